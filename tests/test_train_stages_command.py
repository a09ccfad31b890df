"""`flexi train-stages` as a user meets it."""

from __future__ import annotations

import json
import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flexi_core.demo.model import DemoModel
from flexi_core.runtime.file_model import FileModel
from flexi_core.runtime.unet import UNet
from flexi_core.runtime.unet_config import unet_arguments
from flexi_core.stages.embedded import StagedModel
from flexi_core.stages.network import load_stages
from flexi_core.stages.training import StageTrainer
from search_tools import console
from search_tools.cli import app
from search_tools.noise_stages import data_of

SMALL = ["--scratch", "--channels", "32", "--mult", "1,1", "--blocks", "0,1", "--size", "8", "--data", "20", "--batch", "2"]
CUTS = ["--boundaries", "6.07,2.18"]


@pytest.fixture
def flexi(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(app, ["train-stages", *(str(a) for a in args)])


def done(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_from_scratch_to_a_model_that_can_be_sampled(flexi, tmp_path):
    found = done(flexi(*SMALL, *CUTS, "--widths", "16,32,48", "--iterations", 6, "--json"))
    assert found["iterations"] == 6 == sum(stage["iterations"] for stage in found["stages"])
    assert [(stage["name"], stage["width"]) for stage in found["stages"]] == [("high", 16), ("middle", 32), ("low", 48)]
    stages, base = (tmp_path / file for file in found["files"])
    staged = StagedModel(FileModel.load(base), stages)
    assert staged.stages.boundaries == (6.07, 2.18) and load_stages(stages).licence.startswith("MIT")
    again = flexi(*SMALL, *CUTS, "--widths", "16,32,48", "--iterations", 8)
    assert again.exit_code == 0 and "8 iterations" in again.stdout
    assert "goes with the base written beside it, whose own decoder is that of the stage 'middle'" in again.stdout
    other = flexi(*SMALL, *CUTS, "--widths", "16,48,48", "--folder", "other", "--iterations", 0)
    assert other.exit_code == 0 and "own decoder is untrained" in other.stdout


def test_from_the_embedded_model_the_boundaries_come_from_flexi_stages(flexi, tmp_path):
    (tmp_path / "cuts.json").write_text(json.dumps({"boundaries": [{"sigma": 6.07}], "similarity": [[1.0]]}))
    result = flexi("--boundaries", "cuts.json", "--iterations", 1, "--batch", 1, "--middle", "own", "--folder", "a")
    assert result.exit_code == 0 and "the stage file goes with the embedded model" in result.stdout, result.output
    staged = StagedModel(DemoModel.load(), tmp_path / "a" / "stages.safetensors")
    assert staged.stages.boundaries == (6.07,) and staged.stages.names == ("high", "low")


def test_pictures_of_a_folder_and_of_a_folder_for_each_class(flexi, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("flat/a", "flat/b"):
        (tmp_path / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8)).save(tmp_path / name / f"{i}.png")
    small = [*SMALL, *CUTS, "--iterations", 1]
    nameless = flexi("flat/a", *small)
    assert nameless.exit_code == 2 and "under what licence, --licence" in nameless.output
    done(flexi("flat/a", *small, "--licence", "CC0", "--json"))
    assert load_stages(tmp_path / "flexi_stage_training" / "stages.safetensors").licence == "CC0"
    assert len(data_of("flat/a", 2, (8, 8), 0)) == 2

    config = {
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 32,
        "channel_mult": [1],
        "num_res_blocks": [1],
        "transformer_depth": [1],
        "transformer_depth_output": [1, 1],
        "transformer_depth_middle": -1,
        "num_head_channels": 16,
        "context_dim": 8,
        "image_size": 8,
    }
    unet = UNet(**unet_arguments(config))
    tensors = {**unet.state_dict(), "class_embedding.weight": torch.randn(3, 8)}
    metadata = {"unet_config": json.dumps(config), "prediction": "v", "beta_schedule": "linear 0.00085 0.012"}
    save_file(tensors, tmp_path / "classes.safetensors", metadata)
    of_classes = ["--unet", "classes.safetensors", *CUTS, "--batch", 2, "--licence", "CC0", "--folder", "c", "--iterations", 2]
    done(flexi("flat", *of_classes, "--json"))
    wrong = flexi("flat/a", *of_classes)
    assert wrong.exit_code == 2 and "knows 2 classes, flat/a has 0 sub-folders" in wrong.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--boundaries", "2,6"], "3 stages have the boundaries 2, 6; expected"),
        (["--boundaries", "6;2"], "--boundaries is '6;2'; expected numbers with commas"),
        (["--boundaries", "gone.json"], "gone.json: cannot be read"),
        (["--boundaries", "bad.json"], "bad.json: no boundaries in it; expected what flexi stages --json printed"),
        (["--boundaries", "20"], "the stage 'high' has none of the model's noise levels"),
        ([*CUTS, "--widths", "64,64"], "3 stages have the widths 64, 64; give one for each"),
        ([*CUTS, "--names", "a,b"], "2 stages have the boundaries"),
        ([*CUTS, "--density", "1,2"], "3 stages have the density 1, 2"),
        ([*CUTS, "--rate", "0"], "above 0"),
        ([*CUTS, "--size", "16"], "--size describes a network that begins anew; add --scratch"),
        ([*SMALL, "--unet", "u.safetensors"], "give one of them"),
        ([*SMALL, "--freeze-encoder"], "an encoder that begins anew has to train"),
        ([*SMALL, "--channels", "40"], "the layout needs a multiple of 32"),
        ([*SMALL, "--size", "7"], "which 7 does not divide"),
        ([*SMALL, "--config", "bad.json"], "expected an object, the arguments"),
        (["nowhere", *SMALL, "--licence", "CC0"], "nowhere: no such folder"),
        (["nowhere", "--licence", "CC0"], "conditioned on captions"),
    ],
)
def test_bad_input_is_one_line(flexi, tmp_path, args, message):
    (tmp_path / "bad.json").write_text("[]")
    result = flexi(*args, "--iterations", 1)
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output, result.output
    assert not list(tmp_path.glob("*/*.safetensors"))


