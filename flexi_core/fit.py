"""Blends of extrapolated steps, fitted to the teacher.

Which extrapolation is right (held, linear, quadratic; in the step or in the log of the noise level) differs from gap to gap,
with the solver and with where the computed steps lie. So it is measured: for each stretch of extrapolated steps the factors of
the held derivative, its linear and its quadratic change are those with which the run comes nearest to the teacher's own state
at the next computed step, in least squares of relative errors. Stretches are fitted one after the other, from the state that
the run is really in, so that one makes up for what the ones before it left.

That needs to know where a solver goes from given derivatives. A deterministic solver with one evaluation a step is linear in
them; `linear_response` asks it for its own coefficients. Close to this: optimal linear subspace search (Duan et al., 2023),
which fits every step's own coefficients on the teacher's states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from .extrapolation import DerivativeHistory
from .plan import Plan
from .schedule import Schedule, StepKind

TERMS = 3  # of a blend: held, linear, quadratic; a cubic one gained nothing in any trial
_DIGITS = 4  # of a factor
_RIDGE = 1e-5  # of each term's own size, towards the linear extrapolation
_REWEIGHTINGS = 3
_EXACT = 1e-9  # of what is missing on average: an error of 0

# (denoise(x, sigma), x, sigmas [n + 1]) -> where the solver ends
Solver = Callable[[Callable[[torch.Tensor, float], torch.Tensor], torch.Tensor, torch.Tensor], torch.Tensor]


def linear_response(solve: Solver, sigmas: torch.Tensor) -> torch.Tensor | None:
    """Return how a solver's states follow from its start and its derivatives d = (x - denoised) / sigma.

    Args:
        solve: runs the solver with any denoiser, on latents [1, 1, 1, n + 1].
        sigmas: noise levels [n + 1].

    Returns:
        coefficients [n + 1, n + 1], float64: row i is the state at sigmas[i] over (start, d_0, ..., d_(n-1)); None for a
        solver that is not linear, draws noise, or asks otherwise than once at each noise level.
    """
    n = len(sigmas) - 1
    units = torch.eye(n + 1, dtype=torch.float64)
    mixed = torch.linspace(-1, 1, n + 1, dtype=torch.float64).sin()
    try:
        response = _states(solve, units[0], units[1:], sigmas)
        # Of a solver that is linear, a mixture of its inputs makes the same mixture of its states.
        both = _states(solve, mixed[:1], mixed[1:, None], sigmas)
    except Exception:  # whatever a solver's code does with a latent of another kind: it is then not fitted
        return None
    if response is None or both is None or not response.isfinite().all():
        return None
    expected = response @ mixed
    return response if torch.allclose(both[:, 0], expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max())) else None


def response_at(
    solve: Solver, sigmas: torch.Tensor, response: torch.Tensor, levels: torch.Tensor, at: Iterable[int] | None = None
) -> torch.Tensor | None:
    """Return how a solver's states at other noise levels than its own follow from its start and its derivatives.

    The solver gets to a level between two of its own by a step that ends there, and goes on from where it was.

    Args:
        solve: the solver.
        sigmas: its noise levels [n + 1].
        response: on these.
        levels: noise levels [n + 1] with the same ends.
        at: which of these are wanted; by default all.

    Returns:
        coefficients [n + 1, n + 1], row i of the state at levels[i], zeros where that is not wanted; None where the solver has
        no response on such a grid.
    """
    rows = torch.zeros_like(response)
    for i in range(len(levels)) if at is None else at:
        if levels[i] == sigmas[i]:
            rows[i] = response[i]
            continue
        before = sigmas[sigmas > levels[i]]
        short = linear_response(solve, torch.cat([before, levels[i : i + 1], sigmas[-1:]]))
        if short is None:
            return None
        rows[i, : len(before) + 1] = short[len(before), : len(before) + 1]
    return rows


def _states(solve: Solver, start: torch.Tensor, derivatives: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor | None:
    """Return the states [n + 1, m] of a run of m numbers from a start [m] with derivatives [n, m] given by step."""
    states: list[torch.Tensor] = []

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        at = len(states)
        if at >= len(derivatives) or abs(sigma - float(sigmas[at])) > 1e-4 * float(sigmas[at]):
            raise ValueError("the solver asks elsewhere than once at each noise level")
        states.append(x.double().flatten().clone())
        return x - sigma * derivatives[at].to(x)

    end = solve(denoise, start.reshape(1, 1, 1, -1), sigmas.double())
    return torch.stack([*states, end.double().flatten()]) if len(states) == len(derivatives) else None


@dataclass(frozen=True)
class Trajectory:
    """What a run of full steps went through.

    Args:
        start: its first state [B, ...], float64.
        derivatives: (x - denoised) / sigma at each step [n, B, ...], float64.
    """

    start: torch.Tensor
    derivatives: torch.Tensor

    def state(self, response: torch.Tensor, at: int) -> torch.Tensor:
        """Return the state [B, ...] at a step, or the end, by the solver's response there."""
        return _combination(response[at], self.start, self.derivatives)


