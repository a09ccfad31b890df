"""Where the full steps go, and how the others are blended, for every speed-up at once; no network is asked.

Every state of a run near the teacher's is a combination of the teacher's start and predictions, and of the directions that the
network's answers stray into (`Answer`), each of a size that is known. So an accelerated run is a few dozen numbers, and how far
it is from the teacher follows from the Gram matrix (`Recording`). The run is built from its start, one full step after the
other: a beam search over the step and the number of full steps until then. The blend of each stretch between two of them is the
one that comes nearest to the teacher's state at its end, as in `BlendFit`.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..basis import DENOISED, Rule
from ..errors import FlexiError
from ..fit import RIDGE
from ..schedule import Schedule, Segment, StepKind
from .answer import Answer
from .trajectories import Recording

WIDTH = 3  # of the beam, for each step and number of full steps
LONGEST = 16  # steps from one full step to the next
FORGETS = 0.5  # of the direction that answers stray into, for each unit of log sigma
_TERMS = 3  # of a blend: held, linear, quadratic
_REWEIGHTINGS = 2
_EXACT = 1e-9  # of what is missing on average: an error of 0
_TINY = 1e-14
_DIGITS = 4  # of a factor
_LARGEST = 20.0  # factor of a blend that makes sense
_MOST_DB = 99.0


@dataclass(frozen=True)
class Planned:
    """A schedule and what it is predicted to come to.

    Args:
        schedule: full and extrapolated steps with their blends.
        full: how many full ones.
        predicted_db: mean PSNR to the run of all steps.
    """

    schedule: Schedule
    full: int
    predicted_db: float


@dataclass
class _States:
    """Runs that have come to a full step [S].

    Args:
        places: of their full steps so far.
        blends: of the stretches between them.
        values: the prediction of every step so far, as a combination of start, predictions, directions [S, n, D].
        direction: that the last answer strayed into [S, n].
    """

    places: list[tuple[int, ...]]
    blends: list[tuple[np.ndarray | None, ...]]
    values: np.ndarray
    direction: np.ndarray


@dataclass(order=True)
class _Arrival:
    """A run's next full step, or its end.

    Args:
        score: mean log of the squared error there, over samples.
        errors: of each sample [B].
        source: runs at their last full step.
        at: which of them.
        blend: of the stretch.
    """

    score: float
    errors: np.ndarray = field(compare=False)
    source: _States = field(compare=False)
    at: int = field(compare=False)
    blend: np.ndarray | None = field(compare=False)

    @property
    def places(self) -> tuple[int, ...]:
        """Of the full steps before it."""
        return self.source.places[self.at]

    @property
    def blends(self) -> tuple[np.ndarray | None, ...]:
        """Of all stretches before it."""
        return (*self.source.blends[self.at], self.blend)


def plan_front(
    recording: Recording,
    response: np.ndarray,
    answer: Answer,
    rule: Rule,
    most_full: int | None = None,
    width: int = WIDTH,
) -> list[Planned]:
    """Return the best schedule of each number of full steps, from few to many; one that more steps do not better is left out.

    Args:
        recording: of full runs of n steps.
        response: of the solver in the rule's basis [n + 1, n + 1] (`fit.linear_response`).
        answer: of the network at the run's noise levels.
        rule: how extrapolated steps are predicted.
        most_full: no more full steps than that; by default all but one.
        width: of the beam.

    Raises:
        FlexiError: recording, response and answer are not of one number of steps.
    """
    n = recording.steps
    if response.shape != (n + 1, n + 1) or len(answer.sigmas) != n:
        raise FlexiError(
            f"the recording is of {n} steps, the solver's response of {len(response) - 1}, the answer of {len(answer.sigmas)}"
        )
    found = _Beam(recording, response, answer, rule, most_full or n - 1, width).search()
    front: list[Planned] = []
    for full, end in sorted(found.items()):
        db = _psnr_db(recording.span, end.errors)
        if not front or db > front[-1].predicted_db:
            front.append(Planned(_schedule(n, end.places, end.blends, rule), full, db))
    return front


class _Beam:
    """See `plan_front`."""

    def __init__(
        self, recording: Recording, response: np.ndarray, answer: Answer, rule: Rule, most_full: int, width: int
    ) -> None:
        self._n = recording.steps
        self._gram, self._response = recording.gram, response
        self._gain, self._rest = answer.in_basis(rule)
        self._levels = np.log(answer.sigmas)
        self._most, self._width = most_full, width
        self._prior = np.array([*rule.blend, *[0.0] * _TERMS][:_TERMS] if rule.basis == DENOISED else [1.0, 1.0, 0.0])

    def search(self) -> dict[int, _Arrival]:
        """Return the best end for each number of full steps."""
        n = self._n
        # By step and number of full steps before it.
        arrivals: list[dict[int, list[_Arrival]]] = [{} for _ in range(n + 1)]
        for step in range(n):
            for states in [self._start()] if step == 0 else self._states(step, arrivals[step]):
                for stop in range(step + 1, min(n, step + LONGEST) + 1):
                    for arrival in self._arrived(states, step, stop):
                        full = len(arrival.places)
                        if stop == n or full < self._most:
                            kept = arrivals[stop].setdefault(full, [])
                            bisect.insort(kept, arrival)
                            del kept[self._width :]
            arrivals[step] = {}
        return {full: kept[0] for full, kept in arrivals[n].items()}

    def _start(self) -> _States:
        n = self._n
        values, direction = np.zeros((1, n, 2 * n + 1)), np.zeros((1, n))
        values[0, 0, 1] = 1.0
        return _States([(0,)], [()], values, direction)

    def _states(self, step: int, arrivals: Mapping[int, Sequence[_Arrival]]) -> Iterator[_States]:
        """Yield the runs that come to a full step, with its prediction: those together whose blends have as many terms."""
        for terms, group in itertools.groupby(sorted(arrivals.items()), lambda item: min(item[0] + 1, _TERMS)):
            yield self._built(step, terms, [arrival for _, kept in group for arrival in kept])

    def _built(self, step: int, terms: int, arrivals: Sequence[_Arrival]) -> _States:
        n = self._n
        values = np.stack([a.source.values[a.at] for a in arrivals])
        direction = np.stack([a.source.direction[a.at] for a in arrivals])
        for i, arrival in enumerate(arrivals):
            last = arrival.places[-1]
            if arrival.blend is not None:
                history = list(arrival.places[-_TERMS:][::-1])
                weights = _terms(np.arange(last + 1, step)[:, None], np.array(history)[None])
                values[i, last + 1 : step] = np.einsum("t,jth->jh", arrival.blend, weights) @ values[i, history]
            # The first step is the teacher's own: nothing has strayed there.
            kept = FORGETS ** abs(self._levels[last] - self._levels[step]) if last else 0.0
            direction[i] *= kept
            direction[i, step] = math.sqrt(1 - kept**2)
        moved = np.einsum("j,sjd->sd", self._response[step, 1 : step + 1], values[:, :step])
        moved[:, 0] += self._response[step, 0]
        moved[:, : n + 1] -= self._response[step]
        sizes = np.exp([0.5 * arrival.score for arrival in arrivals])
        values[:, step] = self._gain[step] * moved
        values[:, step, 1 + step] += 1.0
        values[:, step, n + 1 :] += self._rest[step] * sizes[:, None] * direction
        return _States([(*a.places, step) for a in arrivals], [a.blends for a in arrivals], values, direction)

    def _arrived(self, states: _States, step: int, stop: int) -> Iterator[_Arrival]:
        """Yield how runs come from their full step to another one, or the end, all steps between extrapolated."""
        n, row = self._n, self._response[stop]
        # What is missing to the teacher's state before anything is extrapolated [S, D].
        missing = -np.einsum("j,sjd->sd", row[1 : step + 2], states.values[:, : step + 1])
        missing[:, 0] -= row[0]
        missing[:, : n + 1] += row
        if stop == step + 1:
            errors = self._products(missing[:, None])[:, :, 0, 0]
            blends: Sequence[np.ndarray | None] = [None] * len(errors)
        else:
            history = np.array([places[-_TERMS:][::-1] for places in states.places])  # [S, T]
            weights = _terms(np.arange(step + 1, stop)[None, :, None], history[:, None])  # [S, J, T, T]
            of_history = states.values[np.arange(len(history))[:, None], history]  # [S, T, D]
            effects = np.einsum("j,sjth->sth", row[step + 2 : stop + 1], weights) @ of_history
            prior = self._prior[: history.shape[1]]
            left = missing - np.einsum("t,std->sd", prior, effects)
            scale = self._products(missing[:, None])[:, :, 0, 0].mean(1)
            errors, factors = _solved(self._products(np.concatenate([effects, left[:, None]], 1)), scale)
            blends = list(prior + factors)
        errors = np.maximum(errors, _TINY)
        scores = np.log(errors).mean(1)
        for i, blend in enumerate(blends):
            if blend is None or np.abs(blend).max() < _LARGEST:
                yield _Arrival(float(scores[i]), errors[i], states, i, blend)

    def _products(self, vectors: np.ndarray) -> np.ndarray:
        """Return the mean products [S, B, V, V] of combinations [S, V, D]."""
        n = self._n
        inside, outside = vectors[:, :, : n + 1], vectors[:, :, n + 1 :]
        products = np.matmul(np.matmul(inside[:, None], self._gram[None]), inside[:, None].swapaxes(2, 3))
        return products + np.matmul(outside, outside.swapaxes(1, 2))[:, None]


def _terms(at: np.ndarray, history: np.ndarray) -> np.ndarray:
    """Return the weights of the last values, newest first, in the terms of an extrapolation [..., T, T], as `changes` of a
    `PredictionHistory`.

    Args:
        at: places [..., 1].
        history: places of the values [..., T].
    """
    count = history.shape[-1]
    shape = np.broadcast_shapes(at.shape[:-1], history.shape[:-1])
    weights = np.zeros((*shape, count, count))
    below = np.zeros((*shape, count))
    for t in range(count):
        polynomial = np.zeros((*shape, count))
        for i in range(t + 1):
            weight = np.ones(shape)
            for j in range(t + 1):
                if i != j:
                    weight = weight * (at[..., 0] - history[..., j]) / (history[..., i] - history[..., j])
            polynomial[..., i] = weight
        weights[..., t, :] = polynomial - below
        below = polynomial
    return weights


def _solved(products: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the errors that are left [S, B] and the factors [S, T] that leave the least, every sample by its relative error.

    Args:
        products: of the terms' effects and what is missing [S, B, T + 1, T + 1].
        scale: what was missing before the prior, squared [S].
    """
    gram, right, missing = products[:, :, :-1, :-1], products[:, :, :-1, -1], products[:, :, -1, -1]
    weights = np.ones_like(missing)
    eye = np.eye(gram.shape[-1])
    for _ in range(1 + _REWEIGHTINGS):
        whole = np.einsum("sb,sbtu->stu", weights, gram)
        diagonal = np.einsum("stt->st", whole)
        ridged = whole + eye * (RIDGE * diagonal + _TINY)[:, None]
        factors = np.linalg.solve(ridged, np.einsum("sb,sbt->st", weights, right)[..., None])[..., 0]
        left = missing - 2 * np.einsum("sbt,st->sb", right, factors) + np.einsum("st,sbtu,su->sb", factors, gram, factors)
        left = np.maximum(left, _EXACT * scale[:, None] + _TINY)
        weights = 1 / left
        weights = weights / weights.mean(1, keepdims=True)
    return left, factors


def _psnr_db(span: np.ndarray, errors: np.ndarray) -> float:
    return float(np.minimum(10 * np.log10(span**2 / errors), _MOST_DB).mean())


def _schedule(steps: int, places: Sequence[int], blends: Sequence[np.ndarray | None], rule: Rule) -> Schedule:
    segments = []
    for start, stop, blend in zip(places, [*places[1:], steps], blends, strict=True):
        kinds = (StepKind.FULL, *(StepKind.EXTRAPOLATED,) * (stop - start - 1))
        segments.append(Segment(kinds, None, None if blend is None else tuple(round(float(f), _DIGITS) for f in blend)))
    return Schedule(tuple(segments), basis=rule.basis)
