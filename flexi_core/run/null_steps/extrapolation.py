"""Extrapolated null steps: the prediction of a skipped step from the last computed ones.

What is extrapolated, the guided derivative or the denoised latent, is the run's basis; see `basis`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch

_SAME_PLACE = 1e-6  # steps


class Observer(Protocol):
    """What follows a run step by step, and may say how its extrapolated steps are blended."""

    def see(self, index: int, x: torch.Tensor, prediction: torch.Tensor) -> None:
        """Take note of the prediction, computed or extrapolated, of a step that begins in the state x [B, ...].

        It is in the plan's basis: the derivative or the denoised latent [B, ...].
        """
        ...

    def blend(self, index: int, history: PredictionHistory) -> tuple[float, ...] | None:
        """Return the blend of an extrapolated step; None for the schedule's own."""
        ...


class PredictionHistory:
    """The last computed predictions of step starts, in one basis, and their places in the run.

    Args:
        terms: how many are kept.
    """

    def __init__(self, terms: int) -> None:
        self.terms = terms
        self._points: deque[tuple[float, torch.Tensor]] = deque(maxlen=terms)

    def __len__(self) -> int:
        return len(self._points)

    def rewind(self, place: float) -> None:
        """Forget what lies after a place: a corrector's guesses, or what a sampler that goes back up will do again."""
        if self._points and self._points[-1][0] > place + _SAME_PLACE:
            earlier = [point for point in self._points if point[0] <= place + _SAME_PLACE]
            self._points = deque(earlier, maxlen=self._points.maxlen)

    def add(self, place: float, prediction: torch.Tensor) -> None:
        """Keep a computed prediction; one at the same place (a corrector's guess), or of another shape, gives way to it."""
        others = [(at, it) for at, it in self._points if abs(at - place) >= _SAME_PLACE and it.shape == prediction.shape]
        self._points = deque([*others, (place, prediction)], maxlen=self._points.maxlen)

    def fits(self, x: torch.Tensor) -> bool:
        """Return whether there is a prediction to go on from, of the shape of x."""
        return bool(self._points) and self._points[-1][1].shape == x.shape

    def changes(self, place: float, terms: int) -> list[list[float]]:
        """Return the weights of the kept predictions, oldest first, in each term of the extrapolation to a place.

        The terms are the held prediction, and what the line, the parabola, the cubic through one more point add to it
        (Newton's form): with all of them once, the Lagrange polynomial. There are no more terms than kept predictions.
        """
        places, found, below = [at for at, _ in self._points], [], [0.0] * len(self._points)
        for count in range(1, min(terms, len(places)) + 1):
            polynomial = [0.0] * (len(places) - count) + lagrange(places[-count:], place)
            found.append([weight - less for weight, less in zip(polynomial, below, strict=True)])
            below = polynomial
        return found

    def extrapolate(self, place: float, blend: Sequence[float]) -> torch.Tensor:
        """Return the prediction at a place: the terms of `changes`, each multiplied with its factor."""
        return self.combined(self.weights(place, blend))

    def weights(self, place: float, blend: Sequence[float]) -> list[float]:
        """Return the weights of the kept predictions, oldest first, in the one at a place."""
        terms = [
            [factor * weight for weight in term]
            for factor, term in zip(blend, self.changes(place, len(blend)), strict=False)  # fewer terms before enough steps
        ]
        return [sum(column) for column in zip(*terms, strict=True)]

    def combined(self, weights: Sequence[float]) -> torch.Tensor:
        """Return the sum of the kept predictions, oldest first, each multiplied with its weight."""
        total = None
        for weight, (_, prediction) in zip(weights, self._points, strict=True):
            if weight:
                total = prediction * weight if total is None else total + prediction * weight
        return torch.zeros_like(self._points[-1][1]) if total is None else total


def lagrange(places: Sequence[float], place: float) -> list[float]:
    """Return the weights of values at some places in their polynomial's value at another."""
    weights = []
    for i, at in enumerate(places):
        weight = 1.0
        for j, other in enumerate(places):
            if i != j:
                weight *= (place - other) / (at - other)
        weights.append(weight)
    return weights
