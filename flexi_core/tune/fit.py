"""Blends of extrapolated steps, fitted to the teacher.

Which extrapolation is right (held, linear, quadratic; in the step or in the log of the noise level) differs from gap to gap,
with the solver and with where the computed steps lie. So it is measured: for each stretch of extrapolated steps the factors of
the held prediction, its linear and its quadratic change are those with which the run comes nearest to the teacher's own state
at the next computed step, in least squares of relative errors. Stretches are fitted one after the other, from the state that
the run is really in, so that one makes up for what the ones before it left.

That needs to know where a solver goes from given predictions. A solver with one evaluation a step is linear in them, beside the
noise that it draws; `linear_response` asks it for its own coefficients. On the teacher's own noise levels the noise is the
teacher's too, and drops out of what is missing. Close to this: optimal linear subspace search (Duan et al., 2023), which fits
every step's own coefficients on the teacher's states.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from ..run.null_steps.basis import DENOISED, DERIVATIVE, Rule
from ..run.null_steps.extrapolation import PredictionHistory
from ..run.plan import Plan
from ..run.sampler import Solver
from ..schedule.kinds import StepKind
from ..schedule.schedule import Schedule

TERMS = 3  # of a blend: held, linear, quadratic; a cubic one gained nothing in any trial
_DIGITS = 4  # of a factor
RIDGE = 1e-5  # of each term's own size, towards the blend that a fit begins from
# Fitted on 8 samples of the embedded model, 16 unseen ones: over the ridge above -0.1, +0.2 and +0.5 dB with 10, 8 and 6 full
# steps of 20 under euler_ancestral, 0.0, +0.5 and -0.1 dB under dpmpp_2m_sde; two terms in place of three lose 0.1 to 0.4 dB.
RIDGE_UNDER_NOISE = 0.1
_REWEIGHTINGS = 3
_EXACT = 1e-9  # of what is missing on average: an error of 0


def linear_response(solve: Solver, sigmas: torch.Tensor, basis: str = DERIVATIVE) -> torch.Tensor | None:
    """Return how a solver's states follow from its start and its predictions in a basis, beside the noise that it draws.

    Args:
        solve: runs the solver with any denoiser, on latents [1, 1, 1, n + 1]; its noise is the same in every run.
        sigmas: noise levels [n + 1].
        basis: of the predictions.

    Returns:
        coefficients [n + 1, n + 1], float64: row i is the state at sigmas[i] over the start and the n predictions; None for a
        solver that is not linear, or asks otherwise than once at each noise level.
    """
    n = len(sigmas) - 1
    units = torch.eye(n + 1, dtype=torch.float64)
    mixed = torch.linspace(-1, 1, n + 1, dtype=torch.float64).sin()
    try:
        response = _linear_states(solve, units[0], units[1:], sigmas, basis)
        # Of a solver that is linear, a mixture of its inputs makes the same mixture of its states.
        both = _linear_states(solve, mixed[:1], mixed[1:, None], sigmas, basis)
    except Exception:  # whatever a solver's code does with a latent of another kind: it is then not fitted
        return None
    if response is None or both is None or not response.isfinite().all():
        return None
    expected = response @ mixed
    return response if torch.allclose(both[:, 0], expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max())) else None


def response_at(
    solve: Solver,
    sigmas: torch.Tensor,
    response: torch.Tensor,
    levels: torch.Tensor,
    at: Iterable[int] | None = None,
    basis: str = DERIVATIVE,
) -> torch.Tensor | None:
    """Return how a solver's states at other noise levels than its own follow from its start and its predictions.

    The solver gets to a level between two of its own by a step that ends there, and goes on from where it was.

    Args:
        solve: the solver.
        sigmas: its noise levels [n + 1].
        response: on these.
        levels: noise levels [n + 1] with the same ends.
        at: which of these are wanted; by default all.
        basis: of the predictions.

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
        short = linear_response(solve, torch.cat([before, levels[i : i + 1], sigmas[-1:]]), basis)
        if short is None:
            return None
        rows[i, : len(before) + 1] = short[len(before), : len(before) + 1]
    return rows


