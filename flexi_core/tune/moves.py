"""Full steps at noise levels of their own, found without asking the network.

Between two of the recorded levels the teacher's state is where its solver's own shorter step ends, and its prediction lies on
the curve through the recorded ones. So a run at any levels can be foretold (`Simulation`), and levels are moved by what it
foretells. Only where the sampler draws no noise: at other levels it would be other noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch

from ..run.null_steps.basis import Rule
from ..run.null_steps.extrapolation import lagrange
from ..run.sampler import Solver
from ..schedule.schedule import Schedule
from .answer import Answer
from .ascent import LevelAscent
from .fit import linear_response, response_at
from .levels import at_levels, shortest
from .placement import Planned, psnr_of, schedule_of
from .simulation import Ground, Simulation, prior_of
from .trajectories import Recording

_NEAREST = 4  # recorded levels that a prediction between them is taken from: a cubic in log sigma
UNKNOWN = 0.3  # share of a miss
_SAME_LEVEL = 1e-6  # log sigma
_IMPOSSIBLE = -1.0  # dB: of levels at which nothing can be foretold


class LevelMoves:
    """Moves the noise levels of planned schedules.

    Args:
        recording: of full runs.
        sigmas: their noise levels [n + 1].
        solve: the sampler.
        response: of it on these, in the rule's basis [n + 1, n + 1].
        answer: of the network.
        rule: how extrapolated steps are predicted.
    """

    def __init__(
        self, recording: Recording, sigmas: torch.Tensor, solve: Solver, response: torch.Tensor, answer: Answer, rule: Rule
    ) -> None:
        self._recording, self._solve, self._response, self._rule = recording, solve, response, rule
        self._sigmas, self._answer = sigmas.double(), answer
        self._logs = np.log(answer.sigmas)
        self._states: dict[float, np.ndarray | None] = {}  # of the teacher, by noise level

    def moved(self, planned: Planned) -> Planned | None:
        """Return a schedule of as many full steps at moved levels; None where none is foretold to be better."""
        sigmas = [float(sigma) for sigma in self._sigmas]
        own = replace(planned.schedule, sigmas=tuple(map(shortest, sigmas)))
        levels = [sigmas[i] for i, step in enumerate(planned.schedule.steps()) if step.kind.is_full]
        # Every stretch has steps to extrapolate, and so a blend to fit, where full steps are spread evenly over the places.
        starts = [own, replace(at_levels(levels, sigmas), basis=planned.schedule.basis)]
        best: Planned | None = None
        for start in starts:
            ascent = LevelAscent(start, sigmas, [self._foretold(start)[1]])
            for schedule in ascent:
                ascent.tell([self._foretold(schedule)[1]])
            schedule, db = self._foretold(ascent.schedule)
            if db > (best or planned).predicted_db:
                best = Planned(schedule, planned.full, db)
        return best

    def _foretold(self, schedule: Schedule) -> tuple[Schedule, float]:
        """Return a schedule with fitted blends, and the mean PSNR that it is foretold to come to, dB."""
        ground = self._ground(schedule)
        places = [i for i, step in enumerate(schedule.steps()) if step.kind.is_full]
        end = ground and Simulation(ground).followed(places)
        if not end:
            return schedule, _IMPOSSIBLE
        blended = schedule_of(len(schedule), end.places, end.blends, self._rule)
        return replace(blended, sigmas=schedule.sigmas), psnr_of(self._recording.span, end.errors)

    def _ground(self, schedule: Schedule) -> Ground | None:
        levels, n = torch.tensor(schedule.sigmas, dtype=torch.float64), len(schedule)
        levels[0], levels[-1] = self._sigmas[0], self._sigmas[-1]
        full = [i for i, step in enumerate(schedule.steps()) if step.kind.is_full]
        if float(levels[full[-1]].log()) < self._logs[-1] - _SAME_LEVEL:
            return None  # nothing was recorded there
        response = linear_response(self._solve, levels, self._rule.basis)
        if response is None:
            return None
        states, predictions, unknown = np.zeros((n + 1, n + 1)), np.zeros((n, n + 1)), np.zeros(n)
        states[-1] = self._response[-1].numpy()
        for i in full:
            state = self._state(float(levels[i]))
            if state is None:
                return None
            states[i], (predictions[i, 1:], unknown[i]) = state, self._prediction(float(levels[i]))
        answer = self._answer.at(levels[:-1].numpy())
        return Ground(
            self._recording.gram, answer.sigmas, response.numpy(), states, predictions, *answer.in_basis(self._rule),
            prior_of(self._rule), unknown,
        )  # fmt: skip

    def _state(self, level: float) -> np.ndarray | None:
        """Return the teacher's state at a level over its start and predictions [n + 1]."""
        if level not in self._states:
            levels = self._sigmas.clone()
            at = int((self._sigmas > level).sum())
            levels[at] = level
            rows = response_at(self._solve, self._sigmas, self._response, levels, [at], self._rule.basis)
            self._states[level] = None if rows is None else rows[at].numpy()
        return self._states[level]

    def _prediction(self, level: float) -> tuple[np.ndarray, float]:
        """Return the teacher's prediction at a level over those that were recorded [n], and the size of its error."""
        at, n = np.log(level), len(self._logs)
        nearest = int(np.abs(self._logs - at).argmin())
        if abs(at - self._logs[nearest]) < _SAME_LEVEL:
            return np.eye(n)[nearest], 0.0
        after = int(np.searchsorted(-self._logs, -at))
        first = min(max(after - _NEAREST // 2, 0), max(n - _NEAREST, 0))
        near = range(first, min(first + _NEAREST, n))
        share = (at - self._logs[after - 1]) / (self._logs[after] - self._logs[after - 1])
        error = np.interp(at, self._logs[::-1], self._missed[::-1])
        return self._curve(at, near), UNKNOWN * 4 * share * (1 - share) * error

    @cached_property
    def _missed(self) -> np.ndarray:
        """How far each recorded prediction [n] is from the curve through those beside it."""
        n = len(self._logs)
        found = np.zeros(n)
        for i in range(n):
            first = min(max(i - _NEAREST // 2, 0), max(n - _NEAREST - 1, 0))
            beside = [j for j in range(first, min(first + _NEAREST + 1, n)) if j != i]
            left = -self._curve(self._logs[i], beside)
            left[i] += 1
            found[i] = np.sqrt(np.maximum(np.einsum("i,bij,j->b", left, self._recording.gram[:, 1:, 1:], left), 0).mean())
        return found

    def _curve(self, at: float, near: Sequence[int]) -> np.ndarray:
        """Return the weights [n] of recorded predictions in the curve through some of them."""
        weights = np.zeros(len(self._logs))
        weights[list(near)] = lagrange([self._logs[i] for i in near], at)
        return weights
