"""A stage model in the host: a decoder for each stretch of noise levels on the base's own encoder."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from flexi_core import FlexiError, Schedule
from flexi_core.demo.model import WEIGHTS, DemoModel, read_weights
from flexi_core.demo.scenes import parse_caption
from flexi_core.networks.fingerprint import architecture_fingerprint, weights_fingerprint
from flexi_core.runtime import sampling
from flexi_core.runtime.unet_config import unet_arguments
from flexi_core.stages.bounds import Stages
from flexi_core.stages.embedded import EmbeddedParts, StagedModel
from flexi_core.stages.network import make_decoder, save_stages

TWO = Stages((2.0,), ("high", "low"))
MIXED = "F|FXX|FPX@2|F"
CAPTION = "a large red circle at the center on a navy background"


@pytest.fixture(scope="module")
def config():
    return read_weights(WEIGHTS)[0]


@pytest.fixture(scope="module")
def write(tmp_path_factory, config):
    """A function of (decoders, base) that writes a stage file for the embedded model."""
    unet, folder = DemoModel.load().unet, tmp_path_factory.mktemp("stages")

    def put(*decoders, name="stages.safetensors", stages=TWO):
        base = {"architecture": architecture_fingerprint(unet), "weights": weights_fingerprint(unet)}
        save_stages(folder / name, stages, decoders, config, base)
        return folder / name

    return put


@pytest.fixture(scope="module")
def of_the_base(config):
    """A function of (own middle, change) that returns the base's decoder."""

    def make(own_middle=False, change=0.0):
        unet, found = DemoModel.load().unet, nn.Module()
        for name in ("output_blocks", "out", *["middle_block"] * own_middle):
            setattr(found, name, copy.deepcopy(getattr(unet, name)))
        rng = torch.Generator().manual_seed(3)
        for value in found.parameters():
            value.mul_(1 + change * torch.randn(value.shape, generator=rng))
        return found

    return make


@pytest.fixture(scope="module")
def narrow(config):
    made = make_decoder(EmbeddedParts, unet_arguments(config), 32, own_middle=False)
    rng = torch.Generator().manual_seed(4)
    for value in made.parameters():
        value.data.copy_(torch.randn(value.shape, generator=rng) * 0.05)
    return made.requires_grad_(False)


@pytest.mark.parametrize("own_middle", [False, True])
def test_decoders_that_are_the_bases_change_nothing(host, demo_model, apply, write, of_the_base, own_middle):
    model = host.adapter.stage_model(demo_model, write(*[of_the_base(own_middle)] * 2))
    for sampler in ("euler", "dpmpp_2m", "heun"):
        plain = host.sample(demo_model, sampler)
        assert torch.equal(host.sample(model, sampler), plain), sampler
        assert torch.equal(host.sample(apply(model, "8*(F)")[0], sampler), plain), sampler


def test_partial_steps_have_the_stages_own_decoder(host, demo_model, apply, write, of_the_base, narrow):
    """Before the boundary the run is the base's, bit for bit; behind it another decoder's."""
    sigmas = host.sigmas(demo_model, "normal", 8).tolist()
    at = next(i for i, sigma in enumerate(sigmas) if sigma <= 2.0)
    model, handle = apply(host.adapter.stage_model(demo_model, write(of_the_base(), narrow)), "2*(FPPP@2)")
    made = host.sample(model)
    assert made.isfinite().all() and torch.equal(host.sample(model), made), "the second run differs from the first"
    letters = handle.report.letters
    assert letters[at] == "F" and "P" in letters[:at] and "P" in letters[at:]
    high, low = handle.report.stages
    assert [stage.name for stage in (high, low)] == ["high", "low"] and len(high.steps) == at
    assert handle.report.cost_in(1).full_macs < handle.report.cost_in(0).full_macs
    base, _ = apply(demo_model, "2*(FPPP@2)")
    options = {"last_step": at}
    assert torch.equal(host.sample(model, **options), host.sample(base, **options))
    assert not torch.equal(made, host.sample(base))


@pytest.mark.parametrize("text", ["8*(F)", MIXED])
def test_the_embedded_runtime_agrees(host, demo_model, apply, write, of_the_base, narrow, text):
    path = write(of_the_base(change=0.02), narrow)
    noise, embedded = sampling.make_noise(7, 2), StagedModel(DemoModel.load(), path)
    sigmas = sampling.SCHEDULERS["normal"](embedded, 8)
    ours, _ = sampling.sample(embedded, Schedule.parse(text), sigmas, noise, [parse_caption(CAPTION)] * 2, cfg=3.0)
    model, _ = apply(host.adapter.stage_model(demo_model, path), text)
    theirs = host.sample(model, noise=noise, positive=host.adapter.demo_conditioning(CAPTION))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_patches_reach_every_stage(host, demo_model, write, of_the_base):
    seen = []

    def note(h, skip, options):
        seen.append(float(options["sigmas"].max()))
        return h, skip

    model = host.adapter.stage_model(demo_model, write(of_the_base(), of_the_base(change=0.02))).clone()
    model.set_model_output_block_patch(note)
    host.sample(model)
    assert max(seen) > 2.0 > min(seen)


def test_what_has_no_stages_is_refused(host, demo_model, sd15_model, write, of_the_base):
    path = write(of_the_base(), of_the_base())
    with pytest.raises(FlexiError, match="a base of other architecture"):
        host.adapter.stage_model(sd15_model, path)
    model = host.adapter.stage_model(demo_model, path)
    with pytest.raises(FlexiError, match="has stages already"):
        host.adapter.stage_model(model, path)
