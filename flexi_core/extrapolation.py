"""Extrapolated null steps: the prediction of a skipped step from the last computed ones.

The quantity that is extrapolated is the guided derivative d = (x - denoised) / sigma: eps for eps- and v-predicting models,
the velocity for flow models. It changes slowly along a trajectory, where denoised and x do not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch

_SAME_PLACE = 1e-6  # steps


class Observer(Protocol):
    """What follows a run step by step, and may say how its extrapolated steps are blended."""

    def see(self, index: int, x: torch.Tensor, derivative: torch.Tensor) -> None:
        """Take note of the derivative, computed or extrapolated, of a step that begins in the state x [B, ...]."""
        ...

    def blend(self, index: int, history: DerivativeHistory) -> tuple[float, ...] | None:
        """Return the blend of an extrapolated step; None for the schedule's own."""
        ...


class DerivativeHistory:
    """The last computed derivatives and their places in the run.

    Args:
        terms: how many are kept.
    """

    def __init__(self, terms: int) -> None:
        self._points: deque[tuple[float, torch.Tensor]] = deque(maxlen=terms)

    def add(self, place: float, derivative: torch.Tensor) -> None:
        """Keep a computed derivative; one at the same place (a corrector's, or a sampler's that goes back) gives way to it."""
        others = [point for point in self._points if abs(point[0] - place) >= _SAME_PLACE]
        self._points = deque([*others, (place, derivative)], maxlen=self._points.maxlen)

    def fits(self, x: torch.Tensor) -> bool:
        """Return whether there is a derivative to go on from, of the shape of x."""
        return bool(self._points) and self._points[-1][1].shape == x.shape

    def changes(self, place: float, terms: int) -> list[list[float]]:
        """Return the weights of the kept derivatives, oldest first, in each term of the extrapolation to a place.

        The terms are the held derivative, and what the line, the parabola, the cubic through one more point add to it
        (Newton's form): with all of them once, the Lagrange polynomial. There are no more terms than kept derivatives.
        """
        places, found, below = [at for at, _ in self._points], [], [0.0] * len(self._points)
        for count in range(1, min(terms, len(places)) + 1):
            polynomial = [0.0] * (len(places) - count) + lagrange(places[-count:], place)
            found.append([weight - less for weight, less in zip(polynomial, below, strict=True)])
            below = polynomial
        return found

    def extrapolate(self, place: float, blend: Sequence[float]) -> torch.Tensor:
        """Return the derivative at a place: the terms of `changes`, each multiplied with its factor."""
        terms = [
            [factor * weight for weight in term]
            for factor, term in zip(blend, self.changes(place, len(blend)), strict=False)  # fewer terms before enough steps
        ]
        return self.combined([sum(column) for column in zip(*terms, strict=True)])

    def combined(self, weights: Sequence[float]) -> torch.Tensor:
        """Return the sum of the kept derivatives, oldest first, each multiplied with its weight."""
        total = None
        for weight, (_, derivative) in zip(weights, self._points, strict=True):
            if weight:
                total = derivative * weight if total is None else total + derivative * weight
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
