"""Latents as pictures."""

from __future__ import annotations

from typing import Any

import torch


def picture_of(model: Any, samples: Any, vae: Any) -> torch.Tensor:
    """Return a latent's first picture [1, H, W, 3], 0..1: decoded, or without a VAE in the latent format's own colours.

    Args:
        model: of the host, whose latent it is.
        samples: the latent; the first of several streams.
        vae: None where there is none.
    """
    if getattr(samples, "is_nested", False):
        samples = samples.unbind()[0]
    if vae is not None:
        images = vae.decode(samples.clone())  # some write into what they are given, and the latent goes on to others
        images = images[:, images.shape[1] // 2] if images.ndim == 5 else images
        return images[:1].cpu().float()
    factors = torch.tensor(model.model.latent_format.latent_rgb_factors)
    latent = samples[:, :, samples.shape[2] // 2] if samples.ndim == 5 else samples
    rgb = torch.einsum("bchw,cd->bhwd", latent[:1].cpu().float(), factors.float())
    return ((rgb + 1) / 2).clamp(0, 1)
