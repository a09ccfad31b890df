"""Learning a run's schedule from the full runs that its user makes anyway.

The first full runs of a kind are recorded while they sample plainly; from then on the schedule that was planned from them runs,
at the wanted speed or quality. Each kind of run, by its model, weights, sampler, noise levels, guidance and size, learns for
itself.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..run.null_steps.basis import Rule, rule_of
from ..run.null_steps.extrapolation import Observer
from ..run.sampler import SamplerTraits, Solver
from ..schedule.presets import all_full, even, full_steps
from ..schedule.schedule import Schedule
from .answer import Answer
from .fit import linear_response
from .placement import SPREAD_DB, Planned, plan_front
from .shelf import Shelf
from .trajectories import GramRecorder
from .tuner import MEASURED_AT, cheapest, nearest

log = logging.getLogger(__name__)

RUNS = 2  # full runs that are recorded
FEWEST_STEPS, MOST_STEPS = 4, 200  # of a run that is learned
ROWS = 4  # pictures of a batch that are recorded
MOST_BYTES = 2**30  # of predictions that are held while a run is recorded
_NAMES = {
    "patches": "LoRA", "weights": "model", "architecture": "model", "sampler": "sampler", "sigmas": "scheduler or steps",
    "steps": "number of steps", "size": "size", "cfg": "guidance scale", "guider": "guider",
}  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What a run is, when it begins.

    Args:
        identity: what decides which schedule fits: JSON values by name.
        traits: what its sampler does; None where that is not known.
        sigmas: its noise levels [n + 1].
        solve: its sampler.
        latent_bytes: of one picture's latent.
        rows: pictures that are sampled at once.
        starts: steps at which another network of the run begins.
    """

    identity: Mapping[str, Any]
    traits: SamplerTraits | None
    sigmas: Sequence[float]
    solve: Solver
    latent_bytes: int
    rows: int = 1
    starts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Lesson:
    """What learning makes of one run.

    Args:
        schedule: under which it samples; None for plain sampling that nobody follows.
        words: for the user.
        observer: follows the run.
        finish: called when the run has come to its end.
    """

    schedule: Schedule | None
    words: tuple[str, ...]
    observer: Observer | None = None
    finish: Callable[[], None] = lambda: None


