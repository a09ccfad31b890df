"""What an extrapolated step carries on: the guided derivative, or the denoised latent.

The derivative d = (x - denoised) / sigma (eps, or the velocity of flow models) changes slowly along a deterministic trajectory.
Where the sampler puts fresh noise into x, d holds that noise, and extrapolating it makes grain; the denoised latent is free of
it. A solver with a memory forms its own derivatives from denoised latents and is served better by these too. Measured for
every sampler of the host in docs/results/samplers.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...schedule.schedule import Schedule
from ..sampler import SamplerTraits

DERIVATIVE, DENOISED = "derivative", "denoised"
_HELD = (1.0,)
_HALF = (1.0, 0.5)  # of the line through the last two: the denoised latent moves on, and ever more slowly


@dataclass(frozen=True)
class Rule:
    """How a run's extrapolated steps are predicted.

    Args:
        basis: what is carried on, one of `schedule.BASES`.
        blend: its factors where a segment has none of its own.
        own_blends: whether those of the segments hold here.
    """

    basis: str
    blend: tuple[float, ...]
    own_blends: bool = True

    def value(self, x: torch.Tensor, sigma: float, denoised: torch.Tensor) -> torch.Tensor:
        """Return what is carried on of an answer of the network, all [B, ...]."""
        return denoised if self.basis == DENOISED else (x - denoised) / sigma

    def denoised(self, x: torch.Tensor, sigma: float, value: torch.Tensor) -> torch.Tensor:
        """Return the denoised latent [B, ...] that a carried-on value stands for."""
        return value if self.basis == DENOISED else x - sigma * value


def rule_of(schedule: Schedule, sampler: SamplerTraits) -> Rule:
    """Return how a schedule's extrapolated steps are predicted under a sampler.

    A schedule without a basis leaves it to the sampler: the denoised latent where it draws noise or has a memory. Blends
    without one are of the derivative, from before there was another; under noise, where that makes grain, they give way to
    the sampler's own.
    """
    basis = schedule.basis
    of_derivative = basis is None and ("teacher" in schedule.info or any(s.blend for s in schedule.segments))
    if basis is None:
        by_denoised = sampler.draws_noise or (bool(sampler.memory) and not of_derivative)
        basis = DENOISED if by_denoised else DERIVATIVE
    blend = (1.0,) * (schedule.order + 1)
    if basis == DENOISED and schedule.order == 1:  # no order was asked for
        blend = _HELD if sampler.draws_noise and sampler.evaluations > 1 else _HALF
    return Rule(basis, blend, not (of_derivative and basis == DENOISED))
