"""Two models as one: above a boundary in noise one answers, below it the other, each with what is its own."""

from __future__ import annotations

import pytest
import torch

from flexi_core import FlexiError, Schedule
from flexi_core.stages.bounds import UNITS, Boundary

STEPS = 8
MIXED = ["F|FXX|FPX@2|F", "FXXXXXXX", "F|FPPPPP@2|F", "FNNN|FNNN", "2*(FNXX)", "FPPP@1|FPPP@1", "F|f|f|Ff|fX|F"]


@pytest.fixture(scope="module")
def experts(host):
    """Two models of differing weights, the second of another file."""
    high, low = host.adapter.load_demo_model(), host.adapter.load_demo_model()
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in low.model.diffusion_model.parameters():
            value.mul_(1 + 0.05 * torch.randn(value.shape, generator=rng))
    return high, low


@pytest.fixture(scope="module")
def sigmas(host, experts):
    return host.sigmas(experts[0], "normal", STEPS).tolist()


@pytest.fixture(scope="module")
def join(host, experts):
    """A function of (boundary, options) that joins the two experts, or others."""

    def make(level, *models, in_grid=False, unit="sigma"):
        return host.adapter.join_models(*(models or experts), Boundary(level, unit), in_grid)[0]

    return make


@pytest.fixture
def windows(host):
    """A function of (models, step, options) that samples in two windows, as two KSampler (Advanced) nodes do."""

    def sample(high, low, step, sampler="euler", steps=STEPS, **options):
        first = host.sample(high, sampler, steps, last_step=step, **options)
        options |= {"start_step": step, "latent_image": first, "disable_noise": True, "noise": first * 0}
        return host.sample(low, sampler, steps, **options)

    return sample


def test_a_joined_model_is_two_windows(host, experts, join, sigmas, windows):
    joined = host.sample(join(sigmas[3]))
    assert torch.equal(joined, windows(*experts, 3))
    assert not torch.equal(joined, host.sample(experts[0])) and not torch.equal(joined, host.sample(experts[1]))
    assert torch.equal(host.sample(join(sigmas[3])), joined), "the second run differs from the first"


def test_a_boundary_at_an_end_leaves_one_model_alone(host, experts, join):
    assert torch.equal(host.sample(join(0.0)), host.sample(experts[0]))
    assert torch.equal(host.sample(join(1e6)), host.sample(experts[1]))


@pytest.mark.parametrize("step", [1, 4, 5])
@pytest.mark.parametrize("text", MIXED)
def test_a_schedule_over_a_joined_model_is_two_windows_with_it_in_each(host, experts, join, apply, sigmas, windows, text, step):
    model, handle = apply(join(sigmas[step]), text)
    first, second = (apply(each, text)[0] for each in experts)
    assert torch.equal(host.sample(model), windows(first, second, step)), str(handle.report)
    assert [len(stage.steps) for stage in handle.report.stages] == [step, STEPS - step]
    assert handle.report.letters[step] == "F"


def test_a_schedule_of_full_steps_changes_nothing(host, join, apply, sigmas):
    for sampler in ("euler", "dpmpp_2m", "heun", "dpmpp_sde"):
        plain = host.sample(join(sigmas[4]), sampler)
        assert torch.equal(host.sample(apply(join(sigmas[4]), "8*(F)")[0], sampler), plain), sampler


def test_a_schedule_put_on_before_the_models_are_joined_is_for_both(host, experts, join, apply, sigmas):
    text = "F|FPPXX@2|FX"
    after, _ = apply(join(sigmas[4]), text)
    before, handle = apply(experts[0], text)
    assert torch.equal(host.sample(join(sigmas[4], before, experts[1])), host.sample(after))
    assert handle.report.letters == "FFPPFXFX"
    both = join(sigmas[4], before, apply(experts[1], "8*(F)")[0])
    assert torch.equal(host.sample(both), host.sample(after))


def test_a_crossing_segment_is_cut_and_the_report_says_so(host, join, apply, sigmas):
    model, handle = apply(join(sigmas[4]), "F|FPPPPP@2|F")
    host.sample(model)
    text = str(handle.report)
    assert text.startswith("4 of 8 steps were computed in full, 1 more than the schedule says: see below.")
    assert handle.report.letters == "FFPPFPPF"
    assert "The network changes within a segment of the schedule: step 5 ran in full for that." in text
    assert "High noise, steps 1 to 4: 2 full, 2 partial, " in text and "Low noise, steps 5 to 8: 2 full, 2 partial, " in text


