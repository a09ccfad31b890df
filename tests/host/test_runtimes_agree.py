"""The embedded runtime and the host: the same weights, noise and noise levels make the same pictures."""

import pytest
import torch

from flexi_core import Schedule
from flexi_core.demo import sampling
from flexi_core.demo.model import DemoModel
from flexi_core.demo.scenes import parse_caption

STEPS = 8
MIXED = "2*(F)|FPX@2|FPN@3"
CAPTION = "a small green ring at the top left on a brown background"


@pytest.fixture(scope="module")
def embedded():
    return DemoModel.load()


@pytest.mark.parametrize("steps", [1, 5, 20, 50])
@pytest.mark.parametrize("scheduler", list(sampling.SCHEDULERS))
def test_noise_levels_equal_the_hosts(host, demo_model, embedded, scheduler, steps):
    ours, theirs = sampling.SCHEDULERS[scheduler](embedded, steps), host.sigmas(demo_model, scheduler, steps)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("text", [f"{STEPS}*(F)", MIXED], ids=["all-full", "mixed"])
@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [*((sampler, "normal") for sampler in sampling.SAMPLERS), ("euler", "simple"), ("dpmpp_2m", "karras")],
)
def test_samplers_agree_with_the_hosts(host, demo_model, embedded, apply, sampler, scheduler, text):
    noise = sampling.make_noise(7, 2)
    sigmas = sampling.SCHEDULERS[scheduler](embedded, STEPS)
    ours, run = sampling.sample(
        embedded, Schedule.parse(text), sigmas, noise, [parse_caption(CAPTION)] * 2, sampler=sampler, cfg=3.0
    )
    model, handle = apply(demo_model, text)
    positive = host.adapter.demo_conditioning(CAPTION)
    theirs = host.sample(model, sampler, STEPS, scheduler=scheduler, noise=noise, positive=positive)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert [record.network_calls for record in run.records] == [step.network_calls for step in handle.report.steps]


def test_fingerprints_agree_with_the_hosts(demo_model, embedded):
    from flexi_core.fingerprint import architecture_fingerprint, weights_fingerprint

    network = demo_model.model.diffusion_model
    assert architecture_fingerprint(embedded.unet) == architecture_fingerprint(network)
    assert weights_fingerprint(embedded.unet) == weights_fingerprint(network)
