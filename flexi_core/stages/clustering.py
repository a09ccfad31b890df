"""Which noise levels belong together: stages by how alike the right answers at two levels are (Zhang et al., 2023, Section 3).

Two levels are alike where the optimal denoiser, the mean of the data weighted by how likely each datum is behind the noisy
input, predicts the same noise. Data are noised as x = y + sigma z; a model that scales them has the same answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import FlexiError

TOLERANCE = 2 / 255  # in eps, whatever the scale of the data (Section 3.2)
THRESHOLDS = (0.9, 0.5)
_PIECE_BYTES = 32 * 2**20  # of data at one time, in float64


@dataclass(frozen=True)
class Predictions:
    """The noise that some network predicts in the same samples at several levels.

    Args:
        sigmas: noise levels [L], falling.
        eps: predictions [L, samples, D], float32; those at two levels are of the same datum and the same noise.
        noise: that was put in [samples, D]; None where it is not known, as along a run.
        from_mean: what is predicted where only the data's mean is known [L, samples, D]; None without data.
    """

    sigmas: tuple[float, ...]
    eps: torch.Tensor
    noise: torch.Tensor | None = None
    from_mean: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if len(self.sigmas) < 2 or any(high <= low for high, low in zip(self.sigmas, self.sigmas[1:], strict=False)):
            raise FlexiError("the noise levels to be clustered do not fall; give two or more, each below the one before")
        if not self.eps.isfinite().all():
            raise FlexiError("the predictions to be clustered are not all finite")

    def similarity(self, tolerance: float = TOLERANCE) -> np.ndarray:
        """Return how alike each two levels are [L, L]: the share of values predicted within a tolerance of one another."""
        found = np.eye(len(self.sigmas))
        for i in range(len(self.sigmas)):
            for j in range(i):
                found[i, j] = found[j, i] = float(((self.eps[i] - self.eps[j]).abs() < tolerance).double().mean())
        return found

    def lower(self, tolerance: float = TOLERANCE) -> np.ndarray:
        """Return, by level [L], the share of values in which the noise itself is predicted (S0): the datum is recognised.

        For a finite set this is memorisation: the datum is among those that are averaged. A density has nearly none.
        """
        return self._share(self.noise, tolerance)

    def upper(self, tolerance: float = TOLERANCE) -> np.ndarray:
        """Return, by level [L], the share of values predicted as from the data's mean alone (S1)."""
        return self._share(self.from_mean, tolerance)

    def _share(self, limit: torch.Tensor | None, tolerance: float) -> np.ndarray:
        if limit is None:
            raise FlexiError("thresholds need the data that were noised; cluster into a number of stages instead")
        return ((self.eps - limit).abs() < tolerance).double().mean(dim=(1, 2)).numpy()


def optimal_predictions(data: torch.Tensor, sigmas: Sequence[float], samples: int = 24, seed: int = 0) -> Predictions:
    """Return what the optimal denoiser of a set of data predicts (Zhang et al., 2023, Eq. 5; Karras et al., 2022, Eq. 57).

    The data go by once, a piece at a time, in float64; nothing of their number is kept but themselves.

    Args:
        data: [N, ...], at least two, of any scale; the noise levels are in the same units.
        sigmas: noise levels [L], falling, above 0.
        samples: of the data that are noised.
        seed: of the choice of samples and of their noise.

    Raises:
        FlexiError: too few data, or a noise level is not above 0.
    """
    if len(data) < 2:
        raise FlexiError(f"{len(data)} data; the optimal denoiser needs at least 2")
    if not all(sigma > 0 for sigma in sigmas):
        raise FlexiError(f"the noise levels are {', '.join(f'{s:g}' for s in sigmas)}; the optimal denoiser's lie above 0")
    flat, generator = data.reshape(len(data), -1), torch.Generator().manual_seed(seed)
    chosen = flat[torch.randperm(len(flat), generator=generator)[:samples]].double()
    noise = torch.randn(chosen.shape, generator=generator, dtype=torch.float64)
    levels = torch.tensor(sigmas, dtype=torch.float64).view(-1, 1, 1)
    count, mean = len(chosen), torch.zeros(flat.shape[1], dtype=torch.float64)
    most = torch.full((len(sigmas), count, 1), -math.inf, dtype=torch.float64)
    weight, total = torch.zeros_like(most), torch.zeros(len(sigmas), count, flat.shape[1], dtype=torch.float64)
    rows = max(1, _PIECE_BYTES // (8 * max(flat.shape[1], len(sigmas) * count)))
    for part in flat.split(rows):
        piece = part.double()
        mean += piece.sum(0) / len(flat)
        # -|x - y|^2 / (2 sigma^2) for x = sample + sigma noise, less what is the same for every y.
        to_sample, to_noise = (chosen @ piece.T - piece.square().sum(1) / 2), noise @ piece.T
        logits = (to_sample + levels * to_noise) / levels.square()
        top = torch.maximum(most, logits.amax(-1, keepdim=True))
        likely, kept = (logits - top).exp(), (most - top).exp()
        weight = weight * kept + likely.sum(-1, keepdim=True)
        total.mul_(kept).add_((likely.flatten(0, 1) @ piece).view_as(total))
        most = top
    denoised = total.div_(weight)
    x = chosen + levels * noise
    eps = denoised.sub_(x).div_(-levels).float()
    return Predictions(tuple(map(float, sigmas)), eps, noise.float(), ((x - mean) / levels).float())


def network_predictions(
    predict: Callable[[torch.Tensor, float], torch.Tensor], data: torch.Tensor, sigmas: Sequence[float], seed: int = 0
) -> Predictions:
    """Return what a network predicts in its own samples, or in data, noised to each level.

    Args:
        predict: returns eps [samples, ...] for a noisy latent and a noise level.
        data: samples [samples, ...].
        sigmas: noise levels [L], falling, above 0.
        seed: of the noise.
    """
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(seed), dtype=data.dtype)
    eps = torch.stack([predict(data + sigma * noise, sigma).flatten(1).float() for sigma in sigmas])
    return Predictions(tuple(map(float, sigmas)), eps, noise.flatten(1).float())


