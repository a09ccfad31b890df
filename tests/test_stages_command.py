"""`flexi stages` as a user meets it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from flexi_core.demo.model import training_sigmas
from search_tools.cli import app
from search_tools.noise_stages import NoiseLevels

SMALL = ["--levels", "9", "--samples", "4"]


@pytest.fixture
def flexi(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(app, ["stages", *(str(a) for a in args)])


def answer(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_scenes_give_boundaries_in_every_unit_and_a_picture(flexi, tmp_path):
    args = ["--data", 300, *SMALL, "--steps", 20, "--picture", "cuts.png"]
    found = answer(flexi(*args, "--json"))
    assert answer(flexi(*args, "--json")) == found, "the second time is the first"
    first, second = found["boundaries"]
    assert found["sigmas"][0] > first["sigma"] > second["sigma"] > found["sigmas"][-1]
    assert 1 > first["timestep"] > second["timestep"] > 0
    assert 0 < first["steps"] <= second["steps"] < 20 and first["share"] == first["steps"] / 20
    assert np.shape(found["similarity"]) == (9, 9)
    with Image.open(tmp_path / "cuts.png") as image:
        assert image.width > 500
    shown = flexi(*args)
    assert shown.exit_code == 0 and "after step" in shown.stdout and f"{first['sigma']:.4g}" in shown.stdout


@pytest.mark.parametrize("by", ["network", "run"])
def test_the_forms_without_data_need_none(flexi, by):
    found = answer(flexi("--by", by, "--levels", 7, "--samples", 1, "--stages", 2, "--json"))
    assert len(found["boundaries"]) == 1 and found["thresholds"] == []
    similarity = np.array(found["similarity"])
    assert (np.diag(similarity) == 1).all() and (similarity == similarity.T).all() and similarity.min() < 0.9


def test_folders_of_pictures_and_of_latents_are_read(flexi, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("pictures", "latents", "mixed"):
        (tmp_path / name).mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
    save_file({"a": torch.randn(5, 4, 4, 4)}, tmp_path / "latents" / "a.safetensors")
    save_file(
        {"latent_tensor": torch.randn(1, 4, 4, 4), "latent_format_version_0": torch.tensor([])},
        tmp_path / "latents" / "b.latent",
    )
    for folder in ("pictures", "latents"):
        assert len(answer(flexi(folder, *SMALL, "--size", 16, "--json"))["boundaries"]) == 2
    save_file({"a": torch.randn(5, 4, 4, 4)}, tmp_path / "mixed" / "a.safetensors")
    save_file({"a": torch.randn(5, 4, 8, 8)}, tmp_path / "mixed" / "b.safetensors")
    wrong = flexi("mixed", *SMALL)
    assert wrong.exit_code == 2 and "latents of shape [4, 8, 8], those before are [4, 4, 4]" in wrong.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["--stages", 9, "--levels", 5], "5 levels cannot be divided into 9 stages"),
        (["--by", "run", "--flow", 3], "--flow goes with --by data"),
        (["--picture", "cuts.gif"], "expected a name that ends in .png or .svg"),
    ],
)
def test_bad_input_is_one_line(flexi, args, message):
    result = flexi(*args, "--data", 10, "--samples", 2)
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output


def test_the_objective_as_published_is_said_to_cut_slivers(flexi):
    result = flexi("--data", 300, *SMALL, "--published")
    assert result.exit_code == 0 and "slivers at the ends" in result.output
    assert "slivers" not in flexi("--data", 300, *SMALL).output


def test_noise_levels_are_counted_as_their_models_do():
    eps, flow = NoiseLevels(training_sigmas("linear 0.00085 0.012")), NoiseLevels(shift=3.0)
    for levels in (eps, flow):
        grid = levels.grid(11)
        assert len(grid) == 11 and grid == sorted(grid, reverse=True) and grid[-1] > 0
        counted = [levels.counted(level) for level in grid]
        assert [time for _, time in counted] == sorted((time for _, time in counted), reverse=True)
    assert [round(eps.counted(level)[1], 3) for level in eps.grid(11)] == pytest.approx(
        [1 - i / 10 for i in range(11)], abs=2e-3
    )
    own = 3 * 0.5 / (1 + 2 * 0.5)
    assert flow.counted(own / (1 - own)) == pytest.approx((own, own))
    assert flow.run("simple", 4)[0] == math.inf and flow.counted(flow.run("simple", 4)[2])[0] == pytest.approx(own)