def _linear_states(
    solve: Solver, start: torch.Tensor, predictions: torch.Tensor, sigmas: torch.Tensor, basis: str
) -> torch.Tensor | None:
    """Return the states [n + 1, m] of a run, less those of a run of nothing but the solver's noise."""
    states = _states(solve, start, predictions, sigmas, basis)
    noise = _states(solve, torch.zeros_like(start), torch.zeros_like(predictions), sigmas, basis)
    return None if states is None or noise is None else states - noise


def _states(
    solve: Solver, start: torch.Tensor, predictions: torch.Tensor, sigmas: torch.Tensor, basis: str
) -> torch.Tensor | None:
    """Return the states [n + 1, m] of a run of m numbers from a start [m] with predictions [n, m] given by step."""
    states: list[torch.Tensor] = []

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        at = len(states)
        if at >= len(predictions) or abs(sigma - float(sigmas[at])) > 1e-4 * float(sigmas[at]):
            raise ValueError("the solver asks elsewhere than once at each noise level")
        states.append(x.double().flatten().clone())
        given = predictions[at].to(x)
        return given.expand_as(x) if basis == DENOISED else x - sigma * given

    end = solve(denoise, start.reshape(1, 1, 1, -1), sigmas.double())
    return torch.stack([*states, end.double().flatten()]) if len(states) == len(predictions) else None


@dataclass(frozen=True)
class Trajectory:
    """What a run of full steps went through.

    Args:
        start: its first state [B, ...], float64.
        predictions: in the run's basis at each step [n, B, ...], float64.
    """

    start: torch.Tensor
    predictions: torch.Tensor

    def state(self, response: torch.Tensor, at: int) -> torch.Tensor:
        """Return the state [B, ...] at a step, or the end, by the solver's response there, without the noise it drew."""
        return _combination(response[at], self.start, self.predictions)


class TrajectoryRecorder:
    """Records the trajectory of a run of full steps."""

    def __init__(self) -> None:
        self._start: torch.Tensor | None = None
        self._predictions: list[torch.Tensor] = []

    def see(self, index: int, x: torch.Tensor, prediction: torch.Tensor) -> None:
        """Keep a step's prediction."""
        if index == 0:
            self._start, self._predictions = _exact(x), []
        self._predictions.append(_exact(prediction))

    def blend(self, index: int, history: PredictionHistory) -> None:
        """Return None: a run of full steps extrapolates nothing."""

    @property
    def trajectory(self) -> Trajectory:
        return Trajectory(self._start, torch.stack(self._predictions))


