"""Flexi Tune: a schedule for the user's own run, made in the graph and kept."""

import json

import pytest
import torch

STEPS = 12


@pytest.fixture
def inputs(host, demo_model):
    latent = {"samples": torch.zeros(2, 3, 16, 16)}
    return {
        "model": demo_model, "positive": host.positive, "negative": host.negative, "latent_image": latent, "steps": STEPS,
        "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0, "speedup": 2.0, "quality_db": 0.0,
        "effort": "instant",
    }  # fmt: skip


@pytest.fixture
def tune(node, schedule_folder, inputs):
    """A function of changed inputs that returns the node's outputs by name; what it kept is removed in the end."""
    cls = node("FlexiTune")
    names = [output.display_name for output in cls.GET_SCHEMA().outputs]

    @torch.inference_mode()
    def run(**changed):
        shown = cls.execute(**{**inputs, **changed})
        return dict(zip(names, shown.args, strict=True)) | {"ui": shown.ui}

    yield run
    for path in (schedule_folder / "tuned").glob("*"):
        path.unlink()


@pytest.fixture
def sampled(monkeypatch):
    """A list of the step counts of every run that the host samples."""
    import comfy.sample

    counted, before = [], comfy.sample.sample

    def sample(model, noise, steps, *args, **kwargs):
        counted.append(steps)
        return before(model, noise, steps, *args, **kwargs)

    monkeypatch.setattr(comfy.sample, "sample", sample)
    return counted


def psnr(a, b):
    return float(10 * torch.log10(4 / (a - b).square().mean()))


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_ancestral"])
def test_the_model_samples_nearer_than_plain_steps_that_cost_the_same(host, demo_model, tune, sampler):
    tuned = tune(sampler_name=sampler)
    options = {"noise": host.noise(2, 16, seed=5), "seed": 5}
    whole = host.sample(demo_model, sampler, STEPS, **options)
    made, plain = (
        host.sample(tuned["model"], sampler, STEPS, **options),
        host.sample(demo_model, sampler, STEPS // 2, **options),
    )
    assert tuned["run"].report.letters.count("F") == STEPS // 2
    assert psnr(made, whole) > psnr(plain, whole) + 3
    assert tuned["text"].startswith(f"6 of {STEPS} steps are computed, 2x fewer: ")
    assert "Made from 1 full run in the time of" in tuned["text"]


def test_the_next_time_costs_nothing_and_another_run_is_tuned_anew(host, tune, sampled, schedule_folder):
    first = tune()
    spent = len(sampled)
    assert spent > 1
    again = tune(
        positive=host.adapter.demo_conditioning("a small blue ring"), latent_image={"samples": torch.zeros(1, 3, 16, 16)}
    )
    assert len(sampled) == spent
    assert str(again["schedule"]) == str(first["schedule"]) and "Kept from before" in again["text"]
    assert torch.equal(again["front"], first["front"])
    assert len(list((schedule_folder / "tuned").glob("*.json"))) == 1
    tune(cfg=4.0)
    assert len(sampled) > spent


def test_a_lora_is_another_run(host, demo_model, tune, sampled):
    tune()
    spent = len(sampled)
    lora, key = demo_model.clone(), "diffusion_model.output_blocks.5.0.in_layers.2.weight"
    lora.add_patches({key: ("diff", (torch.ones_like(lora.model.state_dict()[key]) * 0.01,))})
    tune(model=lora)
    assert len(sampled) > spent


def test_more_effort_fits_in_runs_of_the_schedules_own(tune):
    instant, good = tune(), tune(effort="good")
    assert "Made from 4 full runs" in good["text"]
    assert str(instant["schedule"]) != str(good["schedule"])


def test_a_quality_is_asked_for_in_place_of_a_speed(tune):
    near, far = (tune(quality_db=db)["schedule"] for db in (60.0, 35.0))
    assert near.letters.count("F") > far.letters.count("F")
    assert near.info["measured"]["psnr_db"] >= 60 and far.info["measured"]["psnr_db"] >= 35
    none = tune(quality_db=90.0)
    assert set(none["schedule"].letters) == {"F"} and "all are computed" in none["text"]


def test_two_pictures_and_a_front_are_shown(tune):
    shown = tune()
    front, pictures = shown["front"], shown["pictures"]
    assert front.shape[0] == pictures.shape[0] == 1 and front.shape[3] == pictures.shape[3] == 3
    assert pictures.shape[1:3] == (16, 32)
    left, right = pictures[:, :, :16], pictures[:, :, 16:]
    assert 0 < float((left - right).abs().mean()) < 0.05
    assert shown["ui"]["flexi_steps"] == (shown["schedule"].letters,)


def test_a_sampler_that_cannot_be_tuned_gets_a_preset_and_the_reason(host, tune):
    shown = tune(sampler_name="heun")
    assert "Not tuned: heun asks the network several times a step" in shown["text"] and "Flexi Preset 2x" in shown["text"]
    assert host.sample(shown["model"], "heun", STEPS).isfinite().all()


@pytest.mark.parametrize("content", ["", "{", '{"format": "flexiffusion-schedule", "version": 1, "schedule": "FX"}'])
def test_a_broken_file_costs_only_the_tuning(tune, schedule_folder, content):
    first = tune()
    (path,) = (schedule_folder / "tuned").glob("*.json")
    path.write_text(content)
    again = tune()
    assert "Made from 1 full run" in again["text"] and str(again["schedule"]) == str(first["schedule"])
    assert json.loads(path.read_text())["schedule"] == str(first["schedule"])


def test_a_full_disk_costs_only_the_keeping(tune, monkeypatch, node):
    module = __import__("sys").modules[node("FlexiTune").__module__]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.folder, "make_room", full)
    shown = tune()
    assert "could not be kept" in shown["text"] and "X" in shown["schedule"].letters


