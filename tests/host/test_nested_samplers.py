"""Samplers around samplers, which give the network another noise level than their own, and samplers that restart."""

from __future__ import annotations

import copy

import pytest
import torch

from flexi_core import Schedule

STEPS, MIXED = 12, "2*(F)|FPX@2|FPN@3|FPX@2|F"
OWN_GRID = ("dpm_fast", "dpm_adaptive")


def daemon(model, x, sigmas, *, wrapped, lie, **kwargs):
    """Run a sampler whose every question reaches the model at `lie(sigma, sigmas)` (the form of Detail Daemon's node)."""

    def lying(x, sigma, **extra_args):
        return model(x, lie(sigma, sigmas), **extra_args)

    for name in ("inner_model", "sigmas"):
        setattr(lying, name, getattr(model, name, None))
    return wrapped.sampler_function(lying, x, sigmas, **kwargs, **wrapped.extra_options)


def honest(sigma, sigmas):
    return sigma * 1.0


def levels_off(count):
    """Return a lie by about `count` of the run's levels, towards more noise where it is positive."""

    def lie(sigma, sigmas):
        level, last = float(sigma.max()), len(sigmas) - 2
        at = min(range(last + 1), key=lambda i: abs(float(sigmas[i]) - level))
        if at == 0 or at - count < 0 or at - count > last:
            return sigma
        return sigma * float(sigmas[at - count] / sigmas[at]) ** 0.97

    return lie


def shrunk(sigma, sigmas):
    return sigma * 0.95


@pytest.fixture
def around(host):
    """A function of (sampler's name, lie) that returns the sampler with the lie around it."""

    def wrap(name, lie):
        options = {"wrapped": host.comfy.samplers.sampler_object(name), "lie": lie}
        return host.comfy.samplers.KSAMPLER(daemon, extra_options=options)

    return wrap


@pytest.fixture
def sample(host):
    """A function of (model, sampler object) that samples 12 steps of the embedded model."""

    def run(model, sampler, sigmas=None):
        noise = host.noise(1)
        sigmas = host.sigmas(model, "normal", STEPS) if sigmas is None else sigmas
        prompts = host.positive, host.negative
        return host.comfy.sample.sample_custom(
            model, noise, 3.0, sampler, sigmas, *prompts, torch.zeros_like(noise), disable_pbar=True, seed=1
        )

    return run


@pytest.mark.matrix("Samplers", "a sampler around {sampler_name} that gives the network another noise level")
@pytest.mark.parametrize("lie", [levels_off(2), levels_off(-2)], ids=["2 up", "2 down"])
def test_steps_are_the_samplers_own_whatever_noise_level_the_network_is_given(
    host, demo_model, apply, around, sample, sampler_name, lie, record_property
):
    if sampler_name.endswith("_gpu") or sampler_name == "ddim":
        pytest.skip("the same function, on a CPU, as another sampler's")
    model, handle = apply(demo_model, MIXED)
    assert sample(model, around(sampler_name, lie)).isfinite().all()
    record_property("does", "steps are known by the inner sampler's own noise level")
    if sampler_name in OWN_GRID:
        assert "chooses its own noise levels" in str(handle.report)
        return
    # The first reads the unguided prediction; the second asks two steps ahead, before the segment's full step.
    other = {"cfg_pp": "FFFPFFPNFPFF", "heunpp2": "FFFPXFFNFPXF"}
    expected = next((letters for name, letters in other.items() if name in sampler_name), Schedule.parse(MIXED).letters)
    assert handle.report.letters == expected, str(handle.report)
    assert "the sampler gave the network another noise level than its own" in str(handle.report)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "heun", "euler_ancestral"])
def test_a_sampler_around_another_that_changes_nothing_makes_the_same_latent(host, demo_model, apply, around, sample, name):
    model, handle = apply(demo_model, MIXED)
    assert torch.equal(sample(model, around(name, honest)), sample(model, host.comfy.samplers.sampler_object(name)))
    assert "another noise level" not in str(handle.report)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "heun"])
def test_all_full_steps_under_another_noise_level_are_plain_sampling(demo_model, apply, around, sample, name):
    model, handle = apply(demo_model, "12*(F)")
    assert torch.equal(sample(model, around(name, shrunk)), sample(demo_model, around(name, shrunk)))
    assert handle.report.letters == "F" * 12


def test_held_derivatives_are_of_the_noise_level_that_was_asked_for(host, demo_model, apply, around, sample):
    asked = []

    def noted(sigma, sigmas):
        asked.append(float(shrunk(sigma, sigmas).max()))
        return shrunk(sigma, sigmas)

    seen, model = [], apply(demo_model, "F|FX|9*(F); order=0, basis=derivative")[0]
    around_it = around("euler", noted)
    inner = around_it.extra_options["wrapped"] = copy.copy(around_it.extra_options["wrapped"])
    euler = inner.sampler_function

    def watched(denoiser, x, sigmas, **options):
        def model(x, sigma, **extra):
            denoised = denoiser(x, sigma, **extra)
            seen.append((x.clone(), denoised.clone()))
            return denoised

        return euler(model, x, sigmas, **options)

    inner.sampler_function = watched
    sample(model, around_it)
    (x1, d1), (x2, d2) = seen[-11:-9]
    first, second = asked[-11:-9]
    torch.testing.assert_close((x2 - d2) / second, (x1 - d1) / first, rtol=1e-4, atol=1e-4)


