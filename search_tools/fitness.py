"""Fitness of a schedule: rFID to the teacher, behind cheap paired screens.

A screen compares a few samples with the teacher's own from the same noise; only a schedule that is not clearly worse than
the best goes on to more, and at last to all samples, whose rFID decides. Lower is better for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from flexi_core.errors import FlexiError
from flexi_core.metrics import data_range, latent_mse, psnr_db, rfid
from flexi_core.replay import PredictionStore
from flexi_core.schedule import Schedule

from .backend import Backend, SampleProgress
from .teacher import SEARCH_SEEDS


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

    `macs` is what the network spent so far on candidates.
    """

    def __init__(
        self,
        backend: Backend,
        stages: Sequence[int] = (8, 32),
        progress: SampleProgress | None = None,
        predictions: PredictionStore | None = None,
    ) -> None:
        if not stages or stages[0] < 1 or any(b <= a for a, b in pairwise(stages)):
            raise FlexiError(f"the stages of the fitness are {tuple(stages)}; give growing numbers of samples")
        self._backend, self.stages, self._predictions = backend, tuple(stages), predictions
        self.macs = 0.0
        self._teacher = backend.teacher(SEARCH_SEEDS, self.stages[-1], progress)
        self._features = backend.features(self._teacher)
        self._range = data_range(self._teacher)

    def sample(self, schedule: Schedule, count: int, latents: torch.Tensor | None = None) -> torch.Tensor:
        """Return the latents [count, ...] of a schedule, from those that an earlier stage made and the rest."""
        have = 0 if latents is None else len(latents)
        made = self._backend.sample(schedule, SEARCH_SEEDS + have, count - have, predictions=self._predictions)
        self.macs += made.macs
        return made.latents if latents is None else torch.cat([latents, made.latents])

    def error(self, latents: torch.Tensor) -> float:
        """Return the mean paired error of latents [count, ...] to the teacher's own."""
        return float(latent_mse(latents, self._teacher[: len(latents)]).mean())

    def evaluate(self, latents: torch.Tensor) -> Evaluation:
        """Return the evaluation of the latents of all samples."""
        return Evaluation(
            rfid=rfid(self._backend.features(latents), self._features),
            psnr_db=float(psnr_db(latents, self._teacher, self._range).mean()),
            mse=self.error(latents),
        )


def stages_to(samples: int) -> tuple[int, ...]:
    """Return the stages of a fitness on this many samples: a few first, each stage four times the one before."""
    return (*(count for count in (8, 32, 128, 512) if 2 * count <= samples), samples)
