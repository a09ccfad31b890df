"""Schedules in the host's own samplers: identities, bit for bit where they can be."""

import functools

import pytest
import torch

from flexi_core import FlexiError
from flexi_core.schedule.kinds import StepKind

pytestmark = pytest.mark.usefixtures("small_latents")

SAMPLERS = ("euler", "dpmpp_2m", "heun", "euler_ancestral", "dpmpp_sde", "uni_pc", "lms", "ddim")
MIXED = "2*(F)|FPX@2|FPN@3"  # 8 steps


@pytest.fixture(scope="module")
def plain(host, demo_model):
    """A function that returns what plain sampling makes, computed once for each sampler."""
    kept = {}

    def sample(sampler):
        if sampler not in kept:
            kept[sampler] = host.sample(demo_model, sampler)
        return kept[sampler]

    return sample


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_all_full_schedule_equals_plain_sampling(host, demo_model, apply, plain, sampler):
    model, handle = apply(demo_model, "8*(F)")
    assert torch.equal(host.sample(model, sampler), plain(sampler))
    assert handle.report.letters == "F" * 8


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_model_without_the_node_is_untouched_by_patched_runs(host, demo_model, apply, plain, sampler):
    expected = plain(sampler)
    model, _ = apply(demo_model, MIXED)
    host.sample(model, sampler)
    assert torch.equal(host.sample(demo_model, sampler), expected)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_second_run_equals_the_first(host, demo_model, apply, plain, sampler):
    model, handle = apply(demo_model, MIXED)
    first = host.sample(model, sampler)
    planned = "".join(step.planned.value for step in handle.report.steps)
    assert torch.equal(host.sample(model, sampler), first)
    assert planned == "FFFPXFPN"
    assert not torch.equal(first, plain(sampler))
    assert first.isfinite().all()


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_ancestral"])
def test_a_schedule_that_drives_the_run_off_ends_near_the_plain_picture(host, demo_model, apply, plain, sampler):
    model, handle = apply(demo_model, "FX~100|FX~100|FX~-100|FX~100; basis=derivative")
    sampled = host.sample(model, sampler)
    assert sampled.isfinite().all() and sampled.abs().max() < 2 * plain(sampler).abs().max()
    assert handle.report.letters == "F" * 8
    assert "From step 2 on the run's numbers were far beyond those of its steps before" in str(handle.report)


def test_a_picture_of_numbers_that_are_not_finite_is_said(host, demo_model, apply):
    model, handle = apply(demo_model, MIXED)
    model.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * float("nan"))
    host.sample(model)
    assert "some of its numbers are not finite" in str(handle.report)


def test_cond_and_uncond_in_one_call_and_in_two_give_the_same_latents(host, apply):
    one_call, two_calls = host.adapter.load_demo_model(), host.adapter.load_demo_model()
    two_calls.model.memory_usage_factor = 1e12  # the host splits what does not fit its estimate of the memory
    runs = []
    for model in (one_call, two_calls):
        patched, handle = apply(model, MIXED)
        runs.append((host.sample(patched), handle.report))
    (together, report), (apart, report_of_two) = runs
    assert sum(s.network_calls for s in report_of_two.steps) == 2 * sum(s.network_calls for s in report.steps)
    assert report_of_two.letters == report.letters == "FFFPXFPN"
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-4)


def test_area_prompts_that_share_a_uuid_do_not_share_a_feature(host, demo_model, apply):
    import node_helpers

    def within(conditioning, area):
        return node_helpers.conditioning_set_values(conditioning, {"area": area, "strength": 1.0})

    ring = host.adapter.demo_conditioning("a small white ring on a teal background")
    left, right = (16, 8, 0, 0), (16, 8, 0, 8)
    positive = within(host.positive, left) + within(ring, right)
    # The host fills in the negative's areas with copies of the positive entries, uuid and all; here they are given.
    given = host.negative + within(host.negative, left) + within(host.negative, right)
    model, handle = apply(demo_model, "F|FPP@2|FPP@2")
    shared, apart = (host.sample(model, steps=7, positive=positive, negative=n) for n in (host.negative, given))
    assert handle.report.letters == "FFPPFPP"
    torch.testing.assert_close(shared, apart, rtol=0, atol=1e-4)


