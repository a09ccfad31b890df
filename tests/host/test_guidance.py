"""Reused guidance in the host: the conditional half alone, whatever sampler, guider and guidance patch is there."""

from __future__ import annotations

import pytest
import torch

REUSED = "2*(F)|f|FX|f|fX"  # 8 steps
LETTERS = "FFfFXffX"
SAMPLERS = ("euler", "dpmpp_2m", "heun", "uni_pc", "dpmpp_sde", "euler_ancestral", "res_multistep", "euler_cfg_pp")


def rows_by_step(report) -> list[int]:
    return [sum(record.calls.values()) for record in report.run.records]


@pytest.mark.matrix("Reused guidance", "{sampler}")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_reused_guidance_keeps_the_laws_of_every_kind_of_sampler(host, demo_model, cell, sampler):
    computes = sampler == "euler_cfg_pp"
    does = "extrapolated steps are computed: the sampler reads the unguided prediction" if computes else None
    cell(demo_model, lambda model: host.sample(model, sampler), REUSED, "FFfFFffF" if computes else LETTERS, does)


def test_a_step_with_reused_guidance_runs_the_conditional_rows_alone(host, demo_model, apply):
    model, handle = apply(demo_model, REUSED)
    host.sample(model)
    assert rows_by_step(handle.report) == [4, 4, 2, 4, 0, 2, 2, 0]
    assert handle.report.speedup_macs == pytest.approx(8 / 4.5)


def test_without_guidance_such_steps_are_full_ones(host, demo_model, apply):
    reused, plain = (apply(demo_model, text)[0] for text in (REUSED, REUSED.upper()))
    assert torch.equal(host.sample(reused, cfg=1.0), host.sample(plain, cfg=1.0))


def test_reused_guidance_is_nearer_to_the_teacher_than_none(host, demo_model, apply):
    teacher = host.sample(demo_model)
    reused = host.sample(apply(demo_model, "4*(F)|4*(f)")[0])
    unguided = host.sample(demo_model, cfg=1.0)
    assert (reused - teacher).square().mean() < 0.05 * (unguided - teacher).square().mean()


@pytest.mark.matrix("Reused guidance", "RescaleCFG")
def test_a_guidance_patch_hears_both_halves(host, demo_model, cell, extra):
    (model,) = extra("model_advanced", "RescaleCFG")(demo_model, 0.7)
    cell(model, host.sample, REUSED, LETTERS)


@pytest.fixture
def by_two_models(host, demo_model, extra):
    """A function of (model, second model) that samples under the guider that asks the second one without the prompt."""
    guider_of, noise = extra("custom_sampler", "DualModelGuider"), host.noise()

    def sample(model, second):
        (guider,) = guider_of(model, host.positive, 3.0, second, host.negative)
        sampler = host.comfy.samplers.sampler_object("euler")
        return guider.sample(noise, torch.zeros_like(noise), sampler, host.sigmas(demo_model, "normal", 8), seed=0)

    return sample


@pytest.fixture
def second_model(host, generated):
    """The embedded network with other weights."""
    model = host.adapter.load_demo_model()
    generated(model.model.diffusion_model)
    return model


@pytest.mark.matrix("Conditioning", "DualModelGuider, the schedule on its first model")
def test_a_schedule_on_the_first_of_two_models_covers_both(by_two_models, demo_model, second_model, cell, apply):
    report = cell(demo_model, lambda model: by_two_models(model, second_model), "2*(F)|FPX@2|FPN@3")
    assert not any(step.fallbacks for step in report.steps)
    assert rows_by_step(report) == [4, 4, 4, 4, 0, 4, 4, 0]
    assert "asks a second model (uncond_model_patcher): the schedule covers it too" in str(report)
    model, handle = apply(demo_model, REUSED)
    assert torch.equal(by_two_models(model, second_model), by_two_models(apply(demo_model, REUSED.upper())[0], second_model))
    assert "the guidance cannot be reused: the guider has two models" in str(handle.report)


@pytest.mark.matrix("Conditioning", "DualModelGuider, the schedule on its second model")
def test_a_schedule_on_the_second_of_two_models_says_that_it_did_not_run(
    by_two_models, demo_model, second_model, apply, record_property
):
    plain = by_two_models(demo_model, second_model)
    second, handle = apply(second_model, "2*(F)|FPX@2|FPN@3")
    latent = by_two_models(demo_model, second)
    assert torch.equal(latent, plain)
    assert "did not run: this model is the second one of its guider" in str(handle.report_of(latent))
    first, lead = apply(demo_model, "8*(F)")
    assert torch.equal(by_two_models(first, second), plain) and lead.report.letters == "F" * 8
    record_property("does", "runs plainly and says so")


def test_a_joined_model_that_is_the_second_one_says_that_its_first_network_alone_answers(
    host, by_two_models, demo_model, second_model, caplog
):
    from flexi_core.stages.bounds import Boundary

    plain, other = by_two_models(demo_model, second_model), host.adapter.load_demo_model()
    joined, _ = host.adapter.join_models(second_model, other, Boundary(1.0, "sigma"))
    assert torch.equal(by_two_models(demo_model, joined), plain)
    assert "its high noise model alone answers" in caplog.text
    caplog.clear()
    host.sample(joined, steps=2)
    assert "alone answers" not in caplog.text


@pytest.mark.matrix("Reused guidance", "PerpNegGuider, which has three conditionings")
def test_a_guider_of_three_conditionings_runs_such_steps_in_full_and_says_so(host, demo_model, apply, extra, record_property):
    guider_of = extra("perpneg", "PerpNegGuider")
    noise = host.noise()

    def sample(model):
        (guider,) = guider_of(model, host.positive, host.negative, host.adapter.demo_conditioning(""), 3.0, 1.0)
        sampler = host.comfy.samplers.sampler_object("euler")
        return guider.sample(noise, torch.zeros_like(noise), sampler, host.sigmas(demo_model, "normal", 8), seed=0)

    model, handle = apply(demo_model, REUSED)
    reused, full = sample(model), sample(apply(demo_model, REUSED.upper())[0])
    assert torch.equal(reused, full)
    assert "has 3 conditionings, not two" in str(handle.report)
    record_property("does", "runs such steps in full and says so")