def test_ctrl_c_keeps_a_checkpoint_and_says_how_to_go_on(flexi, tmp_path, monkeypatch):
    options = [*SMALL, *CUTS, "--iterations", "6"]
    iterate, handler = StageTrainer._iterate, signal.getsignal(signal.SIGINT)

    def interrupted(trainer):
        if trainer.done == 3:
            signal.raise_signal(signal.SIGINT)  # in the middle of an iteration
        iterate(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "_iterate", interrupted)
        patch.setattr(sys, "argv", ["flexi", "train-stages", *options, "--folder", "a b"])
        stopped = flexi(*options, "--folder", "a b")
    assert stopped.exit_code == 130 and not list(tmp_path.glob("*/*.safetensors"))
    assert "stopped after 4 of 6 iterations, kept in a b/stages.checkpoint" in stopped.output
    assert f"to go on: flexi train-stages {' '.join(options)} --folder 'a b'" in stopped.output
    assert signal.getsignal(signal.SIGINT) is handler
    assert done(flexi(*options, "--folder", "a b", "--json"))["iterations"] == 6
    done(flexi(*options, "--folder", "whole", "--json"))
    for file in ("stages.safetensors", "base.safetensors"):
        one, other = (load_file(tmp_path / folder / file) for folder in ("a b", "whole"))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_log_has_lines_with_the_time_left(flexi, monkeypatch):
    monkeypatch.setattr(console, "_FIRST_LINE", 0.0)
    result = flexi(*SMALL, *CUTS, "--iterations", 2)
    assert result.exit_code == 0 and "training, loss by stage" in result.stderr and "s left: 50%" in result.stderr
