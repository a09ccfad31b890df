"""The embedded runtime: sigma grids and samplers (`solvers`) that agree with the host's, run under a plan.

A sampler is a function of `model(x, sigma) -> denoised`; the plan stands between it and the network exactly as it does in
the host, so what a schedule does here it does there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..demo.model import SmallModel
from ..errors import FlexiError
from ..networks.unet import NetworkCall
from ..run.null_steps.extrapolation import Observer
from ..run.plan import Plan, make_plan
from ..run.replay import Replay
from ..run.run import Run
from ..run.sampler import PLAIN, SamplerTraits, Solver, probe
from ..schedule.schedule import Schedule
from .solvers import SAMPLERS, sample_dpmpp_2m, sample_euler, sample_heun  # noqa: F401 (the solvers are also known from here)
from .step_noise import row_seeds

Progress = Callable[[int, int], None]


def sigmas_normal(model: SmallModel, steps: int) -> torch.Tensor:
    """Return the host's `normal` grid [steps + 1]: even in timesteps."""
    return torch.cat([model.sigma(torch.linspace(999, 0, steps)), torch.zeros(1)])


def sigmas_simple(model: SmallModel, steps: int) -> torch.Tensor:
    """Return the host's `simple` grid [steps + 1]: training levels at even strides from the top."""
    stride = len(model.sigmas) / steps
    return torch.cat([torch.stack([model.sigmas[-(1 + int(i * stride))] for i in range(steps)]), torch.zeros(1)])


def sigmas_karras(model: SmallModel, steps: int, rho: float = 7.0) -> torch.Tensor:
    """Return the grid [steps + 1] of Karras et al. (2022), Eq. 5."""
    low, high = float(model.sigmas[0]) ** (1 / rho), float(model.sigmas[-1]) ** (1 / rho)
    return torch.cat([(high + torch.linspace(0, 1, steps) * (low - high)) ** rho, torch.zeros(1)])


SCHEDULERS: dict[str, Callable[[SmallModel, int], torch.Tensor]] = {
    "normal": sigmas_normal,
    "simple": sigmas_simple,
    "karras": sigmas_karras,
}
# The host gives these a grid of one step more, without its last level but one.
_WITHOUT_PENULTIMATE = frozenset({"dpm_2_ancestral", "uni_pc"})


def sigmas_of(model: SmallModel, sampler: str, scheduler: str, steps: int) -> torch.Tensor:
    """Return the noise levels [steps + 1] that the host's KSampler gives a sampler."""
    if sampler not in _WITHOUT_PENULTIMATE:
        return SCHEDULERS[scheduler](model, steps)
    sigmas = SCHEDULERS[scheduler](model, steps + 1)
    return torch.cat([sigmas[:-2], sigmas[-1:]])


def make_noise(seed: int, count: int, shape: tuple[int, ...] = (3, 32, 32)) -> torch.Tensor:
    """Return unit noise [count, *shape], each sample from a seed of its own, so that sample i does not depend on count."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(count)])


def solver_of(sampler: str) -> Solver:
    """Return a sampler as the solver that is tried and fitted, with the noise of one seed."""

    def solve(
        denoise: Callable[[torch.Tensor, float], torch.Tensor], x: torch.Tensor, sigmas: torch.Tensor, seed: int = 0
    ) -> torch.Tensor:
        return SAMPLERS[sampler](lambda x, sigma: denoise(x, float(sigma)), x, sigmas, (seed,) * x.shape[0])

    return solve


def traits_of(sampler: str, sigmas: torch.Tensor) -> SamplerTraits:
    """Return what a sampler does on a run's noise levels [n + 1]."""
    return probe(solver_of(sampler), sigmas.tolist()) or PLAIN


@torch.inference_mode()
def sample(
    model: SmallModel,
    schedule: Schedule | Plan,
    sigmas: torch.Tensor,
    noise: torch.Tensor,
    prompts: Sequence[Any] | None = None,
    *,
    sampler: str = "euler",
    cfg: float,
    seeds: Sequence[int] | None = None,
    progress: Progress | None = None,
    replay: Replay | None = None,
    observer: Observer | None = None,
) -> tuple[torch.Tensor, Run]:
    """Sample latents under a schedule; the embedded model's are images.

    Args:
        model: the embedded model, or one from a file.
        schedule: of any length (it is mapped to the run), or a plan for exactly these sigmas.
        sigmas: noise levels [n + 1], the last 0.
        noise: unit noise [B, C, H, W].
        prompts: B of what the model is conditioned on, captions or class numbers; None for a model without conditioning.
        sampler: a name of `SAMPLERS`.
        cfg: guidance scale; 1 leaves the unconditional half out, and so does a model without conditioning.
        seeds: of the rows, for samplers that draw noise; by default 0, 1, ...
        progress: called with the steps done and the steps in all.
        replay: where predictions are looked up before they are computed.
        observer: follows the run's predictions.

    Returns:
        latents [B, C, H, W], images -1..1 but for the sampler's overshoot; and the run, for its report.

    Raises:
        FlexiError: the sampler is not known, or noise, prompts and seeds are not as many.
    """
    if sampler not in SAMPLERS:
        raise FlexiError(f"unknown sampler {sampler!r}; the embedded runtime has {', '.join(SAMPLERS)}")
    if prompts is not None and len(prompts) != noise.shape[0]:
        raise FlexiError(f"{len(prompts)} prompts for {noise.shape[0]} samples; give one for each")
    seeds = row_seeds(noise.shape[0], seeds)
    plan = (
        schedule
        if isinstance(schedule, Plan)
        else make_plan(schedule, sigmas.tolist(), traits_of(sampler, sigmas), stages=model.stages)
    )
    run = Run(plan, replay=replay, observer=observer)
    cond, uncond = model.conditioning(prompts, noise.shape[0])
    guided = cfg != 1.0 and uncond is not None

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        def halves(both: bool) -> tuple[torch.Tensor, torch.Tensor]:
            rows = torch.cat([x, x]) if both else x
            call = NetworkCall(
                rows / (sigma**2 + 1).sqrt(),
                model.timestep(sigma[None]).expand(rows.shape[0]),
                torch.cat([uncond, cond]) if both else cond,
                options={"uuids": ["uncond", "cond"] if both else ["cond"], "cond_or_uncond": [1, 0] if both else [0]},
            )
            unet = model.network(float(sigma))
            denoised = model.denoised(rows, sigma, run.forward(unet, call, float(sigma), unet._forward))
            without, with_ = denoised.chunk(2) if both else (denoised, denoised)
            return with_, without

        def compute() -> torch.Tensor:
            if not guided:
                run.guides_itself(float(sigma), "the run is not guided")
                return halves(False)[0]
            with_, without = run.guide(x, float(sigma), halves)
            return without + (with_ - without) * cfg

        denoised = run.predict(x, float(sigma), compute)
        if progress is not None:
            progress(plan.step_index(float(sigma)) + 1, len(plan.steps))
        return denoised

    kept = plan.sampled(sigmas)
    # The host starts a run from the top of its noise levels at sqrt(1 + sigma^2), where signal and noise are both of unit size.
    top = kept[0] >= model.sigmas[-1] * (1 - 1e-5)
    x = noise * ((1 + kept[0] ** 2).sqrt() if top else kept[0])
    return SAMPLERS[sampler](denoise, x, kept, seeds), run
