"""Control nets on partial steps: the blocks alone whose residuals the shallow blocks of the U-Net take in.

A control net has the U-Net's own input blocks; residual i depends on the first i + 1 of them and on nothing deeper. So on a
partial step of depth k its first k blocks give exactly the residuals that the step uses, for the share that they cost.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class ShallowControl:
    """Stands for a control net of the host (and those before it in its chain) on a partial step.

    Args:
        control: the host's; it is not changed, and answers for every other attribute.
        depth: of the partial step.
    """

    def __init__(self, control: Any, depth: int) -> None:
        self._control, self._view = control, _view(control, depth)

    def get_control(self, *args: Any) -> dict[str, list] | None:
        """Return the residuals of the shallow blocks, None in the place of others; `whole()` of them gives all."""
        residuals = self._view.get_control(*args)
        return None if residuals is None else _Residuals(residuals, lambda: self._control.get_control(*args))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._control, name)


class _Residuals(dict):
    """Shallow residuals that can still be made whole, for a step that has to run in full after all."""

    def __init__(self, residuals: dict[str, list], whole: Callable[[], dict[str, list]]) -> None:
        super().__init__(residuals)
        self.whole = whole


def _view(control: Any, depth: int) -> Any:
    view = copy.copy(control)
    if view.previous_controlnet is not None:
        view.previous_controlnet = _view(view.previous_controlnet, depth)
    model = getattr(control, "control_model", None)
    if isinstance(getattr(model, "input_blocks", None), nn.ModuleList) and len(model.input_blocks) > depth:
        view.control_model = _ShallowModel(model, depth)
    return view


class _ShallowModel:
    """A control network that runs its first blocks; the network's own forward does, on a shallow view of it."""

    def __init__(self, model: nn.Module, depth: int) -> None:
        self.dtype, self._skipped = model.dtype, len(model.input_blocks) - depth
        self._view = copy.copy(model)
        self._view._modules = {
            **model._modules,
            "input_blocks": model.input_blocks[:depth],
            "zero_convs": model.zero_convs[:depth],
            "middle_block": _Skipped(),
            "middle_block_out": _Skipped(),
        }

    def __call__(self, **kwargs: Any) -> dict[str, list]:
        residuals = type(self._view).forward(self._view, **kwargs)
        return {"middle": [None], "output": [*residuals["output"], *[None] * self._skipped]}


class _Skipped(nn.Module):
    def forward(self, h: torch.Tensor, *_: Any) -> torch.Tensor:
        return h
