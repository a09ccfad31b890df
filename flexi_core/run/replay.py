"""Network evaluations kept by what went in: what was once computed is not computed again.

A prediction is a function of the noisy latent and the noise level, and, on a partial step, of the full step whose deep
feature it uses. So it is kept under a digest of exactly that: candidates that agree with an evaluated one up to some step
find every prediction up to there, with any sampler, and none that differs in a bit.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable

import torch

from ..errors import FlexiError
from .plan import Plan


class ReplayMiss(FlexiError):
    """A partial step needs the deep feature of a full step that was taken from the store; sample again without one."""


class PredictionStore:
    """Predictions in memory, the least recently used given up first.

    Args:
        limit_bytes: most memory for them.
    """

    def __init__(self, limit_bytes: float = 2**30) -> None:
        self.limit_bytes, self.bytes = limit_bytes, 0
        self.asked = self.found = 0
        self._kept: OrderedDict[Hashable, torch.Tensor] = OrderedDict()
        self._partials: dict[Hashable, dict[Hashable, Hashable]] = {}  # under a full step's key: its partial steps' keys

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def get(self, key: Hashable, device: torch.device) -> torch.Tensor | None:
        """Return what was kept under a key, on a device; None where nothing is."""
        self.asked += 1
        kept = self._kept.get(key)
        if kept is None:
            return None
        self.found += 1
        self._kept.move_to_end(key)
        return kept.to(device)

    def put(self, key: Hashable, prediction: torch.Tensor) -> None:
        """Keep a prediction [B, ...], in the computer's own memory; one larger than the limit is not kept."""
        if key in self._kept or prediction.nbytes > self.limit_bytes:
            return
        self._kept[key] = prediction.detach().to("cpu", copy=True)
        self.bytes += prediction.nbytes
        while self.bytes > self.limit_bytes:
            key, oldest = self._kept.popitem(last=False)
            self._partials.pop(key, None)
            self.bytes -= oldest.nbytes

    def link(self, full: Hashable, step: Hashable, partial: Hashable) -> None:
        """Remember that a partial step's prediction was made with the deep feature of a full evaluation."""
        if full in self._kept:
            self._partials.setdefault(full, {})[step] = partial

    def has_partials(self, full: Hashable, steps: list[Hashable]) -> bool:
        """Return whether the predictions of all these partial steps of a full evaluation are kept."""
        known = self._partials.get(full, {})
        return all(known.get(step) in self._kept for step in steps)


class Replay:
    """One run's view of a store.

    A full step is taken from the store only together with all the partial steps that live off it, whose deep feature would
    be missing otherwise.

    Args:
        store: shared by many runs.
        scope: everything beside the noisy latent that a prediction depends on: the model, the prompts, guidance, and the
            noise levels of the run.
    """

    def __init__(self, store: PredictionStore, scope: Hashable) -> None:
        self._store, self._scope = store, scope
        self._full: Hashable = None  # key of the last full evaluation
        self._full_was_recalled = False

    def recall(self, plan: Plan, index: int, x: torch.Tensor, sigma: float) -> tuple[Hashable, torch.Tensor | None]:
        """Return the key of an evaluation, and its prediction where it is kept.

        Args:
            plan: of the run.
            index: of the step, full or partial.
            x: noisy latent [B, ...].
            sigma: noise level.

        Raises:
            ReplayMiss: the step is partial, is not kept, and its full step was not computed in this run.
        """
        step = plan.steps[index]
        key = (self._scope, digest(x), sigma)
        if step.kind.is_partial:
            key = (*key, step.depth, self._full)
            kept = self._store.get(key, x.device)
            if kept is None and self._full_was_recalled:
                raise ReplayMiss(f"step {index + 1} is not in the store of predictions, but the full step before it was")
            return key, kept
        others = [i for i, s in enumerate(plan.steps) if s.segment == step.segment and s.kind.is_partial]
        complete = self._store.has_partials(key, [(i, plan.steps[i].depth) for i in others])
        kept = self._store.get(key, x.device) if complete else None
        self._full, self._full_was_recalled = key, kept is not None
        return key, kept

    def keep(self, plan: Plan, index: int, key: Hashable, prediction: torch.Tensor) -> None:
        """Keep a prediction that was computed, under the key that `recall` gave."""
        self._store.put(key, prediction)
        step = plan.steps[index]
        if step.kind.is_partial:
            self._store.link(self._full, (index, step.depth), key)


def digest(x: torch.Tensor) -> str:
    """Return a digest of a tensor's values, shape and type."""
    values = x.detach().to("cpu").contiguous()
    raw = values.view(torch.uint8) if values.dim() else values.reshape(1).view(torch.uint8)
    return hashlib.blake2b(f"{tuple(x.shape)}{x.dtype}".encode() + raw.numpy().tobytes(), digest_size=16).hexdigest()
