"""What reads pictures and what they are compared with: networks from files, folders of images, the table of measures."""

from __future__ import annotations

import json
import math
import pickle

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from flexi_core import FlexiError, Schedule, save_schedule
from flexi_core.metrics import frechet_distance, precision, recall
from flexi_core.runtime.unet import UNet
from flexi_core.runtime.unet_config import unet_arguments
from search_tools.backends.embedded import EmbeddedBackend
from search_tools.backends.teacher import JUDGE_SEEDS, TeacherSettings
from search_tools.cli import app
from search_tools.measures.features import InceptionFeatures, Lpips, class_probabilities, load_weights
from search_tools.measures.judge import Judge
from search_tools.measures.measures import Measures
from search_tools.measures.references import folder_images, scenes


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    return EmbeddedBackend(TeacherSettings(steps=4), tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def judge(backend):
    return Judge(backend, 6, measure=lambda teacher: Measures(backend, teacher))


def save_scene(scene: torch.Tensor, path) -> None:
    Image.fromarray(((scene + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).save(path)


def importable(name: str) -> object:
    try:
        return pytest.importorskip(name, exc_type=ImportError)
    except (RuntimeError, OSError) as error:  # a torchvision that was built for another torch
        pytest.skip(f"{name} cannot be imported: {error}")


def test_scenes_are_their_seeds_and_a_longer_set_begins_with_a_shorter():
    assert torch.equal(scenes(300)[:256], scenes(256))
    assert not torch.equal(scenes(4), scenes(4, seed=1))


def test_a_folder_gives_its_pictures_in_order_and_leaves_other_files_alone(tmp_path):
    wanted = scenes(3)
    for i, scene in enumerate(wanted):
        save_scene(scene, tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    torch.testing.assert_close(folder_images(tmp_path, 32, 32), wanted, atol=1 / 127, rtol=0)


def test_a_picture_of_another_shape_is_cropped_in_its_middle_and_resized(tmp_path):
    wide = Image.new("RGB", (128, 64), "black")
    wide.paste("white", (32, 0, 96, 64))
    for name in ("a.png", "b.JPG"):
        wide.save(tmp_path / name)
    images = folder_images(tmp_path, 16, 16)
    assert images.shape == (2, 3, 16, 16) and float(images.min()) > 0.8


@pytest.mark.parametrize(("files", "message"), [([], "0 pictures"), (["a.png", "b.png"], "b.png: cannot be read as a picture")])
def test_a_folder_that_holds_no_set_of_pictures_is_refused(tmp_path, files, message):
    for name in files:
        save_scene(scenes(1)[0], tmp_path / name)
    if files:
        (tmp_path / files[-1]).write_bytes(b"no picture")
    with pytest.raises(FlexiError, match=message):
        folder_images(tmp_path, 32, 32)
    with pytest.raises(FlexiError, match="no such folder"):
        folder_images(tmp_path / "missing", 32, 32)


def test_weights_are_read_from_safetensors_and_state_dicts_alike(tmp_path):
    state = {"a": torch.arange(3.0)}
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        assert torch.equal(load_weights(tmp_path / name)["a"], state["a"])


class _Harm:
    def __reduce__(self):
        return (open, ("harm.txt", "w"))


def test_nothing_in_a_weights_file_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": _Harm()}, tmp_path / "w.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"a": _Harm()}))
    for name in ("w.pth", "plain.pth"):
        with pytest.raises(FlexiError, match="not a plain file of tensors"):
            load_weights(tmp_path / name)
    assert not (tmp_path / "harm.txt").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.pth", None, "cannot be read"),
        ("w.safetensors", b"1234", "cannot be read"),
        ("w.pth", [1, 2], "holds list; expected a state dict"),
    ],
)
def test_a_file_without_tensors_is_refused(tmp_path, name, content, message):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / name)
    with pytest.raises(FlexiError, match=message):
        load_weights(tmp_path / name)


