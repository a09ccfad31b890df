"""Stages of noise levels by the optimal denoiser: known answers, exact division, what the objective as published does."""

import itertools
import math

import numpy as np
import pytest
import torch

from flexi_core import FlexiError
from flexi_core.stages import clustering
from flexi_core.stages.clustering import Predictions, cluster, network_predictions, optimal_predictions, threshold_boundaries

VARIANCE, MEAN = 0.25, 0.3
LEVELS = np.geomspace(40.0, 0.5, 13).tolist()


@pytest.fixture(scope="module")
def gaussian_set():
    return MEAN + VARIANCE**0.5 * torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def found(gaussian_set):
    return optimal_predictions(gaussian_set, LEVELS, samples=2000)


def upper(sigma: float) -> float:
    """Return S1 of a Gaussian: |mean - denoised| / sigma is |x - mean| variance / (sigma (variance + sigma^2))."""
    return math.erf(clustering.TOLERANCE * sigma * math.sqrt(VARIANCE + sigma**2) / (VARIANCE * math.sqrt(2)))


def test_the_upper_similarity_of_a_gaussian_is_its_closed_form(found):
    truth = np.array([upper(sigma) for sigma in LEVELS])
    assert truth[0] > 0.99 and truth[-1] < 0.05
    assert np.abs(found.upper() - truth).max() < 0.02


def test_the_denoiser_of_a_set_is_the_softmax_mean_over_it(gaussian_set):
    data, sigma = gaussian_set[:50], 0.7
    one = optimal_predictions(data, [sigma, 0.6], samples=5, seed=3)
    chosen = data[torch.randperm(50, generator=torch.Generator().manual_seed(3))[:5]].double()
    x = chosen + sigma * one.noise.double()
    weights = (-(x[:, None] - data.double()).square().sum(-1) / (2 * sigma**2)).softmax(1)
    denoised = weights @ data.double()
    torch.testing.assert_close(one.eps[0].double(), (x - denoised) / sigma, rtol=0, atol=1e-5)


def test_the_lower_similarity_of_a_set_is_memorisation(gaussian_set):
    """A Gaussian itself has nearly none; its samples are recognised one by one as soon as they are far apart."""
    levels = [0.2, 0.05]
    wide = torch.randn(500, 64, generator=torch.Generator().manual_seed(1))
    lower = optimal_predictions(wide, levels).lower()
    truth = [math.erf(clustering.TOLERANCE / math.sqrt(2 / (1 + sigma**2))) for sigma in levels]
    assert lower.min() > 0.99 and max(truth) < 0.01


def test_pieces_make_no_difference(gaussian_set, monkeypatch):
    whole = optimal_predictions(gaussian_set[:3000], LEVELS)
    monkeypatch.setattr(clustering, "_PIECE_BYTES", 8 * 312 * 17)
    pieces = optimal_predictions(gaussian_set[:3000], LEVELS)
    torch.testing.assert_close(pieces.eps, whole.eps, rtol=0, atol=1e-6)
    assert torch.equal(optimal_predictions(gaussian_set[:3000], LEVELS).eps, pieces.eps), "the second time is the first"


def test_levels_of_any_size_stay_finite():
    data = torch.rand(100, 3072, generator=torch.Generator().manual_seed(0))
    assert optimal_predictions(data, [1e4, 1.0, 1e-3]).eps.isfinite().all()


def test_division_is_the_best_of_all():
    rng = np.random.default_rng(0)
    draws = rng.random((9, 9))
    similarity = (draws + draws.T) / 2
    levels = [9.0 - i for i in range(9)]
    for by_width, least, stages in itertools.product((True, False), (1, 2), (1, 2, 3, 4)):

        def score(starts, by_width=by_width):
            ends = [0, *starts, 9]
            blocks = [similarity[a:b, a:b] for a, b in itertools.pairwise(ends)]
            return sum(block.mean() * (len(block) / 9 if by_width else 1) for block in blocks)

        every = [
            starts
            for starts in itertools.combinations(range(1, 9), stages - 1)
            if all(b - a >= least for a, b in itertools.pairwise((0, *starts, 9)))
        ]
        found = cluster(similarity, levels, stages, by_width, least)
        assert found.score == pytest.approx(max(map(score, every))) and score(found.starts) == pytest.approx(found.score)


def test_blocks_are_found_and_the_objective_as_published_cuts_slivers():
    similarity = np.full((12, 12), 0.2)
    for block in (slice(0, 4), slice(4, 9), slice(9, 12)):
        similarity[block, block] = 0.8
    np.fill_diagonal(similarity, 1.0)
    levels = [12.0 - i for i in range(12)]
    found = cluster(similarity, levels, 3)
    assert found.starts == (4, 9)
    assert found.boundaries == pytest.approx((math.sqrt(9 * 8), math.sqrt(4 * 3)))
    smooth = 0.3 + 0.7 * np.exp(-np.abs(np.subtract.outer(np.arange(12), np.arange(12))) / 6)
    published = cluster(smooth, levels, 3, by_width=False)
    widths = np.diff([0, *published.starts, 12])
    assert sorted(widths)[:2] == [1, 1], "one of the reasons for weights"
    assert min(np.diff([0, *cluster(smooth, levels, 3).starts, 12])) >= 3
    assert min(np.diff([0, *cluster(smooth, levels, 3, by_width=False, least=3).starts, 12])) >= 3


def test_thresholds_cross_between_levels():
    eps = torch.zeros(4, 1, 10)
    for level, apart in enumerate((0, 2, 8, 10)):
        eps[level, :, :apart] = 1.0
    made = Predictions((8.0, 4.0, 2.0, 1.0), eps, noise=torch.ones(1, 10), from_mean=torch.zeros(4, 1, 10))
    assert made.upper() == pytest.approx([1.0, 0.8, 0.2, 0.0]) and made.lower() == pytest.approx([0.0, 0.2, 0.8, 1.0])
    high, low = threshold_boundaries(made, (0.9, 0.5))
    assert high == pytest.approx(math.sqrt(8.0)) and low == pytest.approx(math.sqrt(2.0))
    assert threshold_boundaries(made, (1.1, 0.0)) == (None, None)


def test_a_network_that_is_the_optimal_denoiser_gives_its_similarity(gaussian_set):
    def exact(x, sigma):
        return (x - MEAN) * sigma / (VARIANCE + sigma**2)

    theirs = network_predictions(exact, gaussian_set[:2000], LEVELS).similarity()
    ours = optimal_predictions(gaussian_set, LEVELS[:6], samples=2000).similarity()
    assert np.abs(theirs[:6, :6] - ours).max() < 0.05


def test_what_cannot_be_clustered_is_refused(gaussian_set):
    with pytest.raises(FlexiError, match="needs at least 2"):
        optimal_predictions(gaussian_set[:1], LEVELS)
    with pytest.raises(FlexiError, match="lie above 0"):
        optimal_predictions(gaussian_set[:5], [1.0, 0.0])
    with pytest.raises(FlexiError, match="do not fall"):
        optimal_predictions(gaussian_set[:5], [1.0, 2.0])
    with pytest.raises(FlexiError, match="13 levels cannot be divided into 5 stages of 3"):
        cluster(np.eye(13), LEVELS, 5, least=3)
    with pytest.raises(FlexiError, match="thresholds need the data"):
        Predictions((2.0, 1.0), torch.zeros(2, 1, 3)).lower()
    with pytest.raises(FlexiError, match="not all finite"):
        Predictions((2.0, 1.0), torch.full((2, 1, 3), float("nan")))
