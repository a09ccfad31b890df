"""A U-Net from a file: what the format takes and refuses, and the search on it."""

from __future__ import annotations

import json
import math
import pickle

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from flexi_core import FlexiError, Schedule, load_schedule
from flexi_core.demo.model import training_sigmas
from flexi_core.run.run import FULL_DEPTH
from flexi_core.runtime.file_model import FileModel, parse_size
from flexi_core.runtime.sampling import SCHEDULERS, make_noise, sample
from flexi_core.runtime.unet import UNet
from flexi_core.runtime.unet_config import unet_arguments
from search_tools.backends.registry import open_backend
from search_tools.backends.teacher import TeacherSettings
from search_tools.backends.unet_file import UNetFileBackend
from search_tools.cli import app
from search_tools.commands.options import open_backend_of, open_chosen_backend

CONFIG = {
    "image_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "transformer_depth": [0, 1],
    "transformer_depth_output": [0, 0, 1, 1],
    "transformer_depth_middle": 1,
    "num_heads": 2,
    "context_dim": 8,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "legacy": False,
    "dtype": "torch.float16",
}
PLAIN = {"transformer_depth": [0, 0], "transformer_depth_output": [0] * 4, "transformer_depth_middle": -1, "context_dim": None}
BETAS = "linear 0.00085 0.012"


@pytest.fixture
def write(tmp_path):
    """A function that writes a U-Net's file with random weights and returns its path.

    write(config changes, classes=3, prediction="v", dtype=torch.float32, metadata={}, tensors={}); a None in `metadata` or
    `tensors` leaves that entry out.
    """

    def write(
        changes=None, *, classes=3, prediction="v", dtype=torch.float32, metadata=None, tensors=None, name="u.safetensors"
    ):
        config = {**CONFIG, **(changes or {})}
        unet = UNet(**unet_arguments(config))
        generator = torch.Generator().manual_seed(0)
        weights = {key: torch.randn(value.shape, generator=generator) * 0.1 for key, value in unet.state_dict().items()}
        if classes:
            weights["class_embedding.weight"] = torch.randn(classes + 1, config["context_dim"], generator=generator)
        weights = {key: value.to(dtype) for key, value in weights.items()} | (tensors or {})
        said = {"unet_config": json.dumps(config), "prediction": prediction, "beta_schedule": BETAS, **(metadata or {})}
        said = {key: value for key, value in said.items() if value is not None}
        save_file({key: value for key, value in weights.items() if value is not None}, tmp_path / name, metadata=said)
        return tmp_path / name

    return write


@pytest.fixture
def backend_of(tmp_path):
    """A function of (path, settings) that returns the back end of a file, with a teacher's store of its own."""
    return lambda path, size=None, **settings: UNetFileBackend(
        TeacherSettings(**{"steps": 5, **settings}), FileModel.load(path, size), tmp_path / "teacher"
    )


def test_a_file_loads_as_it_was_written(write):
    table = torch.randn(4, 8)
    model = FileModel.load(write(tensors={"class_embedding.weight": table}))
    again = UNet(**unet_arguments(CONFIG))
    again.load_state_dict(model.unet.state_dict())
    assert torch.equal(model.class_table, table) and model.classes == 3
    assert model.latent_shape == (4, 16, 16) and model.prediction == "v"
    assert torch.equal(model.sigmas, training_sigmas(BETAS))
    assert not model.unet.training and not any(value.requires_grad for value in model.unet.parameters())


def test_half_precision_is_the_rounded_weights_computed_with_in_float32(write):
    half = FileModel.load(write(dtype=torch.float16, name="half.safetensors"))
    rounded = {key: value.half().float() for key, value in FileModel.load(write()).unet.state_dict().items()}
    assert all(torch.equal(value, rounded[key]) for key, value in half.unet.state_dict().items())
    assert {value.dtype for value in half.unet.parameters()} == {torch.float32}
    assert half.precision == "float16"


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_names_as_in_a_checkpoint_of_the_host_are_read(write, prefix):
    path = write()
    model = FileModel.load(path)
    weights = {prefix + key: value.contiguous() for key, value in model.unet.state_dict().items()}
    prefixed = write(tensors={key: None for key in model.unet.state_dict()} | weights, name="prefixed.safetensors")
    assert all(torch.equal(v, model.unet.state_dict()[k]) for k, v in FileModel.load(prefixed).unet.state_dict().items())


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("timestep", [0, 400, 999])
def test_what_a_perfect_network_says_is_denoised_to_the_clean_latent(write, prediction, timestep):
    model = FileModel.load(write(prediction=prediction))
    sigma, x0, noise = model.sigmas[timestep].double(), *torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    output = noise if prediction == "eps" else (noise - sigma * x0) / (sigma**2 + 1).sqrt()
    torch.testing.assert_close(model.denoised(x0 + sigma * noise, sigma, output), x0)


