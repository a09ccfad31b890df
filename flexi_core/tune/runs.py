"""What tuning needs of a run: to sample it under schedules, and to look on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..run.replay import PredictionStore
from ..run.sampler import SamplerTraits, Solver
from ..schedule.schedule import Schedule
from .blends import Observe
from .fit import Trajectory

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


class Runs(Protocol):
    """One sampling run, all steps full, and what it becomes under schedules.

    Sample `seed + i` has a noise and a prompt of its own, whatever else is sampled beside it.
    """

    @property
    def sampler(self) -> str:
        """The sampler's name."""
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
    def solver(self) -> Solver:
        """The run's sampler, for any denoiser."""
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
    def starts(self) -> tuple[int, ...]:
        """Steps at which another network of the run begins; none where one network runs all of it."""
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
            response: of its solver in the basis (`flexi_core.tune.fit.linear_response`).
        """
        ...

    def batches(self, seed: int, count: int) -> list[tuple[int, int]]:
        """Return the first seed and the size of every batch that samples are drawn in."""
        ...
