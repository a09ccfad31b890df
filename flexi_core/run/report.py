"""What a run did: every step's kind, calls, fallbacks with reasons, MACs and seconds against an all-full run."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from statistics import fmean

from ..schedule.kinds import StepKind
from ..schedule.levels import SIGMA_TOLERANCE
from ..schedule.schedule import Schedule
from .cost import NetworkCost, all_full_evaluations, all_full_macs, count_macs, run_macs
from .plan import Plan
from .run import FULL_DEPTH, Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepReport:
    """One step of a finished run.

    Args:
        number: from 1, as people count.
        planned: the schedule's kind of step.
        reached: whether the sampler came to it.
        ran: the kind that really ran; FULL where the planned one could not; the planned one where the step was not reached.
        depth: blocks of a partial step.
        sigma: noise level at which the step starts.
        evaluations: times the sampler asked.
        network_calls: times the network was called.
        seconds: spent in the network and the guidance.
        fallbacks: reasons for which it ran full.
    """

    number: int
    planned: StepKind
    reached: bool
    ran: StepKind
    depth: int | None
    sigma: float
    evaluations: int
    network_calls: int
    seconds: float
    fallbacks: tuple[str, ...]


@dataclass(frozen=True)
class StageReport:
    """What a stage of a finished run took: the steps that one of its networks computed.

    Args:
        name: of the stage.
        steps: that the sampler came to in it, at least one.
        macs: spent in its network; None where they cannot be counted.
        seconds: in the network and the guidance.
    """

    name: str
    steps: tuple[StepReport, ...]
    macs: float | None
    seconds: float

    def __str__(self) -> str:
        first, last = self.steps[0].number, self.steps[-1].number
        numbers = f"step {first}" if first == last else f"steps {first} to {last}"
        kinds = _by_kind(Counter(step.ran for step in self.steps))
        macs = "" if self.macs is None else f", {_macs(self.macs)}"
        return f"{self.name[:1].upper()}{self.name[1:]}, {numbers}{kinds}{macs}, {self.seconds:.2f} s."


class RunReport:
    """A finished run in numbers and in words.

    Args:
        run: finished; None when the run was left to plain sampling.
        seconds: of the whole sampling.
        notes: sentences about mapping, mismatches, or why the schedule stood down.
        words: sentences that come first: what the user got.
        schedule: that a preset became.
    """

    def __init__(
        self,
        run: Run | None,
        seconds: float,
        notes: Sequence[str] = (),
        words: Sequence[str] = (),
        schedule: Schedule | None = None,
    ) -> None:
        self.seconds = seconds
        self.notes, self.words, self.schedule = tuple(notes), tuple(words), schedule
        self.steps: tuple[StepReport, ...] = ()
        self._costs: dict[int, NetworkCost | None] = {}
        self.cache_mib = 0.0
        self._run = run
        if run is not None:
            plan = run.plan
            laid = f"The schedule's {plan.mapping}." if plan.mapping and not plan.lost else _MOVED if plan.moved else ""
            self.notes = (*((laid,) if laid else ()), *_stage_notes(plan), *self.notes)
            reached = run.reached
            self.steps = tuple(_step_report(run, i, i < reached) for i in range(len(run.plan.steps)))
            otherwise = self._otherwise()
            planned = [f"Planned: {words}" for words in self.words] if otherwise and schedule else self.words
            lost = (f"{run.lost[0].upper()}{run.lost[1:]}; every later step was computed in full.",) if run.lost else ()
            self.words = (*lost, *otherwise, *planned)
            self.notes = (*self.notes, *self._sampler_notes())
            self.cache_mib = run.cache.most_bytes / 2**20

    @property
    def run(self) -> Run | None:
        """The run itself; None when it was left to plain sampling."""
        return self._run

    @property
    def reached(self) -> tuple[StepReport, ...]:
        """The steps that the sampler came to."""
        return tuple(step for step in self.steps if step.reached)

    @property
    def evaluations(self) -> Counter[StepKind]:
        """The sampler's questions, by how they were really answered."""
        return sum((record.kinds for record in self._run.records), Counter()) if self._run else Counter()

    @property
    def cost(self) -> NetworkCost | None:
        """MACs of the run's network, the first one's where it has several; None where they cannot be counted."""
        return self.cost_in(min(self._run.first_calls)) if self._run is not None and self._run.first_calls else None

    def cost_in(self, stage: int) -> NetworkCost | None:
        """Return the MACs of a stage's network, counted once at its own shapes; None where they cannot be (said in the log)."""
        if stage not in self._costs:
            self._costs[stage] = self._counted(stage)
        return self._costs[stage]

    def cost_of(self, step: StepReport) -> NetworkCost | None:
        """Return the MACs of the network that a step belongs to; None where they cannot be counted."""
        return self.cost if self._run is None else self.cost_in(self._run.plan.stage(step.number - 1))

    def _counted(self, stage: int) -> NetworkCost | None:
        if self._run is None or stage not in self._run.first_calls:
            return None
        try:
            return count_macs(*self._run.first_calls[stage])
        except Exception:  # the count is a courtesy
            log.exception("Flexiffusion: the MACs of a run could not be counted")
            return None

    @cached_property
    def stages(self) -> tuple[StageReport, ...]:
        """What each stage of the run took; none where one network ran all of it."""
        plan = self._run.plan if self._run else None
        if plan is None or plan.stages is None:
            return ()
        found = []
        for stage, of_stage in groupby(self.reached, lambda step: plan.stage(step.number - 1)):
            steps, cost = tuple(of_stage), self.cost_in(stage)
            macs = None if cost is None else run_macs((self._run.records[step.number - 1] for step in steps), cost)
            found.append(StageReport(plan.stages.names[stage], steps, macs, sum(step.seconds for step in steps)))
        return tuple(found)

    @property
    def macs(self) -> float | None:
        """Multiply-accumulates that the run spent in the network."""
        if self.stages:
            spent = [stage.macs for stage in self.stages]
            return None if None in spent else sum(spent)
        return None if self.cost is None else run_macs(self._run.records, self.cost)

    @property
    def predicted_cache_mib(self) -> float:
        """What the schedule's deep features need, from the network's shapes; 0 where they are not known."""
        if self._run is None or not self.cache_mib or self.cost is None:
            return 0.0
        record = next(record for record in self._run.records if record.network_calls)
        return self.cost.cache_bytes(self._run.plan, sum(record.calls.values()) // max(record.evaluations, 1)) / 2**20

    @property
    def speedup_macs(self) -> float | None:
        """MACs of the same run with every step full, over this run's; without partial steps that needs no count of them."""
        if self._run is None or not self._run.network_calls:
            return None
        if len(self.stages) > 1:
            costs = [self.cost_in(self._run.plan.stage(step.number - 1)) for step in self.reached]
            if None in costs:
                return None
            return all_full_macs(self._run, NetworkCost(fmean(cost.full_macs for cost in costs))) / self.macs
        cost = NetworkCost(1.0) if self._is_whole else self.cost
        return None if cost is None else all_full_macs(self._run, cost) / run_macs(self._run.records, cost)

    @property
    def _is_whole(self) -> bool:
        """Whether every call of the network ran all of it: then nothing has to be counted, which can take seconds."""
        return all(depth == FULL_DEPTH for record in self._run.records for depth in record.calls)

    @property
    def all_full_seconds(self) -> float | None:
        """Estimate of the all-full run's time: the mean full evaluation, for every evaluation of every step.

        The first full step is left out where there are others: it pays for warming up.
        """
        if self._run is None:
            return None
        full = [s for s in self.steps if s.ran is StepKind.FULL and s.network_calls]
        full = full[1:] or full
        asked = sum(s.evaluations for s in full)
        if not asked:
            return None
        evaluation = sum(s.seconds for s in full) / asked
        computing = sum(s.seconds for s in self.steps)
        evaluations = all_full_evaluations(self._run)
        return evaluation * evaluations + max(self.seconds - computing, 0.0)

    @property
    def letters(self) -> str:
        """The steps that really ran, one letter each; fewer than planned where the sampler stopped early."""
        return "".join(step.ran.value for step in self.reached)

    @property
    def verdict(self) -> str:
        """What the run took and what it would have taken, in a sentence."""
        if not self.steps:
            return f"Plain sampling, every step computed: {self.seconds:.2f} s."
        computed, reached = sum(not step.ran.is_null for step in self.reached), len(self.reached)
        if set(self.letters) <= {StepKind.FULL.value}:
            return f"{self.seconds:.2f} s: every step was computed."
        of = f"{computed} of {reached} steps computed"
        estimate = self.all_full_seconds
        if estimate is None:
            return f"{self.seconds:.2f} s: {of}."
        times = estimate / max(self.seconds, 1e-9)
        return f"{self.seconds:.2f} s instead of about {estimate:.2f} s, {times:.2f}x as fast: {of}."

    @property
    def reasons(self) -> list[str]:
        """Sentences about what is not as planned: words, notes, and what ran in full with its reason."""
        return [*self.words, *self._fell_back(), *self.notes]

    def __str__(self) -> str:
        if not self.steps:
            first = "Flexiffusion: plain sampling, every step full."
            return "\n".join([first, *self.words, *self.notes, f"{self.seconds:.2f} s."])
        reached, asked = self.reached, self.evaluations
        of = f" of {len(self.steps)}" if len(reached) < len(self.steps) else ""
        kinds = _by_kind(Counter(step.ran for step in reached))
        lines = [*self.words, self.verdict, f"Flexiffusion: {len(reached)}{of} steps{kinds}.", self.letters]
        if any(step.evaluations != (step.ran is not StepKind.NULL) for step in reached):
            lines.append(f"The sampler asked {asked.total()} times{_by_kind(asked)}.")
        lines += map(str, self.stages)
        calls, speedup = sum(step.network_calls for step in self.steps), self.speedup_macs
        if speedup is None:
            lines.append(f"{calls} network calls; MACs of this network could not be counted.")
        elif self._is_whole:
            lines.append(f"{calls} network calls, every block in each: {_fewer(speedup)}.")
        else:
            whole = f" ({_macs(self.macs * speedup)})" if _saves(speedup) else ""
            lines.append(f"{calls} network calls, {_macs(self.macs)}: {_fewer(speedup)}{whole}.")
        if self.all_full_seconds is not None:
            lines.append("The time of all steps is estimated from this run's full steps.")
        lines += self._fell_back()
        if self.predicted_cache_mib:
            lines.append(f"Cache: {self.cache_mib:.2f} MiB at most, {self.predicted_cache_mib:.2f} MiB predicted.")
        elif self.cache_mib:
            lines.append(f"Cache: {self.cache_mib:.2f} MiB at most.")
        lines += self.notes
        lines += [f"As text for Flexi Schedule: {self.schedule}"] if self.schedule else []
        return "\n".join(lines)

    def _otherwise(self) -> list[str]:
        """Return in words what ran otherwise than planned: steps in full that were to be cheaper, or fewer steps."""
        reached, found = self.reached, []
        if len(reached) < len(self.steps):
            found.append(f"The sampler stopped after {len(reached)} of the run's {len(self.steps)} steps.")
        cut = self._run.plan.cut
        more = [s for s in reached if s.ran is StepKind.FULL and (s.planned is not StepKind.FULL or s.number - 1 in cut)]
        if more:
            full = sum(step.ran is StepKind.FULL for step in reached)
            found.append(
                f"{full} of {len(reached)} steps were computed in full, {len(more)} more than the schedule says: see below."
            )
        return found

    def _sampler_notes(self) -> list[str]:
        """Return in words what the sampler did that others do not."""
        found = []
        if count := self._run.asked_elsewhere:
            found.append(
                f"{_times(count)} the sampler gave the network another noise level than its own; its steps are as planned."
            )
        if count := self._run.rises:
            found.append(
                f"{_times(count)} the sampler went back up to a higher noise level; nothing was carried on from before."
            )
        return found

    def _fell_back(self) -> list[str]:
        """Return in words what ran in full where it was to be cheaper, with the reasons."""
        fallbacks = sum((record.fallbacks for record in self._run.records), Counter()) if self._run else Counter()
        return [f"{count} evaluation{'s' if count > 1 else ''} ran in full: {reason}." for reason, count in fallbacks.items()]


def _saves(speedup: float) -> bool:
    return speedup >= 1.005  # what two digits show


def _fewer(speedup: float) -> str:
    """Return a run's multiply-accumulates (MACs) against those of all steps full, in words."""
    return f"{speedup:.2f}x fewer MACs than all steps full" if _saves(speedup) else "as many MACs as all steps full"


def _stage_notes(plan: Plan) -> list[str]:
    """Return in words where a plan's stages changed its steps, or lie across one."""
    if plan.stages is None:
        return []
    kinds = f"step {plan.cut[0] + 1}" if len(plan.cut) == 1 else f"steps {', '.join(str(i + 1) for i in plan.cut)}"
    found = [f"The network changes within a segment of the schedule: {kinds} ran in full for that."] if plan.cut else []
    for number, level in enumerate(plan.stages.boundaries):
        for i, j in pairwise(plan.kept):
            above, below = plan.stages.at(plan.sigmas[i]), plan.stages.at(plan.sigmas[j])
            if above <= number < below and plan.sigmas[j] < level * (1 - SIGMA_TOLERANCE):
                found.append(
                    f"Step {i + 1} lies across the boundary at sigma {level:.4g} and is {plan.stages.names[above]}'s. Put the "
                    "boundary into the grid to end it there."
                )
    return found


_MOVED = "The noise levels of the steps are the schedule's own."


def _step_report(run: Run, index: int, reached: bool) -> StepReport:
    step, record = run.plan.steps[index], run.records[index]
    ran = StepKind.FULL if record.fallbacks and record.calls[FULL_DEPTH] else step.kind
    return StepReport(
        number=index + 1,
        planned=step.kind,
        reached=reached,
        ran=ran,
        depth=step.depth if ran.is_partial else None,
        sigma=run.plan.sigmas[index],
        evaluations=record.evaluations,
        network_calls=record.network_calls,
        seconds=record.seconds,
        fallbacks=tuple(record.fallbacks),
    )


def _by_kind(counts: Counter[StepKind]) -> str:
    names = {kind: f"null ({kind.label})" if kind.is_null else kind.label for kind in StepKind}
    kinds = ", ".join(f"{counts[kind]} {name}" for kind, name in names.items() if counts[kind])
    return f": {kinds}" if kinds else ""


def _times(count: int) -> str:
    return "Once" if count == 1 else f"{count} times"


def _macs(value: float) -> str:
    for unit, size in (("TMAC", 1e12), ("GMAC", 1e9), ("MMAC", 1e6)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} MAC"