@pytest.mark.parametrize(
    ("changes", "size", "shape"),
    [
        ({}, None, (4, 16, 16)),
        ({"in_channels": 12, "out_channels": 12, "image_size": 8}, None, (12, 8, 8)),
        ({"in_channels": 3, "out_channels": 3, "image_size": [8, 12]}, None, (3, 8, 12)),
        ({}, (9, 7), (4, 9, 7)),  # rounded up by the downsampling
    ],
)
def test_any_channel_count_and_size_is_sampled_with_every_kind_of_step(write, backend_of, changes, size, shape):
    backend = backend_of(write(changes), size, cfg=2.0)
    samples = backend.sample(Schedule.parse("FPX@1|FN"), 0, 2)
    assert samples.latents.shape == (2, *shape) and samples.latents.isfinite().all()
    assert samples.macs == pytest.approx(2 * 2 * (2 * backend.cost.full_macs + backend.cost.macs(1)))
    assert backend.features(samples.latents).shape == (2, 64)
    assert torch.equal(backend.pictures(samples.latents), samples.latents)
    assert backend.caption_accuracy(samples.latents, 0) is None
    assert backend.identity["size"] == list(shape[1:]) and backend.identity["channels"] == shape[0]


def test_the_files_own_size_stands_before_the_configurations_and_an_asked_one_before_both(write):
    path = write(metadata={"sample_size": "8 12"})
    assert FileModel.load(path).latent_shape == (4, 8, 12)
    assert FileModel.load(path, (10, 6)).latent_shape == (4, 10, 6)
    assert [parse_size(text) for text in ("8", "8 12", "8x12", "8X12")] == [(8, 8), (8, 12), (8, 12), (8, 12)]
    with pytest.raises(FlexiError, match="give one, --size"):
        FileModel.load(write({"image_size": None}))


def test_a_model_without_conditioning_is_called_once_for_each_sample(write, backend_of):
    model = FileModel.load(write(PLAIN, classes=0))
    _, run = sample(model, Schedule.parse("FF"), SCHEDULERS["normal"](model, 2), make_noise(0, 3, (4, 16, 16)), cfg=7.0)
    assert [dict(record.calls) for record in run.records] == [{FULL_DEPTH: 3}] * 2
    assert model.conditioning(None, 3) == (None, None)
    with pytest.raises(FlexiError, match=r"guidance scale of 3 is asked of a U-Net without conditioning; use 1"):
        backend_of(write(PLAIN, classes=0), cfg=3.0)
    assert backend_of(write(PLAIN, classes=0), cfg=1.0).prompts(0, 4) is None


def test_class_and_guidance_reach_the_sample(write):
    model = FileModel.load(write())

    def latents(labels, cfg):
        sigmas = SCHEDULERS["normal"](model, 2)
        return sample(model, Schedule.parse("FF"), sigmas, make_noise(0, 1, (4, 16, 16)), labels, cfg=cfg)[0]

    assert not torch.equal(latents([0], 2.0), latents([1], 2.0))
    assert not torch.equal(latents([0], 2.0), latents([0], 3.0))
    # The last row is "no class": guidance between it and itself is none.
    torch.testing.assert_close(latents([3], 5.0), latents([3], 1.0), rtol=1e-3, atol=1e-3)


def test_the_classes_of_the_first_samples_are_spread_over_all(write, backend_of):
    backend = backend_of(write(classes=24))
    labels = backend.prompts(0, 96)
    assert len(set(labels[:8])) == 8 and max(labels[:8]) - min(labels[:8]) > 16
    assert sorted(set(labels)) == list(range(24))
    assert backend.prompts(5, 3) == labels[5:8]


def test_a_sample_does_not_depend_on_the_samples_beside_it(write, backend_of):
    backend, schedule = backend_of(write(), cfg=2.0), Schedule.parse("FPX@1|FX")
    together, alone = backend.sample(schedule, 10, 4).latents, backend.sample(schedule, 12, 1).latents
    torch.testing.assert_close(together[2:3], alone, rtol=1e-4, atol=1e-4)
    other = backend.sample(schedule, 13, 1).latents
    assert not torch.allclose(alone, other, atol=1e-2)


def test_the_features_are_what_leaves_the_middle_block(write, backend_of):
    backend, seen = backend_of(write()), []
    latents = make_noise(0, 20, (4, 16, 16))  # more than one batch
    hook = backend.model.unet.middle_block.register_forward_hook(lambda module, args, out: seen.append(out.mean(dim=(2, 3))))
    features = backend.features(latents)
    hook.remove()
    assert torch.equal(features, torch.cat(seen)) and features.shape == (20, 64)
    assert features.std(dim=0).min() > 0


