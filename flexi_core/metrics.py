"""How near one set of images is to another: in pairs (PSNR, SSIM, latent MSE) and as sets; how sure each figure is.

Sets are compared by what a network reads from them: Frechet distance, precision, recall, inception score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import scipy.ndimage
import torch

from .errors import FlexiError

_PICTURE_LIMIT = 1.5


def psnr_db(images: torch.Tensor, reference: torch.Tensor, data_range: float = 2.0) -> torch.Tensor:
    """Return the peak signal-to-noise ratio of each image [B], dB; inf where two images are equal.

    Args:
        images, reference: [B, ...] on the same scale: pictures, or latents of any shape.
        data_range: width of the scale, 2 for -1..1.
    """
    _check_pairs(images, reference)
    mse = (images.double() - reference.double()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(data_range**2 / mse)


def data_range(reference: torch.Tensor) -> float:
    """Return the width of the scale on which to state PSNR and SSIM: 2 for pictures in -1..1, that of the values for latents.

    Latents have no scale of their own: theirs is twice the 99.9th percentile of what the reference holds, so that one stray
    value does not move every figure.
    """
    largest = float(reference.abs().max())
    # A sampler overshoots the scale of pictures a little.
    return 2.0 if largest <= _PICTURE_LIMIT else 2 * float(np.quantile(reference.abs().double().cpu().numpy(), 0.999))


def ssim(images: torch.Tensor, reference: torch.Tensor, data_range: float = 2.0) -> torch.Tensor:
    """Return the structural similarity of each image [B] (Wang et al., 2004): Gaussian window of 1.5 pixels, 11 wide.

    Args:
        images, reference: [B, C, H, W] on the same scale.
        data_range: width of the scale, 2 for -1..1.
    """
    _check_pairs(images, reference, 4)
    x, y = (t.double().cpu().numpy() for t in (images, reference))

    def blur(a: np.ndarray) -> np.ndarray:
        return scipy.ndimage.gaussian_filter(a, sigma=(0, 0, 1.5, 1.5), radius=(0, 0, 5, 5))

    mx, my = blur(x), blur(y)
    vx, vy, vxy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    quality = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return torch.from_numpy(quality.mean(axis=(1, 2, 3)))


def latent_mse(latents: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error of each latent [B], of any shape [B, ...]."""
    _check_pairs(latents, reference)
    return (latents.double() - reference.double()).square().flatten(1).mean(dim=1)


