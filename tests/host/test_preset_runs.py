"""Presets in the host: each run's own steps, sampler and window decide, and no failure of ours loses a picture."""

from __future__ import annotations

import copy
import functools
import importlib
import sys

import pytest
import torch

from flexi_core import FlexiError
from flexi_core.schedule.presets import Preset, full_steps

SENTENCE = "Flexiffusion: plain sampling, every step full."


@pytest.fixture(scope="module")
def preset(host, demo_model):
    """A function of (name, steps, on_mismatch) that returns the patched model and its reports' handle."""
    return lambda name="2x", steps=0, *args: host.adapter.apply_schedule(demo_model, Preset(name, steps), *args)


def custom(host, model, sampler, sigmas, latent=None, noise=None):
    """Sample as SamplerCustom does."""
    noise = host.noise(1) if noise is None else noise
    sampler = host.comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
    latent = torch.zeros_like(noise) if latent is None else latent
    return host.comfy.sample.sample_custom(
        model, noise, 3.0, sampler, sigmas, host.positive, host.negative, latent, disable_pbar=True, seed=1
    )


def computes_about_half(report, steps):
    assert len(report.letters) == steps
    assert report.letters.count("F") == full_steps(steps, 2)
    assert f"{full_steps(steps, 2)} of {steps} steps are computed" in str(report).splitlines()[0]


@pytest.mark.parametrize("scheduler", ["simple", "normal", "karras"])
@pytest.mark.parametrize("steps", [20, 30])
def test_two_x_is_two_x_at_any_number_of_steps(host, preset, scheduler, steps):
    model, handle = preset()
    host.sample(model, steps=steps, scheduler=scheduler, noise=host.noise(1))
    computes_about_half(handle.report, steps)


@pytest.mark.parametrize(("start", "end"), [(0, 10), (10, 20), (4, 16)])
def test_a_window_takes_its_own_number_of_steps(host, preset, start, end):
    model, handle = preset()
    options = {"start_step": start, "last_step": end, "disable_noise": start > 0}
    host.sample(model, steps=20, scheduler="simple", noise=host.noise(1), **options)
    computes_about_half(handle.report, end - start)


def test_denoise_takes_the_runs_number_of_steps(host, preset):
    model, handle = preset()
    host.sample(model, steps=20, scheduler="simple", noise=host.noise(1), denoise=0.5)
    computes_about_half(handle.report, 20)


def test_split_sigmas_take_their_own_number_of_steps(host, demo_model, preset):
    model, handle = preset()
    sigmas = host.sigmas(demo_model, "simple", 20)
    first = custom(host, model, "euler", sigmas[:11])
    computes_about_half(handle.report, 10)
    custom(host, model, "euler", sigmas[10:], latent=first, noise=torch.zeros_like(first))
    computes_about_half(handle.report, 10)


def test_one_model_samples_runs_of_several_lengths_each_by_its_own(host, preset):
    model, handle = preset()
    latents = [host.sample(model, steps=n, scheduler="simple", noise=host.noise(1)) for n in (20, 8, 3)]
    assert [len(handle.report_of(latent).letters) for latent in latents] == [20, 8, 0]


@pytest.mark.parametrize("name", ["2x", "5x"])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_ancestral", "uni_pc"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_too_short_to_save_is_plain_sampling_with_one_sentence(host, demo_model, preset, name, sampler, steps):
    model, handle = preset(name)
    options = {"steps": steps, "noise": host.noise(1)}
    assert torch.equal(host.sample(model, sampler, **options), host.sample(demo_model, sampler, **options))
    first, why, *_ = str(handle.report).splitlines()
    assert first == SENTENCE
    assert why.startswith(f"For {steps} step{'s' * (steps > 1)} of this kind of sampler and scheduler, no ")
    assert handle.report.steps == () and len(handle.report.words) == 1 and not handle.report.notes


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("text", [None, "10*(FX)"])
def test_a_run_of_no_step_does_what_the_host_does(host, demo_model, preset, apply, count, text):
    model, handle = preset() if text is None else apply(demo_model, text)
    sigmas = torch.tensor([5.0])[:count]
    plain = custom(host, demo_model, "euler", sigmas)
    assert torch.equal(custom(host, model, "euler", sigmas), plain)
    if count:
        assert "the run has 0 steps" in str(handle.report)