@pytest.mark.parametrize("level", [0.3, 0.6])
def test_the_boundary_is_put_into_the_grid(host, experts, join, apply, sigmas, level):
    """The run is then two windows that meet at the boundary itself."""
    boundary = sigmas[3] + level * (sigmas[4] - sigmas[3])
    grid = torch.tensor(sigmas)
    grid[3 if boundary * boundary > sigmas[3] * sigmas[4] else 4] = boundary
    assert torch.equal(host.sample(join(boundary, in_grid=True)), host.sample(join(boundary), sigmas=grid))
    model, handle = apply(join(boundary, in_grid=True), "4*(FX)")
    host.sample(model)
    assert "across" not in str(handle.report) and [step.sigma for step in handle.report.steps] == pytest.approx(
        grid[:-1].tolist()
    )
    model, handle = apply(join(boundary), "4*(FX)")
    host.sample(model)
    assert f"Step 4 lies across the boundary at sigma {boundary:.4g} and is high noise's." in str(handle.report)


def test_a_schedule_tuned_to_a_joined_model_fits_its_run(host, join, sigmas):
    """Its file has the noise levels that the run has, the boundary's among them."""
    from flexi_core.host.runs import KSamplerRun

    model = join(sigmas[3] * 0.9, in_grid=True)
    latent = {"samples": torch.zeros(1, 3, 32, 32)}
    run = KSamplerRun(model, STEPS, 3.0, "euler", "normal", host.positive, host.negative, latent)
    assert (run.sigmas - sigmas[3] * 0.9).abs().min() < 1e-4
    schedule = Schedule.parse("4*(FX)").with_info(teacher={"sigmas": run.sigmas.tolist()})
    patched, handle = host.adapter.apply_schedule(model, schedule, "refuse")
    host.sample(patched)
    assert handle.report.run.plan.mapping == ""


def test_a_boundary_in_the_models_time_and_in_steps(host, experts, join, sigmas):
    sampling = experts[0].get_model_object("model_sampling")
    wanted = host.sample(join(float(sampling.sigma(torch.tensor(500.0)))))
    assert torch.equal(host.sample(join(500 / 999, unit="timestep")), wanted)
    assert torch.equal(host.sample(join(0.25, unit="share of the run")), host.sample(join(sigmas[2])))


def test_what_is_a_models_own_stays_its_own(host, experts, join, sigmas, windows):
    high, low = (model.clone() for model in experts)
    seen = {"high": [], "low": [], "both": []}

    def note(name, scale):
        def patch(h, skip, options):
            seen[name].append(float(options["sigmas"].max()))
            return h * scale, skip

        return patch

    high.set_model_output_block_patch(note("high", 1.01))
    low.set_model_output_block_patch(note("low", 0.98))
    high.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * 1.01)
    low.set_model_unet_function_wrapper(lambda apply, args: apply(args["input"], args["timestep"], **args["c"]) * 1.02)
    low.set_model_sampler_cfg_function(lambda args: args["uncond"] + 2 * (args["cond"] - args["uncond"]))
    joined = join(sigmas[3], high, low)
    assert torch.equal(host.sample(joined), windows(high, low, 3))
    assert {round(level, 3) for level in seen["high"]} == {round(level, 3) for level in sigmas[:3]}
    assert {round(level, 3) for level in seen["low"]} == {round(level, 3) for level in sigmas[3:-1]}
    joined.set_model_output_block_patch(note("both", 1.005))
    high.set_model_output_block_patch(note("both", 1.005))
    low.set_model_output_block_patch(note("both", 1.005))
    assert torch.equal(host.sample(joined), windows(high, low, 3)), "what is put on the joined model is for both"


def test_wrappers_of_either_stay_its_own_and_a_schedule_runs_within_them(host, experts, join, apply, sigmas, windows):
    from comfy.patcher_extension import WrappersMP

    high, low = (model.clone() for model in experts)
    high.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "mine", lambda executor, *args, **named: executor(*args, **named) * 1.01)
    low.add_wrapper_with_key(
        WrappersMP.DIFFUSION_MODEL, "mine", lambda executor, *args, **named: executor(*args, **named) * 0.99
    )
    assert torch.equal(host.sample(join(sigmas[3], high, low)), windows(high, low, 3))
    text = "FPX@2|FPPXX@2"
    first, second = (apply(each, text)[0] for each in (high, low))
    assert torch.equal(host.sample(apply(join(sigmas[3], high, low), text)[0]), windows(first, second, 3))


