"""The search on runs of the host: workflows executed and sampled by the host itself, on small generated models."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from flexi_core import FlexiError, Schedule, load_schedule
from flexi_core.demo.scenes import captions_of
from flexi_core.run.cost import schedule_cost
from flexi_core.run.replay import PredictionStore
from flexi_core.tune import Tuner
from search_tools.cli import app
from search_tools.deadline import TooSlow
from search_tools.space.space import Space
from search_tools.strategies.guesses import with_guesses

CAPTION = "a large red circle at the center on a navy background"
STEPS = 6
SIZE = 16  # pixels of the embedded model's pictures: it takes any, and the laws hold at the smallest
MIXED = Schedule.parse("FP@2|FPX@3|F")
SHORT = ("--speedup", 2, "--samples", 16, "--evaluations", 1, "--finalists", 0, "--no-move", "--json")  # of a search

# A pack of the user's: conditioning without a text encoder, a small model that the host types as SDXL, nodes that fail.
PACK_FOR_TESTS = """
import zlib
import comfy.model_patcher
import comfy.supported_models
import torch

SDXL = {"image_size": 32, "in_channels": 4, "out_channels": 4, "context_dim": 32, "channel_mult": [1, 2],
        "num_res_blocks": [1, 1], "transformer_depth": [0, 1], "transformer_depth_output": [0, 0, 1, 1],
        "transformer_depth_middle": 1, "use_spatial_transformer": True, "use_temporal_attention": False, "legacy": False,
        "dtype": torch.float32, "model_channels": 64, "use_linear_in_transformer": True, "num_classes": "sequential",
        "adm_in_channels": 2816}


class Words:
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "encode", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING", {}), "width": ("INT", {"default": 768})}}

    def encode(self, text, width):
        rng = torch.Generator().manual_seed(zlib.crc32(text.encode()))
        pooled = torch.randn(1, 1280, generator=rng)
        return ([[torch.randn(1, 8, width, generator=rng), {"pooled_output": pooled}]],)


class SmallSdxl:
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "load", "test"
    TYPE, NETWORK = "SDXL", SDXL

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}, "optional": {"seed": ("INT", {"default": 0})}}

    def load(self, seed=0):
        config, cpu = getattr(comfy.supported_models, self.TYPE)(self.NETWORK), torch.device("cpu")
        inner = config.get_model({}, device=cpu)
        rng = torch.Generator().manual_seed(seed)
        for name, value in inner.diffusion_model.named_parameters():
            drawn = torch.randn(value.shape, generator=rng)
            value.data.copy_(drawn * value[0].numel() ** -0.5 if value.ndim > 1 else drawn * 0.1 + name.endswith("weight"))
        return (comfy.model_patcher.ModelPatcher(inner.eval(), load_device=cpu, offload_device=cpu),)


class SmallLtx(SmallSdxl):
    TYPE = "LTXAV"
    NETWORK = {"num_layers": 4, "attention_head_dim": 32, "num_attention_heads": 2, "cross_attention_dim": 64,
               "audio_attention_head_dim": 16, "audio_num_attention_heads": 2, "audio_cross_attention_dim": 32,
               "caption_channels": 32, "connector_attention_head_dim": 16, "connector_num_attention_heads": 2,
               "dtype": torch.float32}


class SmallWan(SmallSdxl):
    TYPE = "WAN21_T2V"
    NETWORK = {"dim": 64, "ffn_dim": 128, "freq_dim": 64, "text_dim": 32, "num_heads": 2, "num_layers": 4, "model_type": "t2v",
               "dtype": torch.float32}


class PicturesAndSound:
    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def make(self):
        from comfy.nested_tensor import NestedTensor

        return ({"samples": NestedTensor([torch.zeros(1, 128, 2, 4, 4), torch.zeros(1, 8, 6, 16)])},)


class Broken(Words):
    def encode(self, text, width):
        raise (KeyboardInterrupt if text == "Ctrl-C" else RuntimeError)("the words\\nare out")


class Lora:
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "patch", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "strength": ("FLOAT", {})}}

    def patch(self, model, strength):
        model, key = model.clone(), "diffusion_model.output_blocks.5.0.in_layers.2.weight"
        model.add_patches({key: ("diff", (torch.ones_like(model.model.state_dict()[key]),))}, strength)
        return (model,)


NODE_CLASS_MAPPINGS = {"TestLora": Lora, "TestWords": Words, "TestSmallSdxl": SmallSdxl, "TestBroken": Broken,
                       "TestSmallLtx": SmallLtx, "TestSmallWan": SmallWan, "TestPicturesAndSound": PicturesAndSound}
"""


def a_node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def sampled(model, words, latent, kind="KSampler", **values):
    """Return a workflow: what makes the model, the conditionings and the latent, and a sampling node of a kind, node 5."""
    graph = {"1": model, "2": words(CAPTION), "3": words(""), "4": latent}
    both = {"positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0]}
    settings = {"steps": STEPS, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal"}
    if kind == "KSampler":
        graph["5"] = a_node(kind, model=["1", 0], **both, **{**settings, "seed": 99, "denoise": 1.0, **values})
    elif kind == "KSamplerAdvanced":
        window = {"start_at_step": 0, "end_at_step": 10000, "add_noise": "enable", "return_with_leftover_noise": "disable"}
        graph["5"] = a_node(kind, model=["1", 0], **both, **{**settings, "noise_seed": 99, **window, **values})
    else:
        graph["6"] = a_node("KSamplerSelect", sampler_name=values.get("sampler_name", "euler"))
        graph["7"] = a_node("BasicScheduler", model=["1", 0], scheduler="normal", steps=STEPS, denoise=1.0)
        custom = {"sampler": ["6", 0], "sigmas": ["7", 0], "latent_image": ["4", 0]}
        if kind == "SamplerCustom":
            graph["5"] = a_node(kind, model=["1", 0], add_noise=True, noise_seed=99, cfg=3.0, **{**both, **custom})
        else:
            graph["8"] = a_node("CFGGuider", model=["1", 0], positive=["2", 0], negative=["3", 0], cfg=3.0)
            graph["9"] = a_node("RandomNoise", noise_seed=99)
            graph["5"] = a_node(kind, noise=["9", 0], guider=["8", 0], **custom)
    return graph


def demo(kind="KSampler", size=SIZE, **values):
    """Return the embedded model's workflow, decoded in node 11."""
    latent = a_node("EmptyChromaRadianceLatentImage", width=size, height=size, batch_size=2)
    words = lambda text: a_node("FlexiDemoPrompt", caption=text)  # noqa: E731 (a value)
    graph = sampled(a_node("FlexiDemoModel"), words, latent, kind, **values)
    graph["10"] = a_node("VAELoader", vae_name="pixel_space")
    graph["11"] = a_node("VAEDecode", samples=["5", 0], vae=["10", 0])
    graph["12"] = a_node("SaveImage", images=["11", 0], filename_prefix="never written")
    return graph