def frechet_distance(features: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the Frechet distance between two sets of features (Heusel et al., 2017, Eq. 6).

    |mu1 - mu2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^1/2), in float64. The last trace is the nuclear norm of A B^T for centred
    feature matrices with C1 = A^T A, C2 = B^T B, so no covariance is inverted and nothing becomes complex: the value is
    defined, 0 for equal sets and never negative, also with fewer samples than dimensions. With few samples it is biased
    (upwards, for sets drawn apart); compare only values of equal sample counts.

    Args:
        features: [N, D], N >= 2.
        reference: [M, D], M >= 2.

    Raises:
        FlexiError: a set has fewer than 2 rows, the widths differ, or a value is not finite.
    """
    a, b = _check_sets(features, reference, 2, "a Frechet distance")
    return _moments_distance(_moments(a), _moments(b))


def rfid(features: torch.Tensor, teacher: torch.Tensor) -> float:
    """Return the Frechet distance to the teacher's images from the same noise (Flexiffusion, arXiv 2409.17566).

    Args:
        features: of the candidate's images [N, D].
        teacher: of the teacher's images [N, D], row i from the same noise as row i of `features`.

    Raises:
        FlexiError: the two are not as many.
    """
    if features.shape != teacher.shape:
        raise FlexiError(
            f"{features.shape[0]} candidate and {teacher.shape[0]} teacher samples; rFID needs the same noise for both"
        )
    return frechet_distance(features, teacher)


class Manifold:
    """Where a set of features lies: balls as wide as the way to the k-th nearest other (Kynkaanniemi et al., 2019).

    The precision of samples is the share of them that lies on the reference's manifold, their recall the share of the
    reference that lies on theirs (Eq. 1-3). Both depend on the sample counts; compare only equal ones.

    Args:
        features: [M, D], M > k.
        k: 3 in the paper.

    Raises:
        FlexiError: there are no more than k rows, or a value is not finite.
    """

    def __init__(self, features: torch.Tensor, k: int = 3) -> None:
        points, _ = _check_sets(features, features, k + 1, f"a manifold of k = {k}")
        self._points = torch.from_numpy(points)
        # The nearest of all is the point itself, at distance 0.
        self._radii = _distances(self._points, self._points).kthvalue(k + 1, dim=1).values

    def holds(self, features: torch.Tensor) -> torch.Tensor:
        """Return for each row of features [N, D] whether it lies in one of the balls [N], bool."""
        points, _ = _check_sets(features, self._points, 1, "a manifold")
        return (_distances(torch.from_numpy(points), self._points) <= self._radii).any(dim=1)


def precision(features: torch.Tensor, reference: torch.Tensor, k: int = 3) -> float:
    """Return the share of samples [N, D] that lies on the manifold of the reference [M, D], 0 to 1."""
    return float(Manifold(reference, k).holds(features).double().mean())


def recall(features: torch.Tensor, reference: torch.Tensor, k: int = 3) -> float:
    """Return the share of the reference [M, D] that lies on the manifold of the samples [N, D], 0 to 1."""
    return precision(reference, features, k)


def inception_score(probabilities: torch.Tensor) -> float:
    """Return exp(E_x KL(p(y|x) || p(y))), 1 to the number of classes (Salimans et al., 2016, Section 4).

    High where each picture is clearly of one class and all classes occur. A set with few samples for each class scores low.

    Args:
        probabilities: of the classes [N, K], rows that sum to 1.

    Raises:
        FlexiError: they are not that.
    """
    p = probabilities.detach().double().cpu()
    if p.ndim != 2 or not len(p) or not bool(((p.sum(1) - 1).abs() < 1e-3).all()) or bool((p < 0).any()):
        raise FlexiError(f"class probabilities of shape {tuple(p.shape)}; expected [N, K], N >= 1, rows that sum to 1")
    divergence = (torch.xlogy(p, p) - torch.xlogy(p, p.mean(dim=0))).sum(dim=1)
    return float(divergence.mean().exp())


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Kendall's tau-b between two rankings, -1 to 1; nan when one of them is constant.

    From the signs of all pairs: scipy's also finds a p-value, 40 times slower, too slow to resample.
    """
    x, y = (np.sign(np.subtract.outer(values, values)) for values in (np.asarray(a, float), np.asarray(b, float)))
    pairs = math.sqrt(np.square(x).sum() * np.square(y).sum())
    return float((x * y).sum() / pairs) if pairs else math.nan


def kendall_tau_within(a: Sequence[float], b: Sequence[float], groups: Sequence[float]) -> float:
    """Return the mean of the tau-b of every group: whether things that are alike in one respect are ranked alike.

    Groups in which one ranking is constant say nothing and are left out; nan when all are.
    """
    a, b, groups = (np.asarray(values) for values in (a, b, groups))
    taus = [kendall_tau(a[groups == group], b[groups == group]) for group in np.unique(groups)]
    return float(np.mean(found)) if (found := [tau for tau in taus if not math.isnan(tau)]) else math.nan


