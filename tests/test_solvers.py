"""The embedded runtime's samplers and the noise that some of them draw, on data whose denoiser has a closed form."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
import torch

from flexi_core import FlexiError, Schedule
from flexi_core.runtime.sampling import make_noise, sample, sigmas_of
from flexi_core.runtime.solvers import SAMPLERS, STOCHASTIC
from flexi_core.runtime.step_noise import brownian_noise, independent_noise

DETERMINISTIC = [sampler for sampler in SAMPLERS if sampler not in STOCHASTIC]
BROWNIAN = [sampler for sampler in SAMPLERS if sampler in ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")]
SEEDS = (5, 3, 2**40)


def solve(gaussian, sampler, seeds=SEEDS, rows=slice(None), steps=6):
    x = gaussian.start(10.0, len(SEEDS))[rows]
    return SAMPLERS[sampler](gaussian.denoise, x, gaussian.sigmas(steps), seeds[rows])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_seeds_give_the_same_latents(gaussian, sampler):
    assert torch.equal(solve(gaussian, sampler), solve(gaussian, sampler))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_row_does_not_depend_on_what_is_sampled_beside_it(gaussian, sampler):
    together = solve(gaussian, sampler)
    for row in range(len(SEEDS)):
        torch.testing.assert_close(solve(gaussian, sampler, rows=slice(row, row + 1)), together[row : row + 1])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_other_seeds_change_what_draws_noise_and_nothing_else(gaussian, sampler):
    one, other = solve(gaussian, sampler), solve(gaussian, sampler, (5, 4, 2**40))
    assert torch.equal(one[0], other[0]) and torch.equal(one[2], other[2])
    assert torch.equal(one[1], other[1]) == (sampler in DETERMINISTIC)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_without_seeds_the_rows_are_numbered(gaussian, sampler):
    assert torch.equal(solve(gaussian, sampler, ()), solve(gaussian, sampler, range(len(SEEDS))))


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_more_steps_come_nearer_to_the_probability_flows_end(gaussian, sampler):
    x = gaussian.start(10.0)
    ends = [SAMPLERS[sampler](gaussian.denoise, x, gaussian.sigmas(steps, low=1e-4)) for steps in (8, 16, 32, 64)]
    errors = [float((end - gaussian.end(x, 10.0)).abs().max()) for end in ends]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < (0.1 if sampler in ("euler", "ddim") else 0.02)


@pytest.mark.parametrize("sampler", sorted(STOCHASTIC))
def test_samplers_that_draw_noise_end_in_the_datas_distribution(gaussian, sampler):
    noise = torch.randn(1, 10_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(12345))
    # LCM's is not a denoiser: it goes to the trajectory's end.
    model = gaussian.end if sampler == "lcm" else gaussian.denoise
    x = SAMPLERS[sampler](model, gaussian.mean + 10.0 * noise, gaussian.sigmas(100, low=1e-3)).flatten(0, 1)
    spread = gaussian.variance.sqrt()
    torch.testing.assert_close((x.mean(dim=0) - gaussian.mean) / spread, torch.zeros_like(spread), rtol=0, atol=0.05)
    torch.testing.assert_close(x.std(dim=0) / spread, torch.ones_like(spread), rtol=0, atol=0.06)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_latents_keep_their_shape_and_type(gaussian, sampler, dtype):
    x, sigmas = gaussian.start(10.0, 1).reshape(1, 1, 1, 3).to(dtype), gaussian.sigmas(5)
    ends = [SAMPLERS[sampler](lambda x, s: gaussian.denoise(x, s).to(dtype), x, grid) for grid in (sigmas, sigmas.float())]
    for end in ends:
        assert end.shape == x.shape and end.dtype == dtype and end.isfinite().all()


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_shortest_runs_end_in_denoised_latents(gaussian, sampler, steps):
    x = gaussian.start(10.0)
    sigmas = torch.cat([torch.linspace(10, 0.05, max(steps, 2), dtype=torch.float64)[:steps], torch.zeros(1)])
    end = SAMPLERS[sampler](gaussian.denoise, x, sigmas)
    assert end.isfinite().all()
    if steps == 1:
        torch.testing.assert_close(end, gaussian.denoise(x, 10.0), rtol=0, atol=1e-2)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_levels_and_latents_are_left_as_they_were(gaussian, sampler):
    x, sigmas = gaussian.start(10.0), gaussian.sigmas(6)
    before = x.clone(), sigmas.clone()
    SAMPLERS[sampler](gaussian.denoise, x, sigmas)
    assert torch.equal(x, before[0]) and torch.equal(sigmas, before[1])


def test_noise_of_every_call_is_anew_and_not_the_starts():
    draw = independent_noise(torch.zeros(2, 3, 4), (7, 8))
    first, second = draw(), draw()
    assert not torch.equal(first, second)
    start = make_noise(7, 2, (3, 4))
    assert not torch.equal(first[0], start[0]) and torch.equal(first[0], start[1])


def test_a_brownian_motion_is_the_same_on_a_finer_grid():
    x = torch.zeros(2, 20000, dtype=torch.float64)
    coarse, fine = torch.tensor([8.0, 2.0, 0.0]), torch.tensor([8.0, 5.0, 3.0, 2.0, 0.0])
    whole = brownian_noise(x, coarse, (1, 2))(coarse[0], coarse[1])
    between = brownian_noise(x, fine, (1, 2))
    parts = [between(a, b) * (a - b).sqrt() for a, b in pairwise(fine[:4])]
    torch.testing.assert_close(whole * 6.0**0.5, sum(parts))
    torch.testing.assert_close(whole.std(dim=1), torch.ones(2, dtype=torch.float64), rtol=0, atol=0.03)


def test_without_torchsde_a_sampler_that_needs_it_says_so(gaussian, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchsde", None)
    for sampler in SAMPLERS:
        if sampler in BROWNIAN:
            with pytest.raises(FlexiError, match="pip install torchsde"):
                solve(gaussian, sampler)
        else:
            solve(gaussian, sampler)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_run_hands_the_rows_seeds_on(tiny_model, sampler):
    noise, sigmas = make_noise(3, 2), sigmas_of(tiny_model, sampler, "simple", 3)
    schedule, options = Schedule.parse("3*(F)"), {"sampler": sampler, "cfg": 1.0}
    default, _ = sample(tiny_model, schedule, sigmas, noise, **options)
    same, _ = sample(tiny_model, schedule, sigmas, noise, seeds=(0, 1), **options)
    other, _ = sample(tiny_model, schedule, sigmas, noise, seeds=range(10, 12), **options)
    assert torch.equal(default, same)
    assert torch.equal(default, other) == (sampler in DETERMINISTIC)


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral"])
def test_seeds_for_other_rows_are_refused(tiny_model, sampler):
    sigmas = sigmas_of(tiny_model, sampler, "simple", 2)
    with pytest.raises(FlexiError, match="3 seeds for 2 samples; give one for each"):
        sample(tiny_model, Schedule.parse("2*(F)"), sigmas, make_noise(3, 2), sampler=sampler, cfg=1.0, seeds=range(3))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_samplers_grid_has_as_many_steps_as_asked(tiny_model, sampler):
    whole, sigmas = sigmas_of(tiny_model, "euler", "normal", 6), sigmas_of(tiny_model, sampler, "normal", 6)
    assert len(sigmas) == 7 and sigmas[-1] == 0 and (sigmas[1:] < sigmas[:-1]).all()
    assert torch.equal(whole, sigmas) == (sampler not in ("dpm_2_ancestral", "uni_pc"))
