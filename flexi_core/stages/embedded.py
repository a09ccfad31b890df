"""Stage models in the embedded runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..demo.model import SmallModel
from ..networks.fingerprint import architecture_fingerprint, weights_fingerprint
from ..runtime.unet import ResBlock, SpatialTransformer, TimestepEmbedSequential, Upsample
from .network import load_stages, with_decoder


class EmbeddedParts:
    """Makes a decoder of the embedded U-Net's own modules; see `network.Parts`."""

    def __init__(self, arguments: Mapping[str, Any], groups: Callable[[int], int]) -> None:
        self._arguments, self._groups = arguments, groups

    def residual(self, channels: int, out: int) -> nn.Module:
        emb, scale_shift = 4 * self._arguments["model_channels"], self._arguments["use_scale_shift_norm"]
        return ResBlock(channels, emb, out, scale_shift, self._groups)

    def transformer(self, channels: int, heads: int, dim_head: int, depth: int) -> nn.Module:
        context_dim, linear = self._arguments["context_dim"], self._arguments["use_linear_in_transformer"]
        return SpatialTransformer(channels, heads, dim_head, depth, context_dim, linear, self._groups)

    def upsample(self, channels: int) -> nn.Module:
        return Upsample(channels)

    def out(self, channels: int, out: int) -> nn.Module:
        return nn.Sequential(nn.GroupNorm(self._groups(channels), channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))

    def block(self, layers: Sequence[nn.Module]) -> nn.Module:
        return TimestepEmbedSequential(*layers)


class StagedModel(SmallModel):
    """A small model whose decoder is another in each stage of a file.

    Args:
        base: whose encoder it has.
        path: of the stage file.

    Raises:
        FlexiError: the file cannot be read, or is for another base.
    """

    def __init__(self, base: SmallModel, path: Path) -> None:
        super().__init__(base.unet, base.sigmas, base.prediction, base.latent_shape)
        found = load_stages(path)
        found.check_base(architecture_fingerprint(base.unet), weights_fingerprint(base.unet))
        self._base, self.stages = base, found.stages
        self._views = [with_decoder(base.unet, decoder) for decoder in found.decoders(EmbeddedParts)]

    def network(self, sigma: float) -> nn.Module:
        """Return the U-Net of a noise level."""
        return self._views[self.stages.at(sigma)]

    def conditioning(self, prompts: Sequence[Any] | None, count: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the base's."""
        return self._base.conditioning(prompts, count)