@pytest.mark.parametrize(
    ("package", "make"), [("torch_fidelity", lambda p: InceptionFeatures(p, lambda x: x)), ("lpips", Lpips)]
)
def test_a_package_that_is_not_there_is_named_with_what_to_install(tmp_path, package, make):
    try:
        __import__(package)
    except (ImportError, RuntimeError, OSError):
        with pytest.raises(FlexiError, match=r"cannot be imported .*; install the extra `perceptual`"):
            make(tmp_path / "w.pth")
    else:
        pytest.skip(f"{package} is there")


def test_inception_refuses_other_weights(tmp_path):
    importable("torch_fidelity")
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(FlexiError, match="not the weights of torch-fidelity's Inception"):
        InceptionFeatures(tmp_path / "w.pth", lambda x: x)


def test_lpips_of_equal_pictures_is_0_and_of_others_is_not(tmp_path):
    importable("lpips")
    from torchvision.models import alexnet

    torch.save(alexnet().state_dict(), tmp_path / "w.pth")
    network, pictures = Lpips(tmp_path / "w.pth"), scenes(20)
    assert (network(pictures, pictures) == 0).all() and (network(pictures, pictures.flip(0)) > 0).any()
    with pytest.raises(FlexiError, match="at least 32 pixels"):
        network(pictures[..., :16], pictures[..., :16])


def test_the_classifier_tells_five_attributes_apart_and_unknown_features_none(backend):
    probabilities = class_probabilities(backend.features, scenes(6))
    assert [p.shape[1] for p in probabilities] == [2, 6, 4, 9, 5]
    assert all(torch.allclose(p.sum(1), torch.ones(6)) for p in probabilities)
    assert class_probabilities(lambda latents: latents, scenes(1)) is None


def test_every_measure_has_its_samples_and_an_interval_around_it(judge):
    row, _ = judge.judge("half", Schedule.parse("2*(FX)"))
    assert row.measures.keys() == {
        "psnr_db", "ssim", "rfid", "precision", "recall", "inception_score", "caption_accuracy",
    }  # fmt: skip
    for measure in row.measures.values():
        assert measure.samples == 6 and measure.by
        assert measure.low - 1e-9 <= measure.value <= measure.high + 1e-9
    assert row.measures["psnr_db"].value == row.psnr_db and row.measures["rfid"].value == row.rfid
    assert judge.measures.not_measured.keys() == {"fid", "lpips"}


def test_the_teacher_is_its_own_equal(judge):
    measures = judge.teacher_row.measures
    assert math.isinf(measures["psnr_db"].value) and measures["precision"].value == measures["recall"].value == 1
    assert measures["rfid"].value == pytest.approx(0, abs=1e-9)
    assert judge.teacher_row.as_dict()["measures"]["psnr_db"]["value"] is None


def test_a_judge_that_is_not_asked_measures_nothing_else(backend):
    assert "measures" not in Judge(backend, 2).teacher_row.as_dict()


def test_given_images_take_the_teachers_place_for_fid_precision_and_recall(backend, tmp_path):
    for i, scene in enumerate(scenes(8)):
        save_scene(scene, tmp_path / f"{i}.png")
    teacher = backend.teacher(JUDGE_SEEDS, 5)
    found = Measures(backend, teacher, images=str(tmp_path))(teacher, JUDGE_SEEDS)
    features, reference = backend.features(teacher), backend.features(folder_images(tmp_path, 32, 32))
    assert found["fid"].value == pytest.approx(frechet_distance(features, reference))
    assert found["precision"].value == pytest.approx(precision(features, reference))
    assert found["recall"].value == pytest.approx(recall(features, reference))
    assert found["recall"].samples == 8 and "8 given images" in found["fid"].by


