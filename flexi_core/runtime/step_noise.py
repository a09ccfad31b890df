"""The noise that samplers draw during a run: for each row from a seed of its own, whatever is sampled beside it.

A row gets the noise that the host, on a CPU, gives a run of that one picture with the same seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..errors import FlexiError

_TREE_DIGITS = 6  # decimals to which torchsde rounds the places that it is asked for


def row_seeds(count: int, seeds: Sequence[int] | None) -> Sequence[int]:
    """Return the seeds of the rows, by default 0, 1, ...

    Raises:
        FlexiError: they are not as many as the rows.
    """
    seeds = range(count) if seeds is None or not len(seeds) else seeds
    if len(seeds) != count:
        raise FlexiError(f"{len(seeds)} seeds for {count} samples; give one for each")
    return seeds


def independent_noise(x: torch.Tensor, seeds: Sequence[int] = ()) -> Callable[[], torch.Tensor]:
    """Return a function that draws unit noise [B, ...] like x, anew in every call.

    Args:
        x: latents [B, ...].
        seeds: of the rows. Drawing begins one above, as in newer hosts: the noise that a run started from is not drawn again.
    """
    generators = [torch.Generator().manual_seed(seed + 1) for seed in row_seeds(x.shape[0], seeds)]

    def draw() -> torch.Tensor:
        return torch.stack([torch.randn(x.shape[1:], dtype=x.dtype, generator=one) for one in generators]).to(x.device)

    return draw


def brownian_noise(
    x: torch.Tensor, sigmas: torch.Tensor, seeds: Sequence[int] = ()
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return a function of two noise levels that gives the unit noise [B, ...] of a Brownian motion between them.

    The motion is fixed by the seed and the ends of the grid: finer steps over the same levels see the same motion.

    Args:
        x: latents [B, ...].
        sigmas: noise levels [n + 1] of the run.
        seeds: of the rows.

    Raises:
        FlexiError: torchsde is not installed.
    """
    try:
        from torchsde import BrownianTree
    except ImportError as error:
        raise FlexiError(
            "this sampler's noise needs torchsde: pip install torchsde, or this project's extra `search`"
        ) from error
    seeds, start = row_seeds(x.shape[0], seeds), torch.zeros(x.shape[1:], dtype=x.dtype)
    levels = sigmas[sigmas > 0].cpu()
    low, high = levels.min(), levels.max()
    trees = [BrownianTree(low, start, high, entropy=int(seed)) for seed in seeds] if low < high else []  # one step draws none

    def between(sigma: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        ends = round(float(following), _TREE_DIGITS), round(float(sigma), _TREE_DIGITS)
        change = torch.stack([tree(*ends) for tree in trees]).to(x.device)
        return -change / (sigma - following).sqrt()  # the run goes down

    return between
