"""Metrics against closed forms, slow references and their own symmetries."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from flexi_core import FlexiError
from flexi_core.metrics import bootstrap_interval, frechet_distance, kendall_tau, latent_mse, psnr_db, rfid, ssim


def normal(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pictures(seed: int = 0, size: int = 16) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def by_matrix_square_root(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return Heusel et al. (2017), Eq. 6, with scipy's matrix square root of the covariances' product."""
    c1, c2 = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(c1 @ c2)
    return float((a.mean(0) - b.mean(0)).square().sum()) + float(np.trace(c1 + c2 - 2 * np.real(root)))


@pytest.mark.parametrize(("n", "d"), [(500, 8), (9, 8), (5, 8), (2, 64), (64, 64)])
def test_equal_sets_are_at_distance_zero(n, d):
    features = normal(n, d) * 3 + 1
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(features, features.flip(0)) == pytest.approx(0, abs=1e-9)


def test_the_distance_of_two_gaussians_with_diagonal_covariance():
    scales = torch.tensor([[1.0, 2.0, 0.5, 3.0], [2.0, 1.0, 0.5, 1.5]], dtype=torch.float64)
    shift = torch.tensor([1.0, 0.0, -2.0, 0.5], dtype=torch.float64)
    exact = shift.square().sum() + (scales[0] - scales[1]).square().sum()  # tr of (C1^1/2 - C2^1/2)^2
    a, b = normal(200_000, 4, 1) * scales[0], normal(200_000, 4, 2) * scales[1] + shift
    assert frechet_distance(a, b) == pytest.approx(float(exact), rel=0.02)


@pytest.mark.parametrize("counts", [(500, 500), (300, 700), (40, 30)])
def test_the_distance_agrees_with_the_matrix_square_root(counts):
    mix = normal(8, 8, 3)
    a, b = normal(counts[0], 8, 4) @ mix, normal(counts[1], 8, 5) + 0.3
    assert frechet_distance(a, b) == pytest.approx(by_matrix_square_root(a, b), rel=1e-6)


@pytest.mark.parametrize("n", [2, 5, 20, 200])
def test_the_distance_is_symmetric_not_negative_and_finite_also_below_the_dimension(n):
    a, b = normal(n, 32, 6), normal(n + 3, 32, 7) * 2
    forward, backward = frechet_distance(a, b), frechet_distance(b, a)
    assert forward == pytest.approx(backward, rel=1e-9)
    assert math.isfinite(forward) and forward > 0


def test_the_distance_does_not_change_when_both_sets_move_or_turn():
    a, b = normal(100, 6, 8), normal(100, 6, 9) * 2 + 1
    turn = torch.linalg.qr(normal(6, 6, 10)).Q
    distance = frechet_distance(a, b)
    assert frechet_distance(a + 100, b + 100) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(distance, rel=1e-9)


def test_the_distance_grows_by_the_square_of_a_shift():
    a = normal(100, 6, 8)
    assert frechet_distance(a, a + 2) == pytest.approx(6 * 4)


def test_half_precision_features_are_compared_in_float64():
    a, b = normal(50, 4, 1), normal(50, 4, 2)
    assert frechet_distance(a.half(), b.half()) == frechet_distance(a.half().double(), b.half().double())


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (normal(1, 4), normal(5, 4), "1 and 5 samples; a Frechet distance needs at least 2"),
        (normal(5, 4), normal(0, 4), "5 and 0 samples"),
        (normal(5, 4), normal(5, 3), r"features of shapes \(5, 4\) and \(5, 3\)"),
        (normal(5, 4)[0], normal(5, 4), "features of shapes"),
        (normal(5, 4) * math.nan, normal(5, 4), "not finite"),
        (normal(5, 4), normal(5, 4) / 0, "not finite"),
    ],
)
def test_features_that_have_no_distance_are_refused(a, b, message):
    with pytest.raises(FlexiError, match=message):
        frechet_distance(a, b)