def test_rising_levels_are_said_to_rise(host, demo_model, preset):
    model, handle = preset()
    sigmas = torch.linspace(0.1, 12, 9)
    assert torch.equal(custom(host, model, "euler", sigmas), custom(host, demo_model, "euler", sigmas))
    assert "do not fall" in str(handle.report)


def test_a_preset_of_other_steps_says_so_first(host, preset):
    model, handle = preset("2x", 20)
    host.sample(model, steps=12, noise=host.noise(1))
    assert len(handle.report.letters) == 12
    told = "Flexi Preset is set to 20 steps, the run has 12: set its steps to 0, and it takes the run's own."
    assert str(handle.report).splitlines()[0] == told
    host.sample(model, steps=4, noise=host.noise(1))
    lines = str(handle.report).splitlines()
    assert lines[0] == "This schedule saves nothing here: made for 20 steps, laid over 4, every step is computed."
    assert lines[1] == told.replace("12", "4") and len(set(lines)) == len(lines)


def test_a_typed_schedule_that_saves_nothing_says_so_first(host, demo_model, apply):
    model, handle = apply(demo_model, "10*(FX)")
    host.sample(model, steps=4, noise=host.noise(1))
    assert str(handle.report).splitlines()[0] == (
        "This schedule saves nothing here: made for 20 steps, laid over 4, every step is computed. "
        "Use Flexi Preset, or a schedule for 4 steps."
    )
    assert "mapped" not in str(handle.report)


def test_no_sentence_of_a_report_stands_twice(host, preset):
    for name in ("1.25x", "2x", "3x", "5x", "deepcache", "all-full"):
        model, handle = preset(name)
        host.sample(model, steps=20, scheduler="simple", noise=host.noise(1))
        lines = str(handle.report).splitlines()
        assert len(set(lines)) == len(lines) and sum("steps are computed" in line for line in lines) <= 1
        assert lines[-1] == f"As text for Flexi Schedule: {handle.report.schedule}"


def test_the_text_of_the_report_makes_the_same_picture(host, demo_model, preset, apply):
    for sampler in ("euler", "euler_ancestral", "dpmpp_2m"):
        options = {"sampler": sampler, "steps": 20, "scheduler": "simple", "noise": host.noise(1)}
        model, handle = preset()
        made = host.sample(model, **options)
        typed, again = apply(demo_model, str(handle.report).splitlines()[-1].removeprefix("As text for Flexi Schedule: "))
        assert torch.equal(host.sample(typed, **options), made)
        assert again.report.letters == handle.report.letters


def test_grain_is_warned_of_first(host, demo_model, apply):
    model, handle = apply(demo_model, "4*(FX); basis=derivative")
    host.sample(model, "euler_ancestral", noise=host.noise(1))
    assert "expect grain" in str(handle.report).splitlines()[0]


def test_another_guidance_of_a_guider_counts(host):
    is_guided = importlib.import_module("flexi_core.host.wrappers").is_guided
    guiders = host.comfy.samplers.CFGGuider
    plain, both = guiders(host.adapter.load_demo_model()), guiders(host.adapter.load_demo_model())
    both.cfg1, both.cfg2 = 4.0, 1.0
    assert not is_guided(plain) and is_guided(both)
    plain.set_cfg(3.0)
    assert is_guided(plain)


class Fails(Exception):
    """What nobody expects."""


def raising(*_, **__):
    raise Fails("on purpose")


@pytest.mark.parametrize(
    "target",
    ["flexi_core.host.wrappers.probe", "flexi_core.schedule.presets.Preset.resolve", "flexi_core.host.wrappers.make_plan"],
)
@pytest.mark.parametrize("on_mismatch", ["map", "refuse", "off"])
def test_a_preset_that_fails_is_plain_sampling_and_says_what_failed(
    host, demo_model, preset, monkeypatch, caplog, target, on_mismatch
):
    plain = host.sample(demo_model)
    model, handle = preset("2x", 0, on_mismatch)
    monkeypatch.setattr(target, raising)
    assert torch.equal(host.sample(model), plain)
    lines = str(handle.report).splitlines()
    assert lines[0] == SENTENCE and lines[1].startswith("The schedule failed (Fails: on purpose)")
    assert [record.levelname for record in caplog.records if record.name.startswith("flexi_core.host.")] == ["ERROR"]


