"""Tunes a run: a few full runs are recorded, one accelerated run says how the network answers, and the rest is arithmetic.

What the arithmetic chose is then tried in runs of its own: with fitted blends, with its full steps at other noise levels, and,
where time is given, changed step by step for as long as that helps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import scipy.special
import torch

from ..errors import FlexiError
from ..metrics import data_range, psnr_db
from ..run.null_steps.basis import Rule, rule_of
from ..run.null_steps.extrapolation import PredictionHistory
from ..schedule.presets import all_full, even, full_steps
from ..schedule.schedule import Schedule
from .answer import Answer, AnswerMeter
from .ascent import LevelAscent, PlaceAscent
from .fit import Trajectory, linear_response
from .moves import LevelMoves
from .placement import SPREAD_DB, Planned, plan_front
from .runs import Runs
from .trajectories import GramRecorder, Recording

MEASURED_AT = 2.0  # times fewer steps: of the accelerated run that the network's answer is measured in


@dataclass(frozen=True)
class Effort:
    """What is spent on a schedule.

    Args:
        samples: full runs to learn from.
        fit: whether blends are fitted, and levels moved, in runs of the schedule's own.
        local: full runs, or what takes as long, for changing it step by step.
    """

    samples: int
    fit: bool = True
    local: float = 0.0


EFFORTS = {"instant": Effort(1, fit=False), "good": Effort(4), "thorough": Effort(8, local=100.0)}


@dataclass(frozen=True)
class Tuned:
    """What came out of a planned schedule on the samples that it was tuned on.

    Args:
        schedule: with the better ones of the planned blends and the fitted ones.
        full: its full steps.
        predicted_db: mean PSNR to the teacher, as planned.
        made_db: as it came out.
        plain_db: of as many plain steps of the same sampler and scheduler.
        sure_db: what other samples' mean is not below in nine of ten cases.
    """

    schedule: Schedule
    full: int
    predicted_db: float
    made_db: float
    plain_db: float
    sure_db: float

    @property
    def is_ahead(self) -> bool:
        """Whether it is nearer to the teacher than plain steps that cost the same."""
        return self.made_db > self.plain_db


@dataclass
class Recorded:
    """Full runs that were sampled, batch by batch; they stay when tuning is interrupted, and serve other wishes too.

    Args:
        watched: by first seed and size of each batch.
        macs: that each took.
    """

    watched: dict[tuple[int, int], _Watched] = field(default_factory=dict)
    macs: dict[tuple[int, int], float] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of memory."""
        return sum(watched.bytes for watched in self.watched.values())