class TrajectoryRecorder:
    """Records the trajectory of a run of full steps."""

    def __init__(self) -> None:
        self._start: torch.Tensor | None = None
        self._derivatives: list[torch.Tensor] = []

    def see(self, index: int, x: torch.Tensor, derivative: torch.Tensor) -> None:
        """Keep a step's derivative."""
        if index == 0:
            self._start, self._derivatives = _exact(x), []
        self._derivatives.append(_exact(derivative))

    def blend(self, index: int, history: DerivativeHistory) -> None:
        """Return None: a run of full steps extrapolates nothing."""

    @property
    def trajectory(self) -> Trajectory:
        return Trajectory(self._start, torch.stack(self._derivatives))


class BlendFit:
    """Fits the blends of a schedule, over one run or several, one after the other.

    Each run is of the same plan, beside the teacher's trajectory of the same samples; its blends come from the equations
    of the runs so far and its own. Fitting in one batch is best; runs of single samples come near to it.

    Args:
        plan: of the schedule.
        full: the teacher's response at all of the plan's noise levels.
        kept: the solver's response on those that the plan keeps.
    """

    def __init__(self, plan: Plan, full: torch.Tensor, kept: torch.Tensor) -> None:
        self._plan, self._full, self._kept = plan, full, kept
        # The equations of the runs before, and with those of this one, by the stretch's first step.
        self._before: dict[int, Equations] = {}
        self._own: dict[int, Equations] = {}
        self._blends: dict[int, tuple[float, ...] | None] = {}
        self._whole = _whole_stretches(plan)
        self._teacher: Trajectory | None = None

    def begin(self, teacher: Trajectory) -> None:
        """Begin a run beside the teacher's; what the run before it found stays."""
        if teacher is not self._teacher:  # else it is the same run again, which was broken off
            self._before |= self._own
        self._teacher = teacher

    def see(self, index: int, x: torch.Tensor, derivative: torch.Tensor) -> None:
        """Take note of a step's derivative, computed or extrapolated."""
        if index == 0:  # a run that was broken off may begin anew
            self._start, self._applied, self._own = _exact(x), {}, {}
        self._applied[index] = _exact(derivative)

    def blend(self, index: int, history: DerivativeHistory) -> tuple[float, ...] | None:
        """Return the blend of an extrapolated step, fitted when its stretch begins.

        None where the segment has other null steps between its stretches, or the factors are far from any sense: there the
        schedule's own extrapolation stays.

        Args:
            index: of the step.
            history: of the run's computed derivatives.
        """
        first = index
        while self._plan.steps[first - 1].kind is StepKind.EXTRAPOLATED:
            first -= 1
        if first == index:
            fitted = self._fitted(first, history) if first in self._whole else None
            usable = fitted is not None and all(abs(factor) < _LARGEST for factor in fitted)
            self._blends[first] = fitted if usable else None
        return self._blends[first]

    def _fitted(self, first: int, history: DerivativeHistory) -> tuple[float, ...]:
        steps, positions = self._plan.steps, {index: at for at, index in enumerate(self._plan.kept)}
        stop = next((i for i in range(first, len(steps)) if steps[i].kind not in _NOT_COMPUTED), len(steps))
        row = self._kept[positions[stop]]
        stretch = [i for i in range(first, stop) if steps[i].kind is StepKind.EXTRAPOLATED]
        known = self._start * float(row[0])
        for index, derivative in self._applied.items():
            known = known + derivative * float(row[1 + positions[index]])
        missing = self._teacher.state(self._full, stop) - known
        terms = len(history.changes(first, TERMS))
        effects = []
        for term in range(terms):
            changes = [history.changes(float(index), TERMS)[term] for index in stretch]
            gains = [float(row[1 + positions[index]]) for index in stretch]
            weights = [
                sum(gain * change[i] for gain, change in zip(gains, changes, strict=True)) for i in range(len(changes[0]))
            ]
            effects.append(_exact(history.combined(weights)).flatten(1))
        prior = torch.ones(terms, dtype=torch.float64)
        prior[2:] = 0.0
        equations = Equations.of(torch.stack(effects, 1), missing.flatten(1), prior)
        if first in self._before and self._before[first].terms == terms:
            equations = self._before[first].and_those_of(equations)
        self._own[first] = equations
        return tuple(round(float(factor), _DIGITS) for factor in prior + equations.solution())

    def schedule(self, schedule: Schedule) -> Schedule:
        """Return the schedule with the blends that were fitted."""
        segments, at = [], 0
        for segment in schedule.segments:
            blend = next((b for i in range(at, at + len(segment)) if (b := self._blends.get(i))), None)
            segments.append(replace(segment, blend=blend) if blend else segment)
            at += len(segment)
        return replace(schedule, segments=tuple(segments))