@pytest.mark.parametrize("target", ["flexi_core.run.report._step_report", "flexi_core.host.handle._digest"])
def test_a_report_that_fails_leaves_the_picture_and_says_what_failed(host, preset, monkeypatch, caplog, target):
    model, handle = preset()
    made = host.sample(model, steps=20, scheduler="simple")
    monkeypatch.setattr(target, raising)
    assert torch.equal(host.sample(model, steps=20, scheduler="simple"), made)
    assert "The report failed (Fails: on purpose)" in str(handle.report)
    assert [record.levelname for record in caplog.records if record.name.startswith("flexi_core.host.")] == ["ERROR"]


@pytest.mark.parametrize(
    ("target", "words", "failed"),
    [
        (("flexi_core.run.report", "RunReport", "__str__"), "The report failed (Fails: on purpose)", False),
        (("flexi_core.run.report", "count_macs"), "2 network calls, every block in each: 2.00x fewer MACs", False),
        (("nodes.sampling", "draw_timeline"), "4 steps: 2 full, 2 null (extrapolated)", True),
        (("nodes.sampling", "ui", "PreviewImage"), "4 steps: 2 full, 2 null (extrapolated)", False),
    ],
)
def test_a_report_node_that_fails_hands_the_latent_on_and_keeps_what_it_can(
    host, node, pack, monkeypatch, target, words, failed
):
    schedule = sys.modules[f"{pack.__name__}.flexi_core"].Schedule.parse("2*(FX)")
    patched, run = node("FlexiApply").execute(node("FlexiDemoModel").execute().args[0], schedule, "map").args
    latent = {"samples": host.sample(patched, steps=4)}
    module, *inside, name = target
    monkeypatch.setattr(functools.reduce(getattr, inside, sys.modules[f"{pack.__name__}.{module}"]), name, raising)
    shown = node("FlexiReport").execute(run, latent)
    assert shown.args[0] is latent and words in shown.args[1]
    assert shown.args[2].shape[-1] == 3 and (shown.args[2].shape[1] == 64) is failed
    assert shown.ui["text"] == (shown.args[1],)


def test_refusing_a_run_still_stops_before_it(host, apply, preset, demo_model):
    for model, _ in (apply(demo_model, "10*(FX)", "refuse"), preset("2x", 20, "refuse")):
        with pytest.raises(FlexiError, match="the schedule has 20 steps, the run 8"):
            host.sample(model)
    model, handle = preset("2x", 0, "refuse")
    host.sample(model, scheduler="simple")
    assert len(handle.report.letters) == 8


def test_cancelling_is_never_swallowed(host, preset, demo_model):
    cancelled = host.comfy.model_management.InterruptProcessingException

    def cancels(model, x, sigmas, extra_args=None, callback=None, disable=None):
        raise cancelled()

    sampler = host.comfy.samplers.KSAMPLER(cancels)
    for model in (preset()[0], demo_model):
        with pytest.raises(cancelled):
            custom(host, model, sampler, torch.linspace(9, 0, 9))


def test_samplers_that_cannot_be_tried_sample_plainly(host, demo_model, apply, preset):
    def refuses_stand_ins(model, x, sigmas, extra_args=None, callback=None, disable=None):
        if x.numel() < 100:
            raise ValueError("this is no picture")
        for i in range(len(sigmas) - 1):
            d = (x - model(x, sigmas[i] * x.new_ones(x.shape[0]), **extra_args)) / sigmas[i]
            x = x + d * (sigmas[i + 1] - sigmas[i])
        return x

    class OfItsOwnKind(host.comfy.samplers.Sampler):
        def sample(
            self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
        ):
            ksampler = host.comfy.samplers.sampler_object("euler")
            return ksampler.sample(model_wrap, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar)

    sigmas = host.sigmas(demo_model, "simple", 8)
    for sampler in (host.comfy.samplers.KSAMPLER(refuses_stand_ins), OfItsOwnKind()):
        plain = custom(host, demo_model, copy.copy(sampler), sigmas)
        for model, handle in (preset(), apply(demo_model, "4*(FX)")):
            assert torch.equal(custom(host, model, copy.copy(sampler), sigmas), plain)
            assert "could not be tried" in str(handle.report)
        # What skips nothing needs no trial.
        model, handle = apply(demo_model, "4*(FP@3)")
        assert custom(host, model, copy.copy(sampler), sigmas).isfinite().all() and handle.report.letters == "FP" * 4
