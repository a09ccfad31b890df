"""The plan: a schedule laid over the sigmas of one run.

A step is known by its sigma, never by counting calls. Where the run is the one that the schedule was made for, the plan is
the schedule; a run with another step count, a denoise below 1 or a window of the steps is mapped, and the plan says how.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..schedule.kinds import StepKind
from ..schedule.levels import SIGMA_TOLERANCE, between_ends, check_levels, same_grid, window_of
from ..schedule.schedule import Schedule
from ..schedule.segment import Step
from ..stages.bounds import Stages
from .null_steps.basis import Rule, rule_of
from .sampler import PLAIN, SamplerTraits

_START_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Plan:
    """What each step of a run computes.

    Args:
        sigmas: the run's noise levels [n + 1], descending: its own, or those that the schedule moves them to.
        steps: one for each interval.
        rule: how extrapolated steps are predicted.
        mapping: in words, how the schedule was laid over the run; empty when it fits as it is.
        moved: the noise levels are the schedule's.
        lost: in words, that mapping left nothing of what the schedule saves; empty where it saves something.
        sampler: what the run's sampler does.
        stages: where the network changes; None where it does not.
        cut: numbers of the steps at which a stage begins that are full for that alone.
    """

    sigmas: tuple[float, ...]
    steps: tuple[Step, ...]
    rule: Rule
    mapping: str = ""
    moved: bool = False
    lost: str = ""
    sampler: SamplerTraits = PLAIN
    stages: Stages | None = None
    cut: tuple[int, ...] = ()

    def stage(self, index: int) -> int:
        """Return the number of the stage that a step begins in."""
        return 0 if self.stages is None else self.stages.at(self.sigmas[index])

    @property
    def kept(self) -> tuple[int, ...]:
        """Indices of the sigmas [<= n + 1] that the sampler gets: all but those at which a removed step starts."""
        return (*(i for i, step in enumerate(self.steps) if step.kind is not StepKind.NULL), len(self.steps))

    def sampled(self, sigmas: torch.Tensor) -> torch.Tensor:
        """Return the noise levels [<= n + 1] that the sampler gets, from the run's own [n + 1]."""
        levels = sigmas.new_tensor(self.sigmas) if self.moved else sigmas
        return levels[list(self.kept)]

    def step_index(self, sigma: float) -> int:
        """Return the number of the step that runs at a noise level: the last kept one that starts at or above it."""
        found = 0
        for i in self.kept[:-1]:
            if sigma > self.sigmas[i] * (1 + SIGMA_TOLERANCE):
                break
            found = i
            if sigma >= self.sigmas[i] * (1 - SIGMA_TOLERANCE):
                break
        return found

    def place(self, sigma: float) -> float:
        """Return where a noise level lies in the run, in steps: 3.0 at sigmas[3], between them linearly in sigma."""
        i = self.step_index(sigma)
        while i < len(self.steps) - 1 and sigma <= self.sigmas[i + 1] * (1 + SIGMA_TOLERANCE):
            i += 1  # over removed steps
        high, low = self.sigmas[i], self.sigmas[i + 1]
        if abs(sigma - high) <= SIGMA_TOLERANCE * high:
            return float(i)
        return i + min(max((high - sigma) / (high - low), 0.0), 1.0)

    def is_start(self, sigma: float) -> bool:
        """Return whether a step that the sampler gets begins at a noise level."""
        return any(abs(sigma - self.sigmas[i]) <= _START_TOLERANCE * self.sigmas[i] for i in self.kept[:-1])

    def rises(self, sigma: float, lowest: float) -> bool:
        """Return whether a question at a noise level goes back up farther from the lowest one than the sampler's steps do."""
        if sigma <= lowest * (1 + SIGMA_TOLERANCE):
            return False
        between = sum(lowest * (1 + SIGMA_TOLERANCE) < self.sigmas[i] <= sigma * (1 + SIGMA_TOLERANCE) for i in self.kept)
        return between > self.sampler.goes_back or self.sampler.goes_back < 1

    @property
    def terms(self) -> int:
        """How many computed steps an extrapolation goes back to."""
        return max(len(self.rule.blend), *(len(self.blend(i)) for i in range(len(self.steps))))

    def blend(self, index: int) -> tuple[float, ...]:
        """Return the factors of an extrapolated step: its segment's, else those of the run."""
        own = self.steps[index].blend if self.rule.own_blends else None
        return own or self.rule.blend

    @property
    def letters(self) -> str:
        return "".join(step.kind.value for step in self.steps)

    def capture_depth(self, index: int) -> int | None:
        """Return the depth at which a full step must keep its deep feature, if any.

        That of its own segment's partial steps; where it has none, of the next segment that forecasts from it.
        """
        segment = self.steps[index].segment
        partial = [step for step in self.steps if step.kind.is_partial]
        own = next((step.depth for step in partial if step.segment == segment), None)
        return own or next((step.depth for step in partial if 0 < step.segment - segment <= step.forecast), None)