def test_the_folder_stays_small(tune, schedule_folder, node, monkeypatch):
    module = __import__("sys").modules[node("FlexiTune").__module__]
    monkeypatch.setattr(module.folder, "MOST_TUNED", 2)
    for speedup in (2.0, 3.0, 4.0):
        tune(speedup=speedup)
    assert len(list((schedule_folder / "tuned").glob("*.json"))) == 2


def test_cancel_stops_at_once(host, tune, monkeypatch, schedule_folder):
    import comfy.model_management

    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        tune()
    assert not list((schedule_folder / "tuned").glob("*.json"))


def guided(host, model, cfg=3.0):
    """Return a guider of the host with its own inputs, as SamplerCustomAdvanced gets them."""
    from comfy_extras.nodes_custom_sampler import Guider_Basic, Noise_RandomNoise

    guider = host.comfy.samplers.CFGGuider(model) if cfg != 1 else Guider_Basic(model)
    guider.set_conds(host.positive, host.negative) if cfg != 1 else guider.set_conds(host.positive)
    if cfg != 1:
        guider.set_cfg(cfg)
    return {
        "noise": Noise_RandomNoise(7),
        "guider": guider,
        "sampler": host.comfy.samplers.sampler_object("euler"),
        "sigmas": host.sigmas(model, "simple", STEPS),
        "latent_image": {"samples": torch.zeros(1, 3, 16, 16)},
    }


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_a_guider_samples_nearer_than_plain_steps_that_cost_the_same(host, demo_model, node, schedule_folder, cfg):
    given = guided(host, demo_model, cfg)
    cls = node("FlexiTuneGuider")
    try:
        with torch.inference_mode():
            shown = cls.execute(**given, speedup=2.0, quality_db=0.0, effort="instant").args
            made, whole, plain = (
                guider.sample(
                    given["noise"].generate_noise(given["latent_image"]), given["latent_image"]["samples"], given["sampler"],
                    sigmas, disable_pbar=True, seed=7,
                )
                for guider, sigmas in (
                    (shown[0], given["sigmas"]),
                    (given["guider"], given["sigmas"]),
                    (given["guider"], host.sigmas(demo_model, "simple", STEPS // 2)),
                )
            )  # fmt: skip
    finally:
        for path in (schedule_folder / "tuned").glob("*"):
            path.unlink()
    assert shown[3].startswith(f"6 of {STEPS} steps are computed, 2x fewer: "), shown[3]
    assert shown[2].report.letters.count("F") == STEPS // 2
    assert given["guider"].model_patcher is demo_model
    assert psnr(made, whole) > psnr(plain, whole) + 3


def test_a_cancel_keeps_what_was_recorded(host, tune, sampled, monkeypatch):
    import comfy.model_management as management

    before = management.throw_exception_if_processing_interrupted

    def cancelled():
        if len(sampled) == 3:  # in the third full run
            raise management.InterruptProcessingException
        before()

    with monkeypatch.context() as patched, pytest.raises(management.InterruptProcessingException):
        patched.setattr(management, "throw_exception_if_processing_interrupted", cancelled)
        tune(effort="good", cfg=2.5)
    assert sampled == [STEPS] * 3
    sampled.clear()
    assert "Made from 4 full runs" in tune(effort="good", cfg=2.5)["text"]
    whole = len(sampled)
    sampled.clear()
    tune(effort="good", cfg=2.5, speedup=3.0)  # the recorded runs serve another wish
    assert len(sampled) < whole


def test_thorough_is_no_farther_off_than_good(tune):
    how = {"speedup": 3.0, "latent_image": {"samples": torch.zeros(1, 3, 8, 8)}}  # a hundred runs
    good, thorough = tune(effort="good", **how), tune(effort="thorough", **how)
    assert thorough["schedule"].letters.count("F") == good["schedule"].letters.count("F")
    measured = thorough["schedule"].info["measured"]
    assert measured["samples"] == 8
    assert measured["psnr_db"] > measured["plain_db"]