def four_channels(model, width, kind="KSampler", **values):
    words = lambda text: a_node("TestWords", text=text, width=width)  # noqa: E731 (a value)
    return sampled(model, words, a_node("EmptyLatentImage", width=64, height=64, batch_size=1), kind, **values)


def sd15(**values):
    return four_channels(a_node("UNETLoader", unet_name="sd15.safetensors", weight_dtype="default"), 768, **values)


def sdxl(**values):
    return four_channels(a_node("TestSmallSdxl"), 32, **values)


@pytest.fixture(scope="module")
def base(host, pack):
    """The base directory with the tests' own pack; the host loads it when the first back end is opened."""
    (host.base / "custom_nodes" / "for_tests.py").write_text(PACK_FOR_TESTS, encoding="utf-8")
    return host.base


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def opened(base, checkout, cache):
    """A function that returns the back end of a workflow."""
    from search_tools.backends.comfyui.backend import ComfyBackend

    return lambda graph, **options: ComfyBackend(str(checkout), graph, base_directory=str(base), store_folder=cache, **options)


@pytest.fixture(scope="module")
def plain(opened):
    return opened(demo())


@pytest.fixture
def flexi(base, checkout, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLEXI_CACHE", str(tmp_path / "cache"))
    where = ["--comfyui", str(checkout), "--base-directory", str(base)]

    def run(graph, *args):
        (tmp_path / "my graph.json").write_text(graph if isinstance(graph, str) else json.dumps(graph), encoding="utf-8")
        return CliRunner().invoke(app, ["search", *where, "--workflow", "my graph.json", *map(str, args)])

    return run


@pytest.fixture(scope="module")
def unet_file(host, base, generated):
    """A U-Net's file in models/diffusion_models that the host types as SD1.5."""
    import comfy.supported_models

    config = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "context_dim": 768,
              "channel_mult": [1, 1], "num_res_blocks": [1, 1], "transformer_depth": [1, 1], "transformer_depth_middle": 1,
              "transformer_depth_output": [1, 1, 1, 1], "use_spatial_transformer": True, "use_temporal_attention": False,
              "use_linear_in_transformer": False, "adm_in_channels": None, "legacy": False, "dtype": torch.float32}  # fmt: skip
    inner = comfy.supported_models.SD15(config).get_model({}, device=torch.device("cpu"))
    path = base / "models" / "diffusion_models" / "sd15.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(generated(inner.diffusion_model).state_dict()), path)
    return path


def by_ksampler(host, model, seed, positive=CAPTION, sampler="euler", **options):
    """Return the latent of core's own KSampler function on the embedded model."""
    import nodes

    prompts = (host.adapter.demo_conditioning(text) for text in (positive, ""))
    latent = {"samples": torch.zeros(1, 3, SIZE, SIZE)}
    with torch.inference_mode():
        return nodes.common_ksampler(model, seed, STEPS, 3.0, sampler, "normal", *prompts, latent, **options)[0]["samples"]


def test_teacher_is_the_sampling_node_bit_for_bit(host, plain):
    teacher = plain.teacher(7, 2)
    for i in range(2):
        assert torch.equal(teacher[i : i + 1], by_ksampler(host, host.adapter.load_demo_model(), 7 + i))


def test_candidate_is_what_the_node_makes_of_the_schedule(host, node, plain):
    (schedule,) = node("FlexiSchedule").execute(str(MIXED)).args
    patched, _ = node("FlexiApply").execute(host.adapter.load_demo_model(), schedule, "map").args
    assert torch.equal(plain.sample(MIXED, 5, 1).latents, by_ksampler(host, patched, 5))


def test_prompts_are_taken_in_turn_and_agree_with_the_embedded_back_end(opened, cache):
    from search_tools.backends.embedded import EmbeddedBackend
    from search_tools.backends.teacher import TeacherSettings

    embedded = EmbeddedBackend(TeacherSettings("euler", "normal", STEPS, 3.0), cache)
    captions = [str(caption) for caption in captions_of(embedded.attributes(0, 2))]
    assert len(set(captions)) == 2
    backend = opened(demo(size=32), prompts=captions)
    for schedule in (Schedule.parse(f"{STEPS}*(F)"), MIXED):
        ours, theirs = backend.sample(schedule, 0, 2), embedded.sample(schedule, 0, 2)
        assert torch.allclose(ours.latents, theirs.latents, atol=2e-4)
        assert ours.macs == pytest.approx(theirs.macs, rel=1e-3)
    for key in ("architecture", "weights", "sampler", "scheduler", "steps", "cfg", "size"):
        assert backend.identity[key] == embedded.identity[key], key


def test_settings_sigmas_cost_and_identity_are_the_runs_own(host, plain):
    assert (plain.settings.sampler, plain.settings.scheduler, plain.settings.steps, plain.settings.cfg) == (
        "euler", "normal", STEPS, 3.0,
    )  # fmt: skip
    assert torch.equal(plain.sigmas, host.sigmas(host.adapter.load_demo_model(), "normal", STEPS))
    assert set(plain.cost.partial_macs) == {1, 2, 3, 4, 5}
    assert json.loads(json.dumps(plain.spec)) == plain.spec
    schedule = Schedule.parse("FXFXFX").with_info(teacher=plain.identity)
    patched, handle = host.adapter.apply_schedule(host.adapter.load_demo_model(), schedule, "refuse")
    by_ksampler(host, patched, 0)
    assert handle.report.notes == (), "the run that a file was made for is no other run"


