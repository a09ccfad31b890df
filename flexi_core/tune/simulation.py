"""A run under a schedule as a few dozen numbers: how far it is from the teacher, without asking the network.

Every state of a run near the teacher's is a combination of the teacher's start and predictions, and of the directions that the
network's answers stray into (`Answer`), each of a size that is known. How far two states are apart follows from the Gram matrix
(`Recording`). The blend of each stretch between two full steps is the one that comes nearest to the teacher's state at its end,
as in `BlendFit`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..run.null_steps.basis import DENOISED, Rule
from .answer import Answer
from .fit import RIDGE

TERMS = 3  # of a blend: held, linear, quadratic
FORGETS = 0.5  # of the direction that answers stray into, for each unit of log sigma
_REWEIGHTINGS = 2
_EXACT = 1e-9  # of what is missing on average: an error of 0
_TINY = 1e-14
_LARGEST = 20.0  # factor of a blend that makes sense


@dataclass(frozen=True)
class Ground:
    """What a run stands on: its solver, and the teacher beside it at its own noise levels.

    Args:
        gram: of the recorded runs [B, n + 1, n + 1].
        levels: noise levels [n] at which steps begin, above 0.
        response: of the solver on these [n + 1, n + 1] (`fit.linear_response`).
        states: of the teacher at these and in the end, over its start and predictions [n + 1, n + 1].
        predictions: of the teacher at these, over the same [n, n + 1].
        gain, rest: of the network's answer there [n], in the basis.
        prior: blend that a fit begins from [TERMS].
        unknown: size of what is not known of the teacher's predictions there [n].
    """

    gram: np.ndarray
    levels: np.ndarray
    response: np.ndarray
    states: np.ndarray
    predictions: np.ndarray
    gain: np.ndarray
    rest: np.ndarray
    prior: np.ndarray
    unknown: np.ndarray

    @classmethod
    def own(cls, gram: np.ndarray, response: np.ndarray, answer: Answer, rule: Rule) -> Ground:
        """Return that of a run at the teacher's noise levels."""
        n = len(answer.sigmas)
        return cls(
            gram, answer.sigmas, response, response, np.eye(n, n + 1, 1), *answer.in_basis(rule), prior_of(rule), np.zeros(n)
        )


@dataclass
class States:
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
class Arrival:
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
    source: States = field(compare=False)
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


