"""The back end of a U-Net in a file: the search on any small model, conditioned on classes or on nothing."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

from flexi_core.errors import FlexiError
from flexi_core.runtime.file_model import FileModel

from ..measures.unet_features import MiddleBlockFeatures
from .small_model import SmallModelBackend
from .teacher import TeacherSettings


class UNetFileBackend(SmallModelBackend):
    """A model from a file; a sample's prompt is a class number.

    Args:
        settings: of the teacher; cfg 1 for a model without conditioning.
        model: from `FileModel.load`.
        store_folder: of the teacher's samples.

    Raises:
        FlexiError: the sampler or scheduler is not known, or guidance is asked of a model without conditioning.
    """

    kind = "unet"
    model: FileModel

    def __init__(self, settings: TeacherSettings, model: FileModel, store_folder: Path | None = None) -> None:
        if not model.classes and settings.cfg != 1:
            raise FlexiError(
                f"{model.path}: a guidance scale of {settings.cfg:g} is asked of a U-Net without conditioning; use 1"
            )
        super().__init__(settings, model, MiddleBlockFeatures(model), store_folder)

    @classmethod
    def open(cls, spec: dict[str, Any], settings: TeacherSettings) -> UNetFileBackend:
        """Return the back end of a `spec`."""
        return cls(settings, FileModel.load(Path(spec["file"]), spec["size"]))

    @property
    def spec(self) -> dict[str, Any]:
        """What opens this back end again."""
        return {"kind": self.kind, "file": str(self.model.path.resolve()), "size": list(self.model.latent_shape[1:])}

    def own_identity(self) -> dict[str, Any]:
        """Return what the file says beside the weights."""
        table = self.model.class_table
        own = {
            "precision": self.model.precision,
            "prediction": self.model.prediction,
            "beta_schedule": self.model.beta_schedule,
            "channels": self.model.latent_shape[0],
            "classes": self.model.classes,
        }
        if table is not None:
            own["class_embedding"] = f"sha256:{hashlib.sha256(table.numpy().tobytes()).hexdigest()[:16]}"
        return own

    def prompts(self, seed: int, count: int) -> list[int] | None:
        """Return the classes of samples seed, seed + 1, ...: spread over all of them, however few samples there are."""
        classes, golden = self.model.classes, (math.sqrt(5) - 1) / 2
        return [int((seed + i) * golden % 1 * classes) for i in range(count)] if classes else None
