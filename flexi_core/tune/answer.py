"""How a network answers away from the teacher's states: two numbers for each noise level.

Near the teacher's state x the derivative is d' = d + gain (x' - x) + rest |x' - x| u: a part along the difference, and a part
of no use in a direction u that changes along the run. Both are measured in one accelerated run; before there is one they are
those of Gaussian data of deviation 0.5, and a rest of 0.33 / sigma, which two models had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..run.null_steps.basis import Rule
from ..run.null_steps.extrapolation import PredictionHistory

DEVIATION = 0.5
REST = 0.33
_NEAR = 0.2  # of log sigma: measured levels are smoothed over that,
_TAIL, _FAR = 0.1, 0.4  # and with this share reach further;
_BEFORE = 0.001  # weight of what was taken before: it stays where nothing near was measured
_NOTHING = 1e-10  # mean square of a difference that tells nothing


@dataclass(frozen=True)
class Answer:
    """The two numbers at each noise level of a run, for the derivative.

    Args:
        sigmas: noise levels [n].
        gain: of the difference [n].
        rest: share of the difference that goes elsewhere [n].
    """

    sigmas: np.ndarray
    gain: np.ndarray
    rest: np.ndarray

    @classmethod
    def guess(cls, sigmas: Sequence[float], flow: bool = False) -> Answer:
        """Return what is taken before anything was measured.

        Args:
            sigmas: noise levels [n], above 0.
            flow: whether x is (1 - sigma) x0 + sigma noise, not x0 + sigma noise.
        """
        levels = np.asarray(sigmas, dtype=np.float64)
        scale = 1 - np.minimum(levels, 0.9999) if flow else np.ones_like(levels)
        of_denoised = DEVIATION**2 / (DEVIATION**2 + (levels / scale) ** 2) / scale
        return cls(levels, (1 - of_denoised) / levels, REST / levels / scale)

    def at(self, sigmas: np.ndarray) -> Answer:
        """Return the answer at other noise levels [m], above 0: times sigma, both numbers lie on lines in log sigma."""
        known, wanted = np.log(self.sigmas)[::-1], np.log(sigmas)
        gain, rest = (np.interp(wanted, known, (each * self.sigmas)[::-1]) / sigmas for each in (self.gain, self.rest))
        return Answer(sigmas, gain, rest)

    def in_basis(self, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
        """Return gain and rest [n] of what is carried on under a rule."""
        zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        gain, rest = [], []
        for sigma, own, other in zip(self.sigmas, self.gain, self.rest, strict=True):
            gain.append(float(rule.value(one, sigma, one - sigma * own)))
            rest.append(abs(float(rule.value(zero, sigma, zero - sigma * other))))
        return np.array(gain), np.array(rest)


class AnswerMeter:
    """Measures the answer in an accelerated run beside the teacher's of the same samples.

    Args:
        states: of the teacher at its steps' starts [n, B, ...].
        predictions: of the teacher there [n, B, ...].
        computed: for each step, whether the accelerated run asks the network.
        sigmas: noise levels [n].
        rule: what predictions are.
    """

    def __init__(
        self, states: torch.Tensor, predictions: torch.Tensor, computed: Sequence[bool], sigmas: Sequence[float], rule: Rule
    ) -> None:
        self._states, self._predictions, self._computed = states, predictions, computed
        self._sigmas, self._rule = sigmas, rule
        self._rows: dict[int, tuple[float, float]] = {}

    def see(self, index: int, x: torch.Tensor, prediction: torch.Tensor) -> None:
        """Take note of the prediction [B, ...] of a step that begins in the state x [B, ...]."""
        if not self._computed[index]:
            return
        sigma = self._sigmas[index]
        moved = (x - self._states[index]).double().flatten(1)
        if float(moved.square().mean()) < _NOTHING:
            return
        difference = (prediction - self._predictions[index]).double().flatten(1)
        # In the derivative, whatever the rule carries on.
        denoised = self._rule.denoised(moved, sigma, difference)
        difference = (moved - denoised) / sigma
        gain = (moved * difference).sum(1) / moved.square().sum(1)
        rest = (difference - gain[:, None] * moved).norm(dim=1) / moved.norm(dim=1)
        self._rows[index] = float(gain.median()), float(rest.median())

    def blend(self, index: int, history: PredictionHistory) -> None:
        """Return None: the schedule's own blends stay."""

    def answer(self, before: Answer) -> Answer:
        """Return what was measured, smoothed over the noise levels; far from what was measured, what was taken before."""
        if not self._rows:
            return before
        levels = np.log(before.sigmas)
        at = np.log([self._sigmas[i] for i in self._rows])
        apart = np.abs(levels[:, None] - at[None])
        weights = np.exp(-0.5 * (apart / _NEAR) ** 2) + _TAIL * np.exp(-apart / _FAR)
        total = weights.sum(1) + _BEFORE
        # Times sigma, both change slowly.
        rows = np.array([np.array(row) * self._sigmas[i] for i, row in self._rows.items()])
        gain, rest = (
            (weights @ measured + _BEFORE * taken * before.sigmas) / total / before.sigmas
            for measured, taken in zip(rows.T, (before.gain, before.rest), strict=True)
        )
        return Answer(before.sigmas, gain, rest)
