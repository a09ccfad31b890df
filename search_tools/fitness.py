"""Fitness of a schedule: rFID to the teacher, behind a cheap paired screen.

The screen compares a few samples with the teacher's own from the same noise; only a schedule that is not clearly worse than
the best goes on to all samples, whose rFID decides. Lower is better for both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flexi_core.errors import FlexiError
from flexi_core.metrics import latent_mse, psnr_db, rfid
from flexi_core.schedule import Schedule

from .embedded import EmbeddedBackend
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
        screen_samples: first stage.
        samples: in all.
    """

    def __init__(self, backend: EmbeddedBackend, screen_samples: int = 8, samples: int = 32, progress=None) -> None:
        if samples <= screen_samples:
            raise FlexiError(f"{samples} samples, of which {screen_samples} screen; ask for more than those")
        self._backend, self.screen_samples, self.samples = backend, screen_samples, samples
        self._teacher = backend.teacher(SEARCH_SEEDS, samples, progress)
        self._features = backend.features(self._teacher)

    def screen(self, schedule: Schedule) -> tuple[float, torch.Tensor]:
        """Return the paired error of the first samples, and their images [screen_samples, ...]."""
        images = self._backend.sample(schedule, SEARCH_SEEDS, self.screen_samples).images
        return float(latent_mse(images, self._teacher[: self.screen_samples]).mean()), images

    def finish(self, schedule: Schedule, screened: torch.Tensor) -> Evaluation:
        """Return the evaluation on all samples, from the screened images and the rest."""
        first = len(screened)
        rest = self._backend.sample(schedule, SEARCH_SEEDS + first, self.samples - first).images
        images = torch.cat([screened, rest])
        return Evaluation(
            rfid=rfid(self._backend.features(images), self._features),
            psnr_db=float(psnr_db(images, self._teacher).mean()),
            mse=float(latent_mse(images, self._teacher).mean()),
        )
