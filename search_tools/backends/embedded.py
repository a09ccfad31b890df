"""The embedded back end: the search on the project's own small model, with nothing downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flexi_core.demo.classifier import load_classifier
from flexi_core.demo.model import DemoModel
from flexi_core.demo.scenes import Caption, captions_of, random_attributes

from .small_model import SmallModelBackend
from .teacher import TeacherSettings


class ClassifierFeatures:
    """The embedded classifier's penultimate features [N, 64]."""

    name = "embedded scene classifier"

    def __init__(self) -> None:
        self.classifier = load_classifier()

    @torch.inference_mode()
    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        return self.classifier.features(latents)


class EmbeddedBackend(SmallModelBackend):
    """The embedded model; a sample's prompt is a caption, and the classifier reads what was drawn."""

    kind = "embedded"
    features: ClassifierFeatures

    @classmethod
    def open(cls, spec: Mapping[str, Any], settings: TeacherSettings) -> EmbeddedBackend:
        """Return the back end of a `spec`, which says nothing more than its kind."""
        return cls(settings)

    def __init__(self, settings: TeacherSettings, store_folder: Path | None = None) -> None:
        super().__init__(settings, DemoModel.load(), ClassifierFeatures(), store_folder)

    def attributes(self, seed: int, count: int) -> torch.Tensor:
        """Return the caption attributes [count, 5] of samples seed, seed + 1, ..."""
        rows = [random_attributes(1, torch.Generator().manual_seed(seed + i)) for i in range(count)]
        return torch.cat(rows)

    def prompts(self, seed: int, count: int) -> list[Caption]:
        """Return the captions of samples seed, seed + 1, ..."""
        return captions_of(self.attributes(seed, count))

    def caption_accuracy(self, latents: torch.Tensor, seed: int) -> torch.Tensor:
        """Return for each image whether every attribute is read as its caption asks [N]."""
        return (self.features.classifier.predict(latents) == self.attributes(seed, len(latents))).all(dim=1)
