"""Extrapolated null steps: the prediction of a skipped step from the last computed ones.

The quantity that is extrapolated is the guided derivative d = (x - denoised) / sigma: eps for eps- and v-predicting models,
the velocity for flow models. It changes slowly along a trajectory, where denoised and x do not.
"""

from __future__ import annotations

from collections import deque

import torch

_SAME_PLACE = 1e-6  # steps


class DerivativeHistory:
    """The last computed derivatives and their places in the run.

    Args:
        order: degree of the polynomial in the place; 0 holds the last derivative. With fewer computed steps than order + 1
            the degree is what they allow.
    """

    def __init__(self, order: int) -> None:
        self._points: deque[tuple[float, torch.Tensor]] = deque(maxlen=order + 1)

    def add(self, place: float, derivative: torch.Tensor) -> None:
        """Keep a computed derivative; one at the same place (a corrector's, or a sampler's that goes back) gives way to it."""
        others = [point for point in self._points if abs(point[0] - place) >= _SAME_PLACE]
        self._points = deque([*others, (place, derivative)], maxlen=self._points.maxlen)

    def fits(self, x: torch.Tensor) -> bool:
        """Return whether there is a derivative to go on from, of the shape of x."""
        return bool(self._points) and self._points[-1][1].shape == x.shape

    def extrapolate(self, place: float) -> torch.Tensor:
        """Return the derivative at a place: the Lagrange polynomial through the kept points."""
        total = None
        for i, (at, derivative) in enumerate(self._points):
            weight = 1.0
            for j, (other, _) in enumerate(self._points):
                if i != j:
                    weight *= (place - other) / (at - other)
            total = derivative * weight if total is None else total + derivative * weight
        return total
