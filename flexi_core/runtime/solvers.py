"""Samplers: each goes through noise levels to the latent that the host's sampler of that name comes to, with the same noise.

A sampler is a function of `model(x, sigma) -> denoised`, latents x [B, ...] = x0 + sigma noise, noise levels [n + 1], and one
seed for each row (`step_noise`), which samplers without noise of their own ignore.

A step from sigma to a lower level with a constant denoised latent D ends in D + level / sigma (x - D). Ancestral samplers go
down to a level below the next one and make the rest of it up with noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import exp, expm1, log

import torch

from .step_noise import brownian_noise, independent_noise

Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x [B, ...], sigma scalar) -> denoised [B, ...]
Sampler = Callable[..., torch.Tensor]  # (model, x [B, ...], sigmas [n + 1], seeds=()) -> x at the last level

_UNI_PC_ORDER = 3
_UNI_PC_END = 0.001  # the host's last level in place of 0, where log sigma is not finite
_ER_SDE_POINTS = 200  # of its integrals in a step


def sample_euler(model: Denoiser, x: torch.Tensor, sigmas: torch.Tensor, seeds: Sequence[int] = ()) -> torch.Tensor:
    """Euler's method (Karras et al., 2022, Algorithm 2 without the correction); for eps models DDIM with eta 0."""
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i])
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


def sample_heun(model: Denoiser, x: torch.Tensor, sigmas: torch.Tensor, seeds: Sequence[int] = ()) -> torch.Tensor:
    """Heun's method (Karras et al., 2022, Algorithm 1)."""
    for i in range(len(sigmas) - 1):
        d = (x - model(x, sigmas[i])) / sigmas[i]
        width = sigmas[i + 1] - sigmas[i]
        if sigmas[i + 1] == 0:
            x = x + d * width
        else:
            guess = x + d * width
            d_next = (guess - model(guess, sigmas[i + 1])) / sigmas[i + 1]
            x = x + (d + d_next) / 2 * width
    return x


def sample_dpmpp_2m(model: Denoiser, x: torch.Tensor, sigmas: torch.Tensor, seeds: Sequence[int] = ()) -> torch.Tensor:
    """DPM-Solver++(2M) (Lu et al., 2022, Algorithm 2) with t = -log sigma."""
    previous = None
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i])
        t, t_next = -sigmas[i].log(), -sigmas[i + 1].log()
        h = t_next - t
        if previous is None or sigmas[i + 1] == 0:
            estimate = denoised
        else:
            r = (t + sigmas[i - 1].log()) / h
            estimate = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * previous
        x = sigmas[i + 1] / sigmas[i] * x - (-h).expm1() * estimate
        previous = denoised
    return x


def sample_res_multistep(model: Denoiser, x: torch.Tensor, sigmas: torch.Tensor, seeds: Sequence[int] = ()) -> torch.Tensor:
    """The second-order multistep method of RES (Zhang et al., 2023, arXiv 2308.02157)."""
    return _res_multistep(model, x, sigmas)


def sample_res_multistep_ancestral(
    model: Denoiser, x: torch.Tensor, sigmas: torch.Tensor, seeds: Sequence[int] = ()
) -> torch.Tensor:
    """Ancestral sampling with the second-order multistep steps of RES (Zhang et al., 2023, arXiv 2308.02157)."""
    return _res_multistep(model, x, sigmas, independent_noise(x, seeds))


def sample_uni_pc(model: Denoiser, x: torch.Tensor, sigmas: torch.Tensor, seeds: Sequence[int] = ()) -> torch.Tensor:
    """UniPC (Zhao et al., 2023, arXiv 2302.04867) of order 3, lower at both ends, with B(h) = h: one evaluation a step."""
    steps = len(sigmas) - 1
    highest = max(1, min(_UNI_PC_ORDER, steps - 1))
    places = [-log(float(sigma) or _UNI_PC_END) for sigma in sigmas]  # t = -log sigma
    history: list[torch.Tensor] = []  # denoised, the newest first
    start, order = x, 1
    for i in range(steps):
        denoised = model(x, sigmas[i])
        if i:
            x = _uni_pc_step(start, history, places[i - 1 :: -1], places[i], order, denoised)
        history = [denoised, *history][:highest]
        start, order = x, min(highest, i + 1, steps - i)
        x = _uni_pc_step(start, history, places[i::-1], places[i + 1], order)
    return x