def make_plan(
    schedule: Schedule,
    sigmas: Sequence[float],
    sampler: SamplerTraits = PLAIN,
    top: float | None = None,
    stages: Stages | None = None,
) -> Plan:
    """Lay a schedule over a run.

    A window of a longer run takes its own stretch of the schedule (see `window_of`). With the teacher's sigma grid in the
    schedule's file, steps correspond by noise level (nearest in log sigma); without it, by position in the run. The first run
    step of every segment is full. The schedule's own noise levels take the place
    of the run's where they fit it: as many steps, on the teacher's grid where that is known, between the same ends.

    Args:
        schedule: of any length.
        sigmas: the run's noise levels [n + 1], strictly descending, the last >= 0.
        sampler: what the run's sampler does.
        top: the model's highest noise level, where it is known.
        stages: where the run's network changes. The first step of a stage is full, and a segment that crosses a boundary ends
            there: what a network's deep features and predictions were says nothing of another's.

    Raises:
        ScheduleError: the run has no step, or its sigmas do not fall.
    """
    plan = _laid(schedule, sigmas, sampler, top)
    return plan if stages is None else _cut(plan, stages)


def _laid(schedule: Schedule, sigmas: Sequence[float], sampler: SamplerTraits, top: float | None) -> Plan:
    check_levels(sigmas)
    sigmas = tuple(float(s) for s in sigmas)
    rule = rule_of(schedule, sampler)
    n, steps, grid = len(sigmas) - 1, tuple(schedule.steps()), schedule.teacher_sigmas
    if n == len(steps) and (grid is None or same_grid(grid, sigmas)):
        if schedule.sigmas is None:
            return Plan(sigmas, steps, rule, sampler=sampler)
        if (moved := between_ends(schedule.sigmas, sigmas)) is not None:
            return Plan(moved, steps, rule, moved=True, sampler=sampler)
        mapping = "noise levels are left out, the run begins or ends elsewhere"
        return Plan(sigmas, steps, rule, mapping, sampler=sampler)
    window = window_of(schedule, sigmas, top)
    if window is not None:
        sources = list(range(window, window + n))
        mapping = f"the run is a window: it takes steps {window + 1} to {window + n} of the schedule's {len(steps)}"
    elif grid is not None:
        logs = [math.log(max(s, 1e-8)) for s in (schedule.sigmas or grid)[:-1]]
        sources = [min(range(len(logs)), key=lambda i: abs(logs[i] - math.log(max(s, 1e-8)))) for s in sigmas[:-1]]
        mapping = f"{len(steps)} steps mapped to {n} by noise level"
    else:
        sources = [min(int((j + 0.5) * len(steps) / n), len(steps) - 1) for j in range(n)]
        mapping = f"{len(steps)} steps mapped to {n} by position in the run"
    if schedule.sigmas is not None:
        mapping += ", without its own noise levels"
    mapped, previous = [], -1
    for source in sources:
        step = steps[source]
        opens = step.segment != previous
        reuses = mapped and step.kind is StepKind.FULL_CONDITIONAL
        mapped.append(Step(StepKind.FULL, None, step.segment) if opens and not reuses else step)
        previous = step.segment
    lost = ""
    if window is None and all(step.kind is StepKind.FULL for step in mapped) and not schedule.is_all_full:
        lost = f"This schedule saves nothing here: made for {len(steps)} steps, laid over {n}, every step is computed."
    return Plan(sigmas, tuple(mapped), rule, mapping, lost=lost, sampler=sampler)


def _cut(plan: Plan, stages: Stages) -> Plan:
    """Return a plan whose segments end where the network changes."""
    steps, cut, more, starts = [], [], 0, stages.starts(plan.sigmas)
    for i, step in enumerate(plan.steps):
        if i in starts:
            more += step.segment == plan.steps[i - 1].segment
            if step.kind is not StepKind.FULL:
                cut.append(i)
                step = Step(StepKind.FULL, None, step.segment)
        steps.append(replace(step, segment=step.segment + more))
    return replace(plan, steps=tuple(steps), stages=stages, cut=tuple(cut))
