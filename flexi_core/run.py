"""One sampling run under a plan: born when sampling starts, dropped when it ends.

`predict` stands where the sampler asks for the denoised latent and answers extrapolated steps; `forward` stands where the
network is called and runs full and partial steps. Everything that a run remembers lives in its `Run`.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import nn

from .extrapolation import DerivativeHistory
from .plan import Plan
from .schedule import StepKind
from .unet_steps import NetworkCall, block_count, full_pass, partial_pass

log = logging.getLogger(__name__)

FULL_DEPTH = 0  # in call counts: a call of every block


@dataclass
class StepRecord:
    """What one step of the run really did.

    `calls` counts rows sent through the network by depth (`FULL_DEPTH`: every block); `evaluations` counts the sampler's
    questions, answered by the network or not; `fallbacks` are the reasons for which a step ran full.
    """

    calls: Counter[int] = field(default_factory=Counter)
    network_calls: int = 0
    evaluations: int = 0
    seconds: float = 0.0
    fallbacks: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _CacheEntry:
    segment: int
    depth: int
    feature: torch.Tensor  # [B, ...]


class Run:
    """The state of one sampling run.

    Args:
        plan: what each step computes.
        synchronize: waits for the device before a clock is read; None on a CPU.
    """

    def __init__(self, plan: Plan, synchronize: Callable[[], None] | None = None) -> None:
        self.plan = plan
        self.records = [StepRecord() for _ in plan.steps]
        self.first_call: tuple[nn.Module, NetworkCall] | None = None  # for counting MACs after the run
        self.cache_bytes = 0  # the most that was held
        self._synchronize = synchronize or (lambda: None)
        self._cache: dict[Hashable, _CacheEntry] = {}
        self._extrapolates = any(step.kind is StepKind.EXTRAPOLATED for step in plan.steps)
        self._history = DerivativeHistory(plan.order)
        self._warned: set[str] = set()
        self._evaluation: float | None = None  # the noise level that is being asked for
        self._seen: Counter[Hashable] = Counter()  # chunks of it, by conditioning

    @property
    def network_calls(self) -> int:
        return sum(record.network_calls for record in self.records)

    def predict(
        self, x: torch.Tensor, sigma: float, compute: Callable[[], torch.Tensor], must_compute: str = ""
    ) -> torch.Tensor:
        """Return the denoised latent at a noise level, extrapolated where the plan says so.

        Args:
            x: noisy latent [B, C, H, W]; it is not written to.
            sigma: noise level, the same for every row.
            compute: asks the network.
            must_compute: a reason for which this evaluation may not be extrapolated.
        """
        index = self.plan.step_index(sigma)
        record = self.records[index]
        record.evaluations += 1
        self._begin_evaluation(sigma)
        place = self.plan.place(sigma)
        if self.plan.steps[index].kind is StepKind.EXTRAPOLATED:
            if must_compute:
                self._fall_back(index, must_compute)
            elif not self._history.fits(x):
                self._fall_back(index, "no computed step of this shape to extrapolate from")
            else:
                return x - sigma * self._history.extrapolate(place)
        self._synchronize()
        began = time.perf_counter()
        denoised = compute()
        self._synchronize()
        record.seconds += time.perf_counter() - began
        if self._extrapolates:
            self._history.add(place, (x - denoised) / sigma)
        return denoised

    def forward(
        self, network: nn.Module, call: NetworkCall, sigma: float, forward: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        """Run one call of the network as the step at this noise level asks.

        Args:
            network: the diffusion network.
            call: its arguments; `call.options` carries "uuids" and "cond_or_uncond", one entry for each chunk of rows.
            sigma: noise level.
            forward: the network's own forward, or the rest of the host's wrapper chain.
        """
        index = self.plan.step_index(sigma)
        step, record = self.plan.steps[index], self.records[index]
        record.network_calls += 1
        rows = call.x.shape[0]
        if sigma != self._evaluation:
            self._begin_evaluation(sigma)
        keys = self._chunk_keys(call)
        if step.kind is StepKind.PARTIAL:
            feature, reason = self._recall(network, keys, step.segment, step.depth)
            if feature is not None:
                record.calls[step.depth] += rows
                return partial_pass(network, call, step.depth, feature)
            self._fall_back(index, reason)
        if self.first_call is None:
            self.first_call = network, call.shapes()
        record.calls[FULL_DEPTH] += rows
        blocks, depth = block_count(network), self.plan.capture_depth(index)
        if depth is None or blocks is None or depth >= blocks:
            return call.run(forward)
        prediction, feature = full_pass(network, call, forward, depth)
        if feature is not None and keys:
            self._store(keys, feature, step.segment, depth)
        return prediction

    def release(self) -> None:
        """Drop everything that the run kept of the network's work; its records stay."""
        self._cache.clear()
        self._history = DerivativeHistory(self.plan.order)

    def _store(self, keys: list[Hashable], feature: torch.Tensor, segment: int, depth: int) -> None:
        for key, part in zip(keys, feature.chunk(len(keys)), strict=True):
            self._cache[key] = _CacheEntry(segment, depth, part)
        held = {entry.feature.untyped_storage().data_ptr(): entry.feature.untyped_storage() for entry in self._cache.values()}
        self.cache_bytes = max(self.cache_bytes, sum(storage.nbytes() for storage in held.values()))

    def _recall(self, network: nn.Module, keys: list[Hashable], segment: int, depth: int) -> tuple[torch.Tensor | None, str]:
        blocks = block_count(network)
        if blocks is None:
            return None, f"{type(network).__name__} has no U-Net blocks to run partially"
        if depth >= blocks:
            return None, f"depth {depth} needs more than the network's {blocks} blocks"
        if not keys:
            return None, "the call does not say which rows belong to which conditioning"
        entries = [self._cache.get(key) for key in keys]
        if any(entry is None or entry.segment != segment or entry.depth != depth for entry in entries):
            return None, "no deep feature kept for this conditioning, shape and segment"
        return torch.cat([entry.feature for entry in entries]) if len(entries) > 1 else entries[0].feature, ""

    def _chunk_keys(self, call: NetworkCall) -> list[Hashable]:
        """Return one cache key for each chunk of rows: whose conditioning it is, its shape, its context window.

        Area prompts give cond and uncond the same uuid, and guidance nodes and tiles ask for one conditioning several times
        in an evaluation; the number of the occurrence in the evaluation tells such chunks apart. Empty when the call does
        not say which rows belong to which conditioning.
        """
        uuids = call.options.get("uuids") or [None]
        slots = call.options.get("cond_or_uncond") or [0] * len(uuids)
        if len(uuids) != len(slots) or call.x.shape[0] % len(uuids):
            return []
        window = call.options.get("context_window")
        frames = tuple(getattr(window, "index_list", ()) or ())
        shape = (call.x.shape[0] // len(uuids), *call.x.shape[1:])
        keys = []
        for uuid, slot in zip(uuids, slots, strict=True):
            chunk = (uuid, slot, shape, frames)
            keys.append((*chunk, self._seen[chunk]))
            self._seen[chunk] += 1
        return keys

    def _begin_evaluation(self, sigma: float) -> None:
        self._evaluation = sigma
        self._seen.clear()

    def _fall_back(self, index: int, reason: str) -> None:
        self.records[index].fallbacks[reason] += 1
        if reason not in self._warned:
            self._warned.add(reason)
            log.warning("Flexiffusion: step %d ran in full: %s", index + 1, reason)