def sample_euler_ancestral(model: Denoiser, x: torch.Tensor, sigmas: torch.Tensor, seeds: Sequence[int] = ()) -> torch.Tensor:
    """Ancestral sampling with Euler's steps (Song et al., 2021, DDIM with eta 1); for eps models DDPM (Ho et al., 2020)."""
    noise = independent_noise(x, seeds)
    for sigma, following in pairwise(sigmas):
        denoised = model(x, sigma)
        down, up = _ancestral(sigma, following)
        x = denoised + down / sigma * (x - denoised)
        if following > 0:
            x = x + up * noise()
    return x


def sample_dpm_2_ancestral(model: Denoiser, x: torch.Tensor, sigmas: torch.Tensor, seeds: Sequence[int] = ()) -> torch.Tensor:
    """Ancestral sampling with the steps of DPM-Solver-2 (Lu et al., 2022, arXiv 2206.00927, Algorithm 1)."""
    noise = independent_noise(x, seeds)
    for sigma, following in pairwise(sigmas):
        denoised = model(x, sigma)
        if following == 0:
            return denoised
        down, up = _ancestral(sigma, following)
        middle = _between(sigma, down)
        guess = denoised + middle / sigma * (x - denoised)
        d = (guess - model(guess, middle)) / middle
        x = x + d * (down - sigma) + up * noise()
    return x


def sample_dpmpp_2s_ancestral(
    model: Denoiser, x: torch.Tensor, sigmas: torch.Tensor, seeds: Sequence[int] = ()
) -> torch.Tensor:
    """Ancestral sampling with the steps of DPM-Solver++(2S) (Lu et al., 2022, arXiv 2211.01095, Algorithm 1)."""
    noise = independent_noise(x, seeds)
    for sigma, following in pairwise(sigmas):
        denoised = model(x, sigma)
        if following == 0:
            return denoised
        down, up = _ancestral(sigma, following)
        middle = _between(sigma, down)
        denoised = model(denoised + middle / sigma * (x - denoised), middle)
        x = denoised + down / sigma * (x - denoised) + up * noise()
    return x


def sample_lcm(model: Denoiser, x: torch.Tensor, sigmas: torch.Tensor, seeds: Sequence[int] = ()) -> torch.Tensor:
    """Multistep consistency sampling (Song et al., 2023, Algorithm 1; Luo et al., 2023): denoise, and noise anew."""
    noise = independent_noise(x, seeds)
    for sigma, following in pairwise(sigmas):
        x = model(x, sigma)
        if following > 0:
            x = x + following * noise()
    return x


def sample_er_sde(model: Denoiser, x: torch.Tensor, sigmas: torch.Tensor, seeds: Sequence[int] = ()) -> torch.Tensor:
    """ER-SDE-Solver-3 (Cui et al., 2023, arXiv 2309.06169) with the noise scale function sigma (exp(sigma^0.3) + 10)."""

    def scale(level: torch.Tensor) -> torch.Tensor:
        return level * ((level**0.3).exp() + 10)

    noise = independent_noise(x, seeds)
    previous = slope_before = None
    for i in range(len(sigmas) - 1):
        sigma, following = sigmas[i], sigmas[i + 1]
        denoised = model(x, sigma)
        if following == 0:
            return denoised
        r, width = scale(following) / scale(sigma), following - sigma
        x = denoised + r * (x - denoised)
        if previous is not None:
            levels = following - width * torch.arange(_ER_SDE_POINTS, device=x.device) / _ER_SDE_POINTS
            weights = -width / _ER_SDE_POINTS * scale(following) / scale(levels)
            slope = (denoised - previous) / (sigma - sigmas[i - 1])
            x = x + (width + weights.sum()) * slope
            if slope_before is not None:
                curvature = (slope - slope_before) / ((sigma - sigmas[i - 2]) / 2)
                x = x + (width**2 / 2 + (weights * (levels - sigma)).sum()) * curvature
            slope_before = slope
        x = x + (following**2 - (sigma * r) ** 2).clamp(min=0).sqrt() * noise()
        previous = denoised
    return x