def test_batch_of_three_equals_its_rows_sampled_alone(host, demo_model, apply):
    model, _ = apply(demo_model, MIXED)
    noise = host.noise(batch=3)
    batch = host.sample(model, noise=noise)
    for i in range(3):
        torch.testing.assert_close(host.sample(model, noise=noise[i : i + 1]), batch[i : i + 1], rtol=0, atol=1e-4)


def test_cfg_1_runs_partial_steps_on_the_conditioned_half_alone(host, demo_model, apply):
    model, handle = apply(demo_model, MIXED)
    assert host.sample(model, cfg=1.0).isfinite().all()
    assert handle.report.letters == "FFFPXFPN"


def test_removed_steps_equal_a_run_on_the_shorter_grid(host, demo_model, apply):
    model, _ = apply(demo_model, "4*(FN)")
    sigmas = host.sigmas(demo_model, "normal", 8)
    shorter = sigmas[[0, 2, 4, 6, 8]]
    assert torch.equal(host.sample(model, sigmas=sigmas), host.sample(demo_model, sigmas=shorter))


@pytest.mark.parametrize("kind", ["EPS", "V_PREDICTION", "FLOW"])
def test_extrapolated_steps_of_order_0_equal_removed_ones_with_euler(host, apply, kind):
    model = host.model_of_type(kind)
    held, handle = apply(model, "F|FXX|FXXX; order=0")
    removed, _ = apply(model, "F|FNN|FNNN")
    noise = host.noise()
    x, n = (host.sample(m, steps=8, noise=noise) for m in (held, removed))
    assert handle.report.letters == "FFXXFXXX"
    assert x.isfinite().all()
    scale = n.abs().max()
    torch.testing.assert_close(x / scale, n / scale, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["EPS", "V_PREDICTION", "FLOW"])
def test_linear_extrapolation_differs_from_holding_for_every_kind_of_model(host, apply, kind):
    model = host.model_of_type(kind)
    linear, held = (host.sample(apply(model, f"F|FXX|FXXX; order={order}")[0]) for order in (1, 0))
    assert linear.isfinite().all()
    assert not torch.equal(linear, held)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "uni_pc", "dpmpp_sde", "euler_ancestral"])
def test_extrapolated_steps_call_no_network(host, demo_model, apply, sampler):
    model, handle = apply(demo_model, "2*(F)|FX|FXX|F")
    assert host.sample(model, sampler).isfinite().all()
    assert all(step.network_calls == 0 for step in handle.report.steps if step.planned is StepKind.EXTRAPOLATED)
    assert handle.report.letters == "FFFXFXXF"


def test_sampler_that_reads_the_unguided_prediction_computes_its_extrapolated_steps(host, demo_model, apply):
    model, handle = apply(demo_model, "2*(F)|FXX|FXX")
    assert torch.equal(host.sample(model, "euler_cfg_pp"), host.sample(demo_model, "euler_cfg_pp"))
    assert handle.report.letters == "F" * 8
    assert "the sampler reads the unguided prediction" in str(handle.report)


def test_sampler_reads_and_sets_what_the_guider_has(host, demo_model, apply):
    euler = host.comfy.samplers.sampler_object("euler").sampler_function

    def two_scales(denoiser, x, sigmas, **options):
        guider = denoiser.inner_model
        x = euler(denoiser, x, sigmas[:4], **options)
        guider.cfg = guider.cfg / 2
        return euler(denoiser, x, sigmas[3:], **options)

    def sample(model):
        sampler = host.comfy.samplers.KSAMPLER(two_scales)
        prompts, noise = (host.positive, host.negative), host.noise()
        sigmas = host.sigmas(model, "normal", 8)
        return host.comfy.sample.sample_custom(
            model, noise, 3.0, sampler, sigmas, *prompts, torch.zeros_like(noise), disable_pbar=True
        )

    model, handle = apply(demo_model, "8*(F)")
    assert torch.equal(sample(model), sample(demo_model))
    assert not torch.equal(sample(model), host.sample(model)), "the sampler's own scale changes nothing"
    assert handle.report.letters == "F" * 8


def test_dpm_adaptive_stands_down_with_a_sentence(host, demo_model, apply):
    model, handle = apply(demo_model, "4*(FX)")
    patched, plain = (host.sample(m, "dpm_adaptive", steps=4, cfg=1.0, noise=host.noise(1)) for m in (model, demo_model))
    assert torch.equal(patched, plain)
    assert "dpm_adaptive chooses its own noise levels" in str(handle.report)


