"""Stage models: a decoder for each stretch of noise levels on one encoder, and the file that they travel in."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from flexi_core import FlexiError, Schedule
from flexi_core.networks.fingerprint import architecture_fingerprint, weights_fingerprint
from flexi_core.run.report import RunReport
from flexi_core.runtime.sampling import make_noise, sample, sigmas_normal
from flexi_core.runtime.unet import UNet
from flexi_core.runtime.unet_config import unet_arguments
from flexi_core.stages.bounds import Stages
from flexi_core.stages.embedded import EmbeddedParts, StagedModel
from flexi_core.stages.network import groups_of, load_stages, make_decoder, save_stages

THREE = Stages((5.0, 1.0), ("high", "middle", "low"))


@pytest.fixture
def config(tiny_model):
    return {"in_channels": 3, "out_channels": 3, "use_scale_shift_norm": True, **tiny_model.unet_config}


def of_the_base(unet: UNet, own_middle: bool = False) -> nn.Module:
    """Return a decoder that is the base's."""
    found = nn.Module()
    for name in ("output_blocks", "out", *["middle_block"] * own_middle):
        setattr(found, name, copy.deepcopy(getattr(unet, name)))
    return found


def drawn(config: dict, width: int, seed: int) -> nn.Module:
    """Return a decoder of a width with random weights."""
    made = make_decoder(EmbeddedParts, unet_arguments(config), width, own_middle=False)
    generator = torch.Generator().manual_seed(seed)
    for value in made.parameters():
        value.data.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    return made


@pytest.fixture
def write(tmp_path, tiny_model, config):
    """A function that writes a stage file for the tiny model."""

    def put(decoders, stages=THREE, name="stages.safetensors"):
        base = {"architecture": architecture_fingerprint(tiny_model.unet), "weights": weights_fingerprint(tiny_model.unet)}
        save_stages(tmp_path / name, stages, decoders, config, base, "CC0")
        return tmp_path / name

    return put


def pictures(model, text: str = "8*(F)"):
    steps = len(Schedule.parse(text))
    return sample(model, Schedule.parse(text), sigmas_normal(model, steps), make_noise(1, 2), cfg=3.0)


@pytest.mark.parametrize("own_middle", [False, True])
@pytest.mark.parametrize("text", ["8*(F)", "F|FXX|FPP@1|FX"])
def test_decoders_that_are_the_bases_give_the_bases_pictures(tiny_model, write, text, own_middle):
    staged = StagedModel(tiny_model, write([of_the_base(tiny_model.unet, own_middle)] * 3))
    base = copy.copy(tiny_model)
    base.stages = staged.stages if "X" in text else None  # a schedule is cut at the boundaries
    assert torch.equal(pictures(staged, text)[0], pictures(base, text)[0])
    assert load_stages(write([of_the_base(tiny_model.unet, own_middle)] * 3)).own_middle is own_middle


def test_each_stage_has_its_own_decoder_and_its_own_macs(tiny_model, config, write):
    widths = (32, 16, 64)
    path = write([drawn(config, width, seed) for seed, width in enumerate(widths)])
    found = load_stages(path)
    assert found.widths == widths and found.stages == THREE and found.licence == "CC0"
    staged = StagedModel(tiny_model, path)
    made, run = pictures(staged, "F|FPPPPPPP@2|F")
    assert made.isfinite().all() and not torch.equal(made, pictures(tiny_model, "F|FPPPPPPP@2|F")[0])
    report = RunReport(run, 1.0)
    assert [stage.name for stage in report.stages] == ["high", "middle", "low"]
    full = [report.cost_in(i).full_macs for i in range(3)]
    assert full[1] < full[0] < full[2]


def test_the_number_of_groups_fits_any_width():
    assert [groups_of(64, 64)(channels) for channels in (64, 128)] == [32, 32]
    for width in (8, 16, 24, 48, 96, 192):
        for channels in (width, 2 * width, width + 64, 3 * width):
            groups = groups_of(width, 64)(channels)
            assert channels % groups == 0 and channels // groups >= 2 and groups <= 32
    assert groups_of(16, 64)(16) == 8


def changed(path, name="bad.safetensors", **entries):
    """Write a copy of a file with other metadata."""
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), **entries}
    save_file(load_file(path), path.with_name(name), {key: value for key, value in metadata.items() if value is not None})
    return path.with_name(name)


def staged(*rows):
    keys = ("name", "below", "above", "width")
    return json.dumps([dict(zip(keys, row, strict=False)) for row in rows])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"format": "other"}, "its format is 'other'"),
        ({"version": "2"}, "update the node pack"),
        ({"unet_config": None}, "its metadata lack unet_config"),
        ({"middle": "both"}, "expected shared or own"),
        ({"stages": "{"}, "no JSON"),
        ({"stages": "{}"}, "no JSON list"),
        ({"stages": "[]"}, "it has 0 stages"),
        ({"stages": staged(("a", None, 2.0))}, "stage 1 lacks"),
        ({"stages": staged(("a", None, 2.0, 32), ("b", 1.5, 0.0, 32))}, "stage 2 begins below 1.5.* end at 2: a gap"),
        ({"stages": staged(("a", None, 2.0, 32), ("b", 2.5, 0.0, 32))}, "stage 2 begins below 2.5.* end at 2: an overlap"),
        ({"stages": staged(("a", 9.0, 2.0, 32), ("b", 2.0, 0.0, 32))}, "stage 1 begins below 9.* end at inf: a gap"),
        ({"stages": staged(("a", None, 2.0, 32), ("b", 2.0, 1.0, 32))}, "the last one to 0"),
        ({"stages": staged(("a", None, "2", 32), ("b", 2.0, 0.0, 32))}, "expected noise levels"),
        ({"stages": staged(("a", None, 0.0, -3))}, "the width -3"),
        ({"stages": staged(("a", None, 0.0, 40))}, "which attention heads of 16 do not fit"),
        ({"stages": staged(("a", None, 0.0, 64))}, "tensors do not fit its widths"),
        ({"base_weights": "sha256:other"}, "a base of other weights"),
        ({"base_architecture": "sha256:other"}, "a base of other architecture"),
    ],
)
def test_a_bad_file_is_one_clear_error(tiny_model, config, write, entries, message):
    path = changed(write([drawn(config, 32, 0)], Stages((), ("all",))), **entries)
    with pytest.raises(FlexiError, match=message) as caught:
        StagedModel(tiny_model, path)
    assert "bad.safetensors" in str(caught.value)


def test_a_file_that_is_none_is_refused(tmp_path, tiny_model):
    (tmp_path / "none.safetensors").write_bytes(b"nothing")
    for name in ("none.safetensors", "gone.safetensors"):
        with pytest.raises(FlexiError, match="cannot be read as a stage file"):
            StagedModel(tiny_model, tmp_path / name)
