"""Every way to start a sampling run, under a schedule with all kinds of step."""

import copy

import pytest
import torch

from flexi_core.run.plan import make_plan
from flexi_core.schedule.schedule import Schedule

pytestmark = pytest.mark.usefixtures("small_latents")

MIXED = "2*(F)|FPX@2|FPN@3"  # 8 steps
LONG = "F|FPPPPPPPPPPP@2|FPPX@2"  # 17: mapped to a window it still has partial steps


@pytest.fixture
def planned(demo_model):
    """A function of (sigmas, text) that returns the letters of a schedule mapped to a run of the embedded model."""
    top = float(demo_model.get_model_object("model_sampling").sigma_max)
    return lambda sigmas, text=MIXED: make_plan(Schedule.parse(text), sigmas.tolist(), top=top).letters


@pytest.fixture
def ksampler(host):
    """A function that samples as core's KSampler nodes do: (model, latent, **options of common_ksampler)."""
    import nodes

    def sample(model, latent, **options):
        options = {"denoise": 1.0, "disable_noise": False, **options}
        latent = latent if isinstance(latent, dict) else {"samples": latent}
        out = nodes.common_ksampler(model, 7, 8, 3.0, "euler", "normal", host.positive, host.negative, latent, **options)
        return out[0]["samples"]

    return sample


@pytest.fixture
def picture(host):
    """A latent that is no noise [1, 3, 16, 16]."""
    return torch.linspace(-1, 1, 16).expand(1, 3, 16, 16).clone()


@pytest.mark.matrix("Runs", "KSampler, empty latent, batch {batch}")
@pytest.mark.parametrize("batch", [1, 3])
def test_ksampler_keeps_the_laws(ksampler, demo_model, cell, batch):
    cell(demo_model, lambda model: ksampler(model, torch.zeros(batch, 3, 16, 16)), MIXED)


@pytest.mark.matrix("Runs", "KSampler, denoise {denoise} (image to image)")
@pytest.mark.parametrize("denoise", [0.3, 0.6])
def test_denoise_keeps_the_laws(host, ksampler, planned, picture, demo_model, cell, denoise):
    sigmas = host.sigmas(demo_model, "normal", int(8 / denoise))[-9:]
    cell(demo_model, lambda model: ksampler(model, picture, denoise=denoise), MIXED, ran=planned(sigmas))


@pytest.mark.matrix("Runs", "KSampler Advanced, steps {start} to {end}, leftover noise {leftover}")
@pytest.mark.parametrize(("start", "end"), [(0, 5), (3, 8), (2, 6)])
@pytest.mark.parametrize("leftover", ["kept", "removed"])
def test_window_keeps_the_laws(host, ksampler, planned, picture, demo_model, cell, start, end, leftover):
    sigmas = host.sigmas(demo_model, "normal", 8)[start : end + 1].clone()
    if leftover == "removed":
        sigmas[-1] = 0
    options = {"start_step": start, "last_step": end, "force_full_denoise": leftover == "removed", "disable_noise": start > 0}
    report = cell(demo_model, lambda model: ksampler(model, picture, **options), LONG, ran=planned(sigmas, LONG))
    assert "P" in report.letters and not any(step.fallbacks for step in report.steps)


@pytest.mark.matrix("Runs", "SamplerCustom, hand-made sigmas")
def test_hand_made_sigmas_keep_the_laws(host, demo_model, cell):
    sigmas = torch.tensor([14.0, 9.0, 8.5, 4.0, 2.0, 1.9, 0.7, 0.2, 0.0])
    cell(demo_model, lambda model: custom(host, model, sigmas), MIXED)


@pytest.mark.matrix("Runs", "SamplerCustom, sigmas that do not end at 0")
def test_sigmas_that_do_not_end_at_zero_keep_the_laws(host, demo_model, cell):
    cell(demo_model, lambda model: custom(host, model, torch.linspace(12, 2, 9)), MIXED)


@pytest.mark.matrix("Runs", "SamplerCustom, rising sigmas (inverse sampling)")
def test_rising_sigmas_are_sampled_plainly(host, demo_model, cell):
    sigmas = torch.linspace(0.1, 12, 9)
    report = cell(demo_model, lambda model: custom(host, model, sigmas), MIXED, ran="", does="stands down: the sigmas rise")
    assert "do not fall" in str(report)