def sample_seeds_2(model: Denoiser, x: torch.Tensor, sigmas: torch.Tensor, seeds: Sequence[int] = ()) -> torch.Tensor:
    """SEEDS-2 (Gonzalez et al., 2023, arXiv 2305.14267) with its second stage half way in log sigma."""
    noise = independent_noise(x, seeds)
    for sigma, following in pairwise(sigmas):
        denoised = model(x, sigma)
        if following == 0:
            return denoised
        middle = _between(sigma, following)
        down, up = _ancestral(sigma, middle)
        drawn = up * noise()
        denoised = model(denoised + down / sigma * (x - denoised) + drawn, middle)
        down, up = _ancestral(middle, following)
        drawn = down / middle * drawn + up * noise()
        x = denoised + (following / sigma) ** 2 * (x - denoised) + drawn
    return x


def sample_dpmpp_sde(model: Denoiser, x: torch.Tensor, sigmas: torch.Tensor, seeds: Sequence[int] = ()) -> torch.Tensor:
    """SDE-DPM-Solver++ (Lu et al., 2022, arXiv 2211.01095) in two stages a step, on a Brownian motion."""
    noise = brownian_noise(x, sigmas, seeds)
    for sigma, following in pairwise(sigmas):
        denoised = model(x, sigma)
        if following == 0:
            return denoised
        middle = _between(sigma, following)
        down, up = _ancestral(sigma, middle)
        denoised = model(denoised + down / sigma * (x - denoised) + up * noise(sigma, middle), middle)
        down, up = _ancestral(sigma, following)
        x = denoised + down / sigma * (x - denoised) + up * noise(sigma, following)
    return x


def sample_dpmpp_2m_sde(model: Denoiser, x: torch.Tensor, sigmas: torch.Tensor, seeds: Sequence[int] = ()) -> torch.Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al., 2022, arXiv 2211.01095), on a Brownian motion."""
    noise = brownian_noise(x, sigmas, seeds)
    previous = width_before = None
    for sigma, following in pairwise(sigmas):
        denoised = model(x, sigma)
        if following == 0:
            return denoised
        width = sigma.log() - following.log()
        estimate = denoised if previous is None else denoised + width / (2 * width_before) * (denoised - previous)
        down, up = _ancestral(sigma, following)
        x = estimate + down / sigma * (x - estimate) + up * noise(sigma, following)
        previous, width_before = denoised, width
    return x


def sample_dpmpp_3m_sde(model: Denoiser, x: torch.Tensor, sigmas: torch.Tensor, seeds: Sequence[int] = ()) -> torch.Tensor:
    """SDE-DPM-Solver++ (Lu et al., 2022, arXiv 2211.01095) with multistep steps of the third order, on a Brownian motion."""
    noise = brownian_noise(x, sigmas, seeds)
    history: list[tuple[torch.Tensor, torch.Tensor]] = []  # (log sigma, denoised), the newest first
    for sigma, following in pairwise(sigmas):
        denoised = model(x, sigma)
        if following == 0:
            return denoised
        history = [(sigma.log(), denoised), *history][:3]
        slopes = [(value - older) / (before - at) for (at, value), (before, older) in pairwise(history)]
        width = sigma.log() - following.log()
        down, up = _ancestral(sigma, following)
        # phi functions of the exponential integrator over 2 width: the noise doubles the decay.
        phi_2 = (-2 * width).expm1() / (2 * width) + 1
        phi_3 = phi_2 / (2 * width) - 0.5
        x = denoised + down / sigma * (x - denoised)
        if len(slopes) == 1:
            x = x + phi_2 * width * slopes[0]
        if len(slopes) == 2:
            bend = (slopes[0] - slopes[1]) / (history[2][0] - history[0][0])
            slope = slopes[0] + bend * (history[1][0] - history[0][0])
            x = x + phi_2 * width * slope - phi_3 * width**2 * bend
        x = x + up * noise(sigma, following)
    return x


SAMPLERS: dict[str, Sampler] = {
    "euler": sample_euler,
    "ddim": sample_euler,
    "heun": sample_heun,
    "dpmpp_2m": sample_dpmpp_2m,
    "res_multistep": sample_res_multistep,
    "uni_pc": sample_uni_pc,
    "euler_ancestral": sample_euler_ancestral,
    "ddpm": sample_euler_ancestral,
    "dpm_2_ancestral": sample_dpm_2_ancestral,
    "dpmpp_2s_ancestral": sample_dpmpp_2s_ancestral,
    "res_multistep_ancestral": sample_res_multistep_ancestral,
    "lcm": sample_lcm,
    "er_sde": sample_er_sde,
    "seeds_2": sample_seeds_2,
    "dpmpp_sde": sample_dpmpp_sde,
    "dpmpp_2m_sde": sample_dpmpp_2m_sde,
    "dpmpp_3m_sde": sample_dpmpp_3m_sde,
}
# Those that draw noise during the run.
STOCHASTIC = frozenset(SAMPLERS) - {"euler", "ddim", "heun", "dpmpp_2m", "res_multistep", "uni_pc"}


def _ancestral(sigma: torch.Tensor, following: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the level that an ancestral step goes down to, and how much noise brings it up to the following level."""
    return following**2 / sigma, following / sigma * ((sigma - following) * (sigma + following)).sqrt()


