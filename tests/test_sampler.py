"""What a sampler does is found by trying it: told right for every sampler, at no cost to the run, and never in its way."""

from __future__ import annotations

import itertools

import pytest
import torch

from flexi_core.run.sampler import PLAIN, SamplerTraits, probe
from flexi_core.runtime.sampling import SCHEDULERS, sigmas_of, solver_of, traits_of
from flexi_core.runtime.solvers import SAMPLERS

# draws noise, of the interval, questions a step, memory, and whether each step begins anew
TOLD = {
    "euler": (False, False, 1, 0),
    "ddim": (False, False, 1, 0),
    "heun": (False, False, 2, 0),
    "dpmpp_2m": (False, False, 1, 1),
    "res_multistep": (False, False, 1, 1),
    "uni_pc": (False, False, 1, 2),
    "euler_ancestral": (True, False, 1, 0),
    "ddpm": (True, False, 1, 0),
    "dpm_2_ancestral": (True, False, 2, 0),
    "dpmpp_2s_ancestral": (True, False, 2, 0),
    "res_multistep_ancestral": (True, False, 1, 1),
    "lcm": (True, False, 1, 0, True),
    "er_sde": (True, False, 1, 2),
    "seeds_2": (True, False, 2, 0),
    "dpmpp_sde": (True, True, 2, 0),
    "dpmpp_2m_sde": (True, True, 1, 1),
    "dpmpp_3m_sde": (True, True, 1, 2),
}
LEVELS = [14.6, 9.0, 5.0, 3.0, 1.5, 0.7, 0.3, 0.03, 0.0]


def traits(draws_noise, of_interval, evaluations, memory, renews=False):
    return SamplerTraits(draws_noise, of_interval, evaluations, memory, renews=renews)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_embedded_sampler_is_told_right(tiny_model, sampler):
    for scheduler in SCHEDULERS:
        for steps in (4, 7, 20, 50):
            assert traits_of(sampler, sigmas_of(tiny_model, sampler, scheduler, steps)) == traits(*TOLD[sampler])


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_sampler_is_told_on_the_shortest_runs(tiny_model, sampler, steps):
    told = traits_of(sampler, sigmas_of(tiny_model, sampler, "simple", steps))
    assert (told.draws_noise, told.evaluations, told.keeps_levels) == (*TOLD[sampler][:3:2], True)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_is_told_in_a_window_of_its_run(sampler):
    for window in (LEVELS[:5], LEVELS[2:6], LEVELS[4:]):
        told = probe(solver_of(sampler), window)
        assert (told.draws_noise, told.evaluations, told.keeps_levels) == (*TOLD[sampler][:3:2], True)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_trying_leaves_the_global_random_state_alone(sampler):
    before = torch.get_rng_state()
    probe(solver_of(sampler), LEVELS)
    assert torch.equal(torch.get_rng_state(), before)


def test_trying_twice_tells_the_same():
    for sampler in SAMPLERS:
        assert probe(solver_of(sampler), LEVELS) == probe(solver_of(sampler), LEVELS)


def test_kinds_differ_where_presets_are_measured_apart():
    assert PLAIN.kind == "no noise, memory 0, 1 a step"
    assert traits(*TOLD["er_sde"]).kind == "noise, memory 2, 1 a step"
    assert traits(*TOLD["dpmpp_sde"]).kind == "brownian, memory 0, 2 a step"


def euler(denoise, x, sigmas, seed=0):
    for sigma, following in itertools.pairwise(sigmas):
        x = x + (following - sigma) / sigma * (x - denoise(x, float(sigma)))
    return x


def raises(denoise, x, sigmas, seed=0):
    raise RuntimeError("no model of mine")


def asks_for_ever(denoise, x, sigmas, seed=0):
    for _ in range(1000):
        x = denoise(x, float(sigmas[0]))
    return x


def asks_elsewhere(denoise, x, sigmas, seed=0):
    return denoise(x, float(sigmas[0]) / 3)


def asks_above(denoise, x, sigmas, seed=0):
    denoise(x, float(sigmas[0]) * 2)
    return euler(denoise, x, sigmas)


def makes_nan(denoise, x, sigmas, seed=0):
    return denoise(x, float(sigmas[0])) * float("nan")


def is_not_linear(denoise, x, sigmas, seed=0):
    for sigma in sigmas[:-1]:
        x = denoise(x, float(sigma)).tanh()
    return x


@pytest.mark.parametrize(
    ("solve", "told"),
    [
        (euler, PLAIN),
        (raises, None),
        (makes_nan, None),
        (None, None),
        (asks_for_ever, SamplerTraits(keeps_levels=False)),
        (asks_elsewhere, SamplerTraits(keeps_levels=False)),
        (asks_above, SamplerTraits(keeps_levels=False)),
        (is_not_linear, SamplerTraits(memory=3, is_linear=False)),
    ],
)
def test_whatever_a_sampler_does_it_is_told_or_not_known(solve, told):
    assert probe(solve, LEVELS) == told


def test_a_sampler_is_asked_few_questions():
    asked = []

    def counted(denoise, x, sigmas, seed=0):
        def ask(x, sigma):
            asked.append(x.numel())
            return denoise(x, sigma)

        return euler(ask, x, sigmas, seed)

    probe(counted, LEVELS)
    assert len(asked) < 100 and max(asked) <= 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sampler_that_can_do_with_one_type_of_number_alone_is_told(dtype):
    def picky(denoise, x, sigmas, seed=0):
        if x.dtype != dtype:
            raise TypeError("another type of number")
        return euler(denoise, x, sigmas)

    assert probe(picky, LEVELS) == PLAIN
