"""The embedded model as one of the host's."""

from __future__ import annotations

from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import torch

from ..demo.captions import embed_captions
from ..demo.model import TOKEN_TABLE, read_weights
from ..demo.model import WEIGHTS as DEMO_WEIGHTS
from ..demo.scenes import parse_caption


class _Pixels(comfy.latent_formats.LatentFormat):
    """Pixels as latents: three channels of the picture's own size, as they are."""

    latent_channels = 3
    spacial_downscale_ratio = 1  # the host's spelling
    latent_rgb_factors = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


class _DemoConfig(comfy.supported_models_base.BASE):
    """The host's description of the embedded model: pixels as latents, eps prediction, no text encoder."""

    unet_config: dict[str, Any] = {}
    unet_extra_config: dict[str, Any] = {}  # the host's own would overwrite num_head_channels
    latent_format = _Pixels
    memory_usage_factor = 1.0
    sampling_settings = {"beta_schedule": "linear", "linear_start": 0.00085, "linear_end": 0.012}


def load_demo_model() -> comfy.model_patcher.ModelPatcher:
    """Return the embedded model as a MODEL of the host: its own UNetModel with the bundled weights.

    Raises:
        FlexiError: the weights file is missing or broken.
    """
    unet_config, weights, _ = read_weights(DEMO_WEIGHTS)
    weights.pop(TOKEN_TABLE)
    layout = {"image_size": 32, "use_spatial_transformer": True, "legacy": False, "use_linear_in_transformer": False}
    config = _DemoConfig({**unet_config, **layout, "num_heads": -1, "dtype": torch.float32})
    model = comfy.model_base.BaseModel(config, comfy.model_base.ModelType.EPS)
    model.diffusion_model.load_state_dict(weights)
    return comfy.model_patcher.ModelPatcher(
        model.eval(),
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def demo_conditioning(caption: str) -> list:
    """Return the CONDITIONING of a caption for the embedded model; the empty caption is the unconditional prompt.

    Raises:
        FlexiError: a word is not known.
    """
    parsed = parse_caption(caption)
    _, weights, _ = read_weights(DEMO_WEIGHTS)
    return [[embed_captions(weights[TOKEN_TABLE], [parsed]), {}]]