def test_features_of_latents_are_not_compared_with_pictures(backend):
    class Latents:
        name = "a U-Net of four channels"

        def __call__(self, latents):
            return latents.flatten(1)

    class Decoded:
        features = Latents()

        def pictures(self, latents):
            return latents[:, :3]

    with pytest.raises(FlexiError, match=r"reads latents of shape .*; give --inception-weights"):
        Measures(Decoded(), torch.randn(4, 4, 32, 32), images="scenes")


@pytest.fixture
def flexi(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLEXI_CACHE", str(tmp_path / "cache"))
    teacher = {"model": "embedded", "sampler": "euler", "scheduler": "normal", "steps": 4, "cfg": 3.0}
    save_schedule(Schedule.parse("FXFX").with_info(teacher=teacher), tmp_path / "s.json")
    return lambda *args: CliRunner().invoke(app, [str(a) for a in args])


def test_evaluate_prints_every_measure_within_80_columns(flexi, tmp_path):
    (tmp_path / "images").mkdir()
    for i, scene in enumerate(scenes(5)):
        save_scene(scene, tmp_path / "images" / f"{i}.png")
    result = flexi("evaluate", "s.json", "--samples", 4, "--images", "images", "--all")
    assert result.exit_code == 0, result.output
    tables = result.stdout[: result.stdout.index("FID, precision, recall: ")]
    assert max(map(len, tables.splitlines())) <= 80
    assert {"FID", "precision", "recall", "IS"} <= set(tables.split())
    assert "lpips: not measured: no weights; give --lpips-weights" in result.stdout


def test_evaluate_says_in_json_what_was_not_measured_and_why(flexi, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pth")
    result = flexi("evaluate", "s.json", "--samples", 2, "--lpips-weights", "w.pth", "--json")
    assert result.exit_code == 0, result.output
    reasons = json.loads(result.stdout)["not_measured"]
    assert reasons["precision, recall"] == "2 samples; they need at least 4"
    assert "lpips" in reasons["lpips"] or "AlexNet" in reasons["lpips"]


def test_evaluate_judges_a_schedule_for_a_unet_in_a_file_by_what_that_model_offers(flexi, tmp_path):
    config = {"in_channels": 3, "out_channels": 3, "image_size": 16, "num_res_blocks": 1, "model_channels": 32,
              "channel_mult": [1, 1], "num_heads": 2, "context_dim": None, "transformer_depth": [0, 0],
              "transformer_depth_output": [0] * 4, "transformer_depth_middle": -1}  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    shapes = UNet(**unet_arguments(config)).state_dict()
    weights = {key: torch.randn(value.shape, generator=generator) * 0.1 for key, value in shapes.items()}
    metadata = {"unet_config": json.dumps(config), "prediction": "eps", "beta_schedule": "linear 0.00085 0.012"}
    save_file(weights, tmp_path / "u.safetensors", metadata=metadata)
    teacher = {"model": "unet", "sampler": "euler", "scheduler": "normal", "steps": 4, "cfg": 1.0, "weights": "sha256:0"}
    save_schedule(Schedule.parse("FXFX").with_info(teacher=teacher), tmp_path / "u.json")
    result = flexi("evaluate", "u.json", "--unet", "u.safetensors", "--samples", 4, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["rows"][1]["measures"]["recall"]["samples"] == 4
    assert {"caption_accuracy", "inception_score"} <= printed["not_measured"].keys()
    assert "u.json: made for other weights than this run has" in result.stderr


def test_evaluate_refuses_a_model_that_the_file_was_not_made_for(flexi, tmp_path):
    teacher = {"model": "unet", "sampler": "euler", "scheduler": "normal", "steps": 4, "cfg": 3.0}
    save_schedule(Schedule.parse("FXFX").with_info(teacher=teacher), tmp_path / "u.json")
    result = flexi("evaluate", "u.json")
    assert result.exit_code == 2 and "u.json: made for a U-Net in a file; give that file, --unet" in result.stderr
    sized = flexi("evaluate", "s.json", "--size", "64x64")
    assert sized.exit_code == 2 and "--size goes with --checkpoint" in sized.stderr