def test_a_lora_of_either_stays_its_own(host, experts, join, sigmas, windows, repatched):
    name = "diffusion_model.output_blocks.5.0.in_layers.2.weight"
    patched = []
    for model, strength in zip(experts, (0.05, -0.03), strict=True):
        clone = model.clone()
        clone.add_patches({name: ("diff", (torch.ones_like(model.model.state_dict()[name]) * strength,))})
        patched.append(clone)
    joined = host.sample(join(sigmas[4], *patched))
    assert torch.equal(joined, windows(*patched, 4))
    assert not torch.equal(joined, host.sample(join(sigmas[4])))
    assert torch.equal(host.sample(join(sigmas[4], patched[0], experts[1])), windows(patched[0], experts[1], 4))


def test_a_function_on_the_second_models_guidance_is_no_listener_of_the_samplers(host, experts, join, apply, sigmas):
    low = experts[1].clone()
    low.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * 0.99)
    model, handle = apply(join(sigmas[4], experts[0], low), "4*(FX)")
    host.sample(model)
    assert handle.report.letters == "FXFXFXFX"


def test_a_prompt_for_a_part_of_the_run_keeps_it(host, experts, join, sigmas, windows):
    """Timestep ranges, areas: the conditioning is the same for either."""
    other = host.adapter.demo_conditioning("a small green ring at the top left on a brown background")
    positive = [
        [host.positive[0][0], {"start_percent": 0.0, "end_percent": 0.5}],
        [other[0][0], {"start_percent": 0.5, "end_percent": 1.0, "area": (16, 32, 0, 0), "strength": 0.8}],
    ]
    assert torch.equal(host.sample(join(sigmas[3]), positive=positive), windows(*experts, 3, positive=positive))


def test_models_that_take_conditioning_in_other_forms_get_it_each_in_its_own(host, sdxl_model, typed_model, prompt, join):
    """As SDXL and its refiner, whose vectors beside the prompt have other lengths."""
    base = sdxl_model
    second = typed_model("SDXLRefiner", {**base.model.model_config.unet_config, "adm_in_channels": 2560})
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"noise": noise, "positive": prompt(1), "negative": prompt(2), "latent_image": noise * 0}
    levels = host.sigmas(base, "normal", 6).tolist()
    joined = host.sample(join(levels[3], base, second), steps=6, **options)
    first = host.sample(base, steps=6, last_step=3, **options)
    options |= {"latent_image": first, "noise": noise * 0, "disable_noise": True}
    torch.testing.assert_close(joined, host.sample(second, steps=6, start_step=3, **options), rtol=1e-4, atol=1e-4)


def test_models_that_do_not_go_together_are_refused(host, experts, join, sd15_model):
    high, _ = experts
    with pytest.raises(FlexiError, match="latents differ: high noise has _Pixels, low noise SD15"):
        join(1.0, high, sd15_model)
    with pytest.raises(FlexiError, match="predicts as EPS, low noise as V_PREDICTION"):
        join(1.0, high, host.model_of_type("V_PREDICTION"))
    with pytest.raises(FlexiError, match="one loaded model"):
        join(1.0, high, high.clone())
    with pytest.raises(FlexiError, match="the low noise model has stages already"):
        join(1.0, high, join(1.0))
    with pytest.raises(FlexiError, match="the boundary is 875; as timestep it is 0 to 1"):
        join(875, unit="timestep")


def test_another_shift_is_said(host, experts):
    alike = host.adapter.join_models(*experts, Boundary(1.0, "sigma"))
    assert alike[1] == ()
    flows = [host.model_of_type("FLOW") for _ in range(2)]
    flows[1].get_model_object("model_sampling").set_parameters(shift=3.0)
    said = host.adapter.join_models(*flows, Boundary(0.875))[1]
    assert said == ("The noise levels of a run are the high noise model's (shift 1, not 3); the low noise model's differ.",)


def test_an_interrupted_run_leaves_both_models_as_they_were(host, experts, join, sigmas):
    before = host.sample(join(sigmas[4]))

    class Stop(Exception):
        pass

    def stop(step, *_):
        if step == 5:
            raise Stop

    with pytest.raises(Stop):
        host.sample(join(sigmas[4]), callback=stop)
    assert torch.equal(host.sample(join(sigmas[4])), before)