def test_rfid_is_the_distance_of_as_many_samples():
    a, b = normal(20, 4, 1), normal(20, 4, 2)
    assert rfid(a, b) == frechet_distance(a, b)
    with pytest.raises(FlexiError, match="19 candidate and 20 teacher samples; rFID needs the same noise"):
        rfid(a[:19], b)


@pytest.mark.parametrize("offset", [0.01, 0.1, 1.0])
def test_psnr_of_a_known_offset(offset):
    images = pictures()
    expected = 20 * math.log10(2 / offset)
    assert psnr_db(images + offset, images).tolist() == pytest.approx([expected] * 2, abs=1e-3)
    assert psnr_db(images + offset, images, data_range=1).tolist() == pytest.approx(
        [expected - 20 * math.log10(2)] * 2, abs=1e-3
    )


def test_psnr_is_infinite_for_equal_images_and_each_images_own():
    images = pictures()
    changed = images.clone()
    changed[1] += 0.1
    assert psnr_db(changed, images).tolist() == [math.inf, pytest.approx(26.02, abs=0.01)]


def test_latent_mse_of_a_known_offset():
    images = pictures()
    scale = torch.tensor([0.5, 2.0]).view(2, 1, 1, 1)
    assert latent_mse(images + scale, images).tolist() == pytest.approx([0.25, 4.0], rel=1e-6)


def slow_ssim(x: np.ndarray, y: np.ndarray, data_range: float) -> float:
    """Return the structural similarity of one channel, window by window, from its definition (Wang et al., 2004)."""
    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = np.outer(window, window) / window.sum() ** 2
    px, py = (np.pad(a, 5, mode="symmetric") for a in (x, y))
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            a, b = px[i : i + 11, j : j + 11], py[i : i + 11, j : j + 11]
            ma, mb = (window * a).sum(), (window * b).sum()
            va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
            cov = (window * (a - ma) * (b - mb)).sum()
            values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return float(np.mean(values))


@pytest.mark.parametrize("data_range", [2.0, 1.0])
def test_ssim_agrees_with_its_definition(data_range):
    x, y = pictures(1, 13), pictures(1, 13) * 0.7 + 0.2 * pictures(2, 13)
    expected = [
        np.mean([slow_ssim(a.double().numpy(), b.double().numpy(), data_range) for a, b in zip(i, j, strict=True)])
        for i, j in zip(x, y, strict=True)
    ]
    assert ssim(x, y, data_range).tolist() == pytest.approx(expected, rel=1e-6)


def test_ssim_is_one_for_equal_images_less_for_others_and_symmetric():
    x, y = pictures(1), pictures(1) + 0.1 * pictures(2)
    assert ssim(x, x).tolist() == pytest.approx([1.0, 1.0], abs=1e-12)
    assert (ssim(x, y) < 1).all()
    torch.testing.assert_close(ssim(x, y), ssim(y, x))
    assert (ssim(x, x + pictures(2)) < ssim(x, y)).all()


@pytest.mark.parametrize("measure", [psnr_db, ssim, latent_mse])
@pytest.mark.parametrize("other", [torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 16, 16), torch.zeros(3, 16, 16)])
def test_paired_measures_refuse_what_is_no_pair(measure, other):
    with pytest.raises(FlexiError, match=r"paired measures need two equal \[B, C, H, W\]"):
        measure(pictures(), other)


def test_kendalls_tau_by_hand():
    assert kendall_tau([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert kendall_tau([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert kendall_tau([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    assert math.isnan(kendall_tau([1, 2, 3], [5, 5, 5]))


def test_the_bootstrap_interval_holds_the_mean_as_often_as_it_says():
    hits = 0
    for seed in range(200):
        low, high = bootstrap_interval(normal(60, 1, seed).flatten() + 3, seed=seed, resamples=300)
        hits += low < 3 < high
    assert 0.88 < hits / 200 < 0.99


def test_the_bootstrap_interval_is_its_seeds_and_narrows_with_samples():
    values = normal(400, 1).flatten()
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)
    few, many = (bootstrap_interval(values[:n]) for n in (25, 400))
    assert many[1] - many[0] < 0.5 * (few[1] - few[0])
