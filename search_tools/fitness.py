"""Fitness of a schedule: rFID to the teacher, behind cheap paired screens.

A screen compares a few samples with the teacher's own from the same noise; only a schedule that is not clearly worse than
the best goes on to more, and at last to all samples, whose rFID decides. The best few of a search meet again in finals on
more samples. Lower is better for all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from flexi_core.errors import FlexiError
from flexi_core.metrics import data_range, latent_mse, psnr_db, rfid
from flexi_core.run.replay import PredictionStore
from flexi_core.schedule.schedule import Schedule
from flexi_core.tune import SampleProgress

from .backends.protocol import Backend
from .backends.teacher import SEARCH_SEEDS
from .deadline import Clock

FINAL = 2  # times the samples of the last stage are those of the finals


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a schedule on the search's samples.

    Args:
        rfid: Frechet distance to the teacher's images from the same noise.
        psnr_db: mean over the samples.
        mse: mean paired error, latent units squared.
    """

    rfid: float
    psnr_db: float
    mse: float


class Fitness:
    """Evaluates schedules on fixed samples of the teacher.

    Args:
        backend: samples and features.
        stages: sample counts, each more than the one before: at all but the last a schedule may be dropped.
        progress: called with the teacher's steps done and the steps in all.
        predictions: where candidates find what others before them computed; None computes everything.
        fit: fit the blends of extrapolated steps on the samples of the first stage.
        clock: that the teacher is timed by.

    `macs` is what the network spent so far on candidates.
    """

    def __init__(
        self,
        backend: Backend,
        stages: Sequence[int] = (8, 32),
        progress: SampleProgress | None = None,
        predictions: PredictionStore | None = None,
        fit: bool = True,
        clock: Clock = time.monotonic,
    ) -> None:
        if not stages or stages[0] < 1 or any(b <= a for a, b in pairwise(stages)):
            raise FlexiError(f"the stages of the fitness are {tuple(stages)}; give growing numbers of samples")
        self._backend, self.stages, self._predictions = backend, tuple(stages), predictions
        self.macs = 0.0
        self._fit = fit
        began = clock()
        # By sample count: the same samples beside others differ in their last bits, and a search must repeat bit for bit.
        self._teachers = {self.stages[-1]: backend.teacher(SEARCH_SEEDS, self.stages[-1], progress)}
        self.teacher_seconds = clock() - began
        self._range = data_range(self._teachers[self.stages[-1]])
        self._features: dict[int, torch.Tensor] = {}

    @property
    def sigmas(self) -> list[float]:
        """The teacher's noise levels [n + 1]."""
        return self._backend.identity["sigmas"]

    def fitted(self, schedule: Schedule) -> Schedule:
        """Return a schedule with its blends fitted, where the search fits them."""
        if not self._fit:
            return schedule
        fitted, macs = self._backend.fit(schedule, SEARCH_SEEDS, self.stages[0], self._predictions)
        self.macs += macs
        return fitted

    def sample(self, schedule: Schedule, count: int, latents: torch.Tensor | None = None) -> torch.Tensor:
        """Return the latents [count, ...] of a schedule, from those that an earlier stage made and the rest."""
        have = 0 if latents is None else len(latents)
        made = self._backend.sample(schedule, SEARCH_SEEDS + have, count - have, predictions=self._predictions)
        self.macs += made.macs
        return made.latents if latents is None else torch.cat([latents, made.latents])

    def staged(self, schedule: Schedule) -> Iterator[tuple[torch.Tensor, float]]:
        """Yield the latents of a schedule and their paired error, stage by stage."""
        latents = None
        for count in self.stages:
            latents = self.sample(schedule, count, latents)
            yield latents, self.error(latents)

    def error(self, latents: torch.Tensor) -> float:
        """Return the mean paired error of latents [count, ...] to the teacher's own."""
        return float(latent_mse(latents, self._teacher(len(latents))).mean())

    def psnr_db(self, latents: torch.Tensor) -> float:
        """Return the mean PSNR of latents [count, ...] to the teacher's own: a few samples that are far off count no more."""
        return float(psnr_db(latents, self._teacher(len(latents)), self._range).mean())

    def evaluate(self, latents: torch.Tensor) -> Evaluation:
        """Return the evaluation of latents [count, ...]."""
        count = len(latents)
        if count not in self._features:
            self._features[count] = self._backend.features(self._teacher(count))
        return Evaluation(
            rfid=rfid(self._backend.features(latents), self._features[count]),
            psnr_db=self.psnr_db(latents),
            mse=self.error(latents),
        )

    def final(self, schedule: Schedule, progress: SampleProgress | None = None) -> Evaluation:
        """Return the evaluation of a schedule on twice the samples of the last stage.

        A few dozen samples do not show a failure of one in thirty; a schedule that fails so is found here.
        """
        count = FINAL * self.stages[-1]
        if count not in self._teachers:
            self._teachers[count] = self._backend.teacher(SEARCH_SEEDS, count, progress)
        return self.evaluate(self.sample(schedule, count))

    def _teacher(self, count: int) -> torch.Tensor:
        return self._teachers[min(c for c in self._teachers if c >= count)][:count]


def stages_to(samples: int) -> tuple[int, ...]:
    """Return the stages of a fitness on this many samples: a few first, each stage four times the one before."""
    return (*(count for count in (8, 32, 128, 512) if 2 * count <= samples), samples)