def bootstrap_interval(
    values: torch.Tensor, seed: int = 0, confidence: float = 0.95, resamples: int = 1000
) -> tuple[float, float]:
    """Return a percentile bootstrap interval for the mean of per-sample values [N]."""
    data = values.double().cpu().numpy()
    picks = np.random.default_rng(seed).integers(len(data), size=(resamples, len(data)))
    low, high = np.quantile(data[picks].mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def bootstrap_statistic(
    statistic: Callable[[np.ndarray], float],
    count: int,
    *,
    groups: Sequence[float] | None = None,
    centred: bool = False,
    seed: int = 0,
    confidence: float = 0.95,
    resamples: int = 300,
) -> tuple[float, float]:
    """Return a bootstrap interval (Efron, 1979) for anything that is computed from samples.

    The plain interval holds the middle of the resampled values (percentile). A Frechet distance or an inception score of a
    resampled set is biased against that of the set itself, since a resample repeats samples: its percentiles may miss the
    value they are for. `centred` takes their spread only and lays it around the value: what as many other samples would
    give, not what infinitely many would. Resampled values that are nan are left out.

    Args:
        statistic: of sample indices [count], which repeat; called with 0, 1, ..., count - 1 for the value itself. What is
            paired is paired by taking the same indices of both.
        count: of samples.
        groups: of each sample; resampling keeps to the groups and leaves their sizes.
        centred: whether to lay the spread around the value.
        seed: of the resampling.

    Returns:
        low, high; nan where the statistic is.
    """
    rng = np.random.default_rng(seed)
    parts = [np.arange(count)] if groups is None else [np.flatnonzero(np.asarray(groups) == g) for g in np.unique(groups)]
    drawn = [statistic(np.concatenate([rng.choice(part, len(part)) for part in parts])) for _ in range(resamples)]
    drawn = [value for value in drawn if not math.isnan(value)]
    if not drawn:
        return math.nan, math.nan
    shift = statistic(np.arange(count)) - np.mean(drawn) if centred else 0.0
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low + shift), float(high + shift)


def frechet_interval(features: torch.Tensor, reference: torch.Tensor, *, paired: bool, seed: int = 0) -> tuple[float, float]:
    """Return a centred bootstrap interval of a Frechet distance, never below 0.

    Args:
        features: [N, D].
        reference: [M, D]; N of them, and resampled with the same indices, where `paired` (rFID); else held as they are.
        paired: whether row i of both is from the same noise.
        seed: of the resampling.
    """

    a, b = _check_sets(features, reference, 2, "a Frechet distance")
    held = _moments(b)

    def distance(picks: np.ndarray) -> float:
        return _moments_distance(_moments(a[picks]), _moments(b[picks]) if paired else held)

    low, high = bootstrap_statistic(distance, len(a), centred=True, seed=seed)
    return max(low, 0.0), max(high, 0.0)


def _moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean [D], and a root R [at most D, D] of the covariance: R^T R."""
    mean = values.mean(axis=0)
    root = (values - mean) / math.sqrt(len(values) - 1)
    return mean, np.linalg.qr(root, mode="r") if len(root) > root.shape[1] else root


def _moments_distance(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> float:
    (mean_a, root_a), (mean_b, root_b) = a, b
    # tr((C1 C2)^1/2) = sum of the singular values of root_a root_b^T.
    cross = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    distance = np.square(mean_a - mean_b).sum() + np.square(root_a).sum() + np.square(root_b).sum() - 2 * cross
    return max(float(distance), 0.0)


def _distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # By matrix products, equal points would not be at distance 0.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _check_sets(features: torch.Tensor, reference: torch.Tensor, least: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    a, b = (t.detach().double().cpu().numpy() for t in (features, reference))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise FlexiError(f"features of shapes {a.shape} and {b.shape}; expected [N, D] and [M, D] with one D")
    if min(len(a), len(b)) < least:
        raise FlexiError(f"{len(a)} and {len(b)} samples; {what} needs at least {least} of each")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise FlexiError("the features hold values that are not finite; the images they were read from are broken")
    return a, b


def _check_pairs(a: torch.Tensor, b: torch.Tensor, ndim: int | None = None) -> None:
    if a.shape != b.shape or a.ndim != (ndim or a.ndim):
        raise FlexiError(f"shapes {tuple(a.shape)} and {tuple(b.shape)}; paired measures need two equal [B, C, H, W]")