class Simulation:
    """Runs on one ground, all at once that come to the same step with as many terms.

    Args:
        ground: what they stand on.
        starts: steps at which another network begins, to which nothing is carried from those before.
    """

    def __init__(self, ground: Ground, starts: Sequence[int] = ()) -> None:
        self._ground, self._logs, self.starts = ground, np.log(ground.levels), tuple(starts)

    @property
    def steps(self) -> int:
        return len(self._logs)

    def history(self, places: Sequence[int]) -> list[int]:
        """Return which full steps an extrapolation after the last of them goes back to, newest first."""
        since = max((start for start in self.starts if start <= places[-1]), default=0)
        return [place for place in places[-TERMS:][::-1] if place >= since]

    def start(self) -> States:
        """Return a run at its first step."""
        n = self.steps
        values, direction = np.zeros((1, n, 2 * n + 1)), np.zeros((1, n))
        values[0, 0, : n + 1] = self._ground.predictions[0]
        return States([(0,)], [()], values, direction)

    def built(self, step: int, arrivals: Sequence[Arrival]) -> States:
        """Return runs that have come to a full step, with its prediction.

        Args:
            step: not the first.
            arrivals: of runs whose next blends have as many terms.
        """
        ground, n = self._ground, self.steps
        values = np.stack([a.source.values[a.at] for a in arrivals])
        direction = np.stack([a.source.direction[a.at] for a in arrivals])
        for i, arrival in enumerate(arrivals):
            last = arrival.places[-1]
            if arrival.blend is not None:
                history = self.history(arrival.places)
                weights = term_weights(np.arange(last + 1, step)[:, None], np.array(history)[None])
                values[i, last + 1 : step] = np.einsum("t,jth->jh", arrival.blend, weights) @ values[i, history]
            # The first step is the teacher's own: nothing has strayed there. Another network strays elsewhere.
            kept = 0.0 if not last or step in self.starts else FORGETS ** abs(self._logs[last] - self._logs[step])
            direction[i] *= kept
            direction[i, step] = math.sqrt(1 - kept**2)
        moved = np.einsum("j,sjd->sd", ground.response[step, 1 : step + 1], values[:, :step])
        moved[:, 0] += ground.response[step, 0]
        moved[:, : n + 1] -= ground.states[step]
        sizes = np.exp([0.5 * arrival.score for arrival in arrivals])
        values[:, step] = ground.gain[step] * moved
        values[:, step, : n + 1] += ground.predictions[step]
        values[:, step, n + 1 :] += ground.rest[step] * sizes[:, None] * direction
        values[:, step, n + 1 + step] += ground.unknown[step]
        return States([(*a.places, step) for a in arrivals], [a.blends for a in arrivals], values, direction)

    def arrived(self, states: States, step: int, stop: int) -> Iterator[Arrival]:
        """Yield how runs come from their full step to another one, or the end, all steps between extrapolated."""
        n, row = self.steps, self._ground.response[stop]
        # What is missing to the teacher's state before anything is extrapolated [S, D].
        missing = -np.einsum("j,sjd->sd", row[1 : step + 2], states.values[:, : step + 1])
        missing[:, 0] -= row[0]
        missing[:, : n + 1] += self._ground.states[stop]
        if stop == step + 1:
            errors = self._products(missing[:, None])[:, :, 0, 0]
            blends: Sequence[np.ndarray | None] = [None] * len(errors)
        else:
            history = np.array([self.history(places) for places in states.places])  # [S, T]
            weights = term_weights(np.arange(step + 1, stop)[None, :, None], history[:, None])  # [S, J, T, T]
            of_history = states.values[np.arange(len(history))[:, None], history]  # [S, T, D]
            effects = np.einsum("j,sjth->sth", row[step + 2 : stop + 1], weights) @ of_history
            prior = self._ground.prior[: history.shape[1]]
            left = missing - np.einsum("t,std->sd", prior, effects)
            scale = self._products(missing[:, None])[:, :, 0, 0].mean(1)
            errors, factors = _solved(self._products(np.concatenate([effects, left[:, None]], 1)), scale)
            blends = list(prior + factors)
        errors = np.maximum(errors, _TINY)
        scores = np.log(errors).mean(1)
        for i, blend in enumerate(blends):
            if blend is None or np.abs(blend).max() < _LARGEST:
                yield Arrival(float(scores[i]), errors[i], states, i, blend)

    def followed(self, places: Sequence[int]) -> Arrival | None:
        """Return how one run ends with full steps at these places; None where no sensible blend takes it there."""
        states = self.start()
        for step, stop in zip(places, [*places[1:], self.steps], strict=True):
            arrival = next(self.arrived(states, step, stop), None)
            if arrival is None or stop == self.steps:
                return arrival
            states = self.built(stop, [arrival])
        return None

    def _products(self, vectors: np.ndarray) -> np.ndarray:
        """Return the mean products [S, B, V, V] of combinations [S, V, D]."""
        n = self.steps
        inside, outside = vectors[:, :, : n + 1], vectors[:, :, n + 1 :]
        products = np.matmul(np.matmul(inside[:, None], self._ground.gram[None]), inside[:, None].swapaxes(2, 3))
        return products + np.matmul(outside, outside.swapaxes(1, 2))[:, None]


def term_weights(at: np.ndarray, history: np.ndarray) -> np.ndarray:
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


def prior_of(rule: Rule) -> np.ndarray:
    """Return the blend that a fit begins from [TERMS]."""
    return np.array([*rule.blend, *[0.0] * TERMS][:TERMS] if rule.basis == DENOISED else [1.0, 1.0, 0.0])