@dataclass(frozen=True)
class Clusters:
    """Stages that a grid of levels was divided into.

    Args:
        sigmas: the grid [L], falling.
        starts: the index at which each stage but the first begins, rising.
        score: of the objective.
    """

    sigmas: tuple[float, ...]
    starts: tuple[int, ...]
    score: float

    @property
    def boundaries(self) -> tuple[float, ...]:
        """The noise levels between the stages: half way, in the logarithm, between the levels that they part."""
        return tuple(math.sqrt(self.sigmas[i - 1] * self.sigmas[i]) for i in self.starts)


def cluster(similarity: np.ndarray, sigmas: Sequence[float], stages: int, by_width: bool = True, least: int = 1) -> Clusters:
    """Divide a grid of levels into stages whose levels are most alike, exactly, by dynamic programming (Section 3.3).

    The published objective is the sum over stages of the mean similarity inside each, itself included. Its best division is
    mostly slivers of one level, each perfectly like itself, at the ends of the grid, and one long rest. With the stages
    weighted by their width it is not.

    Args:
        similarity: of the levels [L, L], symmetric.
        sigmas: of the levels [L], falling.
        stages: how many.
        by_width: weight each stage by its share of the levels; else as published.
        least: levels in a stage.

    Raises:
        FlexiError: there are not so many levels.
    """
    count = len(sigmas)
    if stages < 1 or least < 1 or stages * least > count:
        raise FlexiError(f"{count} levels cannot be divided into {stages} stages of {least} or more; take fewer stages")
    sums = np.zeros((count + 1, count + 1))
    sums[1:, 1:] = similarity.cumsum(0).cumsum(1)
    best = np.full((stages + 1, count + 1), -math.inf)
    came = np.zeros((stages + 1, count + 1), int)
    best[0, 0] = 0.0
    for stage in range(1, stages + 1):
        for stop in range(stage * least, count + 1):
            for start in range((stage - 1) * least, stop - least + 1):
                width = stop - start
                inside = (sums[stop, stop] - 2 * sums[start, stop] + sums[start, start]) / width**2
                score = best[stage - 1, start] + (inside * width / count if by_width else inside)
                if score > best[stage, stop]:
                    best[stage, stop], came[stage, stop] = score, start
    starts, stop = [], count
    for stage in range(stages, 1, -1):
        stop = came[stage, stop]
        starts.append(int(stop))
    return Clusters(tuple(sigmas), tuple(reversed(starts)), float(best[stages, count]))


def threshold_boundaries(
    predictions: Predictions, thresholds: tuple[float, float] = THRESHOLDS, tolerance: float = TOLERANCE
) -> tuple[float | None, float | None]:
    """Return the boundaries of three stages by thresholds (Section 3.2): above the first, S1 holds, below the second, S0 does.

    None stands for one that does not lie in the grid.
    """
    lower, upper = predictions.lower(tolerance), predictions.upper(tolerance)
    logs = np.log(predictions.sigmas)
    return _crossing(logs, upper, thresholds[1]), _crossing(logs[::-1], lower[::-1], thresholds[0])


def _crossing(logs: np.ndarray, share: np.ndarray, threshold: float) -> float | None:
    """Return where a share falls below a threshold for the first time, from its first level on; None where it never does."""
    below = np.flatnonzero(share < threshold)
    if not len(below) or below[0] == 0:
        return None
    i = below[0]
    part = (share[i - 1] - threshold) / (share[i - 1] - share[i])
    return float(np.exp(logs[i - 1] + part * (logs[i] - logs[i - 1])))
