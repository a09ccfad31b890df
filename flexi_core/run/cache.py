"""The deep features of one run: kept by conditioning, bounded, in the device's memory or in RAM."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from ..networks.graphs import outside_graphs
from .null_steps.extrapolation import lagrange

# What a full pass keeps for partial ones, by name, rows first; None for a stream that ends in the skipped blocks.
Feature = dict[Hashable, "torch.Tensor | None"]

PLACES = ("auto", "gpu", "ram")
_FREE_SHARE = 0.25  # of the device's free memory may a feature take before `auto` keeps it in RAM
_MIB = 2**20


@dataclass(frozen=True)
class CachePolicy:
    """Where deep features are kept, and how much of them.

    Args:
        place: `gpu` (where the network runs), `ram`, or `auto`: where the network runs while that leaves room.
        limit_bytes: what does not fit is not kept, and its partial steps run in full.
        free_bytes: returns the free memory of a device.
    """

    place: str = "auto"
    limit_bytes: float = float("inf")
    free_bytes: Callable[[torch.device], float] = lambda device: float("inf")


@dataclass(frozen=True)
class _Entry:
    segment: int
    depth: int
    place: float
    feature: Feature


class FeatureCache:
    """Deep features by chunk key; see `Run` for what makes a key."""

    def __init__(self, policy: CachePolicy) -> None:
        self.most_bytes = 0  # that were held at one time
        self._policy = policy
        self._entries: dict[Hashable, list[_Entry]] = {}  # the newest last
        self._refused: dict[Hashable, str] = {}  # why a chunk's feature was not kept

    @outside_graphs
    def store(
        self, keys: Sequence[Hashable], feature: Feature, segment: int, depth: int, place: float = 0.0, older: int = 0
    ) -> None:
        """Keep a feature of several chunks of rows in the place of what these chunks had, or beside it.

        Args:
            keys: one for each chunk, in the order of the rows.
            feature: of all rows.
            segment: of the full step that made it.
            depth: of the partial steps that it is for.
            place: of the full step in the run.
            older: how many features of earlier segments stay beside it.
        """
        for key in keys:
            earlier = [e for e in self._entries.pop(key, []) if e.depth == depth and e.segment != segment]
            if earlier and older:
                self._entries[key] = earlier[-older:]
            self._refused.pop(key, None)
        size = sum(value.nbytes for value in feature.values() if value is not None)
        if self.held_bytes + size > self._policy.limit_bytes:
            for key in keys:  # a held feature rather than none
                self._entries.pop(key, None)
        held = self.held_bytes
        if held + size > self._policy.limit_bytes:
            reason = (
                f"the deep feature ({size / _MIB:.0f} MiB beside {held / _MIB:.0f} MiB kept) does not fit into the cache limit "
                f"of {self._policy.limit_bytes / _MIB:.0f} MiB"
            )
            self._refused.update(dict.fromkeys(keys, reason))
            return
        device = next(value.device for value in feature.values() if value is not None)
        if self._policy.place == "ram" or (
            self._policy.place == "auto" and size > _FREE_SHARE * self._policy.free_bytes(device)
        ):
            feature = {name: None if value is None else value.to("cpu") for name, value in feature.items()}
        parts = {name: value.chunk(len(keys)) for name, value in feature.items() if value is not None}
        for i, key in enumerate(keys):
            own = {name: None if value is None else parts[name][i] for name, value in feature.items()}
            self._entries.setdefault(key, []).append(_Entry(segment, depth, place, own))
        self.most_bytes = max(self.most_bytes, self.held_bytes)

    def recall(
        self,
        keys: Sequence[Hashable],
        segment: int,
        depth: int,
        device: torch.device,
        place: float = 0.0,
        order: int = 0,
    ) -> tuple[Feature | None, str]:
        """Return the feature of chunks of rows on a device, or None and why there is none.

        Args:
            keys: of the chunks.
            segment: of the partial step.
            depth: of the partial step.
            device: where it is needed.
            place: of the partial step in the run.
            order: in which the feature is extrapolated to it (TaylorSeer, Liu et al., 2025); with fewer features kept, what
                they allow.
        """
        kept = [self._entries.get(key, []) for key in keys]
        if any(not entries or entries[-1].segment != segment or entries[-1].depth != depth for entries in kept):
            reasons = (self._refused[key] for key in keys if key in self._refused)
            return None, next(reasons, "no deep feature kept for this conditioning, shape and segment")
        # Each chunk by itself: behind steps of the conditional half alone, the halves have features of other steps.
        features = [_forecast(entries[-order - 1 :], place) for entries in kept]
        return {name: _joined([feature[name] for feature in features], device) for name in features[0]}, ""

    def clear(self) -> None:
        """Drop everything."""
        self._entries.clear()
        self._refused.clear()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def held_bytes(self) -> int:
        """What is kept now; chunks of one tensor count once."""
        entries = (entry for of_chunk in self._entries.values() for entry in of_chunk)
        tensors = (value for entry in entries for value in entry.feature.values() if value is not None)
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        return sum(storage.nbytes() for storage in storages.values())


@outside_graphs
def _joined(parts: list[torch.Tensor | None], device: torch.device) -> torch.Tensor | None:
    if parts[0] is None:
        return None
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).to(device)


@outside_graphs
def _forecast(entries: Sequence[_Entry], place: float) -> Feature:
    """Return the feature of one chunk at a place, extrapolated from those kept; the last one where their sizes differ."""
    last = entries[-1].feature
    shapes = [{name: None if part is None else part.shape for name, part in entry.feature.items()} for entry in entries]
    if len(entries) == 1 or any(shape != shapes[-1] for shape in shapes):
        return last
    weights = lagrange([entry.place for entry in entries], place)
    parts = {name: [entry.feature[name] for entry in entries] for name, value in last.items() if value is not None}
    forecast = {name: sum(w * part for w, part in zip(weights, each, strict=True)) for name, each in parts.items()}
    return {name: None if value is None else forecast[name].to(value.dtype) for name, value in last.items()}