def test_another_guidance_scale_or_size_is_said_refused_or_off(host, demo_model):
    schedule = Schedule.parse("4*(FX)").with_info(teacher={"cfg": 7.0, "size": [48, 64]})
    said = ["the guidance scale was 7, the run's is 3", "the latent was 64x48, the run's is 16x16"]
    sample = lambda model: host.sample(model, noise=host.noise(1, SIZE))  # noqa: E731 (short)
    mapped, handle = host.adapter.apply_schedule(demo_model, schedule)
    latent = sample(mapped)
    assert handle.report.notes == tuple(f"Made for another run: {words}." for words in said)
    assert torch.equal(latent, sample(host.adapter.apply_schedule(demo_model, Schedule.parse("4*(FX)"))[0]))
    with pytest.raises(FlexiError, match="; ".join(said)):
        sample(host.adapter.apply_schedule(demo_model, schedule, "refuse")[0])
    off, _ = host.adapter.apply_schedule(demo_model, schedule, "off")
    assert torch.equal(sample(off), sample(demo_model))


def test_spec_opens_the_same_back_end_again(plain, cache):
    from search_tools.settings import SearchSettings
    from search_tools.study.reopen import OwnHost, reopen

    kept = SearchSettings.of(plain, 2.0, 16).as_dict()
    stored = SearchSettings.from_dict(json.loads(json.dumps(kept)))
    with pytest.raises(FlexiError, match="give the folder of yours, --comfyui"):
        reopen(stored)
    own = OwnHost(*(value and Path(value) for value in (plain.spec["comfyui"], plain.spec["base_directory"])))
    foreign = {**stored.backend, "comfyui": "/of/another", "base_directory": "/of/another"}
    again = reopen(replace(stored, backend=foreign), own)
    assert again.identity == plain.identity and again.settings == plain.settings
    assert torch.equal(again.sample(MIXED, 3, 1).latents, plain.sample(MIXED, 3, 1).latents)


def test_another_prompt_is_another_teacher_and_another_seed_is_not(opened, plain):
    other = opened({**demo(), "2": a_node("FlexiDemoPrompt", caption="a small blue ring")})
    assert other.identity["workflow"] != plain.identity["workflow"]
    assert opened(demo(seed=1)).identity == plain.identity, "each sample has a seed of its own"


def test_run_with_a_lora_is_searched_with_it_and_known_again(host, opened):
    graph = {**demo(), "5": {**demo()["5"], "inputs": {**demo()["5"]["inputs"], "model": ["20", 0]}}}
    graph["20"] = a_node("TestLora", model=["1", 0], strength=0.05)
    backend = opened(graph)
    assert not torch.equal(backend.teacher(7, 1), opened(demo()).teacher(7, 1))
    schedule = Schedule.parse("FXFXFX").with_info(teacher=backend.identity)

    def notes(strength):
        model = host.adapter.load_demo_model()
        if strength:
            key = "diffusion_model.output_blocks.5.0.in_layers.2.weight"
            model.add_patches({key: ("diff", (torch.ones_like(model.model.state_dict()[key]),))}, strength)
        patched, handle = host.adapter.apply_schedule(model, schedule)
        by_ksampler(host, patched, 0)
        return handle.report.notes

    assert notes(0.05) == ()
    assert notes(0.1) == notes(0) == ("Made for another run: the network's weights are patched otherwise (a LoRA).",)


def test_pictures_are_decoded_and_features_are_the_networks_own(plain):
    latents = plain.teacher(7, 2)
    pictures = plain.pictures(latents)
    assert torch.allclose(pictures, latents.clamp(-1, 1), atol=1e-6)  # pixel space: decoding only clamps
    features = plain.features(latents)
    assert "middle block" in plain.features.name
    assert features.shape[0] == 2 and features.ndim == 2 and features.isfinite().all() and not torch.equal(*features)
    assert torch.allclose(plain.features(latents[1:]), features[1:], atol=1e-4)


@pytest.mark.parametrize("kind", ["KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced"])
def test_every_sampling_node_makes_the_same_run(opened, plain, kind):
    backend = opened(demo(kind))
    assert torch.allclose(backend.sigmas, plain.sigmas) and backend.settings == plain.settings
    assert torch.equal(backend.sample(MIXED, 4, 1).latents, plain.sample(MIXED, 4, 1).latents)
    shorter = backend.sample(Schedule.parse("3*(F)"), 4, 1, steps=3)
    assert shorter.macs == pytest.approx(3 * 2 * backend.cost.full_macs)


@pytest.mark.parametrize(("start", "end", "leftover"), [(0, 4, "enable"), (2, 10000, "disable")])
def test_window_of_steps_is_searched_as_it_is(host, opened, start, end, leftover):
    backend = opened(demo("KSamplerAdvanced", start_at_step=start, end_at_step=end, return_with_leftover_noise=leftover))
    whole = host.sigmas(host.adapter.load_demo_model(), "normal", STEPS)
    assert torch.equal(backend.sigmas, whole[start : end + 1]) and backend.settings.steps == 4
    options = {"start_step": start, "last_step": end, "force_full_denoise": leftover == "disable"}
    assert torch.equal(backend.teacher(1, 1), by_ksampler(host, host.adapter.load_demo_model(), 1, **options))
    shorter = backend.sample(Schedule.parse("FF"), 1, 1, steps=2)
    assert shorter.macs == pytest.approx(2 * 2 * backend.cost.full_macs) and shorter.latents.isfinite().all()


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "uni_pc", "dpmpp_2m_sde"])
def test_predictions_from_a_store_change_no_bit(opened, sampler):
    backend, store = opened(demo(sampler_name=sampler)), PredictionStore()
    spent = {}
    for text in ("6*(F)", str(MIXED), "FP@2|FPX@3|F", "FP@2|FXX|F"):
        schedule = Schedule.parse(text)
        without = backend.sample(schedule, 2, 1)
        kept = backend.sample(schedule, 2, 1, predictions=store)
        assert torch.equal(without.latents, kept.latents), text
        spent[text] = kept.macs, without.macs
    assert spent["FP@2|FXX|F"][0] < spent["FP@2|FXX|F"][1], "nothing was taken from the store"


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "dpmpp_sde"])
def test_blends_are_fitted_in_the_host_as_in_the_embedded_runtime(opened, backend_on, small_model, sampler):
    schedule = Schedule.parse("FXX|FXX")
    fitted, macs = opened(demo(sampler_name=sampler)).fit(schedule, 0, 1)
    if sampler in ("heun", "dpmpp_sde"):  # two evaluations a step
        assert fitted == schedule
        return
    from search_tools.backends.teacher import TeacherSettings

    embedded = backend_on(small_model, TeacherSettings(sampler, "normal", STEPS, 3.0))
    prompts = [str(caption) for caption in captions_of(embedded.attributes(0, 1))]
    fitted, _ = opened(demo(sampler_name=sampler), prompts=prompts).fit(schedule, 0, 1)
    ours = [factor for segment in fitted.segments for factor in segment.blend]
    theirs = [factor for segment in embedded.fit(schedule, 0, 1)[0].segments for factor in segment.blend]
    assert macs > 0 and ours == pytest.approx(theirs, abs=2e-2)