def test_a_lie_around_a_lie_leaves_the_innermost_level(host, demo_model, apply, around, sample):
    nested = host.comfy.samplers.KSAMPLER(
        daemon, extra_options={"wrapped": around("euler", levels_off(2)), "lie": levels_off(-1)}
    )
    model, handle = apply(demo_model, MIXED)
    assert sample(model, nested).isfinite().all()
    assert handle.report.letters == Schedule.parse(MIXED).letters


def test_a_lie_that_cannot_be_seen_through_samples_plainly_and_says_so(host, demo_model, apply, sample):
    euler = host.comfy.samplers.sampler_object("euler").sampler_function

    def closed(model, x, sigmas, **options):  # holds its inner sampler where nobody finds it; it lies in a step or two
        def lying(x, sigma, **extra):
            return model(x, sigma * (1.2 if 0.7 <= sigma.max() <= 1.2 else 1.0), **extra)

        lying.inner_model = model.inner_model
        return euler(lying, x, sigmas, **options)

    model, handle = apply(demo_model, MIXED)
    sampler = host.comfy.samplers.KSAMPLER(closed)
    assert torch.equal(sample(model, sampler), sample(demo_model, sampler))
    assert "closed chooses its own noise levels" in str(handle.report)


def test_a_question_where_no_step_begins_is_answered_in_full_and_said(host, demo_model, apply, sample):
    euler = host.comfy.samplers.sampler_object("euler").sampler_function

    def late(model, x, sigmas, **options):  # honest while it is tried
        def lying(x, sigma, **extra):
            return model(x, sigma * (1.02 if x.numel() > 100 else 1.0), **extra)

        lying.inner_model = model.inner_model
        return euler(lying, x, sigmas, **options)

    sampler = host.comfy.samplers.KSAMPLER(late)
    model, handle = apply(demo_model, MIXED)
    made = sample(model, sampler)
    assert set(handle.report.letters) <= {"F", "N"}
    assert "the sampler asked at a noise level at which no step of the run begins" in str(handle.report)
    assert made.isfinite().all()


def restarting(host, name, back, to):
    """Return a sampler that goes from noise level `back` up to `to` with fresh noise, and on from there."""
    inner = host.comfy.samplers.sampler_object(name)

    def restart(model, x, sigmas, extra_args=None, callback=None, disable=None):
        options = {"extra_args": extra_args, "callback": callback, "disable": disable}
        low, high = (int((sigmas - level).abs().argmin()) for level in (back, to))
        x = inner.sampler_function(model, x, sigmas[: low + 1], **options)
        if high < low:
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(x)
            x = x + noise * (sigmas[high] ** 2 - sigmas[low] ** 2) ** 0.5
            x = inner.sampler_function(model, x, sigmas[high : low + 1], **options)
        return inner.sampler_function(model, x, sigmas[low:], **options)

    return host.comfy.samplers.KSAMPLER(restart)


@pytest.mark.matrix("Samplers", "a sampler that restarts: back up in noise, and down again")
@pytest.mark.parametrize("name", ["euler", "heun"])
def test_a_restart_takes_its_own_steps_again_and_carries_nothing_over(host, demo_model, apply, sample, name, record_property):
    levels = host.sigmas(demo_model, "normal", STEPS).tolist()
    sampler = restarting(host, name, back=levels[8], to=levels[3])
    full, handle = apply(demo_model, "12*(F)")
    assert torch.equal(sample(full, sampler), sample(demo_model, sampler))
    again = [1] * 3 + [2] * 5 + [1] * 4
    if name == "euler":
        assert [step.evaluations for step in handle.report.steps] == again
    assert "Once the sampler went back up to a higher noise level" in str(handle.report)
    model, handle = apply(demo_model, "2*(F)|FXXX|FPP@2|FXX")
    assert sample(model, sampler).isfinite().all()
    report = handle.report
    if name == "euler":
        # Levels 3 to 5 are skipped steps, at first; after the restart the first of them is computed, and carried on.
        assert report.letters == "FFFFXXFPPFXX"
        assert report.steps[3].fallbacks == ("no step was computed since the sampler went back up to a higher noise level",)
        assert report.evaluations.total() == 17 and report.speedup_macs > 1
        assert "The sampler asked 17 times" in str(report)
    record_property("does", "the steps of the noise levels that it asks at; what was kept is dropped where it goes back up")


def test_a_restart_by_one_step_carries_nothing_over(host, demo_model, apply, sample):
    model, handle = apply(demo_model, "2*(F)|FX|FXXXXXXX")
    levels = host.sigmas(demo_model, "normal", STEPS).tolist()
    assert sample(model, restarting(host, "euler", back=levels[4], to=levels[3])).isfinite().all()
    assert "Once the sampler went back up to a higher noise level" in str(handle.report)