WINDOWS = "2*(F)|FPX@2|FX|2*(F)|2*(F)|FPX@2|F|FXX"  # 18: what step 10 begins needs nothing of the first half


@pytest.fixture(scope="module")
def windows(host):
    """A function of (first model, second model, sampler) that samples each half of 18 steps with a model of its own."""

    def sample(first, second, sampler):
        half = host.sample(first, sampler, 18, start_step=0, last_step=9, force_full_denoise=False)
        nothing = torch.zeros_like(half)
        return host.sample(second, sampler, 18, noise=nothing, latent_image=half, start_step=9, disable_noise=True)

    return sample


@pytest.fixture(scope="module")
def plain_windows(host, demo_model, windows):
    """A function of a sampler: the 18 steps of plain sampling in two windows, and in one."""
    return functools.cache(lambda sampler: (windows(demo_model, demo_model, sampler), host.sample(demo_model, sampler, 18)))


@pytest.mark.parametrize("on_mismatch", ["map", "refuse", "off"])
@pytest.mark.parametrize("with_grid", [True, False])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_two_windows_of_ksampler_advanced_take_their_own_stretches_of_a_schedule(
    host, demo_model, windows, plain_windows, sampler, with_grid, on_mismatch
):
    from flexi_core import Schedule

    schedule = Schedule.parse(WINDOWS)
    if with_grid:
        schedule = schedule.with_info(teacher={"sigmas": host.sigmas(demo_model, "normal", 18).tolist()})
    whole, _ = host.adapter.apply_schedule(demo_model, schedule)
    first, early = host.adapter.apply_schedule(demo_model, schedule, on_mismatch)
    second, late = host.adapter.apply_schedule(demo_model, schedule, on_mismatch)
    made = windows(first, second, sampler)
    letters = schedule.letters
    assert (early.report.letters, late.report.letters) == (letters[:9], letters[9:])
    assert "takes steps 1 to 9 of the schedule's 18" in str(early.report)
    assert "takes steps 10 to 18 of the schedule's 18" in str(late.report)
    plain, at_once = plain_windows(sampler)
    apart = (plain - at_once).abs().max()
    assert (made - host.sample(whole, sampler, 18)).abs().max() <= 2 * apart + 1e-5
    assert (made - plain).abs().max() > 1e-4


def test_a_window_of_the_middle_takes_the_middle_of_a_schedule(host, demo_model, apply):
    model, handle = apply(demo_model, MIXED)
    host.sample(model, start_step=2, last_step=6, force_full_denoise=False)
    assert "takes steps 3 to 6 of the schedule's 8" in str(handle.report)


def test_denoise_below_1_takes_the_end_of_a_longer_schedule(host, demo_model, apply):
    model, handle = apply(demo_model, "F|FXX|FXX|FXX")
    picture = host.sample(demo_model)
    assert host.sample(model, steps=5, denoise=0.5, latent_image=picture).isfinite().all()
    assert "takes steps 6 to 10 of the schedule's 10" in str(handle.report) and handle.report.letters == "FXFXX"


def test_file_with_a_sigma_grid_maps_a_window_by_noise_level(host, demo_model):
    from flexi_core import Schedule

    sigmas = host.sigmas(demo_model, "normal", 8).tolist()
    schedule = Schedule.parse("4*(F)|FXXX").with_info(teacher={"sigmas": sigmas})
    model, handle = host.adapter.apply_schedule(demo_model, schedule)
    host.sample(model, start_step=4, last_step=8)
    assert handle.report.letters == "FXXX"
    assert "takes steps 5 to 8 of the schedule's 8" in str(handle.report)


def test_mismatch_is_refused_when_asked(host, demo_model, apply):
    model, _ = apply(demo_model, "4*(FX)", "refuse")
    assert host.sample(model, steps=8).isfinite().all()
    with pytest.raises(FlexiError, match="the schedule has 8 steps, the run 5"):
        host.sample(model, steps=5)


def test_mismatch_turns_the_schedule_off_when_asked(host, demo_model, apply):
    model, handle = apply(demo_model, "4*(FX)", "off")
    assert torch.equal(host.sample(model, steps=5), host.sample(demo_model, steps=5))
    assert "The schedule is off" in str(handle.report)


