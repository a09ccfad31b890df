"""What is kept of a full run: the Gram matrix of its start and its predictions, (n + 1)^2 numbers a sample.

A solver with one evaluation a step is linear in its start and its predictions, so that every state of every accelerated run
near the teacher's is a combination of these, and how far two states are apart follows from their inner products alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..errors import FlexiError
from ..files import replace_file
from ..metrics import data_range
from ..run.null_steps.extrapolation import PredictionHistory

FORMAT = "flexiffusion-recording-1"
MAX_BYTES = 64 * 2**20  # of a recording's file: 200 samples of 200 steps
_CHUNK = 2**22  # numbers that are multiplied at once, in float64


@dataclass(frozen=True)
class Recording:
    """Full runs of one kind.

    Args:
        gram: mean products over a latent's numbers of [start, prediction 0 .. n - 1], by sample [B, n + 1, n + 1], float64.
        span: width of the scale that each sample's PSNR is stated on [B] (`metrics.data_range`).
        identity: what the runs were: JSON values by name.
    """

    gram: np.ndarray
    span: np.ndarray
    identity: dict[str, Any]

    @property
    def steps(self) -> int:
        return self.gram.shape[1] - 1

    def and_those_of(self, other: Recording) -> Recording:
        """Return the runs of both.

        Raises:
            FlexiError: they are not of one kind.
        """
        if self.identity != other.identity or self.steps != other.steps:
            changed = sorted(k for k in {*self.identity, *other.identity} if self.identity.get(k) != other.identity.get(k))
            raise FlexiError(f"recordings of different runs cannot be put together; they differ in {', '.join(changed)}")
        return Recording(np.concatenate([self.gram, other.gram]), np.concatenate([self.span, other.span]), self.identity)

    def save(self, path: Path) -> None:
        """Write it to a file, whole or not at all."""
        metadata = {"format": FORMAT, "identity": json.dumps(self.identity, sort_keys=True)}
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as temporary:
            temporary.write_bytes(save({"gram": self.gram, "span": self.span}, metadata))

    @staticmethod
    def identity_of(path: Path) -> dict[str, Any]:
        """Return what the runs of a file were.

        Raises:
            FlexiError: it is not a recording.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                identity = json.loads((file.metadata() or {}).get("identity", ""))
        except (OSError, SafetensorError, ValueError) as error:
            raise FlexiError(f"{path} is no recording of full runs: {error}") from error
        if not isinstance(identity, dict):
            raise FlexiError(f"{path} does not say what was recorded")
        return identity

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Read it from a file.

        Raises:
            FlexiError: it is not a recording, or is damaged.
        """
        try:
            if path.stat().st_size > MAX_BYTES:
                raise FlexiError(f"{path} is larger than any recording ({MAX_BYTES >> 20} MiB)")
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                gram, span = file.get_tensor("gram"), file.get_tensor("span")
            identity = json.loads(metadata.get("identity", ""))
        except (OSError, SafetensorError, ValueError) as error:
            raise FlexiError(f"{path} is no recording of full runs: {error}") from error
        shaped = gram.ndim == 3 and gram.shape[1] == gram.shape[2] >= 2 and span.shape == gram.shape[:1] and len(span)
        if metadata.get("format") != FORMAT or not isinstance(identity, dict) or not shaped:
            raise FlexiError(f"{path} is no recording of full runs in the form {FORMAT}")
        if not (np.isfinite(gram).all() and np.isfinite(span).all()):
            raise FlexiError(f"{path} holds numbers that are not finite; record the runs again")
        return cls(gram.astype(np.float64), span.astype(np.float64), identity)


class GramRecorder:
    """Records a full run while it samples; nothing of the run changes.

    While the run goes on its predictions are put aside as they are, which costs a copy; they are multiplied when it has ended.
    """

    def __init__(self) -> None:
        self._vectors: list[torch.Tensor] = []
        self._steps = 0
        self._gram: np.ndarray | None = None

    def see(self, index: int, x: torch.Tensor, prediction: torch.Tensor) -> None:
        """Take note of the prediction [B, ...] of a step that begins in the state x [B, ...]."""
        if index == 0:
            self._vectors, self._gram = [x.detach().flatten(1).clone()], None
        self._steps = index + 1
        self._vectors.append(prediction.detach().flatten(1).clone())

    def blend(self, index: int, history: PredictionHistory) -> None:
        """Return None: a full run extrapolates nothing."""

    def recording(self, end: torch.Tensor, identity: dict[str, Any]) -> Recording:
        """Return what was recorded.

        Args:
            end: clean latents of the run [B, ...], on the scale of its predictions.
            identity: what it was: JSON values by name.

        Raises:
            FlexiError: steps of the run are missing.
        """
        if self._gram is None:
            if len(self._vectors) != self._steps + 1:
                raise FlexiError(
                    f"a full run was to be recorded; of its {self._steps} steps {max(len(self._vectors) - 1, 0)} were seen"
                )
            self._gram, self._vectors = _products(self._vectors), []
        return Recording(self._gram, np.full(len(end), data_range(end)), identity)


def _products(vectors: Sequence[torch.Tensor]) -> np.ndarray:
    """Return the mean products [B, V, V] of V vectors [B, N], piece by piece in float64."""
    rows, width = vectors[0].shape
    products = torch.zeros(rows, len(vectors), len(vectors), dtype=torch.float64)
    piece = max(_CHUNK // len(vectors), 1)
    for at in range(0, width, piece):
        # To the processor first: not every device has numbers of 64 bits.
        part = torch.stack([vector[:, at : at + piece].cpu() for vector in vectors], 1).double()
        products += part @ part.mT
    return (products / width).numpy()
