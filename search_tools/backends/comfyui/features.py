"""What Frechet distances are measured on in the host: the teacher's own network, CLIP vision, or the latents themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import comfy.clip_vision
import comfy.sample
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from flexi_core.errors import FlexiError
from flexi_core.networks.transformer import ModelCall, streams_of, watched
from flexi_core.networks.unet import block_count

from ..protocol import Features

_ROWS = 8  # latents at once
_POOLED = 8  # places along each side
# Where a run of 1000 timesteps has 100 left: noise enough for a network that expects some, little enough to see the picture.
_READ_AT = 0.9
# A conditioning is read for the whole picture, at any noise level, without what hangs on it.
_LEFT_OUT = ("control", "area", "mask", "strength", "start_percent", "end_percent", "hooks", "model_conds", "uuid")


class NetworkFeatures:
    """The middle block of the network that samples, averaged over places [N, D].

    Args:
        model: the run's.
        conditioning: CONDITIONING under which latents are read; the empty or negative one of the run.
    """

    name = "the teacher network's middle block"

    def __init__(self, model: ModelPatcher, conditioning: Sequence) -> None:
        self._model = model
        self._conditioning = [
            [tokens, {key: value for key, value in others.items() if key not in _LEFT_OUT}] for tokens, others in conditioning
        ]

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.read(rows) for rows in latents.split(_ROWS)])

    @torch.inference_mode()
    def read(self, latents: torch.Tensor) -> torch.Tensor | None:
        """Return the features of a few latents [N, D]; None where the network shows no block."""
        seen: list[torch.Tensor] = []
        model = self._watched(seen, len(latents))
        sigma = float(model.get_model_object("model_sampling").percent_to_sigma(_READ_AT))
        noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(0)).expand_as(latents)
        comfy.sample.sample_custom(
            model,
            noise,
            1.0,
            comfy.samplers.KSAMPLER(_ask_once),
            torch.tensor([sigma, 0.0]),
            self._conditioning,
            self._conditioning,
            latents,
            disable_pbar=True,
            seed=0,
        )
        return seen[len(seen) // 2].cpu() if seen else None

    def _watched(self, seen: list[torch.Tensor], rows: int) -> ModelPatcher:
        """Return a clone of the model that adds what its middle, or each of its transformer's blocks, makes [rows, D]."""
        model = self._model.clone()
        if block_count(model.get_model_object("diffusion_model")) is not None:

            def patch(h: torch.Tensor, skip: torch.Tensor, options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
                if options.get("block") == ("output", 0):
                    seen.append(h[:rows].float().flatten(2).mean(dim=2))
                return h, skip

            model.set_model_output_block_patch(patch)
            return model

        def visit(key: tuple[str, int], args: dict[str, Any], original: Callable[[dict[str, Any]], Any]) -> Any:
            out = original(args)
            streams = streams_of(out, args)
            tokens = next((streams[name] for name in ("img", ("img", 0), "x", ("x", 0)) if name in streams), None)
            if tokens is not None and len(tokens) >= rows:
                seen.append(tokens[:rows].float().flatten(1, -2).mean(dim=1))
            return out

        def apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
            options = {} if transformer_options is None else transformer_options
            return watched(ModelCall(x, t, c_concat, c_crossattn, control, options, kwargs), visit).run(executor)

        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "flexiffusion features", apply_model)
        return model


class PooledLatents:
    """The latents averaged to 8x8 places [N, C * 64]: for networks that show nothing of themselves."""

    name = f"latents, averaged to {_POOLED}x{_POOLED}"

    def __init__(self, planes: Callable[[torch.Tensor], torch.Tensor] = lambda latents: latents) -> None:
        self._planes = planes  # of latents

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        latents = self._planes(latents)
        planes = latents.flatten(1, -3) if latents.ndim > 3 else latents[:, None]
        return torch.nn.functional.adaptive_avg_pool2d(planes.float(), _POOLED).flatten(1)


class ClipVisionFeatures:
    """The host's CLIP vision on decoded pictures [N, D].

    Args:
        path: of the model file.
        pictures: decodes latents to [N, 3, H, W], -1..1.

    Raises:
        FlexiError: the file is no CLIP vision model.
    """

    def __init__(self, path: str, name: str, pictures: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.name, self._pictures = f"CLIP vision ({name})", pictures
        self._clip = comfy.clip_vision.load(path)
        if self._clip is None:
            raise FlexiError(f"{path}: not a CLIP vision model that this ComfyUI knows; give another --clip-vision")

    @torch.inference_mode()
    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        read = []
        for rows in latents.split(_ROWS):
            pictures = self._pictures(rows)
            if pictures.shape[1] != 3:
                raise FlexiError("CLIP vision reads pictures, and the workflow decodes none; add a VAEDecode node to it")
            images = ((pictures + 1) / 2).clamp(0, 1).movedim(1, -1)
            read.append(self._clip.encode_image(images)["image_embeds"].float().cpu())
        return torch.cat(read)


def features_of(model: ModelPatcher, conditioning: Sequence, latents: torch.Tensor) -> Features:
    """Return the features that a network offers, tried on a few latents of its own."""
    network = NetworkFeatures(model, conditioning)
    return PooledLatents() if network.read(latents) is None else network


def _ask_once(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Stand for a sampler: ask the network once, and leave the latent."""
    model(x, sigmas[:1].expand(len(x)), **(extra_args or {}))
    return x