class BlendFit:
    """Fits the blends of a schedule, over one run or several, one after the other.

    Each run is of the same plan, beside the teacher's trajectory of the same samples; its blends come from the equations
    of the runs so far and its own. Fitting in one batch is best; runs of single samples come near to it.

    Args:
        plan: of the schedule.
        full: the teacher's response at all of the plan's noise levels.
        kept: the solver's response on those that the plan keeps.
        ridge: how strongly it is held to the blend that it begins from.
    """

    def __init__(self, plan: Plan, full: torch.Tensor, kept: torch.Tensor, ridge: float = RIDGE) -> None:
        self._plan, self._full, self._kept, self._ridge = plan, full, kept, ridge
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

    def see(self, index: int, x: torch.Tensor, prediction: torch.Tensor) -> None:
        """Take note of a step's prediction, computed or extrapolated."""
        if index == 0:  # a run that was broken off may begin anew
            self._start, self._applied, self._own = _exact(x), {}, {}
        self._applied[index] = _exact(prediction)

    def blend(self, index: int, history: PredictionHistory) -> tuple[float, ...] | None:
        """Return the blend of an extrapolated step, fitted when its stretch begins.

        None where the segment has other null steps between its stretches, or the factors are far from any sense: there the
        schedule's own extrapolation stays.

        Args:
            index: of the step.
            history: of the run's computed predictions.
        """
        first = index
        while self._plan.steps[first - 1].kind is StepKind.EXTRAPOLATED:
            first -= 1
        if first == index:
            fitted = self._fitted(first, history) if first in self._whole else None
            usable = fitted is not None and all(abs(factor) < _LARGEST for factor in fitted)
            self._blends[first] = fitted if usable else None
        return self._blends[first]

    def _fitted(self, first: int, history: PredictionHistory) -> tuple[float, ...]:
        steps, positions = self._plan.steps, {index: at for at, index in enumerate(self._plan.kept)}
        stop = next((i for i in range(first, len(steps)) if steps[i].kind not in _NOT_COMPUTED), len(steps))
        row = self._kept[positions[stop]]
        stretch = [i for i in range(first, stop) if steps[i].kind is StepKind.EXTRAPOLATED]
        known = self._start * float(row[0])
        for index, prediction in self._applied.items():
            known = known + prediction * float(row[1 + positions[index]])
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
        prior = torch.tensor([*_prior(self._plan.rule), *[0.0] * TERMS][:terms], dtype=torch.float64)
        equations = Equations.of(torch.stack(effects, 1), missing.flatten(1), prior)
        if first in self._before and self._before[first].terms == terms:
            equations = self._before[first].and_those_of(equations)
        self._own[first] = equations
        return tuple(round(float(factor), _DIGITS) for factor in prior + equations.solution(self._ridge))

    def schedule(self, schedule: Schedule) -> Schedule:
        """Return the schedule with the blends that were fitted, and their basis where that is not the derivative."""
        segments, at = [], 0
        for segment in schedule.segments:
            blend = next((b for i in range(at, at + len(segment)) if (b := self._blends.get(i))), None)
            own = segment.blend if self._plan.rule.own_blends else None
            segments.append(replace(segment, blend=blend or own))
            at += len(segment)
        # Blends without a basis are of the derivative.
        basis = DENOISED if self._plan.rule.basis == DENOISED else schedule.basis
        return replace(schedule, segments=tuple(segments), basis=basis)


@dataclass(frozen=True)
class Equations:
    """Normal equations of each sample, for what the factors are beyond those that a fit begins from.

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

    def solution(self, ridge: float = RIDGE) -> torch.Tensor:
        """Return the factors [T] of least squares, reweighted so that every sample counts by its relative error.

        Without that the few samples that are far off decide for all.

        Args:
            ridge: of each term's own size, added to it.
        """
        weights = torch.ones_like(self.missing)
        for _ in range(1 + _REWEIGHTINGS):
            gram = torch.einsum("b,btu->tu", weights, self.gram)
            right = torch.einsum("b,bt->t", weights, self.right)
            solved = torch.linalg.lstsq(gram + ridge * torch.diag(gram.diagonal()), right[:, None]).solution[:, 0]
            left = self.missing - 2 * self.right @ solved + torch.einsum("t,btu,u->b", solved, self.gram, solved)
            weights = 1 / left.clamp_min(_EXACT * float(self.missing.mean()))
            weights = weights / weights.mean()
        return solved


def _prior(rule: Rule) -> tuple[float, ...]:
    """Return the factors that a fit begins from."""
    return rule.blend if rule.basis == DENOISED else (1.0, 1.0)


def _whole_stretches(plan: Plan) -> set[int]:
    """Return the first steps of the stretches that are all of their segment's extrapolated steps."""
    firsts: dict[int, list[int]] = {}
    for i, step in enumerate(plan.steps):
        if step.kind is StepKind.EXTRAPOLATED and plan.steps[i - 1].kind is not StepKind.EXTRAPOLATED:
            firsts.setdefault(step.segment, []).append(i)
    return {stretches[0] for stretches in firsts.values() if len(stretches) == 1}


_NOT_COMPUTED = (StepKind.EXTRAPOLATED, StepKind.NULL)
_LARGEST = 20.0


def _combination(row: torch.Tensor, start: torch.Tensor, predictions: torch.Tensor) -> torch.Tensor:
    total = start * float(row[0])
    for coefficient, prediction in zip(row[1:].tolist(), predictions, strict=True):
        if coefficient:
            total = total + prediction * coefficient
    return total


def _exact(x: torch.Tensor) -> torch.Tensor:
    """Return a latent for solving: float64, which not every device has."""
    return x.detach().to("cpu", torch.float64)