class Tuner:
    """Finds schedules for one run.

    Args:
        runs: of the teacher.
        effort: what is spent; or the number of full runs to record, with fits.
        seed: of the first of them.
        progress: called with what is done, the work done and the work in all, in samples.
        recorded: full runs of the very same run from before; those that are missing are added.

    Raises:
        FlexiError: the run's sampler cannot be tuned.
    """

    def __init__(
        self,
        runs: Runs,
        effort: Effort | int,
        seed: int = 0,
        progress: Callable[[str, int, int], None] = lambda name, done, total: None,
        recorded: Recorded | None = None,
    ) -> None:
        self.effort = Effort(effort) if isinstance(effort, int) else effort
        self._runs, self._samples, self._seed, self._progress = runs, self.effort.samples, seed, progress
        self._recorded = Recorded() if recorded is None else recorded
        self.steps = len(runs.sigmas) - 1
        if self.steps < 3:
            raise FlexiError(f"the run has {self.steps} steps; there is nothing to skip in fewer than 3")
        if runs.cuts:
            raise FlexiError("the run is of several sampling nodes, one after the other; tuning is for one: use flexi search")
        if runs.traits.evaluations > 1 or not runs.traits.is_linear:
            raise self._not_for_it()
        self._rule = rule_of(even(self.steps, full_steps(self.steps, MEASURED_AT)), runs.traits)
        self._levels = [float(level) for level in runs.sigmas[:-1]]
        self._macs, self._one = 0.0, 0.0  # spent, and of one full run
        self._teacher = torch.empty(0)
        self._moves: LevelMoves | None = None

    @property
    def full_runs(self) -> float:
        """What was spent on the network so far, in full runs of one sample."""
        return self._macs / self._one if self._one else 0.0

    def front(self, measured: bool = True) -> list[Planned]:
        """Return the best schedules by number of full steps, with what they are predicted to come to.

        Args:
            measured: whether the network's answer is measured, in one accelerated run; else it is what most networks have.
        """
        recording = self._record()
        response = linear_response(self._runs.solver, self._runs.sigmas, self._rule.basis)
        if response is None:
            raise self._not_for_it()
        for batch in self._batches:
            watched = self._recorded.watched[batch]
            trajectory = Trajectory(watched.states[0].double(), watched.predictions.double())
            self._runs.keep_trajectory(*batch, self._rule.basis, trajectory, response)
        known = Answer.guess(self._levels, flow=self._levels[0] <= 1)  # the levels of flow models are shares of 1
        planned = plan_front(recording, response.numpy(), known, self._rule, starts=self._runs.starts)
        if measured:
            known = self._measured(known, nearest(planned, full_steps(self.steps, MEASURED_AT)))
            planned = plan_front(recording, response.numpy(), known, self._rule, starts=self._runs.starts)
        # At other levels it would be other noise, or another network.
        if not self._runs.traits.draws_noise and not self._runs.starts:
            self._moves = LevelMoves(recording, self._runs.sigmas, self._runs.solver, response, known, self._rule)
        return planned

    def confirmed(self, planned: Planned) -> Tuned:
        """Return what a planned schedule comes to on the recorded samples, as it is or as the effort betters it.

        Args:
            planned: of the front.
        """
        made = {planned.schedule: self._psnr_db(planned.schedule)}
        if self.effort.fit:
            moved = self._moves and self._moves.moved(planned)
            for schedule in [planned.schedule, *([moved.schedule] if moved else ())]:
                fitted = self._fitted(schedule)
                made.setdefault(fitted, self._psnr_db(fitted))
        best = max(made, key=lambda schedule: float(made[schedule].mean()))
        found = made[best]
        if self.effort.local:
            best, found = self._local(best, found)
        plain = float(self._psnr_db(all_full(planned.full)).mean())
        return Tuned(best, planned.full, planned.predicted_db, float(found.mean()), plain, _sure_of(found))

    def chosen(self, front: Sequence[Planned], speedup: float, quality: float | None = None) -> Tuned | None:
        """Return what the schedule for a speed-up, or the cheapest for a quality, comes to; None where none comes so near.

        Args:
            front: from few full steps to many.
            speedup: how many times fewer steps to compute.
            quality: in place of a speed-up: mean PSNR to the teacher in dB, of other samples too. What was predicted may be
                missed: then with more full steps.
        """
        if quality is None:
            return self.confirmed(nearest(front, full_steps(self.steps, speedup)))
        planned = cheapest(front, quality)
        while planned is not None:
            tuned = self.confirmed(planned)
            if tuned.sure_db >= quality:
                return tuned
            planned = next((p for p in front if p.full > tuned.full), None)
        return None

    def _not_for_it(self) -> FlexiError:
        return FlexiError(
            f"{self._runs.sampler} asks the network several times a step, or is not linear in its answers; "
            "tuning is for other samplers: use flexi search"
        )

    @property
    def _batches(self) -> list[tuple[int, int]]:
        return self._runs.batches(self._seed, self._samples)

    def _record(self) -> Recording:
        """Return the recording of all full runs, sampled where they are not there."""
        schedule = replace(all_full(self.steps), basis=self._rule.basis)
        whole: Recording | None = None
        done = 0
        for batch in self._batches:
            if batch not in self._recorded.watched:
                watched = _Watched()
                watched.end, self._recorded.macs[batch] = self._runs.observed(
                    schedule, *batch, lambda plan, solve, own=watched: own
                )
                self._recorded.watched[batch] = watched  # whole: an interrupted run leaves none
                self._macs += self._recorded.macs[batch]
            watched = self._recorded.watched[batch]
            own = watched.gram.recording(watched.clean(self._rule, self._levels[-1]), {"teacher": self._runs.identity})
            whole = own if whole is None else whole.and_those_of(own)
            done += len(watched.end)
            self._progress("full runs", done, self._samples)
        self._teacher = torch.cat([self._recorded.watched[batch].end for batch in self._batches])
        self._one = sum(self._recorded.macs[batch] for batch in self._batches) / self._samples
        return whole

    def _measured(self, known: Answer, planned: Planned) -> Answer:
        """Return the network's answer, measured beside the first recorded runs."""
        batch = self._batches[0]
        watched = self._recorded.watched[batch]
        computed = [letter == "F" for letter in planned.schedule.letters]
        meter = AnswerMeter(watched.states, watched.predictions, computed, self._levels, self._rule)
        _, macs = self._runs.observed(planned.schedule, *batch, lambda plan, solve: meter)
        self._macs += macs
        self._progress("answer of the network", 1, 1)
        return meter.answer(known)

    def _fitted(self, schedule: Schedule) -> Schedule:
        fitted, macs = self._runs.fit(schedule, self._seed, self._samples)
        self._macs += macs
        return fitted

    def _local(self, schedule: Schedule, found: torch.Tensor) -> tuple[Schedule, torch.Tensor]:
        """Return a schedule changed step by step, each change kept that is better on both halves of the samples, and its PSNR.

        Its full steps' noise levels are moved; where the sampler draws noise, or the network changes, their places.
        """
        half = self._samples // 2
        halves = [(0, half), (half, self._samples - half)] if half else [(0, self._samples)]
        start = [float(found[first : first + count].mean()) for first, count in halves]
        starts = self._runs.starts
        if self._runs.traits.draws_noise or starts:
            ascent = PlaceAscent(schedule, start, starts)
        else:
            ascent = LevelAscent(schedule, self._runs.sigmas.tolist(), start)
        limit, best = self.full_runs + self.effort.local, schedule
        for tried in ascent:
            if self.full_runs >= limit:
                break
            fitted, reached = self._fitted(tried), []
            for part, least in zip(halves, ascent.psnr_db, strict=True):
                reached.append(self._psnr_db(fitted, *part))
                if float(reached[-1].mean()) <= least:
                    break
            before = ascent.psnr_db
            ascent.tell([float(each.mean()) for each in reached])
            if ascent.psnr_db is not before:
                best, found = fitted, torch.cat(reached)
            self._progress("local search", int(self.full_runs), int(limit))
        return best, found

    def _psnr_db(self, schedule: Schedule, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Return the PSNR [count] of what a schedule makes of the recorded samples, or some of them."""
        steps = None if len(schedule) == self.steps else len(schedule)
        count = self._samples if count is None else count
        teacher, name = self._teacher[first : first + count].float(), "schedules" if steps is None else "plain steps"
        made = self._runs.sample(
            schedule,
            self._seed + first,
            count,
            steps=steps,
            progress=lambda done, _: self._progress(name, done, count * len(schedule)),
        )
        self._macs += made.macs
        return psnr_db(made.latents.float(), teacher, data_range(self._teacher)).clamp(max=99)


def _sure_of(psnr_db: torch.Tensor) -> float:
    """Return what the mean PSNR of other samples is not below in nine of ten cases, from that of a few [B], dB."""
    count = len(psnr_db)
    if count == 1:
        return float(psnr_db) - 2 * SPREAD_DB
    return float(psnr_db.mean()) - float(scipy.special.stdtrit(count - 1, 0.9)) * float(psnr_db.std()) / count**0.5


def nearest(front: Sequence[Planned], full: int) -> Planned:
    """Return the schedule with the most full steps up to a number, or the one with the fewest.

    Args:
        front: from few to many.
        full: steps.
    """
    return max((planned for planned in front if planned.full <= full), key=lambda p: p.full, default=front[0])


def cheapest(front: Sequence[Planned], db: float) -> Planned | None:
    """Return the schedule with the fewest full steps that is predicted to come so near; None where none is."""
    return next((planned for planned in front if planned.predicted_db >= db), None)


class _Watched:
    """What is kept of recorded runs: their Gram matrices, and for the answer's measuring the states and predictions."""

    def __init__(self) -> None:
        self.gram = GramRecorder()
        self.end = torch.empty(0)  # of the run
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def see(self, index: int, x: torch.Tensor, prediction: torch.Tensor) -> None:
        """Take note of a step."""
        if index == 0:
            self._seen = []
        self.gram.see(index, x, prediction)
        self._seen.append((x.detach().clone(), prediction.detach().clone()))

    def blend(self, index: int, history: PredictionHistory) -> None:
        """Return None: a full run extrapolates nothing."""

    def clean(self, rule: Rule, sigma: float) -> torch.Tensor:
        """Return the denoised latents of the last step, on the scale that the run works on: what comes out may have another."""
        return rule.denoised(self._seen[-1][0], sigma, self._seen[-1][1])

    @property
    def bytes(self) -> int:
        """Of memory."""
        tensors = [tensor for pair in self._seen for tensor in pair]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def states(self) -> torch.Tensor:
        return torch.stack([x for x, _ in self._seen])

    @property
    def predictions(self) -> torch.Tensor:
        return torch.stack([prediction for _, prediction in self._seen])
