"""Fits the blends of candidates, beside the teacher's own trajectories."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import torch

from ..run.null_steps.basis import rule_of
from ..run.null_steps.extrapolation import Observer
from ..run.plan import Plan
from ..run.replay import PredictionStore
from ..run.sampler import PLAIN, SamplerTraits, Solver
from ..schedule.presets import all_full
from ..schedule.schedule import Schedule
from .fit import RIDGE, RIDGE_UNDER_NOISE, BlendFit, Trajectory, TrajectoryRecorder, linear_response, response_at

Observe = Callable[[Plan, Solver], "Observer | None"]
# (schedule, batch, observe, predictions) -> MACs spent: samples one batch under a schedule, followed by an observer
Observed = Callable[[Schedule, Hashable, Observe, "PredictionStore | None"], float]


class BlendFitter:
    """Fits schedules to one teacher, whose trajectories are sampled once for each batch and basis, and kept.

    Args:
        observed: samples one batch under a schedule.
        sampler: what the teacher's sampler does.
    """

    def __init__(self, observed: Observed, sampler: SamplerTraits = PLAIN) -> None:
        self._observed, self._sampler = observed, sampler
        self._sigmas: torch.Tensor | None = None  # of the teacher
        self._responses: dict[str, torch.Tensor | None] = {}  # of its solver, by basis
        self._trajectories: dict[tuple[Hashable, str], Trajectory] = {}

    def fit(
        self, schedule: Schedule, batches: Sequence[Hashable], predictions: PredictionStore | None = None
    ) -> tuple[Schedule, float]:
        """Return a schedule with fitted blends, and the MACs that its runs took.

        A schedule comes back as it is where it extrapolates nothing, where the sampler cannot be fitted (it asks twice a step,
        or is not linear in what it is told), and where the sampler draws noise and the schedule takes it to other noise levels
        than the teacher's: what is missing is then other noise, which no blend makes up for.

        Args:
            schedule: of the teacher's length.
            batches: of samples, each fitted on beside those before it.
            predictions: where network evaluations are looked up before they are computed, and kept.
        """
        elsewhere = "N" in schedule.letters or schedule.sigmas is not None
        if "X" not in schedule.letters or (self._sampler.draws_noise and elsewhere):
            return schedule, 0.0
        basis = rule_of(schedule, self._sampler).basis
        fit: BlendFit | None = None
        macs = 0.0
        for batch in batches:
            teacher, response = self._trajectory(batch, len(schedule), basis), self._responses[basis]
            if response is None:
                break

            def observe(
                plan: Plan, solve: Solver, teacher: Trajectory = teacher, response: torch.Tensor = response
            ) -> Observer | None:
                nonlocal fit
                if fit is None:
                    levels = torch.tensor(plan.sigmas)
                    kept = linear_response(solve, levels[list(plan.kept)], basis)
                    ends = [i for i, step in enumerate(plan.steps) if not step.kind.is_null]  # of the stretches
                    full = response_at(solve, self._sigmas, response, levels, [*ends, len(plan.steps)], basis)
                    if kept is None or full is None:
                        return None
                    fit = BlendFit(plan, full, kept, RIDGE_UNDER_NOISE if self._sampler.draws_noise else RIDGE)
                fit.begin(teacher)
                return fit

            macs += self._observed(schedule, batch, observe, predictions)
        return (schedule if fit is None else fit.schedule(schedule)), macs

    def keep(self, batch: Hashable, basis: str, trajectory: Trajectory, sigmas: torch.Tensor, response: torch.Tensor) -> None:
        """Keep a batch's trajectory that was recorded elsewhere, so that it is not sampled again.

        Args:
            batch: of samples.
            basis: of the trajectory's predictions.
            trajectory: of the teacher.
            sigmas: its noise levels [n + 1].
            response: of its solver in the basis.
        """
        self._sigmas, self._responses[basis] = sigmas, response
        self._trajectories[batch, basis] = trajectory

    def _trajectory(self, batch: Hashable, steps: int, basis: str) -> Trajectory:
        if (batch, basis) not in self._trajectories:
            recorder = TrajectoryRecorder()

            def observe(plan: Plan, solve: Solver) -> Observer:
                if basis not in self._responses:
                    self._sigmas = torch.tensor(plan.sigmas)
                    self._responses[basis] = linear_response(solve, self._sigmas, basis)
                return recorder

            self._observed(replace(all_full(steps), basis=basis), batch, observe, None)
            self._trajectories[batch, basis] = recorder.trajectory
        return self._trajectories[batch, basis]