def test_presets_over_a_joined_model_save_as_much_less_one_step(host, join, sigmas):
    from flexi_core.schedule.presets import Preset

    steps = 20
    levels = host.sigmas(host.adapter.load_demo_model(), "normal", steps).tolist()
    for level in (levels[6], levels[13]):
        model, handle = host.adapter.apply_schedule(join(level), Preset("2x"))
        host.sample(model, steps=steps)
        full = handle.report.letters.count("F")
        assert 10 <= full <= 11 and len(handle.report.stages) == 2
        assert handle.report.words[0].startswith("11 of 20 steps were computed in full, 1 more" if full == 11 else "10 of 20")


WAN = {"dim": 64, "ffn_dim": 128, "freq_dim": 64, "text_dim": 32, "num_heads": 2, "num_layers": 4, "model_type": "t2v"}


@pytest.mark.parametrize("unit", UNITS[3:])
def test_two_experts_of_wan_share_a_schedule_and_no_feature(host, typed_model, generated, join, apply, unit):
    """Their published boundary is a share of the network's own time, whatever the shift; a flow's windows round otherwise."""
    experts = [typed_model("WAN21_T2V", {**WAN, "dtype": torch.float32}) for _ in range(2)]
    generated(experts[1].model.diffusion_model, seed=1)
    sampling = experts[0].get_model_object("model_sampling")
    noise = torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts = [[[torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(seed)), {}]] for seed in (1, 2)]
    options = {"noise": noise, "positive": prompts[0], "negative": prompts[1], "latent_image": noise * 0, "scheduler": "simple"}
    levels = host.sigmas(experts[0], "simple", 10).tolist()
    share = float(unit[-6:-1])
    step = sum(float(sampling.timestep(torch.tensor(level))) > share * 1000 for level in levels)
    assert 1 < step < 9
    text = "F|FPPPPPPPP@2"
    models = [apply(each, text)[0] for each in experts]
    half = host.sample(models[0], steps=10, last_step=step, **options)
    later = {**options, "noise": noise * 0, "latent_image": half, "disable_noise": True}
    windowed = host.sample(models[1], steps=10, start_step=step, **later)
    model, handle = apply(join(0.0, *experts, unit=unit), text)
    torch.testing.assert_close(host.sample(model, steps=10, **options), windowed, rtol=1e-3, atol=1e-3)
    assert handle.report.letters == "FF" + "P" * (step - 2) + "F" + "P" * (9 - step)
    assert all(stage.macs for stage in handle.report.stages)


def test_a_lora_that_comes_with_a_prompt_is_for_both(host, experts, join, sigmas, windows):
    from comfy import hooks

    name = "diffusion_model.output_blocks.5.0.in_layers.2.weight"
    hook, group = hooks.WeightHook(strength_model=0.05), hooks.HookGroup()
    hook.weights, hook.need_weight_init = {name: ("diff", (torch.ones_like(experts[0].model.state_dict()[name]),))}, False
    group.add(hook)
    positive = [[host.positive[0][0], {"hooks": group}]]
    joined = host.sample(join(sigmas[3]), positive=positive)
    assert torch.equal(joined, windows(*experts, 3, positive=positive))
    assert not torch.equal(joined, host.sample(join(sigmas[3])))
    assert torch.equal(host.sample(join(sigmas[3])), windows(*experts, 3)), "the hook stayed on"


def test_a_schedule_file_says_which_other_network_it_was_made_for(host, experts, join, sigmas):
    teacher = host.adapter.teacher_of(join(sigmas[3]), 3.0)
    assert "networks" in teacher and "networks" not in host.adapter.teacher_of(experts[0], 3.0)
    assert host.adapter.teacher_of(join(sigmas[3]), 3.0) == teacher
    assert host.adapter.teacher_of(join(sigmas[4]), 3.0) != teacher
    assert host.adapter.teacher_of(join(sigmas[3], experts[1], experts[0]), 3.0)["networks"] != teacher["networks"]
    schedule = Schedule.parse("4*(FX)").with_info(teacher=teacher)
    for model, differs in ((join(sigmas[3]), False), (join(sigmas[4]), True), (experts[0], True)):
        patched, handle = host.adapter.apply_schedule(model, schedule)
        host.sample(patched)
        assert ("the run changes its network elsewhere, or to another one" in str(handle.report)) is differs


def test_a_joined_model_and_what_it_has_are_cloned_together(host, experts, join, apply, sigmas, windows):
    joined = join(sigmas[3]).clone().clone()
    assert torch.equal(host.sample(joined), windows(*experts, 3))
