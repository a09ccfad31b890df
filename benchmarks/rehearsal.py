"""A run's stand-in that needs no network: how near a schedule comes to the teacher, told from the teacher's own run.

Near the teacher's states the network answers as it did there, plus how its answer changes with the state: in the denoised
latent K = s^2 / (s^2 + sigma^2) of the difference, as for Gaussian data of deviation s, and a part of no use, rho |difference|,
in a direction that changes along the run. Both were measured on accelerated runs of two models: s 0.5, rho 0.33 in the denoised
latent, directions correlated by 0.5 for each unit of log sigma. The run's own sampler goes through all its steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from flexi_core import Schedule
from flexi_core.run.plan import make_plan
from flexi_core.run.run import Run
from flexi_core.run.sampler import SamplerTraits, Solver

DEVIATION = 0.5
USELESS = 0.33
_FORGETS = 0.5  # of a direction, for each unit of log sigma


@dataclass(frozen=True)
class Recorded:
    """What a teacher's run was asked and answered.

    Args:
        levels: of the run [n + 1].
        sigmas: asked for [m].
        states: there [m, B, ...].
        answers: denoised latents [m, B, ...].
        end: latents [B, ...].
    """

    levels: torch.Tensor
    sigmas: tuple[float, ...]
    states: torch.Tensor
    answers: torch.Tensor
    end: torch.Tensor


class Rehearsal:
    """Rehearses schedules under a sampler.

    Args:
        solve: the sampler for any denoiser.
        seed: of its noise, the teacher's.
        recorded: the teacher's run.
        traits: what the sampler does.
        flow: whether x is (1 - sigma) x0 + sigma noise, not x0 + sigma noise.
    """

    def __init__(self, solve: Solver, seed: int, recorded: Recorded, traits: SamplerTraits, flow: bool) -> None:
        self._solve, self._seed, self._recorded, self._traits, self._flow = solve, seed, recorded, traits, flow
        self._directions = _directions(recorded)

    def end(self, schedule: Schedule) -> torch.Tensor:
        """Return where the run ends under a schedule [B, ...]."""
        teacher = self._recorded
        run = Run(make_plan(schedule, teacher.levels.tolist(), self._traits))
        asked = 0

        def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
            nonlocal asked
            at, asked = asked, asked + 1
            return run.predict(x, sigma, lambda: self._answer(at, x, sigma))

        return self._solve(denoise, teacher.states[0].clone(), teacher.levels.clone(), self._seed)

    def _answer(self, at: int, x: torch.Tensor, sigma: float) -> torch.Tensor:
        difference = x - self._recorded.states[at]
        scale = 1 - min(sigma, 0.9999) if self._flow else 1.0
        level = sigma / scale
        gain = DEVIATION**2 / (DEVIATION**2 + level**2) / scale
        size = difference.flatten(1).square().mean(1).sqrt().view(-1, *(1,) * (x.ndim - 1))
        # rho |difference| / sigma in the derivative is rho |difference| in the denoised latent.
        return self._recorded.answers[at] + gain * difference + USELESS * size / scale * self._directions[at]


def record(
    run: Callable[[Callable[[torch.Tensor, float, torch.Tensor], None]], torch.Tensor], levels: torch.Tensor
) -> Recorded:
    """Return what a teacher's run went through.

    Args:
        run: samples all steps in full and tells every question (x, sigma, denoised).
        levels: of the run [n + 1].
    """
    sigmas: list[float] = []
    states: list[torch.Tensor] = []
    answers: list[torch.Tensor] = []

    def see(x: torch.Tensor, sigma: float, denoised: torch.Tensor) -> None:
        sigmas.append(sigma)
        states.append(x.detach().float().cpu().clone())
        answers.append(denoised.detach().float().cpu().clone())

    end = run(see)
    return Recorded(levels, tuple(sigmas), torch.stack(states), torch.stack(answers), end)


def _directions(recorded: Recorded) -> torch.Tensor:
    """Return a direction of unit size for each question [m, B, ...], changing slowly along the run."""
    rng = torch.Generator().manual_seed(0)
    shape = recorded.states.shape[1:]
    found = [torch.randn(shape, generator=rng)]
    for before, sigma in zip(recorded.sigmas, recorded.sigmas[1:], strict=False):
        kept = _FORGETS ** abs(math.log(max(sigma, 1e-4) / max(before, 1e-4)))
        found.append(kept * found[-1] + (1 - kept**2) ** 0.5 * torch.randn(shape, generator=rng))
    return torch.stack(found)
