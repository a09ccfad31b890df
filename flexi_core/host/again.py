"""A run that was sampled, sampled once more: with the same noise, seed and sampler, and every step computed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Again:
    """What a run began from.

    Args:
        guider: of the host, which holds the model and the conditioning.
        noise, latent_image: as it was given them [B, ...].
        sampler: of the host.
        sigmas: of the whole run [n + 1].
        denoise_mask: None without one.
        seed: of the run.
        random: state of torch's own generator on the CPU when it began; some samplers draw from it.
    """

    guider: Any
    noise: torch.Tensor
    latent_image: torch.Tensor
    sampler: Any
    sigmas: torch.Tensor
    denoise_mask: torch.Tensor | None
    seed: int | None
    random: torch.Tensor

    def sample(self, on_step: Callable[[], None]) -> tuple[torch.Tensor, float]:
        """Return the latent of the run, and the seconds that it took.

        Args:
            on_step: is called after each step.
        """
        began = time.perf_counter()
        with torch.random.fork_rng():
            torch.set_rng_state(self.random)
            latent = self.guider.sample(
                self.noise,
                self.latent_image,
                self.sampler,
                self.sigmas,
                denoise_mask=self.denoise_mask,
                callback=lambda *_: on_step(),
                disable_pbar=True,
                seed=self.seed,
            )
        return latent, time.perf_counter() - began

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1


def again(guider: Any, noise: Any, latent_image: Any, sampler: Any, sigmas: Any, *rest: Any, **named: Any) -> Again | None:
    """Return what a run begins from, from what the host samples it with; None for several streams, which come packed."""
    mask, _, _, seed = _rest(*rest, **named)
    if len(named.get("latent_shapes") or [noise.shape]) > 1:
        return None
    return Again(guider, noise, latent_image, sampler, sigmas, mask, seed, torch.get_rng_state())


def _rest(denoise_mask=None, callback=None, disable_pbar=False, seed=None, **_: Any) -> tuple[Any, Any, Any, Any]:
    return denoise_mask, callback, disable_pbar, seed