class Learner:
    """Learns the runs of one model.

    Args:
        shelf: where recordings and plans are kept.
        speedup: how many times fewer steps to compute.
        quality_db: above 0, in place of the speed-up: how near to the pictures of all steps, PSNR in dB.
        runs: full runs to record before the first plan.
        frozen: schedules that are taken as they are, each for runs of its number of steps.
    """

    def __init__(
        self,
        shelf: Shelf,
        speedup: float = 2.0,
        quality_db: float = 0.0,
        runs: int = RUNS,
        frozen: Sequence[Schedule] = (),
    ) -> None:
        self._shelf, self._speedup, self._quality, self._runs = shelf, speedup, quality_db, runs
        self._frozen = tuple(frozen)
        self._planning: dict[str, threading.Thread] = {}
        self._seen: dict[str, tuple[Mapping[str, Any], Schedule | None]] = {}  # runs, and what was learned of them

    @property
    def learned(self) -> list[Schedule]:
        """The schedules that this learner's runs sampled under, one for each kind of run."""
        return [schedule for _, schedule in self._seen.values() if schedule is not None]

    def forget(self) -> int:
        """Forget the kinds of runs that this learner met; return how many."""
        for identity, _ in self._seen.values():
            self._shelf.forget(identity)
        count = len(self._seen)
        self._seen.clear()
        return count

    def lesson(self, facts: Facts) -> Lesson:
        """Return what a run that begins samples under, and what follows it."""
        lesson = self._lesson(facts)
        self._seen[str(facts.identity)] = facts.identity, None if lesson.observer else lesson.schedule
        return lesson

    def _lesson(self, facts: Facts) -> Lesson:
        n = len(facts.sigmas) - 1
        frozen = next((schedule for schedule in self._frozen if len(schedule) == n), None)
        if frozen is not None:
            return Lesson(frozen, (f"Frozen: {_computed(frozen)}",))
        if reason := _why_not(facts):
            return Lesson(None, (f"Nothing is learned of this run: {reason}. It samples plainly.",))
        rule = rule_of(even(n, full_steps(n, MEASURED_AT)), facts.traits)
        thread = self._planning.pop(str(facts.identity), None)
        if thread is not None:
            thread.join()  # a second or two after the last recorded run
        kept = self._shelf.recording(facts.identity)
        count = 0 if kept is None else len(kept.gram)
        if kept is None or kept.steps != n or count < self._runs:
            return self._recorded(facts, rule, count)
        front = self._shelf.front(facts.identity) or self._plan(facts, rule)
        return self._chosen(front, n)

    def _recorded(self, facts: Facts, rule: Rule, count: int) -> Lesson:
        recorder = _Recorder(rule, facts)
        news = "" if count else self._news(facts.identity)
        words = f"Recording {count + 1} of {self._runs}{news}: plain sampling, every step computed."
        schedule = replace(all_full(len(facts.sigmas) - 1), basis=rule.basis)

        def finish() -> None:
            recording = recorder.recorded()
            kept = self._shelf.recording(facts.identity)
            if kept is not None and kept.steps == recording.steps:
                recording = kept.and_those_of(recording)
            self._shelf.keep_recording(recording)
            if len(recording.gram) >= self._runs:
                # Beside what the user's graph does next.
                thread = threading.Thread(target=self._plan_quietly, args=(facts, rule), daemon=True)
                self._planning[str(facts.identity)] = thread
                thread.start()

        return Lesson(schedule, (words,), recorder, finish)

    def _news(self, identity: Mapping[str, Any]) -> str:
        """Return in words what is new about a run that was never recorded."""
        changed = self._shelf.nearest(identity)
        names = dict.fromkeys(_NAMES[name] for name in changed or () if name in _NAMES)
        return f" (new {', '.join(names)})" if names else ""

    def _plan_quietly(self, facts: Facts, rule: Rule) -> None:
        try:
            self._plan(facts, rule)
        except Exception:  # it is tried again when the next run begins
            log.exception("Flexiffusion: planning from recorded runs failed")

    def _plan(self, facts: Facts, rule: Rule) -> list[Planned]:
        """Return the front of a run that is recorded, and keep it."""
        recording = self._shelf.recording(facts.identity)
        sigmas = torch.tensor(facts.sigmas)
        response = linear_response(facts.solve, sigmas, rule.basis)
        if recording is None or response is None:
            return []
        levels = [float(level) for level in sigmas[:-1]]
        answer = Answer.guess(levels, flow=levels[0] <= 1)
        front = plan_front(recording, response.numpy(), answer, rule, starts=facts.starts)
        self._shelf.keep_front(facts.identity, front)
        return front

    def _chosen(self, front: Sequence[Planned], steps: int) -> Lesson:
        if not front:
            return Lesson(None, ("Nothing could be planned from the recorded runs: plain sampling.",))
        if self._quality:
            planned = cheapest(front, self._quality + SPREAD_DB)
            if planned is None:
                return Lesson(
                    None,
                    (f"No schedule is known that comes within {self._quality:g} dB: plain sampling, every step computed.",),
                )
        else:
            planned = nearest(front, full_steps(steps, self._speedup))
        low, high = planned.interval_db
        predicted = f"Predicted: {planned.predicted_db:.0f} dB to the picture of all steps ({low:.0f} to {high:.0f})."
        words = f"{_computed(planned.schedule)} {predicted}"
        return Lesson(planned.schedule, (words,))


class _Recorder(GramRecorder):
    """Records the first pictures of a run's batch."""

    def __init__(self, rule: Rule, facts: Facts) -> None:
        super().__init__()
        self._rule, self._identity = rule, dict(facts.identity)
        self._last_level = float(facts.sigmas[-2])

    def see(self, index: int, x: torch.Tensor, prediction: torch.Tensor) -> None:
        super().see(index, x[:ROWS], prediction[:ROWS])
        self._x, self._prediction = x[:ROWS], prediction[:ROWS]

    def recorded(self) -> Any:
        """Return what was recorded, once the run has come to its end."""
        return self.recording(self._rule.denoised(self._x, self._last_level, self._prediction), self._identity)


def _why_not(facts: Facts) -> str:
    """Return in words why a run is not learned; empty where it is."""
    n = len(facts.sigmas) - 1
    if facts.traits is None:
        return "its sampler could not be tried"
    if not facts.traits.keeps_levels:
        return "its sampler chooses its own noise levels"
    if facts.traits.reads_guidance:
        return "its sampler reads the prediction without the prompt, which a skipped step lacks"
    if facts.traits.evaluations > 1 or not facts.traits.is_linear:
        return "its sampler asks the network several times a step, or is not linear in its answers; try Flexi Preset"
    if not FEWEST_STEPS <= n <= MOST_STEPS:
        return f"it has {n} steps, and {FEWEST_STEPS} to {MOST_STEPS} are learned"
    if n * facts.latent_bytes * min(facts.rows, ROWS) > MOST_BYTES:
        return f"its predictions are larger than {MOST_BYTES >> 20} MiB"
    return ""


def _computed(schedule: Schedule) -> str:
    full, n = schedule.letters.count("F"), len(schedule)
    return f"{full} of {n} steps are computed, {n / full:.3g}x fewer."
