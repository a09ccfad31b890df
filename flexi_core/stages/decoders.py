"""Decoders to begin a training with: the base's own, a part of it, or new ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..runtime.unet import UNet
from .network import PartsMaker, make_decoder, skip_channels

_Runs = Sequence[tuple[int, int]]  # of channels along an axis: how many the new tensor has, and how many the base's


def begin_decoder(
    parts_of: PartsMaker, unet: UNet, arguments: Mapping[str, Any], width: int, own_middle: bool, scratch: bool
) -> nn.Module:
    """Return a decoder to train.

    Of the base's width it is a copy of the base's. Of another it has the base's first channels; a wider one's further channels
    are new, with no say in the first ones at the beginning (their weights there are zero). From scratch it is new, with an
    output layer of zeros as the layout's.

    Args:
        parts_of: the runtime's.
        unet: the base.
        arguments: of the base's U-Net (`unet_arguments`).
        width: of the decoder.
        own_middle: whether it has a middle block.
        scratch: whether a decoder of another width than the base's is new.
    """
    made, own = make_decoder(parts_of, arguments, width, own_middle), nn.Module()
    for name in made._modules:
        setattr(own, name, copy.deepcopy(getattr(unet, name)))
    if width == arguments["model_channels"]:
        return own
    for value in made.out[2].parameters():
        nn.init.zeros_(value)
    if not scratch:
        _take(made, own, arguments)
    return made


@torch.no_grad()
def _take(made: nn.Module, base: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Put the first channels of the base's decoder into one of another width."""
    had = base.state_dict()
    for name, value in made.state_dict().items():
        if (old := had.get(name)) is None or old.ndim != value.ndim:
            continue
        runs = [[(new, before)] for new, before in zip(value.shape, old.shape, strict=True)]
        _split(runs, name, arguments)
        if value.ndim > 1:
            _silence(value, runs)
        _copy(value, old, runs)


def _split(runs: list[_Runs], name: str, arguments: Mapping[str, Any]) -> None:
    """Divide the axes of a tensor where two kinds of channels lie behind each other."""
    paired = (".emb_layers." in name and arguments["use_scale_shift_norm"]) or ".ff.net.0.proj." in name
    if paired:  # scale and shift; value and gate
        new, before = runs[0][0]
        runs[0] = [(new // 2, before // 2)] * 2
    block, layer, *rest = name.removeprefix("output_blocks.").split(".")
    if name.startswith("output_blocks.") and layer == "0" and rest[0] in ("in_layers", "skip_connection"):
        axis = 0 if rest[:2] == ["in_layers", "0"] else 1
        if axis < len(runs):
            new, before = runs[axis][0]
            skip = skip_channels(arguments)[-1 - int(block)]
            runs[axis] = [(new - skip, before - skip), (skip, skip)]


def _silence(value: torch.Tensor, runs: Sequence[_Runs]) -> None:
    """Take away what new input channels say in output channels that the base has."""
    at = 0
    for new, before in runs[0]:
        rows, start = value[at : at + min(new, before)], 0
        for more, had in runs[1]:
            rows[:, start + min(more, had) : start + more] = 0
            start += more
        at += new


def _copy(value: torch.Tensor, old: torch.Tensor, runs: Sequence[_Runs]) -> None:
    def places(axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        to, of, new_at, old_at = [], [], 0, 0
        for new, before in runs[axis]:
            both = torch.arange(min(new, before))
            to.append(both + new_at)
            of.append(both + old_at)
            new_at, old_at = new_at + new, old_at + before
        return torch.cat(to), torch.cat(of)

    to, of = zip(*(places(axis) for axis in range(min(value.ndim, 2))), strict=True)
    if value.ndim == 1:
        value[to[0]] = old[of[0]]
    else:
        value[to[0][:, None], to[1]] = old[of[0][:, None], of[1]]
