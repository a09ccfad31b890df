"""One sampling run under a plan: born when sampling starts, dropped when it ends.

`predict` stands where the sampler asks for the denoised latent and answers extrapolated steps; `forward` stands where the
network is called and runs full and partial steps. Everything that a run remembers lives in its `Run`.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from .block_lists import find_block_lists
from .cache import CachePolicy, Feature, FeatureCache
from .extrapolation import Observer, PredictionHistory
from .graphs import for_later_calls, outside_graphs
from .guidance import GuidanceHistory
from .plan import Plan
from .replay import Replay
from .schedule import MAX_ORDER, Step, StepKind
from .transformer_steps import ModelCall, TransformerSteps
from .unet_steps import NetworkCall, UNetSteps, block_count

log = logging.getLogger(__name__)

FULL_DEPTH = 0  # in call counts: a call of every block
MOST_TERMS = MAX_ORDER + 1


@dataclass
class StepRecord:
    """What one step of the run really did.

    `calls` counts rows sent through the network by depth (`FULL_DEPTH`: every block); `evaluations` counts the sampler's
    questions, answered by the network or not; `spans` tell the seconds of each computed answer, when they are asked;
    `fallbacks` are the reasons for which a step ran full.
    """

    calls: Counter[int] = field(default_factory=Counter)
    network_calls: int = 0
    evaluations: int = 0
    spans: list[Callable[[], float]] = field(default_factory=list)
    fallbacks: Counter[str] = field(default_factory=Counter)

    @property
    def seconds(self) -> float:
        """Time in the network and the guidance; asked for during a run, it waits for the device."""
        return sum(span() for span in self.spans)


def processor_time() -> Callable[[], float]:
    """Begin a span of time on a device that computes at once; return what ends it and tells its seconds ever after."""
    began, ended = time.perf_counter(), 0.0

    def end() -> float:
        nonlocal ended
        ended = ended or time.perf_counter()
        return ended - began

    return end


class Run:
    """The state of one sampling run.

    Args:
        plan: what each step computes.
        stopwatch: begins a span of time, and returns what ends it when first called and tells its seconds; it must not make
            the processor wait for the device, whose work it runs ahead of.
        policy: where deep features are kept, and how much of them.
        count_options: options for the pass without data in which MACs are counted.
        replay: where predictions are looked up before they are computed.
        observer: follows the run's predictions.
    """

    def __init__(
        self,
        plan: Plan,
        stopwatch: Callable[[], Callable[[], float]] = processor_time,
        policy: CachePolicy | None = None,
        count_options: Mapping[str, Any] | None = None,
        replay: Replay | None = None,
        observer: Observer | None = None,
    ) -> None:
        reuses_guidance = any(step.kind.reuses_guidance for step in plan.steps)
        self._older = max((step.forecast for step in plan.steps), default=0)  # features of earlier segments
        # The guidance, and the features, of a step that was taken from a store are not known.
        self.plan, self._replay = plan, None if reuses_guidance or self._older else replay
        self._guidance = GuidanceHistory() if reuses_guidance else None
        self.records = [StepRecord() for _ in plan.steps]
        self.first_call: tuple[nn.Module, NetworkCall | ModelCall] | None = None  # for counting MACs after the run
        self.cache = FeatureCache(policy or CachePolicy())
        self._stopwatch = stopwatch
        self._count_options = count_options or {}
        self._steps: dict[nn.Module, UNetSteps | TransformerSteps] = {}
        self._extrapolates = any(step.kind is StepKind.EXTRAPOLATED for step in plan.steps)
        self._observer = observer
        self._history = PredictionHistory(MOST_TERMS if observer else plan.terms)
        self._warned: set[str] = set()
        self._evaluation: float | None = None  # the noise level that is being asked for
        self._seen: Counter[Hashable] = Counter()  # chunks of it, by conditioning

    @property
    def network_calls(self) -> int:
        return sum(record.network_calls for record in self.records)

    def partial_depth(self, sigma: float) -> int | None:
        """Return the depth of the partial step at a noise level; None where the step is of another kind."""
        step = self.plan.steps[self.plan.step_index(sigma)]
        return step.depth if step.kind.is_partial else None

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
        place, rule = self.plan.place(sigma), self.plan.rule
        self._history.rewind(place)
        if self.plan.steps[index].kind is StepKind.EXTRAPOLATED:
            if must_compute:
                self._fall_back(index, must_compute)
            elif not self._history.fits(x):
                self._fall_back(index, "no computed step of this shape to extrapolate from")
            else:
                blend = self._observer and self._observer.blend(index, self._history)
                prediction = self._history.extrapolate(place, blend or self.plan.blend(index))
                if self._observer:
                    self._observer.see(index, x, prediction)
                return rule.denoised(x, sigma, prediction)
        # Whoever listens for the unguided prediction must hear it.
        replay = None if must_compute else self._replay
        key, denoised = (None, None) if replay is None else replay.recall(self.plan, index, x, sigma)
        if denoised is None:
            span = self._stopwatch()
            denoised = compute()
            span()
            record.spans.append(span)
            if replay is not None:
                replay.keep(self.plan, index, key, denoised)
        # What a sampler asks between two steps' starts is answered, but not gone on from.
        if place == index and (self._extrapolates or self._observer):
            with for_later_calls():
                prediction = rule.value(x, sigma, denoised)
            self._history.add(place, prediction)
            if self._observer:
                self._observer.see(index, x, prediction)
        return denoised

    def guide(
        self,
        x: torch.Tensor,
        sigma: float,
        halves: Callable[[bool], tuple[torch.Tensor, torch.Tensor]],
        window: tuple[int, ...] = (),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the denoised latents with and without the prompt [B, ...] at a noise level, as the step there asks.

        Args:
            x: noisy latent [B, ...].
            sigma: noise level.
            halves: asks the network, for both halves or for the conditional one alone, whose partner is then not read.
            window: the context window that x is, where the run has several.
        """
        if self._guidance is None:
            return halves(True)
        index = self.plan.step_index(sigma)
        if self.plan.steps[index].kind.reuses_guidance:
            if not (reason := self._guidance.why_not(x, window)):
                conditional, _ = halves(False)
                return conditional, self._guidance.unconditional(sigma, conditional, window)
            self._fall_back(index, f"the guidance cannot be reused: {reason}")
        conditional, unconditional = halves(True)
        with for_later_calls():
            self._guidance.keep(index, sigma, conditional, unconditional, window)
        return conditional, unconditional

    def guides_itself(self, sigma: float, reason: str) -> None:
        """Note that a step at this noise level cannot reuse guidance, where it should."""
        index = self.plan.step_index(sigma)
        if self.plan.steps[index].kind.reuses_guidance:
            self._fall_back(index, f"the guidance cannot be reused: {reason}")

    @outside_graphs
    def forward(
        self, network: nn.Module, call: NetworkCall | ModelCall, sigma: float, forward: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        """Run one call of the network as the step at this noise level asks.

        Args:
            network: the U-Net, or the host's model around a network of another kind.
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
        keys, steps = self._chunk_keys(call), self._steps_of(network)
        if step.kind.is_partial:
            feature, reason = self._recall(steps, keys, step, self.plan.place(sigma), call.x.device)
            prediction = None if feature is None else steps.partial(call, forward, step.depth, feature)
            if prediction is not None:
                record.calls[step.depth] += rows
                return prediction
            self._fall_back(index, reason or "the network ran other blocks, or blocks of another size, than in the full step")
            call = _with_whole_control(call)
        if self.first_call is None:
            shapes = call.shapes()
            self.first_call = network, replace(shapes, options={**shapes.options, **self._count_options})
        record.calls[FULL_DEPTH] += rows
        depth = self.plan.capture_depth(index)
        prediction, feature = steps.full(call, forward, depth)
        if feature is not None and keys:
            self.cache.store(keys, feature, step.segment, depth, self.plan.place(sigma), self._older)
        return prediction

    def release(self) -> None:
        """Drop everything that the run kept of the network's work; its records stay."""
        self.cache.clear()
        self._steps.clear()
        self._history = PredictionHistory(self.plan.terms)
        self._observer = None
        self._guidance = self._guidance and GuidanceHistory()

    def _steps_of(self, network: nn.Module) -> UNetSteps | TransformerSteps:
        if network not in self._steps:
            inner = getattr(network, "diffusion_model", network)
            unet = block_count(network) is not None
            name, lists = type(inner).__name__, find_block_lists(network)
            self._steps[network] = UNetSteps(network) if unet else TransformerSteps(name, lists)
        return self._steps[network]

    def _recall(
        self, steps: UNetSteps | TransformerSteps, keys: list[Hashable], step: Step, place: float, device: torch.device
    ) -> tuple[Feature | None, str]:
        if reason := steps.why_not(step.depth):
            return None, reason
        if not keys:
            return None, "the call does not say which rows belong to which conditioning"
        return self.cache.recall(keys, step.segment, step.depth, device, place, step.forecast)

    def _chunk_keys(self, call: NetworkCall) -> list[Hashable]:
        """Return one cache key for each chunk of rows: whose conditioning it is, its shape, its context window.

        Area prompts give cond and uncond the same uuid, and guidance nodes and tiles ask for one conditioning several times
        in an evaluation; the number of the occurrence in the evaluation tells such chunks apart. It is counted over all
        chunks of a call together, so that a tile of which one half alone runs does not move the other half of the next.
        Empty when the call does not say which rows belong to which conditioning.
        """
        uuids = call.options.get("uuids") or [None]
        slots = call.options.get("cond_or_uncond") or [0] * len(uuids)
        if len(uuids) != len(slots) or call.x.shape[0] % len(uuids):
            return []
        window = call.options.get("context_window")
        frames = tuple(getattr(window, "index_list", ()) or ())
        shape = (call.x.shape[0] // len(uuids), *call.x.shape[1:])
        chunks = [(uuid, slot, shape, frames) for uuid, slot in zip(uuids, slots, strict=True)]
        first = max(self._seen[chunk] for chunk in chunks)
        here: Counter[Hashable] = Counter()
        keys = []
        for chunk in chunks:
            keys.append((*chunk, first + here[chunk]))
            here[chunk] += 1
        for chunk in here:
            self._seen[chunk] = first + max(here.values())
        return keys

    def _begin_evaluation(self, sigma: float) -> None:
        self._evaluation = sigma
        self._seen.clear()

    def _fall_back(self, index: int, reason: str) -> None:
        self.records[index].fallbacks[reason] += 1
        if reason not in self._warned:
            self._warned.add(reason)
            log.warning("Flexiffusion: step %d ran in full: %s", index + 1, reason)


def _with_whole_control(call: NetworkCall | ModelCall) -> NetworkCall | ModelCall:
    """Return a call with the residuals of every block, where the host made those of the shallow ones alone."""
    whole = getattr(call.control, "whole", None)
    return call if whole is None else replace(call, control=whole())