@pytest.mark.parametrize("reason", [KeyboardInterrupt(), TooSlow(0.5, 0.1, 3.0)], ids=["Ctrl-C", "no time"])
def test_a_run_that_is_broken_off_between_steps_leaves_the_back_end_as_it_was(plain, reason):
    def stop(done, total):
        if done >= 3:
            raise reason

    before = plain.sample(MIXED, 6, 1).latents
    with pytest.raises(type(reason)):
        plain.sample(MIXED, 6, 2, progress=stop)
    assert torch.equal(plain.sample(MIXED, 6, 1).latents, before)


def test_ctrl_c_in_a_node_stops_at_once_and_the_host_goes_on(opened):
    with pytest.raises(KeyboardInterrupt):
        opened({**sdxl(), "2": a_node("TestBroken", text="Ctrl-C", width=32)})
    assert opened(sdxl()).settings.steps == STEPS


def test_progress_counts_the_steps_of_all_samples(plain):
    seen = []
    plain.sample(Schedule.parse("6*(F)"), 0, 2, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (12, 12) and [done for done, _ in seen] == sorted(done for done, _ in seen)
    # Newer hosts leave out calls that come soon after another.
    assert any(done < 6 for done, _ in seen) and any(6 < done < 12 for done, _ in seen)


@pytest.mark.parametrize(("graph", "blocks"), [(sd15, 4), (sdxl, 4)], ids=["SD1.5", "SDXL"])
def test_models_of_the_hosts_own_types_are_searched(opened, unet_file, graph, blocks):
    backend = opened(graph(steps=4), prompts=["one", "two"])
    teacher = backend.teacher(0, 2)
    assert teacher.shape == (2, 4, 8, 8) and teacher.isfinite().all()
    assert set(backend.cost.partial_macs) == set(range(1, blocks))
    sample = backend.sample(Schedule.parse("FP@1|FX"), 1, 1)
    assert sample.latents.isfinite().all() and sample.macs < 0.8 * 2 * 4 * backend.cost.full_macs
    assert backend.features(teacher).isfinite().all()
    assert backend.pictures(teacher) is teacher, "the workflow decodes nothing"


def test_network_without_a_middle_is_read_through_its_blocks(host, typed_model, opened):
    from search_tools.backends.comfyui.features import features_of

    config = {"in_channels": 4, "patch_size": 2, "out_channels": 4, "depth": 2, "input_size": None, "adm_in_channels": 32,
              "num_patches": 64, "pos_embed_max_size": 8, "pos_embed_scaling_factor": None, "qkv_bias": True,
              "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 128}},
              "dtype": torch.float32}  # fmt: skip
    model = typed_model("SD3", config)
    words = [[torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0)), {"pooled_output": torch.zeros(1, 32)}]]
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    features = features_of(model, words, latents)
    assert "middle block" in features.name
    assert features(latents).shape == (2, 128) and features(latents).isfinite().all()


def test_guesses_of_a_search_come_from_full_runs_of_the_host(opened):
    backend, study = opened(demo(steps=8, sampler_name="dpmpp_2m")), optuna.create_study()
    space = with_guesses(study, backend, Space(8, 2.0, backend.cost), 2, samples=2)
    assert "flexi:tuned" in study.user_attrs
    assert [guess.letters.count("F") for guess in space.guesses] == [4, 4]


def test_search_writes_the_schedule_where_the_node_finds_it(flexi, base, node):
    found = flexi(demo(cfg=1.0, steps=4), *SHORT)
    assert found.exit_code == 0, found.output
    printed = json.loads(found.stdout)
    path = base / "models" / "flexi_schedules" / "my graph_2x.json"
    assert printed["file"] == str(path)
    schedule = load_schedule(path)
    assert str(schedule) == printed["schedule"] and schedule.info["teacher"]["cfg"] == 1.0
    assert "middle block" in schedule.info["measured"]["features"]
    shown = node("FlexiLoadSchedule").execute("my graph_2x.json")
    assert shown.ui["flexi_steps"] == (schedule.letters,)
    (line,) = shown.ui["text"]
    assert line.startswith("made for 4 euler steps, normal, cfg 1, 16x16; 2.0x fewer MACs, ") and line.endswith(" dB")


@pytest.mark.smoke
@pytest.mark.matrix("Doors", "`flexi search --workflow`")
def test_a_workflow_of_what_every_host_has_is_searched(flexi, checkout, record_property):
    words = lambda text: a_node("FlexiDemoPrompt", caption=text)  # noqa: E731 (a value)
    pixels = (checkout / "comfy_extras" / "nodes_chroma_radiance.py").is_file()  # since 0.3.60
    kind, size = ("EmptyChromaRadianceLatentImage", SIZE) if pixels else ("EmptyLatentImage", 8 * SIZE)
    latent = a_node(kind, width=size, height=size, batch_size=1)
    graph = sampled(a_node("FlexiDemoModel"), words, latent, steps=4)
    found = flexi(graph, *SHORT)
    assert found.exit_code == 0, found.output
    assert load_schedule(json.loads(found.stdout)["file"]).info["teacher"]["steps"] == 4
    record_property("does", "a schedule file")


def clip_l():
    """Return weights of a CLIP-L, quickly made: layers of zeros pass the words on, and a prompt still decides the picture."""
    import comfy.sd1_clip

    weights = {}
    for name, value in comfy.sd1_clip.SDClipModel(device="cpu", dtype=torch.float16).transformer.state_dict().items():
        filled = torch.randn(value.shape, dtype=torch.float16) if "token_embedding" in name else torch.zeros_like(value)
        weights[name] = filled + 1 if name.endswith("norm.weight") else filled
    return weights


