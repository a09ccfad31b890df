"""One sampling run under a plan: born when sampling starts, dropped when it ends.

`predict` stands where the sampler asks for the denoised latent and answers extrapolated steps; `forward` stands where the
network is called and runs full and partial steps. Everything that a run remembers lives in its `Run`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..networks.block_lists import find_block_lists
from ..networks.graphs import for_later_calls, outside_graphs
from ..networks.transformer import ModelCall, TransformerSteps
from ..networks.unet import NetworkCall, UNetSteps, block_count
from ..schedule.kinds import StepKind
from ..schedule.levels import SIGMA_TOLERANCE
from ..schedule.segment import MAX_ORDER, Step
from .cache import CachePolicy, Feature, FeatureCache
from .guard import FAR, Guard
from .guidance import GuidanceHistory
from .null_steps.extrapolation import Observer, PredictionHistory
from .plan import Plan
from .replay import Replay

log = logging.getLogger(__name__)

FULL_DEPTH = 0  # in call counts: a call of every block
MOST_TERMS = MAX_ORDER + 1
_NOTHING_BEFORE = "no computed step of this shape to extrapolate from"
_RISEN = "no step was computed since the sampler went back up to a higher noise level"
_ELSEWHERE = "the sampler asked at a noise level at which no step of the run begins"
_SHARED = "several threads asked for one conditioning at once"


@dataclass
class StepRecord:
    """What one step of the run really did.

    `calls` counts rows sent through the network by depth (`FULL_DEPTH`: every block); `evaluations` counts the sampler's
    questions, answered by the network or not, and `kinds` the same by how they were answered; `spans` tell the seconds of each
    computed answer, when they are asked; `fallbacks` are the reasons for which questions were answered in full; `stage` is the
    number of the stage whose network answers.
    """

    calls: Counter[int] = field(default_factory=Counter)
    network_calls: int = 0
    evaluations: int = 0
    kinds: Counter[StepKind] = field(default_factory=Counter)
    spans: list[Callable[[], float]] = field(default_factory=list)
    fallbacks: Counter[str] = field(default_factory=Counter)
    stage: int = 0

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


@dataclass(eq=False)
class _Evaluation:
    """One question of the sampler: the step that it belongs to, its place in the run, and why it must be answered in full."""

    index: int
    place: float
    sigma: float
    must: str = ""
    reasons: set[str] = field(default_factory=set)
    seen: Counter[Hashable] = field(default_factory=Counter)  # chunks of it, by conditioning
    askers: dict[Hashable, int] = field(default_factory=dict)  # and the threads that asked for them


class Run:
    """The state of one sampling run.

    The sampler asks from one thread; the network may be called from several at once, as hosts with several devices do.

    Args:
        plan: what each step computes.
        stopwatch: begins a span of time, and returns what ends it when first called and tells its seconds; it must not make
            the processor wait for the device, whose work it runs ahead of.
        policy: where deep features are kept, and how much of them.
        count_options: options for the pass without data in which MACs are counted.
        replay: where predictions are looked up before they are computed.
        observer: follows the run's predictions.
        watch: is told each step as the sampler asks in it.
    """

    def __init__(
        self,
        plan: Plan,
        stopwatch: Callable[[], Callable[[], float]] = processor_time,
        policy: CachePolicy | None = None,
        count_options: Mapping[str, Any] | None = None,
        replay: Replay | None = None,
        observer: Observer | None = None,
        watch: Callable[[int], None] | None = None,
    ) -> None:
        reuses_guidance = any(step.kind.reuses_guidance for step in plan.steps)
        self._older = max((step.forecast for step in plan.steps), default=0)  # features of earlier segments
        # The guidance, and the features, of a step that was taken from a store are not known.
        self.plan, self._replay = plan, None if reuses_guidance or self._older else replay
        self._guidance = GuidanceHistory() if reuses_guidance else None
        self.records = [StepRecord(stage=plan.stage(i)) for i in range(len(plan.steps))]
        self.first_calls: dict[int, tuple[nn.Module, NetworkCall | ModelCall]] = {}  # by stage, for counting MACs after the run
        self.cache = FeatureCache(policy or CachePolicy())
        self._stopwatch = stopwatch
        self._count_options = count_options or {}
        self._steps: dict[nn.Module, UNetSteps | TransformerSteps] = {}
        self._extrapolates = any(step.kind is StepKind.EXTRAPOLATED for step in plan.steps)
        self._observer, self._watch = observer, watch
        self._history = PredictionHistory(MOST_TERMS if observer else plan.terms)
        plain = all(step.kind is StepKind.FULL for step in plan.steps) and not plan.moved
        self._guard = None if plain else Guard()
        self._stage = 0  # of the last question
        self._warned: set[str] = set()
        self.asked_elsewhere = 0  # evaluations at another noise level than the sampler's own
        self.rises = 0  # times that the sampler went back up to a higher noise level
        self._lock = threading.RLock()
        self._last: _Evaluation | None = None
        self._asking = False  # whether it is being answered
        self._lowest: float | None = None  # noise level since the last rise
        self._x: torch.Tensor | None = None  # of the last question
        self._answered: torch.Tensor | None = None  # the last answer
        self._shared: set[Hashable] = set()  # chunks that several threads asked for at once

    @property
    def network_calls(self) -> int:
        return sum(record.network_calls for record in self.records)

    @property
    def lost(self) -> str:
        """From which step on the run's numbers could not be trusted, in words; every later step was computed in full."""
        return self._guard.lost if self._guard else ""

    @property
    def reached(self) -> int:
        """How many steps the sampler came to: those that it asked in, and the removed ones that its last step spans."""
        kept = self.plan.kept
        return next((kept[i + 1] for i in reversed(range(len(kept) - 1)) if self.records[kept[i]].evaluations), 0)

    def partial_depth(self, sigma: float) -> int | None:
        """Return the depth of the partial step at a noise level; None where the step is of another kind."""
        here = self._at(sigma)
        step = self.plan.steps[here.index]
        return step.depth if step.kind.is_partial and not here.must else None

    def predict(
        self,
        x: torch.Tensor,
        sigma: float,
        compute: Callable[[], torch.Tensor],
        must_compute: str = "",
        level: float | None = None,
    ) -> torch.Tensor:
        """Return the denoised latent at a noise level, extrapolated where the plan says so.

        Args:
            x: noisy latent [B, C, H, W]; it is not written to.
            sigma: noise level, the same for every row.
            compute: asks the network.
            must_compute: a reason for which this evaluation may not be extrapolated.
            level: the sampler's own noise level, which says in which step it is; by default, that at which it asks.
        """
        if self._asking:  # within the answer to a question: a part of it
            return compute()
        level = sigma if level is None else level
        here = self._begin(x, sigma, level)
        record, rule, place = self.records[here.index], self.plan.rule, here.place
        record.evaluations += 1
        if self._watch:
            self._watch(here.index)
        self._history.rewind(place)
        if self.plan.steps[here.index].kind is StepKind.EXTRAPOLATED:
            if reason := here.must or must_compute:
                self._fall_back(here, reason)
            elif not self._history.fits(x):
                self._fall_back(here, _RISEN if self.rises and not len(self._history) else _NOTHING_BEFORE)
            else:
                blend = self._observer and self._observer.blend(here.index, self._history)
                weights = self._history.weights(place, blend or self.plan.blend(here.index))
                prediction, sure = self._history.combined(weights), sum(map(abs, weights)) <= FAR
                if self._guard.is_well(here.index, prediction, computed=False, sure=sure):
                    record.kinds[StepKind.EXTRAPOLATED] += 1
                    if self._observer:
                        self._observer.see(here.index, x, prediction)
                    self._answered = rule.denoised(x, sigma, prediction)
                    return self._answered
                here.must = self.lost
                self._fall_back(here, self.lost)
        self._answered = denoised = self._answer(here, x, compute, must_compute)
        # What a sampler asks between two steps' starts is answered, but not gone on from.
        if place == here.index and (self._extrapolates or self._observer):
            with for_later_calls():
                prediction = rule.value(x, sigma, denoised)
            self._history.add(place, prediction)
            if self._observer:
                self._observer.see(here.index, x, prediction)
        return denoised

    def _begin(self, x: torch.Tensor, sigma: float, level: float) -> _Evaluation:
        """Begin the sampler's next question, with what is known of it.

        New noise makes what was kept another run's, another stage another network's.
        """
        plan, stage = self.plan, self.plan.stage(self.plan.step_index(level))
        if self._lowest is not None and (plan.rises(level, self._lowest) or self._asks_anew(x, level)):
            self.rises += 1
            self._forget()
            self._lowest = None
        if stage != self._stage:
            self._forget()
            self._guard = self._guard if self.lost else self._guard and Guard()
            self._stage = stage
        self._lowest, self._x = level if self._lowest is None else min(level, self._lowest), x
        self.asked_elsewhere += abs(sigma - level) > SIGMA_TOLERANCE * level
        lost = not plan.sampler.asks_between and not plan.is_start(level)
        self._last = _Evaluation(plan.step_index(level), plan.place(level), sigma, self.lost or (_ELSEWHERE if lost else ""))
        return self._last

    def _forget(self) -> None:
        """Drop what was kept of earlier steps for later ones."""
        self._history = PredictionHistory(self._history.terms)
        self.cache.clear()
        self._guidance = self._guidance and GuidanceHistory()

    def _asks_anew(self, x: torch.Tensor, level: float) -> bool:
        """Return whether a question at the lowest level so far is of another latent, where the sampler asks once at each."""
        if self.plan.sampler.goes_back >= 0 or level < self._lowest or self._x is x:
            return False
        return self._x.shape != x.shape or not torch.equal(self._x, x)

    def _answer(
        self, here: _Evaluation, x: torch.Tensor, compute: Callable[[], torch.Tensor], must_compute: str
    ) -> torch.Tensor:
        """Return the network's answer to a question, or what is kept of it."""
        index, record = here.index, self.records[here.index]
        # Whoever listens for the unguided prediction must hear it; what a lost run computes is not its plan's.
        replay = None if must_compute or self.lost else self._replay
        key, denoised = (None, None) if replay is None else replay.recall(self.plan, index, x, here.sigma)
        whole = record.calls[FULL_DEPTH]
        if denoised is None:
            denoised = self._timed(record, compute)
            if here.place == index and self._guard and not self.lost:
                denoised = self._guarded(here, x, denoised, compute)
            if replay is not None and not self.lost:
                replay.keep(self.plan, index, key, denoised)
        kind = self.plan.steps[index].kind
        if kind.is_null or (record.calls[FULL_DEPTH] > whole and (here.reasons or not kind.reuses_guidance)):
            kind = StepKind.FULL
        record.kinds[kind] += 1
        return denoised

    def _timed(self, record: StepRecord, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        span = self._stopwatch()
        self._asking = True
        try:
            denoised = compute()
        finally:
            self._asking = False
        span()
        record.spans.append(span)
        return denoised

    def _guarded(
        self, here: _Evaluation, x: torch.Tensor, denoised: torch.Tensor, compute: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """Return a computed answer [B, ...]; that of every block where a cheaper one went astray."""
        kind = self.plan.steps[here.index].kind
        cheaper = kind.is_partial or kind.reuses_guidance
        value = self.plan.rule.value(x, here.sigma, denoised)
        if self._guard.is_well(here.index, value, computed=not cheaper) or not cheaper:
            return denoised
        here.must = self.lost
        return self._timed(self.records[here.index], compute)

    def _at(self, sigma: float) -> _Evaluation:
        """Return the question that is being answered; outside of one, the last one at a noise level, or another."""
        with self._lock:
            if self._last is None or (not self._asking and sigma != self._last.sigma):
                self._last = _Evaluation(self.plan.step_index(sigma), self.plan.place(sigma), sigma, self.lost)
            return self._last

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
        here = self._at(sigma)
        if self.plan.steps[here.index].kind.reuses_guidance:
            if not (reason := here.must or self._guidance.why_not(x, window)):
                conditional, _ = halves(False)
                return conditional, self._guidance.unconditional(sigma, conditional, window)
            self._fall_back(here, f"the guidance cannot be reused: {reason}")
        conditional, unconditional = halves(True)
        with for_later_calls():
            self._guidance.keep(here.index, sigma, conditional, unconditional, window)
        return conditional, unconditional

    def guides_itself(self, sigma: float, reason: str) -> None:
        """Note that a step at this noise level cannot reuse guidance, where it should."""
        here = self._at(sigma)
        if self.plan.steps[here.index].kind.reuses_guidance:
            self._fall_back(here, f"the guidance cannot be reused: {reason}")

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
        here, rows = self._at(sigma), call.x.shape[0]
        step, record = self.plan.steps[here.index], self.records[here.index]
        with self._lock:
            record.network_calls += 1
            # A feature is one network's: other packs' nodes may change it too.
            keys, steps = [(id(network), *key) for key in self._chunk_keys(here, call)], self._steps_of(network)
        if step.kind.is_partial:
            with self._lock:
                feature, reason = self._recall(steps, keys, step, here, call.x.device)
            prediction = None if feature is None else steps.partial(call, forward, step.depth, feature)
            if prediction is not None:
                with self._lock:
                    record.calls[step.depth] += rows
                return prediction
            self._fall_back(here, reason or "the network ran other blocks, or blocks of another size, than in the full step")
            call = _with_whole_control(call)
        with self._lock:
            if (stage := self.plan.stage(here.index)) not in self.first_calls:
                shapes = call.shapes()
                self.first_calls[stage] = network, replace(shapes, options={**shapes.options, **self._count_options})
            record.calls[FULL_DEPTH] += rows
        depth = self.plan.capture_depth(here.index)
        prediction, feature = steps.full(call, forward, depth)
        if feature is not None and keys:
            with self._lock:
                self.cache.store(keys, feature, step.segment, depth, here.place, self._older)
        return prediction

    def release(self) -> torch.Tensor | None:
        """Drop everything that the run kept of the network's work, and return the last answer; its records stay."""
        answer, self._answered = self._answered, None
        self.cache.clear()
        self._steps.clear()
        self._history = PredictionHistory(self.plan.terms)
        self._observer = self._x = None
        self._guidance = self._guidance and GuidanceHistory()
        return answer

    def _steps_of(self, network: nn.Module) -> UNetSteps | TransformerSteps:
        if network not in self._steps:
            inner = getattr(network, "diffusion_model", network)
            unet = block_count(network) is not None
            self._steps[network] = UNetSteps(network) if unet else TransformerSteps(inner, find_block_lists(network))
        return self._steps[network]

    def _recall(
        self, steps: UNetSteps | TransformerSteps, keys: list[Hashable], step: Step, here: _Evaluation, device: torch.device
    ) -> tuple[Feature | None, str]:
        if reason := here.must or steps.why_not(step.depth):
            return None, reason
        if not keys:
            return None, _SHARED if self._shared else "the call does not say which rows belong to which conditioning"
        feature, reason = self.cache.recall(keys, step.segment, step.depth, device, here.place, step.forecast)
        return feature, _RISEN if reason and self.rises and not len(self.cache) else reason

    def _chunk_keys(self, here: _Evaluation, call: NetworkCall) -> list[Hashable]:
        """Return one cache key for each chunk of rows: whose conditioning it is, its shape, its context window.

        Area prompts give cond and uncond the same uuid, and guidance nodes and tiles ask for one conditioning several times
        in an evaluation; the number of the occurrence in the evaluation tells such chunks apart. It is counted over all
        chunks of a call together, so that a tile of which one half alone runs does not move the other half of the next.
        Empty when the call does not say which rows belong to which conditioning, or when several threads ask for one
        conditioning in an evaluation: then there is no order.
        """
        uuids = call.options.get("uuids") or [None]
        slots = call.options.get("cond_or_uncond") or [0] * len(uuids)
        if len(uuids) != len(slots) or call.x.shape[0] % len(uuids):
            return []
        window = call.options.get("context_window")
        frames = tuple(getattr(window, "index_list", ()) or ())
        shape = (call.x.shape[0] // len(uuids), *call.x.shape[1:])
        chunks = [(uuid, slot, shape, frames) for uuid, slot in zip(uuids, slots, strict=True)]
        thread = threading.get_ident()
        self._shared.update(chunk for chunk in chunks if here.askers.setdefault(chunk, thread) != thread)
        if not self._shared.isdisjoint(chunks):
            return []
        first = max(here.seen[chunk] for chunk in chunks)
        own: Counter[Hashable] = Counter()
        keys = []
        for chunk in chunks:
            keys.append((*chunk, first + own[chunk]))
            own[chunk] += 1
        for chunk in own:
            here.seen[chunk] = first + max(own.values())
        return keys

    def _fall_back(self, here: _Evaluation, reason: str) -> None:
        """Note why a question is answered in full; it counts once, however many calls of the network it takes."""
        with self._lock:
            if reason not in here.reasons:
                here.reasons.add(reason)
                self.records[here.index].fallbacks[reason] += 1
            if reason not in self._warned:
                self._warned.add(reason)
                log.warning("Flexiffusion: step %d ran in full: %s", here.index + 1, reason)


def _with_whole_control(call: NetworkCall | ModelCall) -> NetworkCall | ModelCall:
    """Return a call with the residuals of every block, where the host made those of the shallow ones alone."""
    whole = getattr(call.control, "whole", None)
    return call if whole is None else replace(call, control=whole())