@pytest.mark.matrix("Runs", "SamplerCustomAdvanced with a CFG guider")
def test_guider_keeps_the_laws(host, demo_model, cell):
    def sample(model):
        guider = host.comfy.samplers.CFGGuider(model)
        guider.set_conds(host.positive, host.negative)
        guider.set_cfg(3.0)
        noise, sampler = host.noise(), host.comfy.samplers.sampler_object("dpmpp_2m")
        return guider.sample(noise, torch.zeros_like(noise), sampler, host.sigmas(model, "normal", 8), disable_pbar=True)

    cell(demo_model, sample, MIXED)


def test_the_denoised_output_of_the_custom_sampler_finds_its_report_too(host, demo_model, apply, extra):
    model, handle = apply(demo_model, MIXED)
    noise, guider, sampler, sigmas = (
        extra("custom_sampler", "RandomNoise")(5)[0],
        extra("custom_sampler", "CFGGuider")(model, host.positive, host.negative, 3.0)[0],
        host.comfy.samplers.sampler_object("euler"),
        torch.linspace(12, 2, 9),
    )
    out, denoised = extra("custom_sampler", "SamplerCustomAdvanced")(
        noise, guider, sampler, sigmas, {"samples": torch.zeros(1, 3, 16, 16)}
    )
    assert not torch.equal(out["samples"], denoised["samples"])
    assert handle.report_of(out["samples"]) is handle.report_of(denoised["samples"]) is handle.report is not None


@pytest.mark.matrix("Runs", "inpainting with a mask")
def test_mask_keeps_the_laws(ksampler, picture, demo_model, cell):
    mask = torch.zeros(1, 16, 16)
    mask[:, 4:12, 4:12] = 1
    latent = {"samples": picture, "noise_mask": mask}
    cell(demo_model, lambda model: ksampler(model, copy.copy(latent)), MIXED)


@pytest.mark.matrix("Runs", "a latent batch with a mask each")
def test_batch_of_masks_keeps_the_laws(ksampler, picture, demo_model, cell):
    masks = torch.zeros(3, 16, 16)
    for row, mask in enumerate(masks):
        mask[:, 4 * row : 4 * row + 4] = 1
    latent = {"samples": picture.repeat(3, 1, 1, 1), "noise_mask": masks}
    cell(demo_model, lambda model: ksampler(model, copy.copy(latent)), MIXED)


@pytest.mark.matrix("Runs", "two samplers in one graph, the second larger (hires fix)")
def test_hires_pass_keeps_the_laws(ksampler, demo_model, cell):
    def sample(model):
        small = ksampler(model, torch.zeros(1, 3, 16, 16))
        larger = torch.nn.functional.interpolate(small, size=(24, 24), mode="nearest")
        return ksampler(model, larger, disable_noise=False)

    cell(demo_model, sample, MIXED)


@pytest.mark.matrix("Runs", "cfg {cfg}")
@pytest.mark.parametrize("cfg", [1.0, 7.5])
def test_cfg_keeps_the_laws(host, demo_model, cell, cfg):
    report = cell(demo_model, lambda model: host.sample(model, cfg=cfg, noise=host.noise(batch=1)), MIXED)
    assert not any(step.fallbacks for step in report.steps)


@pytest.mark.matrix("Runs", "cond and uncond in two calls (little memory)")
def test_two_calls_a_step_keep_the_laws(host, demo_model, cell, monkeypatch):
    monkeypatch.setattr(host.comfy.model_management, "get_free_memory", lambda *_, **__: 0)
    report = cell(demo_model, lambda model: host.sample(model), MIXED)
    assert [step.network_calls for step in report.steps] == [2, 2, 2, 2, 0, 2, 2, 0]


@pytest.mark.matrix("Runs", "one step, a schedule of 8")
def test_one_step_keeps_the_laws(host, demo_model, cell):
    cell(demo_model, lambda model: host.sample(model, steps=1), MIXED, ran="F")


@pytest.mark.matrix("Runs", "20 steps, a schedule of 8")
def test_more_steps_keep_the_laws(host, planned, demo_model, cell):
    ran = planned(host.sigmas(demo_model, "normal", 20))
    report = cell(demo_model, lambda model: host.sample(model, steps=20, noise=host.noise(batch=1)), MIXED, ran=ran)
    assert "8 steps mapped to 20 by position" in str(report)


def custom(host, model, sigmas):
    noise, sampler = host.noise(), host.comfy.samplers.sampler_object("euler")
    zero = torch.zeros_like(noise)
    return host.comfy.sample.sample_custom(
        model, noise, 3.0, sampler, sigmas, host.positive, host.negative, zero, disable_pbar=True, seed=1
    )
