"""What the search needs of the run that it searches for; each back end says where that run takes place."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from flexi_core.run.cost import NetworkCost
from flexi_core.tune import Runs, SampleProgress

from .teacher import TeacherSettings


class Features(Protocol):
    """What Frechet distances are measured on."""

    name: str  # for reports and files: what measured

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """Return features [N, D] of samples [N, ...]."""
        ...


class Backend(Runs, Protocol):
    """One sampling run, all steps full, and everything that candidates are compared by."""

    settings: TeacherSettings
    features: Features
    most_fitted: int | None  # samples that blends are fitted on; None for as many as asked for

    @property
    def spec(self) -> dict[str, Any]:
        """What `open_backend` needs to open the same back end in another process: plain JSON, with "kind"."""
        ...

    @property
    def cost(self) -> NetworkCost:
        """MACs of one row, full and at every partial depth."""
        ...

    def teacher(self, seed: int, count: int, progress: SampleProgress | None = None) -> torch.Tensor:
        """Return the teacher's latents [count, ...], from the store where they are."""
        ...

    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """Return what people look at [N, C, H, W], -1..1; C is 3 where the latents can be decoded."""
        ...

    def caption_accuracy(self, latents: torch.Tensor, seed: int) -> torch.Tensor | None:
        """Return for each sample whether its picture is what its prompt asks [N]; None where nothing here can read that."""
        ...