def _between(sigma: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """Return the level half way in log sigma, rounded as the host's is: a Brownian motion tells the difference."""
    return (sigma.log() - 0.5 * (sigma.log() - following.log())).exp()


def _res_multistep(
    model: Denoiser, x: torch.Tensor, sigmas: torch.Tensor, noise: Callable[[], torch.Tensor] | None = None
) -> torch.Tensor:
    """Sample with the second-order multistep steps of RES, ancestral ones where noise is given."""
    previous = down_before = None
    for i in range(len(sigmas) - 1):
        sigma, following = sigmas[i], sigmas[i + 1]
        denoised = model(x, sigma)
        down, up = (following, 0.0) if noise is None else _ancestral(sigma, following)
        x = denoised + down / sigma * (x - denoised)
        if previous is not None and following > 0:
            h = sigma.log() - down.log()
            place = (down_before.log() - sigmas[i - 1].log()) / h  # of the previous evaluation, in steps; negative
            x = x + (1 + (-h).expm1() / h) / place * (previous - denoised)
        if noise is not None and following > 0:
            x = x + up * noise()
        previous, down_before = denoised, down
    return x


def _uni_pc_step(
    x: torch.Tensor,
    history: Sequence[torch.Tensor],
    places: Sequence[float],
    place: float,
    order: int,
    denoised: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the state [B, ...] at a place, t = -log sigma: UniP's, or UniC's with the denoised latent of a first guess there.

    Args:
        x: state at the newest place.
        history: denoised latents, the newest first.
        places: theirs.
        place: of the state asked for.
        order: how many of them are used.
        denoised: at the place.
    """
    h = place - places[0]
    at = [(places[k] - places[0]) / h for k in range(1, order)]
    differences = [(history[k] - history[0]) / at[k - 1] for k in range(1, order)]
    if denoised is not None:
        at, differences = [*at, 1.0], [*differences, denoised - history[0]]
    x = history[0] + exp(-h) * (x - history[0])
    for weight, difference in zip(_uni_pc_weights(h, at), differences, strict=True):
        x = x + h * weight * difference
    return x


def _uni_pc_weights(h: float, at: Sequence[float]) -> list[float]:
    """Return the weights of UniPC's differences at some places in steps of width h (Zhao et al., 2023)."""
    if len(at) <= 1:
        return [0.5] * len(at)
    right, phi, factorial = [], expm1(-h) / -h - 1, 1
    for k in range(1, len(at) + 1):
        right.append(phi * factorial / -h)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    powers = torch.tensor([[a**k for a in at] for k in range(len(at))], dtype=torch.float64)
    return torch.linalg.solve(powers, torch.tensor(right, dtype=torch.float64)).tolist()
