"""Everything that is measured of a schedule's pictures, each figure with its samples and a 95 % bootstrap interval."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from flexi_core.errors import FlexiError
from flexi_core.metrics import (
    Manifold,
    bootstrap_interval,
    bootstrap_statistic,
    data_range,
    frechet_distance,
    frechet_interval,
    inception_score,
    psnr_db,
    rfid,
    ssim,
)

from ..backends.protocol import Backend, Features
from .features import Lpips, class_probabilities
from .references import SCENES, features_of, folder_images, scenes

_SCENES = 5000
_MANIFOLD = 4  # the fewest samples that a manifold of k = 3 can be made of


@dataclass(frozen=True)
class Measure:
    """One figure.

    Args:
        value: of all samples; inf for the PSNR of equal pictures.
        low, high: its 95 % bootstrap interval over the samples.
        samples: how many.
        by: what measured, and against what.
    """

    value: float
    low: float
    high: float
    samples: int
    by: str

    def as_dict(self) -> dict:
        """Return plain values, what is not finite as None."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


class Measures:
    """All metrics, against the teacher's samples and, where there are any, given images.

    Args:
        backend: whose samples are measured.
        teacher: its latents [N, ...], all steps full.
        features: what sets are compared on; the back end's own by default.
        images: a folder of pictures, or "scenes": fresh ones of the embedded model's kind.
        lpips_weights: of AlexNet.

    Raises:
        FlexiError: the images cannot be read, or these features cannot read pictures.
    """

    def __init__(
        self,
        backend: Backend,
        teacher: torch.Tensor,
        *,
        features: Features | None = None,
        images: str | None = None,
        lpips_weights: Path | None = None,
    ) -> None:
        self._backend, self._features = backend, features or backend.features
        self._teacher_pictures = backend.pictures(teacher)
        self._teacher_features = self._features(teacher)
        self._range = data_range(self._teacher_pictures)
        self.not_measured: dict[str, str] = {}
        self._lpips = self._open_lpips(lpips_weights)
        self._reference = None
        if images is None:
            self.not_measured["fid"] = "no images to compare with; give --images"
        else:
            self._reference = self._reference_features(images, teacher)
            self._images = "fresh scenes" if images == SCENES else "given images"

    def __call__(self, latents: torch.Tensor, seed: int) -> dict[str, Measure]:
        """Return the measures of samples seed, seed + 1, ... [N, ...], as many as the teacher's, by name."""
        pictures, features = self._backend.pictures(latents), self._features(latents)
        count, by = len(latents), self._features.name
        psnr = psnr_db(pictures, self._teacher_pictures, self._range)
        found = {
            "psnr_db": _mean(psnr, "pairs with the teacher"),
            "ssim": _mean(ssim(pictures, self._teacher_pictures, self._range), "pairs with the teacher"),
        }
        if self._lpips is not None:
            found["lpips"] = _mean(self._lpips(pictures, self._teacher_pictures), "AlexNet; pairs with the teacher")
        paired = frechet_interval(features, self._teacher_features, paired=True)
        value = rfid(features, self._teacher_features)
        found["rfid"] = Measure(value, *paired, count, f"{by}; the teacher's samples from the same noise")
        against, other = "the teacher's samples", self._teacher_features
        if self._reference is not None:
            against, other = f"{len(self._reference)} {self._images}", self._reference
            value, held = frechet_distance(features, other), frechet_interval(features, other, paired=False)
            found["fid"] = Measure(value, *held, count, f"{by}; {against}")
        if min(count, len(other)) >= _MANIFOLD:
            found["precision"] = _mean(self._manifold.holds(features), f"{by}; {against}")
            found["recall"] = _mean(Manifold(features).holds(other), f"{by}; {against}")
        else:
            self.not_measured["precision, recall"] = f"{count} samples; they need at least {_MANIFOLD}"
        probabilities = class_probabilities(self._features, latents)
        if probabilities is None:
            self.not_measured["inception_score"] = f"{by} has no classes"
        else:
            found["inception_score"] = _inception_measure(probabilities, by)
        read = self._backend.caption_accuracy(latents, seed)
        if read is None:
            self.not_measured["caption_accuracy"] = "nothing here can read what a prompt asks for"
        else:
            found["caption_accuracy"] = _mean(read, self._backend.features.name)
        return found

    @cached_property
    def _manifold(self) -> Manifold:
        return Manifold(self._teacher_features if self._reference is None else self._reference)

    def _open_lpips(self, weights: Path | None) -> Callable | None:
        if weights is None:
            self.not_measured["lpips"] = "no weights; give --lpips-weights"
            return None
        try:
            network = Lpips(weights)
            network(self._teacher_pictures[:1], self._teacher_pictures[:1])
        except FlexiError as error:
            self.not_measured["lpips"] = str(error)
            return None
        return network

    def _reference_features(self, images: str, teacher: torch.Tensor) -> torch.Tensor:
        height, width = self._teacher_pictures.shape[-2:]
        pictures = scenes(_SCENES) if images == SCENES else folder_images(Path(images), height, width)
        if images == SCENES and self._teacher_pictures.shape[1:] != pictures.shape[1:]:
            raise FlexiError(f"scenes are {tuple(pictures.shape[1:])}, the samples {tuple(self._teacher_pictures.shape[1:])}")
        if hasattr(self._features, "of_pictures"):
            return features_of(self._features.of_pictures, pictures)
        if teacher.shape[1:] == self._teacher_pictures.shape[1:] == pictures.shape[1:]:  # the model works on pixels
            return features_of(self._features, pictures)
        raise FlexiError(
            f"{self._features.name} reads latents of shape {tuple(teacher.shape[1:])}, not pictures; give --inception-weights "
            "to compare with images"
        )


def _mean(values: torch.Tensor, by: str) -> Measure:
    values = values.double()
    interval = bootstrap_interval(values) if torch.isfinite(values).all() else (math.inf, math.inf)
    return Measure(float(values.mean()), *interval, len(values), by)


def _inception_measure(probabilities: list[torch.Tensor], by: str) -> Measure:
    """Return the inception score; of a network with several sets of classes, the geometric mean of the scores on each."""

    def score(picks: np.ndarray) -> float:
        return float(np.exp(np.mean([np.log(inception_score(p[picks])) for p in probabilities])))

    count = len(probabilities[0])
    interval = bootstrap_statistic(score, count, centred=True)
    return Measure(score(np.arange(count)), *(max(end, 1.0) for end in interval), count, by)
