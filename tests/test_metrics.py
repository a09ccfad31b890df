"""Metrics against closed forms, slow references and their own symmetries."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from flexi_core import FlexiError
from flexi_core.metrics import (
    Manifold,
    bootstrap_interval,
    bootstrap_statistic,
    frechet_distance,
    frechet_interval,
    inception_score,
    kendall_tau,
    kendall_tau_within,
    latent_mse,
    precision,
    psnr_db,
    recall,
    rfid,
    ssim,
)


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


def test_errors_are_of_latents_of_any_shape_and_similarity_of_pictures_alone():
    films = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for measure in (psnr_db, latent_mse):
        torch.testing.assert_close(measure(films, films * 0.5), measure(films.flatten(2, 3), films.flatten(2, 3) * 0.5))
    with pytest.raises(FlexiError, match="paired measures"):
        ssim(films, films)


def test_kendalls_tau_by_hand():
    assert kendall_tau([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert kendall_tau([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert kendall_tau([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    assert math.isnan(kendall_tau([1, 2, 3], [5, 5, 5]))


@pytest.mark.parametrize("levels", [3, 1000])
def test_kendalls_tau_agrees_with_scipys_with_and_without_ties(levels):
    rng = np.random.default_rng(levels)
    a, b = rng.integers(levels, size=(2, 40))
    assert kendall_tau(a, b) == pytest.approx(scipy.stats.kendalltau(a, b).statistic)


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


def by_loops(samples: torch.Tensor, reference: torch.Tensor, k: int) -> float:
    """Return Kynkaanniemi et al. (2019), Eq. 1-2, one pair at a time."""
    inside = 0
    for sample in samples:
        for i, point in enumerate(reference):
            others = sorted(float((point - other).norm()) for j, other in enumerate(reference) if j != i)
            if float((sample - point).norm()) <= others[k - 1]:
                inside += 1
                break
    return inside / len(samples)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_agree_with_the_definition(k):
    a, b = normal(30, 4, 1), normal(25, 4, 2) * 1.5 + 0.5
    assert precision(a, b, k) == pytest.approx(by_loops(a, b, k))
    assert recall(a, b, k) == pytest.approx(by_loops(b, a, k))
    assert 0 < precision(a, b, k) < 1


def test_equal_sets_lie_on_each_others_manifold_and_distant_ones_do_not():
    a = normal(40, 8).float() * 1e3  # far from 0, where distances by matrix products lose their digits
    assert precision(a, a.flip(0)) == recall(a, a.flip(0)) == 1
    assert precision(a, a + 1e6) == recall(a, a + 1e6) == 0


def test_narrower_samples_are_precise_and_wider_ones_recall():
    a, b = normal(300, 3, 1), normal(300, 3, 2)
    assert precision(a * 0.3, b) > 0.95 > 0.6 > recall(a * 0.3, b)
    assert recall(a * 3, b) > 0.9 > 0.6 > precision(a * 3, b)


def test_repeated_points_have_a_ball_of_no_width():
    points = torch.zeros(4, 2, dtype=torch.float64)
    assert Manifold(points).holds(torch.tensor([[0.0, 0.0], [0.0, 1e-9]])).tolist() == [True, False]


def test_a_manifold_of_too_few_points_is_refused():
    with pytest.raises(FlexiError, match="3 and 3 samples; a manifold of k = 3 needs at least 4"):
        Manifold(normal(3, 2))
    with pytest.raises(FlexiError, match="features of shapes"):
        Manifold(normal(9, 2)).holds(normal(9, 3))


def test_the_inception_score_by_hand():
    certain = torch.eye(5).repeat(4, 1)
    assert inception_score(certain) == pytest.approx(5)  # every class, each for certain
    assert inception_score(certain[[0, 5, 10]]) == pytest.approx(1)  # one class only
    assert inception_score(torch.full((7, 5), 0.2)) == pytest.approx(1)  # nothing is certain
    p = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    assert inception_score(p) == pytest.approx(math.exp(0.9 * math.log(1.8) + 0.1 * math.log(0.2)))


@pytest.mark.parametrize("wrong", [torch.ones(3, 2), torch.ones(3), torch.zeros(0, 2), torch.tensor([[1.5, -0.5]])])
def test_what_are_no_class_probabilities_is_refused(wrong):
    with pytest.raises(FlexiError, match="class probabilities of shape"):
        inception_score(wrong)


def test_tau_within_groups_does_not_see_what_lies_between_them():
    groups = [1, 1, 1, 2, 2, 2]
    assert kendall_tau_within([1, 2, 3, 11, 12, 13], [3, 2, 1, 30, 20, 10], groups) == -1
    assert kendall_tau([1, 2, 3, 11, 12, 13], [3, 2, 1, 30, 20, 10]) > 0
    assert kendall_tau_within([1, 2, 3, 5, 5, 5], [1, 2, 3, 4, 5, 6], groups) == 1  # the second group ranks nothing
    assert math.isnan(kendall_tau_within([1, 2, 3], [1, 2, 3], [1, 2, 3]))


def test_the_interval_of_a_mean_is_the_same_by_either_bootstrap():
    values = normal(80, 1, 5).flatten()
    direct = bootstrap_interval(values, resamples=4000)
    general = bootstrap_statistic(lambda picks: float(values[picks].mean()), 80, resamples=4000)
    assert general == pytest.approx(direct, abs=0.03)


def test_the_interval_of_tau_holds_the_true_tau_as_often_as_it_says():
    rho = 0.6
    exact = 2 / math.pi * math.asin(rho)  # Kendall's tau of a Gaussian pair (Greiner's relation)
    hits = 0
    for seed in range(60):
        pair = normal(50, 2, seed)
        a, b = pair[:, 0], rho * pair[:, 0] + math.sqrt(1 - rho**2) * pair[:, 1]
        low, high = bootstrap_statistic(lambda p, a=a, b=b: kendall_tau(a[p], b[p]), 50, resamples=200, seed=seed)
        hits += low < exact < high
    assert 0.85 < hits / 60 <= 1


def test_resampling_in_groups_leaves_their_sizes():
    groups = [7] * 3 + [8] * 5
    sums = []
    bootstrap_statistic(lambda picks: float(sums.append((picks < 3).sum()) or 0), 8, groups=groups, resamples=20)
    assert set(sums) == {3}


def test_a_statistic_that_is_never_defined_has_no_interval():
    assert all(math.isnan(end) for end in bootstrap_statistic(lambda picks: math.nan, 5, resamples=10))


def test_the_frechet_interval_holds_what_other_samples_as_many_give():
    reference = normal(2000, 4, 99)
    draws = [normal(60, 4, seed) * 1.2 + 0.3 for seed in range(40)]
    typical = float(np.mean([frechet_distance(draw, reference) for draw in draws]))
    intervals = [frechet_interval(draw, reference, paired=False) for draw in draws]
    assert np.mean([low <= typical <= high for low, high in intervals]) > 0.75
    assert all(low <= frechet_distance(d, reference) <= high for d, (low, high) in zip(draws, intervals, strict=True))


def test_paired_samples_make_the_interval_of_rfid_narrow():
    teacher = normal(60, 4, 1)
    near = teacher + 0.05 * normal(60, 4, 2)
    paired, free = (frechet_interval(near, teacher, paired=paired) for paired in (True, False))
    assert paired[1] - paired[0] < 0.3 * (free[1] - free[0])
    assert paired[0] <= rfid(near, teacher) <= paired[1]
    assert frechet_interval(teacher, teacher, paired=True) == pytest.approx((0, 0), abs=1e-9)
