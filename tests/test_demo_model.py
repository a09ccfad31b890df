"""The embedded model: what ships, and the runtime that samples it."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexi_core import FlexiError, Schedule
from flexi_core.demo import classifier, model
from flexi_core.demo.classifier import load_classifier
from flexi_core.demo.model import DemoModel, read_weights, training_sigmas
from flexi_core.demo.scenes import ATTRIBUTES, Caption, captions_of, random_attributes, render
from flexi_core.run.run import FULL_DEPTH
from flexi_core.runtime.sampling import SAMPLERS, SCHEDULERS, make_noise, sample
from flexi_core.runtime.unet import UNet

SD_SIGMAS = training_sigmas("linear 0.00085 0.012")


@pytest.fixture
def captions():
    return captions_of(random_attributes(2, torch.Generator().manual_seed(5)))


def plain(tiny_model, sampler, sigmas, noise, captions, cfg):
    """Sample without plan and run: the loop that an all-full schedule has to equal."""
    cond, uncond = tiny_model.context(captions), tiny_model.context([Caption()] * len(captions))

    def denoise(x, sigma):
        rows = torch.cat([x, x])
        timesteps = tiny_model.timestep(sigma[None]).expand(len(rows))
        eps = tiny_model.unet(rows / (sigma**2 + 1).sqrt(), timesteps, torch.cat([uncond, cond]))
        without, with_ = (rows - sigma * eps).chunk(2)
        return without + (with_ - without) * cfg

    return SAMPLERS[sampler](denoise, noise * (1 + sigmas[0] ** 2).sqrt(), sigmas)


def test_the_classifier_reads_every_attribute_of_fresh_scenes():
    generator = torch.Generator().manual_seed(987654321)
    attributes = random_attributes(2000, generator)
    right = load_classifier().predict(render(attributes, generator)) == attributes
    for name, share in zip(ATTRIBUTES, right.float().mean(dim=0).tolist(), strict=True):
        assert share >= 0.99, f"{name}: {share:.1%} of scenes"


def test_the_classifiers_features_tell_scenes_apart():
    images = render(random_attributes(64, torch.Generator().manual_seed(1)), torch.Generator().manual_seed(2))
    features = load_classifier().features(images)
    assert features.shape == (64, classifier.FEATURES)
    assert features.isfinite().all() and (features.std(dim=0) > 0).sum() > classifier.FEATURES / 2


def test_the_shipped_network_is_small_enough_to_ship():
    assert model.WEIGHTS.stat().st_size <= 10_000_000
    assert sum(value.numel() for value in load_file(model.WEIGHTS).values()) <= 5_000_000
    assert {value.dtype for value in load_file(model.WEIGHTS).values()} == {torch.float16}
    assert classifier.WEIGHTS.stat().st_size <= 1_000_000


def test_the_shipped_weights_fit_the_network_of_their_own_configuration_key_by_key():
    config, weights, _ = read_weights()
    weights.pop("token_embedding.weight")
    assert set(weights) == set(UNet(**config).state_dict())


def test_the_shipped_keys_are_those_of_the_ldm_layout():
    _, weights, _ = read_weights()
    assert {name.split(".")[0] for name in weights} == {
        "time_embed",
        "input_blocks",
        "middle_block",
        "output_blocks",
        "out",
        "token_embedding",
    }
    for name in ("input_blocks.0.0.weight", "input_blocks.1.0.in_layers.2.weight", "out.2.weight", "time_embed.0.weight"):
        assert name in weights


def test_the_shipped_model_loads_and_answers_finitely():
    demo = DemoModel.load()
    eps = demo.unet(torch.randn(1, 3, 32, 32), torch.tensor([500]), demo.context([Caption()]))
    assert eps.shape == (1, 3, 32, 32) and eps.isfinite().all()


def test_a_missing_weights_file_is_refused(tmp_path):
    with pytest.raises(FlexiError, match=r"cannot be read .*run flexi train-demo"):
        DemoModel.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("length", [0, 2, 100, 1_000_000])
def test_a_cut_off_weights_file_is_refused(tmp_path, length):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(model.WEIGHTS.read_bytes()[:length])
    with pytest.raises(FlexiError, match=r"broken.safetensors: .*cannot be read"):
        DemoModel.load(path)


def test_a_file_of_other_weights_is_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(FlexiError, match="not a demo model"):
        DemoModel.load(tmp_path / "other.safetensors")


def test_the_noise_levels_are_stable_diffusions():
    # sigma_min and sigma_max of SD 1.5's scaled-linear betas, as k-diffusion and ComfyUI print them.
    assert SD_SIGMAS[0].item() == pytest.approx(0.0292, abs=1e-4)
    assert SD_SIGMAS[-1].item() == pytest.approx(14.6146, abs=1e-3)


def test_timestep_and_noise_level_invert_each_other(tiny_model):
    t = torch.arange(1000)
    assert torch.equal(tiny_model.timestep(tiny_model.sigmas), t)
    torch.testing.assert_close(tiny_model.sigma(t.float()), tiny_model.sigmas)
    middle = tiny_model.sigma(torch.tensor([500.5]))
    assert tiny_model.sigmas[500] < middle < tiny_model.sigmas[501]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 20, 50])
def test_a_grid_falls_from_the_top_noise_level_to_zero(tiny_model, scheduler, steps):
    sigmas = SCHEDULERS[scheduler](tiny_model, steps)
    assert len(sigmas) == steps + 1
    assert sigmas[0].item() == pytest.approx(tiny_model.sigmas[-1].item(), rel=1e-5)
    assert sigmas[-1] == 0
    assert (sigmas[1:] < sigmas[:-1]).all()


def test_a_samples_noise_does_not_depend_on_how_many_are_made():
    assert torch.equal(make_noise(10, 5)[3], make_noise(13, 1)[0])
    assert not torch.equal(make_noise(10, 2)[0], make_noise(10, 2)[1])


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("scheduler", ["normal", "simple"])
def test_all_full_schedule_equals_plain_sampling(tiny_model, captions, sampler, scheduler):
    sigmas, noise = SCHEDULERS[scheduler](tiny_model, 6), make_noise(0, 2)
    sampled, run = sample(tiny_model, Schedule.parse("6*(F)"), sigmas, noise, captions, sampler=sampler, cfg=3.0)
    assert torch.equal(sampled, plain(tiny_model, sampler, sigmas, noise, captions, 3.0))
    assert not any(record.fallbacks for record in run.records)


@pytest.mark.parametrize("text", ["6*(F)", "FPPXXX@2", "FNFX|FP@1", "FP@3|FXXN"])
def test_the_second_run_equals_the_first(tiny_model, captions, text):
    schedule, sigmas = Schedule.parse(text), SCHEDULERS["normal"](tiny_model, 6)
    first, second = (sample(tiny_model, schedule, sigmas, make_noise(0, 2), captions, cfg=3.0)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_each_kind_of_step_calls_the_network_as_it_says(tiny_model, captions):
    schedule, sigmas = Schedule.parse("FPN@2|FX"), SCHEDULERS["normal"](tiny_model, 5)
    _, run = sample(tiny_model, schedule, sigmas, make_noise(0, 2), captions, cfg=3.0)
    assert [dict(record.calls) for record in run.records] == [{FULL_DEPTH: 4}, {2: 4}, {}, {FULL_DEPTH: 4}, {}]
    assert not any(record.fallbacks for record in run.records)


def test_a_sample_does_not_depend_on_its_batch(tiny_model, captions):
    schedule, sigmas = Schedule.parse("FPX@1|FX"), SCHEDULERS["normal"](tiny_model, 5)
    both, _ = sample(tiny_model, schedule, sigmas, make_noise(0, 2), captions, cfg=3.0)
    second, _ = sample(tiny_model, schedule, sigmas, make_noise(1, 1), captions[1:], cfg=3.0)
    torch.testing.assert_close(both[1:], second, rtol=1e-4, atol=1e-4)


def test_guidance_of_one_leaves_the_unconditional_half_out(tiny_model, captions):
    schedule, sigmas = Schedule.parse("FP@1"), SCHEDULERS["normal"](tiny_model, 2)
    _, run = sample(tiny_model, schedule, sigmas, make_noise(0, 2), captions, cfg=1.0)
    assert [dict(record.calls) for record in run.records] == [{FULL_DEPTH: 2}, {1: 2}]


def test_the_caption_and_the_scale_of_guidance_reach_the_picture(tiny_model, captions):
    def image(captions, cfg):
        sigmas = SCHEDULERS["normal"](tiny_model, 3)
        return sample(tiny_model, Schedule.parse("FFF"), sigmas, make_noise(0, 2), captions, cfg=cfg)[0]

    reference = image(captions, 3.0)
    assert not torch.equal(reference, image(captions[::-1], 3.0))
    assert not torch.equal(reference, image(captions, 5.0))


def test_a_schedule_of_another_length_is_mapped(tiny_model, captions):
    sigmas = SCHEDULERS["normal"](tiny_model, 4)
    _, run = sample(tiny_model, Schedule.parse("10*(FX)"), sigmas, make_noise(0, 2), captions, cfg=3.0)
    assert run.plan.mapping == "20 steps mapped to 4 by position in the run"


def test_progress_counts_to_the_last_step(tiny_model, captions):
    told = []
    sample(
        tiny_model,
        Schedule.parse("FNFX"),
        SCHEDULERS["normal"](tiny_model, 4),
        make_noise(0, 2),
        captions,
        cfg=3.0,
        progress=lambda done, steps: told.append((done, steps)),
    )
    assert told == [(1, 4), (3, 4), (4, 4)]


def test_an_unknown_sampler_and_a_missing_caption_are_refused(tiny_model, captions):
    sigmas = SCHEDULERS["normal"](tiny_model, 2)
    with pytest.raises(FlexiError, match="unknown sampler 'euler_a'; the embedded runtime has euler, ddim"):
        sample(tiny_model, Schedule.parse("FF"), sigmas, make_noise(0, 2), captions, sampler="euler_a", cfg=3.0)
    with pytest.raises(FlexiError, match="2 prompts for 3 samples; give one for each"):
        sample(tiny_model, Schedule.parse("FF"), sigmas, make_noise(0, 3), captions, cfg=3.0)


def test_the_shipped_model_draws_what_captions_ask_for_without_leftover_noise():
    shipped, judge = DemoModel.load(), load_classifier()
    attributes = random_attributes(24, torch.Generator().manual_seed(7))
    sigmas = SCHEDULERS["normal"](shipped, 12)
    images, _ = sample(
        shipped, Schedule.parse("12*(F)"), sigmas, make_noise(3_000_000, 24), captions_of(attributes), cfg=model.DEFAULT_CFG
    )
    right = (judge.predict(images) == attributes).all(dim=1)
    assert right.double().mean() >= 0.85
    # Backgrounds are plain: the median difference of neighbouring pixels is that of a gradient.
    assert (images.diff(dim=3).abs().flatten(1).median(dim=1).values < 0.05).all()
