"""Tunes a run: a few full runs are recorded, one accelerated run says how the network answers, and the rest is arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..basis import Rule, rule_of
from ..errors import FlexiError
from ..extrapolation import PredictionHistory
from ..fit import Trajectory, linear_response
from ..metrics import data_range, psnr_db
from ..plan import Plan
from ..presets import all_full, even, full_steps
from ..sampler import Solver
from ..schedule import Schedule
from .answer import Answer, AnswerMeter
from .placement import Planned, plan_front
from .runs import Runs
from .trajectories import GramRecorder, Recording

MEASURED_AT = 2.0  # times fewer steps: of the accelerated run that the network's answer is measured in


@dataclass(frozen=True)
class Tuned:
    """What came out of a planned schedule on the samples that it was tuned on.

    Args:
        schedule: with the better ones of the planned blends and the fitted ones.
        full: its full steps.
        predicted_db: mean PSNR to the teacher, as planned.
        made_db: as it came out.
        plain_db: of as many plain steps of the same sampler and scheduler.
    """

    schedule: Schedule
    full: int
    predicted_db: float
    made_db: float
    plain_db: float

    @property
    def is_ahead(self) -> bool:
        """Whether it is nearer to the teacher than plain steps that cost the same."""
        return self.made_db > self.plain_db


class Tuner:
    """Finds schedules for one run.

    Args:
        runs: of the teacher.
        samples: full runs to record; one is enough at 2x, four are better at 3x.
        seed: of the first of them.
        progress: called with what is done, the work done and the work in all, in samples.

    Raises:
        FlexiError: the run's sampler cannot be tuned.
    """

    def __init__(
        self,
        runs: Runs,
        samples: int,
        seed: int = 0,
        progress: Callable[[str, int, int], None] = lambda name, done, total: None,
    ) -> None:
        self._runs, self._samples, self._seed, self._progress = runs, samples, seed, progress
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
        self._solve: Solver | None = None
        self._watched: list[_Watched] = []
        self._teacher = torch.empty(0)

    @property
    def full_runs(self) -> float:
        """What was spent on the network so far, in full runs of one sample."""
        return self._macs / self._one if self._one else 0.0

    def front(self) -> list[Planned]:
        """Return the best schedules by number of full steps, with what they are predicted to come to."""
        recording = self._recorded()
        response = linear_response(self._solve, self._runs.sigmas, self._rule.basis)
        if response is None:
            raise self._not_for_it()
        for (seed, rows), watched in zip(self._runs.batches(self._seed, self._samples), self._watched, strict=True):
            trajectory = Trajectory(watched.states[0].double(), watched.predictions.double())
            self._runs.keep_trajectory(seed, rows, self._rule.basis, trajectory, response)
        known = Answer.guess(self._levels, flow=self._levels[0] <= 1)  # the levels of flow models are shares of 1
        planned = plan_front(recording, response.numpy(), known, self._rule)
        measured = self._measured(known, nearest(planned, full_steps(self.steps, MEASURED_AT)))
        return plan_front(recording, response.numpy(), measured, self._rule)

    def confirmed(self, planned: Planned, fit: bool = True) -> Tuned:
        """Return what a planned schedule comes to on the recorded samples, with blends fitted in its own runs.

        Args:
            planned: of the front.
            fit: whether blends are fitted too.
        """
        tried = [planned.schedule]
        if fit:
            fitted, macs = self._runs.fit(planned.schedule, self._seed, self._samples)
            self._macs += macs
            tried.append(fitted)
        made = {schedule: self._db(schedule, "schedules") for schedule in dict.fromkeys(tried)}
        best = max(made, key=made.__getitem__)
        plain = self._db(all_full(planned.full), "plain steps")
        return Tuned(best, planned.full, planned.predicted_db, made[best], plain)

    def chosen(self, front: Sequence[Planned], speedup: float, quality: float | None = None, fit: bool = True) -> Tuned | None:
        """Return what the schedule for a speed-up, or the cheapest for a quality, comes to; None where none comes so near.

        Args:
            front: from few full steps to many.
            speedup: how many times fewer steps to compute.
            quality: in place of a speed-up: mean PSNR to the teacher in dB. What was predicted may be missed: then with more
                full steps.
            fit: whether blends are fitted too.
        """
        if quality is None:
            return self.confirmed(nearest(front, full_steps(self.steps, speedup)), fit)
        planned = cheapest(front, quality)
        while planned is not None:
            tuned = self.confirmed(planned, fit)
            if tuned.made_db >= quality:
                return tuned
            planned = next((p for p in front if p.full > tuned.full), None)
        return None

    def _not_for_it(self) -> FlexiError:
        return FlexiError(
            f"{self._runs.sampler} asks the network several times a step, or is not linear in its answers; "
            "tuning is for other samplers: use flexi search"
        )

    def _recorded(self) -> Recording:
        schedule = replace(all_full(self.steps), basis=self._rule.basis)
        whole: Recording | None = None
        ends = []
        for seed, rows in self._runs.batches(self._seed, self._samples):
            watched = _Watched()

            def observe(plan: Plan, solve: Solver, watched: _Watched = watched) -> _Watched:
                self._solve = solve
                return watched

            end, macs = self._runs.observed(schedule, seed, rows, observe)
            self._macs += macs
            self._watched.append(watched)
            ends.append(end)
            own = watched.gram.recording(watched.clean(self._rule, self._levels[-1]), {"teacher": self._runs.identity})
            whole = own if whole is None else whole.and_those_of(own)
            self._progress("full runs", sum(map(len, ends)), self._samples)
        self._teacher = torch.cat(ends)
        self._one = self._macs / self._samples
        return whole

    def _measured(self, known: Answer, planned: Planned) -> Answer:
        """Return the network's answer, measured beside the first recorded runs."""
        seed, rows = self._runs.batches(self._seed, self._samples)[0]
        computed = [letter == "F" for letter in planned.schedule.letters]
        meter = AnswerMeter(self._watched[0].states, self._watched[0].predictions, computed, self._levels, self._rule)
        _, macs = self._runs.observed(planned.schedule, seed, rows, lambda plan, solve: meter)
        self._macs += macs
        self._progress("answer of the network", 1, 1)
        return meter.answer(known)

    def _db(self, schedule: Schedule, name: str) -> float:
        """Return the mean PSNR of what a schedule makes of the recorded samples."""
        steps = None if len(schedule) == self.steps else len(schedule)
        total = self._samples * len(schedule)
        made = self._runs.sample(
            schedule, self._seed, self._samples, steps=steps, progress=lambda done, _: self._progress(name, done, total)
        )
        self._macs += made.macs
        return float(psnr_db(made.latents.float(), self._teacher.float(), data_range(self._teacher)).clamp(max=99).mean())


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
    def states(self) -> torch.Tensor:
        return torch.stack([x for x, _ in self._seen])

    @property
    def predictions(self) -> torch.Tensor:
        return torch.stack([prediction for _, prediction in self._seen])
