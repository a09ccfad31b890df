"""Fits the blends of candidates, beside the teacher's own trajectories."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch

from flexi_core.extrapolation import Observer
from flexi_core.fit import BlendFit, Solver, Trajectory, TrajectoryRecorder, linear_response, response_at
from flexi_core.plan import Plan
from flexi_core.presets import all_full
from flexi_core.replay import PredictionStore
from flexi_core.schedule import Schedule

Observe = Callable[[Plan, Solver], "Observer | None"]
# (schedule, batch, observe, predictions) -> MACs spent: samples one batch under a schedule, followed by an observer
Observed = Callable[[Schedule, Hashable, Observe, "PredictionStore | None"], float]


class BlendFitter:
    """Fits schedules to one teacher, whose trajectories are sampled once for each batch and kept.

    Args:
        observed: samples one batch under a schedule.
    """

    def __init__(self, observed: Observed) -> None:
        self._observed = observed
        self._sigmas: torch.Tensor | None = None  # of the teacher
        self._response: torch.Tensor | None = None  # of its solver
        self._trajectories: dict[Hashable, Trajectory] = {}

    def fit(
        self, schedule: Schedule, batches: Sequence[Hashable], predictions: PredictionStore | None = None
    ) -> tuple[Schedule, float]:
        """Return a schedule with fitted blends, and the MACs that its runs took.

        A schedule comes back as it is where it extrapolates nothing, or where the sampler cannot be fitted (it draws noise,
        asks twice a step, or is not linear in what it is told).

        Args:
            schedule: of the teacher's length.
            batches: of samples, each fitted on beside those before it.
            predictions: where network evaluations are looked up before they are computed, and kept.
        """
        fit: BlendFit | None = None
        macs = 0.0
        for batch in batches if "X" in schedule.letters else ():
            teacher = self._trajectory(batch, len(schedule))
            if self._response is None:
                break

            def observe(plan: Plan, solve: Solver, teacher: Trajectory = teacher) -> Observer | None:
                nonlocal fit
                if fit is None:
                    levels = torch.tensor(plan.sigmas)
                    kept = linear_response(solve, levels[list(plan.kept)])
                    ends = [i for i, step in enumerate(plan.steps) if not step.kind.is_null]  # of the stretches
                    full = response_at(solve, self._sigmas, self._response, levels, [*ends, len(plan.steps)])
                    if kept is None or full is None:
                        return None
                    fit = BlendFit(plan, full, kept)
                fit.begin(teacher)
                return fit

            macs += self._observed(schedule, batch, observe, predictions)
        return (schedule if fit is None else fit.schedule(schedule)), macs

    def _trajectory(self, batch: Hashable, steps: int) -> Trajectory:
        if batch not in self._trajectories:
            recorder = TrajectoryRecorder()

            def observe(plan: Plan, solve: Solver) -> Observer:
                if self._response is None:
                    self._sigmas = torch.tensor(plan.sigmas)
                    self._response = linear_response(solve, self._sigmas)
                return recorder

            self._observed(all_full(steps), batch, observe, None)
            self._trajectories[batch] = recorder.trajectory
        return self._trajectories[batch]
