"""A schedule's own noise levels in the host's samplers."""

from dataclasses import replace

import pytest
import torch

from flexi_core import FlexiError, Schedule
from flexi_core.demo.model import DemoModel
from flexi_core.demo.scenes import parse_caption
from flexi_core.runtime import sampling

STEPS = 8
MIXED = "F|FX|FPX@2|FN"
CAPTION = "a small green ring at the top left on a brown background"


@pytest.fixture
def moved(host, demo_model):
    """A function of a schedule's text: the schedule at noise levels of its own, and those."""
    sigmas = host.sigmas(demo_model, "normal", STEPS)
    levels = sigmas.clone()
    levels[1:-1] = sigmas[1:-1] + 0.3 * (sigmas[2:] - sigmas[1:-1])

    def move(text):
        return replace(Schedule.parse(text), sigmas=tuple(levels.tolist())), levels

    return move


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "euler_ancestral", "uni_pc", "lms"])
def test_an_all_full_schedule_samples_as_the_host_does_at_these_levels(host, demo_model, apply, moved, sampler):
    schedule, levels = moved(f"{STEPS}*(F)")
    model, handle = apply(demo_model, str(schedule))
    assert torch.equal(host.sample(model, sampler), host.sample(demo_model, sampler, sigmas=levels))
    assert "The noise levels of the steps are the schedule's own." in handle.report.notes
    assert [step.sigma for step in handle.report.steps] == pytest.approx(levels[:-1].tolist())
    assert torch.equal(host.sample(model, sampler), host.sample(model, sampler)), "the second run equals the first"


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_the_embedded_runtime_agrees(host, demo_model, apply, moved, sampler):
    schedule, _ = moved(MIXED)
    noise, embedded = sampling.make_noise(7, 2), DemoModel.load()
    sigmas = sampling.SCHEDULERS["normal"](embedded, STEPS)
    ours, _ = sampling.sample(embedded, schedule, sigmas, noise, [parse_caption(CAPTION)] * 2, sampler=sampler, cfg=3.0)
    model, handle = apply(demo_model, str(schedule))
    positive = host.adapter.demo_conditioning(CAPTION)
    theirs = host.sample(model, sampler, STEPS, noise=noise, positive=positive)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert handle.report.letters == "FFXFPXFN"


def test_a_run_that_ends_elsewhere_keeps_its_own_levels(host, demo_model, apply, moved):
    schedule, _ = moved(MIXED)
    model, handle = apply(demo_model, str(schedule))
    plain, _ = apply(demo_model, str(replace(schedule, sigmas=None)))
    options = {"denoise": 0.6}
    assert torch.equal(host.sample(model, **options), host.sample(plain, **options))
    assert "The schedule's noise levels are left out, the run begins or ends elsewhere." in handle.report.notes
    assert handle.report.letters == "FFXFPXFN"


def test_a_run_of_another_length_is_mapped_without_them(host, demo_model, apply, moved):
    schedule, _ = moved(MIXED)
    model, handle = apply(demo_model, str(schedule))
    plain, _ = apply(demo_model, str(replace(schedule, sigmas=None)))
    assert torch.equal(host.sample(model, steps=11), host.sample(plain, steps=11))
    assert "without its own noise levels" in " ".join(handle.report.notes)


def test_levels_that_do_not_fit_are_refused_or_turn_the_schedule_off_where_that_is_asked_for(host, demo_model, moved):
    schedule, _ = moved(MIXED)
    model, _ = host.adapter.apply_schedule(demo_model, schedule, on_mismatch="refuse")
    with pytest.raises(FlexiError, match="own noise levels begin or end elsewhere than the run's"):
        host.sample(model, denoise=0.6)
    model, handle = host.adapter.apply_schedule(demo_model, schedule, on_mismatch="off")
    assert torch.equal(host.sample(model, denoise=0.6), host.sample(demo_model, denoise=0.6))
    assert handle.report.run is None