@pytest.mark.smoke
@pytest.mark.matrix("Doors", "`flexi search --checkpoint`")
def test_checkpoint_is_searched_without_a_workflow(host, base, checkout, generated, unet_file, monkeypatch, cache):
    import comfy.taesd.taesd
    from safetensors.torch import load_file

    from search_tools.commands.options import HostChoice

    monkeypatch.setenv("FLEXI_CACHE", str(cache))
    weights = {f"model.diffusion_model.{name}": value.half() for name, value in load_file(unet_file).items()}
    weights |= {f"cond_stage_model.transformer.{name}": value for name, value in clip_l().items()}
    vae = generated(comfy.taesd.taesd.TAESD())
    weights |= {f"first_stage_model.{name}": value.contiguous() for name, value in vae.state_dict().items()}
    path = base / "models" / "checkpoints" / "tiny.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path)
    choice = HostChoice(checkout, base_directory=base, checkpoint="tiny.safetensors", prompt="a cat", negative="a dog")
    backend = choice.open("dpmpp_2m_sde", "karras", 3, 5.0, "64x64")
    assert (backend.settings.sampler, backend.settings.scheduler, backend.settings.cfg) == ("dpmpp_2m_sde", "karras", 5.0)
    assert backend.identity["size"] == [8, 8]
    latents = backend.sample(Schedule.parse("FFX"), 0, 1).latents
    assert backend.pictures(latents).shape == (1, 3, 64, 64) and latents.isfinite().all()
    missing = HostChoice(checkout, base_directory=base, checkpoint="gone.safetensors")
    with pytest.raises(FlexiError, match=r"node 1 \(CheckpointLoaderSimple\): Value not in list: ckpt_name: 'gone"):
        missing.open("euler", "normal", 3, None, None)


def test_latents_of_pictures_and_sound_are_searched_for(host, opened):
    import comfy.supported_models

    if not hasattr(comfy.supported_models, "LTXAV"):
        pytest.skip("this host has no LTXAV")
    words = lambda text: a_node("TestWords", text=text, width=64)  # noqa: E731 (a value)
    backend = opened(sampled(a_node("TestSmallLtx"), words, a_node("TestPicturesAndSound")))
    assert backend.identity["size"] == [4, 4]
    teacher = backend.teacher(0, 2)
    assert teacher.shape == (2, 1, 128 * 2 * 4 * 4 + 8 * 6 * 16)
    assert torch.equal(backend.sample(Schedule.parse(f"{STEPS}*(F)"), 0, 2).latents, teacher)
    assert backend.pictures(teacher).shape == (2, 128, 4, 4), "the middle frame"
    assert not torch.equal(*backend.features(teacher)) and len(backend.features(teacher)) == 2
    mixed = backend.sample(MIXED, 0, 2)
    assert mixed.latents.isfinite().all() and not torch.equal(mixed.latents, teacher)


def experts(at=4, **others):
    """Return a workflow of two experts, nodes 5 and 15: steps 1 to `at` of `STEPS`, and the rest, with values of its own."""
    words = lambda text: a_node("TestWords", text=text, width=32)  # noqa: E731 (a value)
    latent = a_node("EmptyHunyuanLatentVideo", width=64, height=64, length=5, batch_size=1)
    first = {"end_at_step": at, "return_with_leftover_noise": "enable", "scheduler": "simple"}
    graph = sampled(a_node("TestSmallWan", seed=1), words, latent, "KSamplerAdvanced", **first)
    graph["11"] = a_node("TestSmallWan", seed=2)
    window = {"start_at_step": at, "end_at_step": 10000, "add_noise": "disable", "return_with_leftover_noise": "disable"}
    own = {"model": ["11", 0], "latent_image": ["5", 0], "noise_seed": 0, **window, **others}
    graph["15"] = {"class_type": "KSamplerAdvanced", "inputs": {**graph["5"]["inputs"], **own}}
    return graph