def test_the_same_teacher_opens_again_from_its_spec(write, backend_of):
    backend = backend_of(write(metadata={"sample_size": "8"}), cfg=2.0)
    spec = json.loads(json.dumps(backend.spec))
    assert open_backend(spec, backend.settings).identity == backend.identity
    small = backend_of(write(), (6, 6), cfg=2.0)
    assert open_backend(small.spec, small.settings).identity["size"] == [6, 6]


@pytest.mark.parametrize(
    "change",
    [
        {"prediction": "eps"},
        {"metadata": {"beta_schedule": "linear 0.001 0.012"}},
        {"dtype": torch.float16},
        {"tensors": {"class_embedding.weight": torch.zeros(4, 8)}},
        {"tensors": {"out.2.bias": torch.ones(4)}},
    ],
    ids=str,
)
def test_another_teacher_has_another_identity(write, backend_of, change):
    one, other = backend_of(write()), backend_of(write(**change, name="other.safetensors"))
    assert one.identity != other.identity


def test_attention_resolutions_stand_for_lists_of_depths_as_in_the_host():
    lists = {"num_res_blocks": [2, 1, 1], "channel_mult": [1, 2, 2], "transformer_depth": [0, 0, 2, 2],
             "transformer_depth_output": [0, 0, 0, 2, 2, 2, 2], "transformer_depth_middle": 2}  # fmt: skip
    short = {**CONFIG, **lists, "transformer_depth": 2, "attention_resolutions": [2, 4]}
    del short["transformer_depth_middle"], short["transformer_depth_output"]
    assert unet_arguments(short) == unet_arguments({**CONFIG, **lists})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 3}, "unet_config has 'width', which is no argument of the host's UNetModel"),
        ({"resblock_updown": True}, "resblock_updown = True; this runtime has nothing but False"),
        ({"num_classes": "sequential"}, "num_classes = 'sequential'"),
        ({"disable_self_attentions": [True, False]}, "disable_self_attentions"),
        ({"dims": 3}, "dims = 3"),
        ({"transformer_depth": None}, "unet_config lacks transformer_depth; give the arguments"),
        ({"transformer_depth": [0]}, "1 values for transformer_depth; its levels and blocks need 2"),
        ({"transformer_depth": "01"}, "transformer_depth = '01'; expected a list of whole numbers"),
        ({"channel_mult": [1, 1.5]}, r"channel_mult = \[1, 1.5\]"),
        ({"channel_mult": 2}, "channel_mult = 2"),
        ({"channel_mult": [2, 2]}, "its first value has to be 1"),
        ({"model_channels": 48}, "a multiple of 32"),
        ({"out_channels": 8}, "in_channels = 4 and out_channels = 8"),
        ({"context_dim": None}, "transformers and context_dim = None"),
        ({"num_heads": -1}, "neither num_heads nor num_head_channels"),
        ({"num_heads": 5}, "64 channels, which its attention heads do not divide"),
        ({"transformer_depth_middle": -2}, "no middle block"),
        ({"attention_resolutions": 2}, "attention_resolutions, which needs num_res_blocks"),
        ({"attention_resolutions": [1], "transformer_depth": [1]}, "give one for each level"),
    ],
)
def test_an_argument_that_the_runtime_cannot_honour_is_named(changes, message):
    with pytest.raises(FlexiError, match=message):
        unet_arguments({**CONFIG, **changes})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"metadata": {"prediction": None, "beta_schedule": None}},
            "metadata lack prediction, beta_schedule; docs/guide/unet-file.md",
        ),
        ({"prediction": "x0"}, "the prediction is 'x0'; known: eps, v"),
        ({"metadata": {"beta_schedule": "cosine"}}, "beta_schedule is 'cosine'; expected `linear START END`"),
        ({"metadata": {"beta_schedule": "linear 0.1 a"}}, "expected `linear START END`"),
        ({"metadata": {"beta_schedule": "linear 0.5 1.5"}}, "expected `linear START END`"),
        ({"metadata": {"unet_config": "{"}}, "unet_config is not JSON"),
        ({"metadata": {"unet_config": "[1]"}}, "unet_config is list; expected an object"),
        ({"metadata": {"sample_size": "0"}}, "the size is '0'; expected S or HxW"),
        ({"tensors": {"out.2.bias": None}}, "it lacks out.2.bias"),
        ({"tensors": {"conv_in.weight": torch.zeros(1)}}, "it has conv_in.weight, which its unet_config does not"),
        ({"tensors": {"out.2.bias": torch.zeros(5)}}, r"out.2.bias has shape \(5,\); its unet_config asks for \(4,\)"),
        ({"tensors": {"class_embedding.weight": torch.zeros(4, 9)}}, r"has shape \(4, 9\); expected \(classes \+ 1, 8\)"),
        ({"tensors": {"class_embedding.weight": torch.zeros(8)}}, r"has shape \(8,\)"),
        ({"classes": 0}, "cross-attention to tokens of width 8 and no class_embedding.weight"),
        (
            {"changes": PLAIN, "classes": 0, "tensors": {"class_embedding.weight": torch.zeros(4, 8)}},
            "no transformer that takes",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_is_not_in_the_format_is_refused_in_one_sentence(write, change, message):
    path = write(**change)
    with pytest.raises(FlexiError, match=message) as refused:
        FileModel.load(path)
    assert str(refused.value).startswith(f"{path}: ") and "\n" not in str(refused.value)


def test_what_is_no_safetensors_file_is_not_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    (tmp_path / "model.ckpt").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(FlexiError, match=r"not a safetensors file .* a pickled checkpoint .* is not opened"):
        FileModel.load(tmp_path / "model.ckpt")
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(FlexiError, match="there is no such file"):
        FileModel.load(tmp_path / "none.safetensors")


@pytest.fixture
def flexi(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLEXI_CACHE", str(tmp_path / "cache"))
    return lambda *args: CliRunner().invoke(app, [str(a) for a in args])


SEARCH = ["search", "--steps", "5", "--speedup", "2", "--samples", "16", "--evaluations", "3", "--finalists", "1"]


def test_a_whole_search_on_a_file(flexi, write, tmp_path):
    path = write(metadata={"sample_size": "8"})
    found = flexi(*SEARCH, "--out", "s.json", "--json", "--unet", path, "--cfg", 2)
    assert found.exit_code == 0, found.output
    result, schedule = json.loads(found.stdout), load_schedule(tmp_path / "s.json")
    assert result["candidates"] == 3 and math.isfinite(result["judged"]["rfid"])
    teacher, model = schedule.info["teacher"], FileModel.load(path)
    assert teacher["model"] == "unet" and teacher["cfg"] == 2 and teacher["size"] == [8, 8]
    assert teacher["prediction"] == "v" and teacher["beta_schedule"] == BETAS and teacher["classes"] == 3
    assert teacher["weights"] == UNetFileBackend(TeacherSettings(), model, tmp_path).identity["weights"]
    assert schedule.info["measured"]["features"] == "the teacher's middle block"
    again = flexi(*SEARCH, "--out", "s.json", "--json", "--unet", path, "--cfg", 2)
    assert json.loads(again.stdout)["schedule"] == result["schedule"], "the finished study gives its result again"


def test_a_file_without_conditioning_is_searched_without_guidance(flexi, write, tmp_path):
    path = write(PLAIN, classes=0)
    found = flexi(*SEARCH, "--out", "s.json", "--json", "--unet", path, "--size", "6x8")
    assert found.exit_code == 0, found.output
    teacher = load_schedule(tmp_path / "s.json").info["teacher"]
    assert teacher["cfg"] == 1 and teacher["size"] == [6, 8] and teacher["classes"] == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--unet", "none.safetensors"), "none.safetensors: there is no such file"),
        (("--size", "8"), "--size goes with --unet"),
        (("--unet", "u.safetensors", "--size", "8x"), "the size is '8x'"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(flexi, write, args, message):
    write()
    refused = flexi(*SEARCH, "--out", "s.json", "--json", *args)
    assert refused.exit_code == 2 and message in refused.stderr and "Traceback" not in refused.output


def test_the_run_of_a_schedule_file_opens_again_with_the_unets_file(write, tmp_path):
    path = write()
    made = open_chosen_backend("dpmpp_2m", "karras", 4, 2.0, unet=path, size="6x8")
    opened = open_backend_of(made.identity, tmp_path / "s.json", path)
    assert opened.identity == made.identity and opened.spec == made.spec
    embedded = open_backend_of({"model": "embedded", "sampler": "euler", "scheduler": "normal", "steps": 4, "cfg": 3.0}, path)
    assert embedded.identity["model"] == "embedded"


@pytest.mark.parametrize(
    ("teacher", "unet", "message"),
    [
        ({"model": "unet"}, False, "s.json: made for a U-Net in a file; give that file, --unet"),
        ({"model": "embedded"}, True, "s.json: made for the embedded model; leave --unet out"),
        ({"model": "sd15"}, True, "s.json: made for sd15; one for the embedded model or for --unet"),
        ({}, False, "s.json: made for an unnamed model"),
        ({"model": "unet", "steps": 4, "cfg": 1.0}, True, "s.json: its teacher lacks sampler, scheduler"),
    ],
)
def test_a_schedule_file_of_another_kind_of_run_is_refused(write, teacher, unet, message):
    with pytest.raises(FlexiError, match=message):
        open_backend_of(teacher, "s.json", write() if unet else None)
