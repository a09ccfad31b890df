"""What the search needs of the run that it searches for; each back end says where that run takes place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from flexi_core.cost import NetworkCost
from flexi_core.errors import FlexiError
from flexi_core.fit import Trajectory
from flexi_core.replay import PredictionStore
from flexi_core.sampler import SamplerTraits
from flexi_core.schedule import Schedule

from .fitting import Observe
from .teacher import TeacherSettings

SampleProgress = Callable[[int, int], None]  # the samples' steps done, and those in all


@dataclass(frozen=True)
class Samples:
    """What one schedule made.

    Args:
        latents: [N, ...], as the sampler ends; -1..1 where the model works on pixels.
        seconds: of sampling.
        macs: multiply-accumulates that the network really spent on them; less than the schedule's where predictions were
            taken from a store.
    """

    latents: torch.Tensor
    seconds: float
    macs: float


class Features(Protocol):
    """What Frechet distances are measured on."""

    name: str  # for reports and files: what measured

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """Return features [N, D] of samples [N, ...]."""
        ...


class Backend(Protocol):
    """One sampling run, all steps full, and everything that candidates are compared by.

    Sample `seed + i` has a noise and a prompt of its own, whatever else is sampled beside it.
    """

    settings: TeacherSettings
    features: Features

    @property
    def spec(self) -> dict[str, Any]:
        """What `open_backend` needs to open the same back end in another process: plain JSON, with "kind"."""
        ...

    @property
    def sigmas(self) -> torch.Tensor:
        """The run's noise levels [n + 1]."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the teacher's samples; also the teacher's part of a schedule file."""
        ...

    @property
    def traits(self) -> SamplerTraits:
        """What the run's sampler does."""
        ...

    @property
    def cuts(self) -> tuple[int, ...]:
        """Steps at which one window of the run ends and the next begins; none of a run in one piece."""
        ...

    @property
    def cost(self) -> NetworkCost:
        """MACs of one row, full and at every partial depth."""
        ...

    def sample(
        self,
        schedule: Schedule,
        seed: int,
        count: int,
        *,
        steps: int | None = None,
        progress: SampleProgress | None = None,
        predictions: PredictionStore | None = None,
    ) -> Samples:
        """Sample under a schedule.

        Args:
            schedule: of the run's length.
            seed: of the first sample.
            count: of samples.
            steps: another step count than the teacher's, on the scheduler's own grid.
            progress: called with the samples' steps done and the steps in all.
            predictions: where network evaluations are looked up before they are computed, and kept; of this back end alone.
        """
        ...

    def fit(
        self, schedule: Schedule, seed: int, count: int, predictions: PredictionStore | None = None
    ) -> tuple[Schedule, float]:
        """Return a schedule with blends fitted on samples beside the teacher's trajectories, and the MACs that it took.

        As it is where it extrapolates nothing or the sampler cannot be fitted. The arguments are those of `sample`.
        """
        ...

    def observed(
        self,
        schedule: Schedule,
        seed: int,
        rows: int,
        observe: Observe,
        predictions: PredictionStore | None = None,
    ) -> tuple[torch.Tensor, float]:
        """Return the latents [rows, ...] of one batch under a schedule, and the MACs that it took, followed by an observer.

        Args:
            schedule: of the run's length.
            seed: of the first sample.
            rows: at most as many as one of `batches` has.
            observe: makes what follows the run's steps.
            predictions: as those of `sample`.
        """
        ...

    def keep_trajectory(self, seed: int, rows: int, basis: str, trajectory: Trajectory, response: torch.Tensor) -> None:
        """Keep what the teacher went through in a batch, so that fits on it need not sample it again.

        Args:
            seed, rows: the batch.
            basis: of the trajectory's predictions.
            trajectory: of the teacher.
            response: of its solver in the basis (`flexi_core.fit.linear_response`).
        """
        ...

    def batches(self, seed: int, count: int) -> list[tuple[int, int]]:
        """Return the first seed and the size of every batch that samples are drawn in."""
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


def open_backend(spec: Mapping[str, Any], settings: TeacherSettings) -> Backend:
    """Return the back end of a `Backend.spec`.

    Raises:
        FlexiError: the kind is not known, or the back end refuses its spec.
    """
    kind = spec.get("kind")
    if kind == "embedded":
        from .embedded import EmbeddedBackend

        return EmbeddedBackend(settings)
    if kind == "unet":
        from .unet_file import UNetFileBackend

        return UNetFileBackend.open(spec, settings)
    if kind == "comfyui":
        from .comfyui import ComfyBackend

        return ComfyBackend(**{key: value for key, value in spec.items() if key != "kind"})
    raise FlexiError(f"unknown back end {kind!r}; known: embedded, unet, comfyui")