def test_a_joined_model_is_searched_with_a_full_step_at_its_boundary_and_each_networks_own_macs(opened):
    graph = experts()
    joined = {"high_noise": ["1", 0], "low_noise": ["11", 0], "unit": "share of the run", "boundary_in_grid": True}
    graph["16"] = a_node("FlexiJoinModels", boundary=0.5, **joined)
    kept = {name: graph["5"]["inputs"][name] for name in ("positive", "negative", "latent_image", "steps", "cfg")}
    sampler = {"sampler_name": "euler", "scheduler": "simple", "seed": 1, "denoise": 1.0}
    graph["5"] = a_node("KSampler", model=["16", 0], **kept, **sampler)
    del graph["15"]
    backend, half = opened(graph), STEPS // 2
    assert backend.starts == (half,) and backend.cuts == ()
    assert backend.cost.by_step == (0,) * half + (1,) * half and set(backend.cost.by_stage) == {0, 1}
    schedule = Schedule.parse("FX" * (half // 2) + "X" * (half % 2) + "F" + "X" * (half - 1))
    spent = backend.sample(schedule, 0, 1).macs
    assert spent == pytest.approx(2 * schedule_cost(schedule, backend.cost)), "with the prompt and without"
    front = Tuner(backend, 1).front()
    assert front and all(planned.schedule.letters[half] == "F" for planned in front)


@pytest.fixture
def by_experts(host, base, opened):
    """A function of (seed, patch) that samples the two experts with core's own function: patch(model) is put in its place."""
    import nodes

    made = opened(experts())._run.nodes  # brings the host up, with the tests' pack

    def sample(seed, patch=lambda model: model, at=4, sampler="euler"):
        latent = made[0].inputs[0]["latent_image"]
        for number, (model, span) in enumerate(zip((each.model for each in made), ((0, at), (at, 10000)), strict=True)):
            options = {"disable_noise": number == 1, "start_step": span[0], "last_step": span[1]}
            conds = made[0].inputs[0]["positive"], made[0].inputs[0]["negative"]
            with torch.inference_mode():
                (latent,) = nodes.common_ksampler(
                    patch(model), seed if number == 0 else 0, STEPS, 3.0, sampler, "simple", *conds, latent,
                    force_full_denoise=number == 1, **options,
                )  # fmt: skip
        return latent["samples"]

    return sample


def test_two_experts_are_one_run_with_a_noise_of_its_own_for_each_sample(opened, by_experts):
    backend = opened(experts())
    assert backend.cuts == (4,) and backend.settings.steps == STEPS
    assert len(backend.sigmas) == STEPS + 1 and backend.sigmas[-1] == 0
    first, second = backend.identity["stages"]
    assert (first["steps"], second["steps"]) == (4, 2) and first["weights"] != second["weights"]
    teacher = backend.teacher(7, 2)
    assert not torch.equal(*teacher)
    for i in range(2):
        assert torch.equal(teacher[i : i + 1], by_experts(7 + i))
    assert opened(experts(noise_seed=5)).identity == backend.identity


def test_schedule_for_two_experts_runs_in_both_nodes_as_it_was_searched(opened, by_experts, node, schedule_folder):
    from flexi_core import save_schedule

    backend = opened(experts())
    schedule = Schedule.parse("FPXX@2|FX")
    save_schedule(schedule.with_info(teacher=backend.identity), schedule_folder / "experts.json")
    (loaded,) = node("FlexiLoadSchedule").execute("experts.json").args
    handles = []

    def patch(model):
        patched, handle = node("FlexiApply").execute(model, loaded, "refuse").args
        handles.append(handle)
        return patched

    for seed in (3, 4):
        assert torch.equal(backend.sample(schedule, seed, 1).latents, by_experts(seed, patch))
    reports = [handle.report for handle in handles[:2]]
    assert [report.letters for report in reports] == ["FPXX", "FX"]
    assert not any(step.fallbacks for report in reports for step in report.steps)
    assert not any("Made for another run" in note for report in reports for note in report.notes)


def test_experts_that_change_places_are_known_by_their_windows(host, opened, by_experts):
    backend = opened(experts())
    schedule = Schedule.parse("FPXX@2|FX").with_info(teacher=backend.identity)
    others, handles = [node.model for node in reversed(backend._run.nodes)], []

    def exchanged(model):
        patched, handle = host.adapter.apply_schedule(others[len(handles)], schedule)
        handles.append(handle)
        return patched

    by_experts(0, exchanged)
    assert [handle.report.letters for handle in handles] == ["FPXX", "FX"]
    assert all("Made for another run: the network's weights differ." in handle.report.notes for handle in handles)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun"])
def test_predictions_of_two_experts_from_a_store_change_no_bit(opened, sampler):
    graph = experts(sampler_name=sampler)
    graph["5"]["inputs"]["sampler_name"] = sampler
    backend, store = opened(graph), PredictionStore()
    for text in ("6*(F)", "FPXX@2|FX", "FPX@2|F|FX", "FPXX@2|FF"):
        text = text.replace("FF", "F|F") if "FF" in text else text
        schedule = Schedule.parse(text)
        assert torch.equal(backend.sample(schedule, 2, 1).latents, backend.sample(schedule, 2, 1, predictions=store).latents)
    assert store.found > 0


def test_fewer_steps_are_shared_by_the_experts_and_progress_counts_the_whole_run(opened):
    backend, seen = opened(experts()), []
    shorter = backend.sample(Schedule.parse("3*(F)"), 1, 1, steps=3)
    assert shorter.macs == pytest.approx(3 * 2 * backend.cost.full_macs)
    backend.sample(Schedule.parse("6*(F)"), 0, 1, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (6, 6) and [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_blends_are_fitted_in_each_window_and_bring_the_run_nearer_to_the_teacher(opened):
    backend, schedule = opened(experts()), Schedule.parse("F|FXX|FX")
    fitted, macs = backend.fit(schedule, 0, 2)
    assert macs > 0 and fitted.letters == schedule.letters and [bool(s.blend) for s in fitted.segments] == [False, True, True]
    teacher = backend.teacher(0, 2)
    error = lambda each: float((backend.sample(each, 0, 2).latents - teacher).square().mean())  # noqa: E731 (a value)
    assert error(fitted) < error(schedule)


def test_two_experts_are_searched_by_one_command_into_one_file(flexi, caplog):
    found = flexi(experts(), "--speedup", 1.5, "--samples", 16, "--evaluations", 2, "--finalists", 0, "--json")
    assert found.exit_code == 0, found.output
    printed = json.loads(found.stdout)
    schedule = load_schedule(printed["file"])
    assert len(schedule) == STEPS and schedule.letters[4] == "F"
    assert len(schedule.teacher_sigmas) == STEPS + 1 and len(schedule.info["teacher"]["stages"]) == 2
    assert "steps 1 to 4 by node 5 (KSamplerAdvanced), 5 to 6 by node 15 (KSamplerAdvanced)" in caplog.text


def test_experts_in_advanced_samplers_with_guiders_are_one_run_too(opened):
    graph = experts()
    for name, model in (("5", "1"), ("15", "11")):
        graph[f"{name}2"] = a_node("CFGGuider", model=[model, 0], positive=["2", 0], negative=["3", 0], cfg=3.0)
    graph["6"] = a_node("KSamplerSelect", sampler_name="euler")
    graph["7"] = a_node("BasicScheduler", model=["1", 0], scheduler="simple", steps=STEPS, denoise=1.0)
    graph["8"] = a_node("SplitSigmas", sigmas=["7", 0], step=4)
    graph["9"], graph["10"] = a_node("RandomNoise", noise_seed=99), a_node("DisableNoise")
    kind, common = "SamplerCustomAdvanced", {"sampler": ["6", 0]}
    first = {"noise": ["9", 0], "guider": ["52", 0], "sigmas": ["8", 0], "latent_image": ["4", 0]}
    second = {"noise": ["10", 0], "guider": ["152", 0], "sigmas": ["8", 1], "latent_image": ["5", 0]}
    graph |= {"5": a_node(kind, **common, **first), "15": a_node(kind, **common, **second)}
    backend = opened(graph)
    assert torch.equal(backend.sigmas, opened(experts()).sigmas) and backend.cuts == (4,)
    schedule = Schedule.parse("FPXX@2|FX")
    assert torch.equal(backend.sample(schedule, 3, 1).latents, opened(experts()).sample(schedule, 3, 1).latents)
    graph["15"]["inputs"]["latent_image"] = ["5", 1]
    with pytest.raises(
        FlexiError, match=r"adds no noise and goes on from node 5 \(SamplerCustomAdvanced\), output 2: a search"
    ):
        opened(graph, node="15")


def changed(graph, name, **values):
    return {**graph, name: {**graph[name], "inputs": {**graph[name]["inputs"], **values}}}


BETWEEN = {**changed(experts(), "15", latent_image=["20", 0]),
           "20": a_node("LatentUpscaleBy", samples=["5", 0], upscale_method="bilinear", scale_by=1.5)}  # fmt: skip


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        (BETWEEN, "goes on from node 20 (LatentUpscaleBy), which stands between it and node 5: a search would compare one"),
        (changed(experts(), "15", start_at_step=3), "adds no noise and goes on from node 5 (KSamplerAdvanced), but begins at"),
        (changed(experts(), "5", return_with_leftover_noise="disable"), "where that one ends at 0: they are no one run"),
        (changed(experts(), "15", sampler_name="heun"), "with another sampler (euler, heun): one schedule cannot be for both"),
    ],
)
def test_nodes_that_share_no_run_are_refused_in_words(flexi, graph, words):
    result = flexi(graph, "--node", "15")
    assert result.exit_code == 2 and result.stdout == ""
    assert words in result.stderr and "--node 5" in result.stderr and result.stderr.count("\n") == 1


@pytest.fixture
def sd3_checkpoint(host, base, generated):
    """The file that the official SD3.5 template asks for: an MMDiT of one block and large patches, a CLIP-L, no VAE."""
    import comfy.supported_models

    config = {"in_channels": 16, "patch_size": 8, "out_channels": 16, "depth": 1, "input_size": None, "adm_in_channels": 2048,
              "num_patches": 16 * 16, "pos_embed_max_size": 16, "pos_embed_scaling_factor": None, "dtype": torch.float32,
              "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 64}},
              }  # fmt: skip
    inner = comfy.supported_models.SD3(config).get_model({}, device=torch.device("cpu"))
    weights = {f"model.diffusion_model.{k}": value for k, value in generated(inner.diffusion_model).state_dict().items()}
    weights["model.diffusion_model.pos_embed"] = torch.zeros(1, 16 * 16, 64)
    weights |= {f"text_encoders.clip_l.transformer.{name}": value for name, value in clip_l().items()}
    weights["first_stage_model.pixel_space_vae"] = torch.ones(1)  # decodes nothing: a megapixel takes seconds
    path = base / "models" / "checkpoints" / "sd3.5_large_fp8_scaled.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path)
    yield path
    path.unlink()


def test_an_official_template_is_searched_as_downloaded(flexi, base, template, sd3_checkpoint):
    found = flexi(
        template("sd3.5_simple_example"), "--speedup", 2, "--samples", 16, "--evaluations", 1, "--finalists", 0, "--json"
    )
    assert found.exit_code == 0, found.output
    schedule = load_schedule(base / "models" / "flexi_schedules" / "my graph_2x.json")
    teacher = schedule.info["teacher"]
    assert (teacher["sampler"], teacher["scheduler"], teacher["steps"], teacher["cfg"]) == ("euler", "sgm_uniform", 20, 4.01)
    assert teacher["size"] == [128, 128] and len(schedule) == 20
    assert json.loads(found.stdout)["schedule"] == str(schedule)


def saved_form(graph):
    """Return an API-format workflow as the page would save it, its values by position."""
    import nodes

    links, saved = [], []
    for name, node in graph.items():
        types = nodes.NODE_CLASS_MAPPINGS[node["class_type"]].INPUT_TYPES()
        order = [key for part in ("required", "optional") for key in types.get(part, {})]
        values, inputs = [], []
        for key in sorted(node["inputs"], key=order.index):
            value = node["inputs"][key]
            if isinstance(value, list):
                links.append([len(links) + 1, int(value[0]), value[1], int(name), len(inputs), "*"])
                inputs.append({"name": key, "type": "*", "link": len(links)})
            else:
                values += [value, "randomize"] if key in ("seed", "noise_seed") else [value]
        saved.append({"id": int(name), "type": node["class_type"], "mode": 0, "inputs": inputs, "widgets_values": values})
    return {"nodes": saved, "links": links, "version": 0.4}


def test_a_saved_workflow_is_the_same_run_as_its_api_form(opened, plain):
    backend = opened(saved_form(demo()))
    assert backend.identity == plain.identity and backend.spec == plain.spec
    assert torch.equal(backend.sample(MIXED, 3, 1).latents, plain.sample(MIXED, 3, 1).latents)
    rolled = opened(demo(seed=12345))
    assert rolled.spec == plain.spec


SAVED = {"nodes": [{"id": 1, "type": "KSampler"}], "links": [], "version": 0.4}
TWO = {**demo(), "20": {**demo()["5"], "_meta": {"title": "Hires fix"}}}


@pytest.mark.parametrize(
    ("graph", "args", "words"),
    [
        ({"1": a_node("FlexiDemoModel")}, [], "the workflow has no sampling node; a search needs one of KSampler"),
        (TWO, [], "2 sampling nodes: 5 (KSampler), 20 (KSampler, 'Hires fix'); choose one with --node"),
        (TWO, ["--node", "4"], "node 4 is a EmptyChromaRadianceLatentImage; the workflow's sampling nodes are: 5"),
        (SAVED, [], "node 1 (KSampler): Required input is missing"),
        ({**SAVED, "links": [[1, 2]]}, [], "the saved workflow cannot be read"),
        ("{", [], "my graph.json: not JSON"),
        ([1], [], "my graph.json: not a workflow"),
        ({"1": 5}, [], "not an API-format workflow"),
        ({**demo(), "5": a_node("KSampler", model=["77", 0])}, [], "comes from node 77, which is not in the workflow"),
        ({**sd15(), "1": a_node("UNETLoader", unet_name="gone", weight_dtype="default")}, [], "node 1 (UNETLoader): Value not"),
        ({**demo(), "1": a_node("NoSuchNode")}, [], "this ComfyUI has no node NoSuchNode; install the pack"),
        ({**sdxl(), "2": a_node("TestBroken", text="", width=32)}, [], "node 2 (TestBroken) failed: the words are out"),
        ({**demo(), "2": a_node("FlexiDemoPrompt", caption="a pink sun")}, [], "node 2 (FlexiDemoPrompt): "),
        ({**demo(), "5": a_node("KSampler")}, [], "node 5 (KSampler): Required input is missing"),
        (demo(sampler_name="dpm_adaptive"), [], "dpm_adaptive chooses its own noise levels"),
        (demo(), ["--checkpoint", "x"], "--comfyui needs either --workflow"),
        (demo(), ["--prompts", "none.txt"], "none.txt: cannot be read"),
        (demo(), ["--clip-vision", "none"], "there is no 'none' in models/clip_vision"),
        ({**sdxl(), "2": a_node("TestWords", text=["9", 0], width=32), "9": a_node("TestJoined", string=["8", 0]),
          "8": a_node("PrimitiveString", value="x")}, ["--prompts", "my graph.json"], "is made by node 9 (TestJoined)"),
    ],
)  # fmt: skip
def test_bad_workflow_is_one_line_and_exit_code_2(flexi, graph, args, words):
    result = flexi(graph, *args)
    assert result.exit_code == 2
    assert words in result.stderr and result.stderr.count("\n") == 1 and result.stdout == ""


def test_no_checkout_is_one_line_and_exit_code_2(tmp_path):
    result = CliRunner().invoke(app, ["search", "--comfyui", str(tmp_path), "--checkpoint", "x"])
    assert result.exit_code == 2 and "no ComfyUI there" in result.stderr and result.stderr.count("\n") == 1


def test_fresh_process_brings_the_host_up_and_says_what_is_missing(base, checkout, tmp_path):
    (tmp_path / "g.json").write_text(json.dumps({**demo(), "10": a_node("VAELoader", vae_name="gone")}), encoding="utf-8")
    command = [sys.executable, "-c", "from search_tools.cli import app; app()", "search", "--comfyui", str(checkout)]
    standin = [path for path in sys.path if path.endswith("standin")]  # there where the real torchvision does not import
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *standin]))}
    done = subprocess.run(
        [*command, "--base-directory", str(base), "--workflow", "g.json"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert "node 10 (VAELoader): Value not in list: vae_name: 'gone'" in done.stderr
    assert "Traceback" not in done.stderr


def test_names_of_results_are_kept_apart(host):
    from flexi_core.files import file_stem

    names = ["my graph", "my_graph", "猫", "犬", "a/b", "a\\b", "a:b", "?", "!", "Wan 2.2 (14B)"]
    stems = [file_stem(name) for name in names]
    assert len(set(stems)) == len(names) and stems[:4] == names[:4]
    assert not any(sign in stem for stem in stems for sign in '/\\:?!<>|"')


def test_a_workflow_is_tuned_without_a_search(base, checkout, tmp_path, monkeypatch, unet_file):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLEXI_CACHE", str(tmp_path / "cache"))
    (tmp_path / "graph.json").write_text(json.dumps(demo()), encoding="utf-8")
    where = ["--comfyui", str(checkout), "--base-directory", str(base), "--workflow", "graph.json"]
    result = CliRunner().invoke(app, ["tune", *where, "--samples", "2", "--out", "tuned.json", "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    written = load_schedule(tmp_path / "tuned.json")
    assert str(written) == said["schedule"]
    assert said["full"] <= STEPS // 2
    assert said["made_db"] > said["plain_db"]
    assert written.info["teacher"]["model"] == "comfyui"


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_ancestral"])
def test_recorded_runs_are_the_teachers_in_the_host(opened, sampler):
    from flexi_core.tune import Tuner

    backend = opened(demo(sampler_name=sampler))
    tuner = Tuner(backend, 1)
    front = tuner.front()
    assert torch.equal(tuner._teacher, backend.teacher(0, 1))
    assert len(front) >= 3


@pytest.mark.parametrize("name", ["2x", "3x"])
def test_joined_experts_under_a_preset_are_two_windows_in_a_graph(base, checkout, name):
    """One sampler with one schedule over both, and two KSampler (Advanced) nodes with the same in each."""
    from search_tools.backends.comfyui.host import open_host

    host, steps, at = open_host(str(checkout), str(base)), 20, 9
    graph = four_channels(a_node("TestSmallSdxl", seed=1), 32, steps=steps)
    graph["20"] = a_node("TestSmallSdxl", seed=2)
    settings = {"boundary": at / steps, "unit": "share of the run", "boundary_in_grid": True}
    graph["21"] = a_node("FlexiJoinModels", high_noise=["1", 0], low_noise=["20", 0], **settings)
    graph["22"] = a_node("FlexiPreset", preset=name, steps=0)
    graph["23"] = a_node("FlexiApply", model=["21", 0], schedule=["22", 0], on_mismatch="map")
    graph["5"]["inputs"]["model"] = ["23", 0]
    graph["24"] = a_node("FlexiReport", run=["23", 1], latent=["5", 0])
    made = host.evaluate(graph, "24")
    latent = made["latent"]["samples"]
    report = made["run"].report_of(latent)
    assert [len(stage.steps) for stage in report.stages] == [at, steps - at] and report.letters[at] == "F"
    assert report.letters.count("F") <= (11 if name == "2x" else 8)

    graph["22"] = a_node("FlexiSchedule", text=str(report.schedule))
    advanced = {key: value for key, value in graph["5"]["inputs"].items() if key not in ("seed", "denoise")}
    for sampler, model, applied in (("5", "1", "23"), ("15", "20", "25")):
        graph[applied] = a_node("FlexiApply", model=[model, 0], schedule=["22", 0], on_mismatch="map")
        graph[sampler] = a_node("KSamplerAdvanced", **{**advanced, "model": [applied, 0], "noise_seed": 99})
    first = {"add_noise": "enable", "start_at_step": 0, "end_at_step": at, "return_with_leftover_noise": "enable"}
    second = {"add_noise": "disable", "start_at_step": at, "end_at_step": 10000, "return_with_leftover_noise": "disable"}
    graph["5"]["inputs"] |= first
    graph["15"]["inputs"] |= {**second, "latent_image": ["5", 0]}
    graph["24"] = a_node("FlexiReport", run=["25", 1], latent=["15", 0])
    # Between two nodes the latent is scaled to the format of files and back, which rounds.
    torch.testing.assert_close(host.evaluate(graph, "24")["latent"]["samples"], latent, rtol=1e-3, atol=1e-3)
