"""How near one set of images is to another: paired (PSNR, SSIM, latent MSE) and as distributions (Frechet distance)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import scipy.ndimage
import scipy.stats
import torch

from .errors import FlexiError

_PICTURE_LIMIT = 1.5


def psnr_db(images: torch.Tensor, reference: torch.Tensor, data_range: float = 2.0) -> torch.Tensor:
    """Return the peak signal-to-noise ratio of each image [B], dB; inf where two images are equal.

    Args:
        images, reference: [B, C, H, W] on the same scale.
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
    _check_pairs(images, reference)
    x, y = (t.double().cpu().numpy() for t in (images, reference))

    def blur(a: np.ndarray) -> np.ndarray:
        return scipy.ndimage.gaussian_filter(a, sigma=(0, 0, 1.5, 1.5), radius=(0, 0, 5, 5))

    mx, my = blur(x), blur(y)
    vx, vy, vxy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    quality = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return torch.from_numpy(quality.mean(axis=(1, 2, 3)))


def latent_mse(latents: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error of each latent [B]."""
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
    a, b = (t.detach().double().cpu().numpy() for t in (features, reference))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise FlexiError(f"features of shapes {a.shape} and {b.shape}; expected [N, D] and [M, D] with one D")
    if min(len(a), len(b)) < 2:
        raise FlexiError(f"{len(a)} and {len(b)} samples; a Frechet distance needs at least 2 of each")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise FlexiError("the features hold values that are not finite; the images they were read from are broken")
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    root_a = (a - mean_a) / math.sqrt(len(a) - 1)
    root_b = (b - mean_b) / math.sqrt(len(b) - 1)
    # tr((C1 C2)^1/2) = sum of the singular values of root_a root_b^T, taken on the smaller side through QR.
    r_a, r_b = (np.linalg.qr(root, mode="r") if len(root) > root.shape[1] else root for root in (root_a, root_b))
    cross = np.linalg.svd(r_a @ r_b.T, compute_uv=False).sum()
    distance = np.square(mean_a - mean_b).sum() + np.square(root_a).sum() + np.square(root_b).sum() - 2 * cross
    return max(float(distance), 0.0)


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


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Kendall's tau-b between two rankings, -1 to 1 (scipy); nan when one of them is constant."""
    return float(scipy.stats.kendalltau(a, b).statistic)


def bootstrap_interval(
    values: torch.Tensor, seed: int = 0, confidence: float = 0.95, resamples: int = 1000
) -> tuple[float, float]:
    """Return a percentile bootstrap interval for the mean of per-sample values [N]."""
    data = values.double().cpu().numpy()
    picks = np.random.default_rng(seed).integers(len(data), size=(resamples, len(data)))
    low, high = np.quantile(data[picks].mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _check_pairs(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.shape != b.shape or a.ndim != 4:
        raise FlexiError(f"shapes {tuple(a.shape)} and {tuple(b.shape)}; paired measures need two equal [B, C, H, W]")
