"""Reused guidance: the step runs with the prompt alone, what guidance adds comes from the last step that ran both halves.

The guidance difference, conditional minus unconditional, is kept in the derivative d = (x - denoised) / sigma (eps, or a flow's
velocity), where it changes slowly from step to step; in the denoised latent it shrinks with the noise level. Late in a run it
may be stopped or reused for long (T-GATE, Zhang et al., 2024; adaptive guidance, Castillo et al., 2023).
"""

from __future__ import annotations

from collections.abc import Hashable

import torch


class GuidanceHistory:
    """The guidance difference of the last evaluation that ran both halves, for each context window."""

    def __init__(self) -> None:
        self._differences: dict[Hashable, tuple[int, torch.Tensor]] = {}
        self._last = -1

    def keep(
        self, step: int, sigma: float, conditional: torch.Tensor, unconditional: torch.Tensor, window: Hashable = ()
    ) -> None:
        """Keep the difference of two denoised latents [B, ...] of a step at a noise level, in the derivative."""
        self._differences[window] = step, (unconditional - conditional) / sigma
        self._last = step

    def why_not(self, x: torch.Tensor, window: Hashable = ()) -> str:
        """Return in words why the guidance of latents like x [B, ...] cannot be reused; empty where it can."""
        step, difference = self._differences.get(window, (-1, None))
        if difference is None:
            return "no step before it ran with and without the prompt"
        if step != self._last:
            return "the last step with both halves had other context windows"
        return "" if difference.shape == x.shape else "the latent has another size than where its guidance was computed"

    def unconditional(self, sigma: float, conditional: torch.Tensor, window: Hashable = ()) -> torch.Tensor:
        """Return the denoised latent without the prompt that the kept difference gives, beside one with it [B, ...]."""
        return conditional + sigma * self._differences[window][1]