@dataclass(frozen=True)
class Equations:
    """Normal equations of each sample, for what the factors are beyond those of the linear extrapolation.

    Args:
        gram: of the terms' effects [B, T, T].
        right: of the effects and what is missing [B, T].
        missing: squared [B].
    """

    gram: torch.Tensor
    right: torch.Tensor
    missing: torch.Tensor

    @classmethod
    def of(cls, effects: torch.Tensor, missing: torch.Tensor, prior: torch.Tensor) -> Equations:
        """Return the equations of effects [B, T, N], a state that is missing [B, N], and factors to go on from [T]."""
        left = missing - torch.einsum("t,btn->bn", prior, effects)
        return cls(effects @ effects.mT, torch.einsum("btn,bn->bt", effects, left), left.square().sum(1))

    @property
    def terms(self) -> int:
        return self.right.shape[1]

    def and_those_of(self, other: Equations) -> Equations:
        """Return the equations of these samples and another's."""
        pairs = zip((self.gram, self.right, self.missing), (other.gram, other.right, other.missing), strict=True)
        return Equations(*map(torch.cat, pairs))

    def solution(self) -> torch.Tensor:
        """Return the factors [T] of least squares, reweighted so that every sample counts by its relative error.

        Without that the few samples that are far off decide for all.
        """
        weights = torch.ones_like(self.missing)
        for _ in range(1 + _REWEIGHTINGS):
            gram = torch.einsum("b,btu->tu", weights, self.gram)
            right = torch.einsum("b,bt->t", weights, self.right)
            solved = torch.linalg.lstsq(gram + _RIDGE * torch.diag(gram.diagonal()), right[:, None]).solution[:, 0]
            left = self.missing - 2 * self.right @ solved + torch.einsum("t,btu,u->b", solved, self.gram, solved)
            weights = 1 / left.clamp_min(_EXACT * float(self.missing.mean()))
            weights = weights / weights.mean()
        return solved


def _whole_stretches(plan: Plan) -> set[int]:
    """Return the first steps of the stretches that are all of their segment's extrapolated steps."""
    firsts: dict[int, list[int]] = {}
    for i, step in enumerate(plan.steps):
        if step.kind is StepKind.EXTRAPOLATED and plan.steps[i - 1].kind is not StepKind.EXTRAPOLATED:
            firsts.setdefault(step.segment, []).append(i)
    return {stretches[0] for stretches in firsts.values() if len(stretches) == 1}


_NOT_COMPUTED = (StepKind.EXTRAPOLATED, StepKind.NULL)
_LARGEST = 20.0


def _combination(row: torch.Tensor, start: torch.Tensor, derivatives: torch.Tensor) -> torch.Tensor:
    total = start * float(row[0])
    for coefficient, derivative in zip(row[1:].tolist(), derivatives, strict=True):
        if coefficient:
            total = total + derivative * coefficient
    return total


def _exact(x: torch.Tensor) -> torch.Tensor:
    """Return a latent for solving: float64, which not every device has."""
    return x.detach().to("cpu", torch.float64)