def test_mismatch_is_mapped_by_default(host, demo_model, apply):
    model, handle = apply(demo_model, "4*(F)|FXXX")
    assert host.sample(model, steps=4).isfinite().all()
    assert handle.report.letters == "FFFX"
    assert "8 steps mapped to 4 by position" in str(handle.report)


def test_file_made_for_another_sampler_and_model_says_so(host, demo_model):
    from flexi_core import Schedule

    teacher = {"sampler": "dpmpp_2m", "architecture": "sha256:0"}
    model, handle = host.adapter.apply_schedule(demo_model, Schedule.parse("4*(FX)").with_info(teacher=teacher))
    host.sample(model)
    assert "the sampler was dpmpp_2m, the run's is euler" in str(handle.report)
    assert "the network's architecture differs" in str(handle.report)


def test_weights_are_known_again_after_another_clones_lora(host, demo_model):
    from flexi_core import Schedule
    from flexi_core.networks.fingerprint import weights_fingerprint

    network = demo_model.model.diffusion_model
    host.sample(demo_model, steps=2)
    schedule = Schedule.parse("2*(FX)").with_info(teacher={"weights": weights_fingerprint(network)})
    name = "diffusion_model.output_blocks.5.0.in_layers.2.weight"
    lora = demo_model.clone()
    lora.add_patches({name: ("diff", (torch.ones_like(demo_model.model.state_dict()[name]),))})
    patched, report_of_lora = host.adapter.apply_schedule(lora, schedule)
    host.sample(patched, steps=4)
    assert "the network's weights are patched (a LoRA)" in str(report_of_lora.report)
    model, _ = host.adapter.apply_schedule(demo_model, schedule, "refuse")
    assert host.sample(model, steps=4).isfinite().all()


def test_unknown_way_to_meet_a_mismatch_is_refused(demo_model, apply):
    with pytest.raises(FlexiError, match="expected one of map, refuse, off"):
        apply(demo_model, "F", "resample")


@pytest.mark.matrix("Runs", "interrupted in the middle, then run again")
def test_interrupted_run_leaves_nothing_to_the_next(host, demo_model, apply, record_property):
    model, handle = apply(demo_model, MIXED)
    expected = host.sample(model)
    report = handle.report

    def stop_at_four(step, *_):
        if step == 4:
            host.comfy.model_management.interrupt_current_processing()
            host.comfy.model_management.throw_exception_if_processing_interrupted()

    with pytest.raises(BaseException) as raised:
        host.sample(model, callback=stop_at_four)
    assert raised.typename == "InterruptProcessingException"
    assert handle.report is report, "a run that was broken off has no report"
    assert host.adapter.KEY not in model.model_options["transformer_options"]
    assert torch.equal(host.sample(model), expected)
    assert not any(step.fallbacks for step in handle.report.steps)
    record_property("does", "the next run starts empty and gives its own latent")


@pytest.mark.matrix("Runs", "one model in two samplers of different size")
def test_one_patched_model_in_two_samplers_of_different_size(host, demo_model, apply, record_property):
    model, handle = apply(demo_model, MIXED)
    small, large = host.noise(size=16), host.noise(size=24)
    alone = host.sample(model, noise=small)
    bigger = host.sample(model, noise=large)
    assert bigger.isfinite().all()
    assert torch.equal(host.sample(model, noise=small), alone)
    assert not any(step.fallbacks for step in handle.report.steps)
    record_property("does", "each run has a cache of its own")


def test_reports_of_two_samplers_are_told_apart_by_their_latents(host, demo_model, apply):
    model, handle = apply(demo_model, "4*(FX)")
    first, second = host.sample(model, steps=8), host.sample(model, steps=4)
    assert len(handle.report_of(first).steps) == 8
    assert len(handle.report_of(second).steps) == 4
    for dtype in (torch.float16, torch.bfloat16):
        assert handle.report_of(first.to(dtype)) is handle.report_of(first)
    assert handle.report_of(torch.zeros(1)) is None, "another run's numbers"
    for _ in range(8):
        host.sample(model, steps=2, noise=host.noise(1))
    assert handle.report_of(first) is None, "the last run's numbers"


def test_later_of_two_schedules_wins(host, demo_model, apply):
    earlier, first = apply(demo_model, "8*(F)")
    both, second = apply(earlier, MIXED)
    assert torch.equal(host.sample(both), host.sample(apply(demo_model, MIXED)[0]))
    assert first.report is None
    assert second.report.letters == "FFFPXFPN"
