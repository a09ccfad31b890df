"""A schedule laid over a run: which step runs what, and how other step counts, denoise and windows are mapped."""

import math
import re
from dataclasses import FrozenInstanceError

import pytest
import torch

from flexi_core import Schedule, ScheduleError, StepKind
from flexi_core.run.plan import make_plan
from flexi_core.run.sampler import SamplerTraits
from flexi_core.schedule.levels import same_grid


def grid(steps: int, high: float = 14.6, low: float = 0.03) -> list[float]:
    """Return `steps` noise levels even in log sigma, with a last 0."""
    return [high * (low / high) ** (i / max(steps - 1, 1)) for i in range(steps)] + [0.0]


def made_for(text: str, sigmas: list[float]) -> Schedule:
    """Return the schedule as its file would have it, with the teacher's sigma grid."""
    return Schedule.parse(text).with_info(teacher={"sigmas": sigmas})


@pytest.mark.parametrize("with_grid", [False, True])
def test_at_its_own_step_count_a_plan_is_the_schedule(random_schedules, with_grid):
    for schedule in random_schedules[:100]:
        sigmas = grid(len(schedule))
        if levels := schedule.sigmas:  # another grid between the same ends
            sigmas = [levels[0], *(0.9 * level + 0.1 * levels[-1] for level in levels[1:-1]), levels[-1]]
        plan = make_plan(schedule.with_info(teacher={"sigmas": sigmas}) if with_grid else schedule, sigmas)
        assert plan.steps == tuple(schedule.steps())
        assert plan.sigmas == (schedule.sigmas or tuple(sigmas))
        assert plan.rule.blend == (1.0,) * (schedule.order + 1)
        assert plan.mapping == ""


def test_the_sampler_gets_the_schedules_own_noise_levels_where_they_fit_the_runs_ends():
    schedule, run = Schedule.parse("FNX; sigmas=8/5/3/0"), torch.tensor([8.0, 4.0, 2.0, 0.0])
    moved = make_plan(schedule, run.tolist())
    assert moved.moved and moved.mapping == ""
    assert moved.sampled(run).tolist() == [8.0, 3.0, 0.0]
    kept = make_plan(schedule, (2 * run).tolist())
    assert not kept.moved and kept.mapping == "noise levels are left out, the run begins or ends elsewhere"
    assert kept.sampled(2 * run).tolist() == [16.0, 4.0, 0.0]


def test_the_full_step_that_a_mapped_segment_opens_with_forecasts_nothing():
    plan = make_plan(Schedule.parse("F|FPPP@2^1"), grid(4)[1:])
    assert [(step.kind.value, step.depth, step.forecast, step.blend) for step in plan.steps if step.kind.is_full] == [
        ("F", None, 0, None)
    ] * plan.letters.count("F")


def test_a_plan_is_a_value():
    with pytest.raises(FrozenInstanceError):
        make_plan(Schedule.parse("FX"), grid(2)).moved = True


@pytest.mark.parametrize("with_grid", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50])
def test_in_every_mapped_plan_each_segment_opens_in_full_and_keeps_its_order(random_schedules, with_grid, steps):
    for schedule in random_schedules[:60]:
        schedule = schedule.with_info(teacher={"sigmas": grid(len(schedule), high=20.0)} if with_grid else {})
        plan = make_plan(schedule, grid(steps))
        assert len(plan.steps) == steps
        assert plan.steps[0].kind is StepKind.FULL
        for number in {step.segment for step in plan.steps}:
            letters = "".join(step.kind.value for step in plan.steps if step.segment == number)
            assert re.fullmatch("(F+[Pp]*|Ff*p*|f+p*)[NX]*", letters)
        assert [step.segment for step in plan.steps] == sorted(step.segment for step in plan.steps)


def test_without_a_grid_steps_are_mapped_by_position():
    plan = make_plan(Schedule.parse("FFXX|FPPP@2"), grid(4))
    assert plan.letters == "FXFP"
    assert plan.steps[3].depth == 2
    assert plan.mapping == "8 steps mapped to 4 by position in the run"


@pytest.mark.parametrize("with_grid", [False, True])
def test_a_mapping_that_leaves_nothing_of_the_saving_says_so(with_grid):
    schedule = made_for("10*(FX)", grid(20)) if with_grid else Schedule.parse("10*(FX)")
    for steps in (1, 2, 4, 10):
        plan = make_plan(schedule, grid(steps))
        saves = set(plan.letters) != {"F"}
        said = f"This schedule saves nothing here: made for 20 steps, laid over {steps}, every step is computed."
        assert plan.lost == ("" if saves else said)
    assert make_plan(schedule, grid(4)).lost
    assert not make_plan(schedule, grid(20)).lost and not make_plan(schedule, grid(40)).lost


def test_a_schedule_that_saved_nothing_has_nothing_to_lose():
    assert not make_plan(Schedule.parse("20*(F)"), grid(4)).lost


def test_twice_the_steps_by_position_doubles_every_step():
    assert make_plan(Schedule.parse("FX|FPN@1"), grid(10)).letters == "FFXXFFPPNN"


def test_with_a_grid_steps_are_mapped_by_noise_level():
    # The run covers the lower half of the schedule's noise levels only; by position it would begin with the first segment.
    sigmas = grid(8)
    plan = make_plan(made_for("FFFF|FPXX@1", sigmas), [1.01 * sigma for sigma in sigmas[4:]])
    assert plan.letters == "FPXX"
    assert plan.mapping == "8 steps mapped to 4 by noise level"


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (4, 8), (3, 8), (2, 6), (0, 8)])
@pytest.mark.parametrize("with_grid", [True, False])
def test_a_window_takes_its_own_stretch_of_the_schedule(start, stop, with_grid):
    sigmas = grid(8)
    whole = made_for("FF|FPX@1|FXX", sigmas) if with_grid else Schedule.parse("FF|FPX@1|FXX")
    plan = make_plan(whole, sigmas[start : stop + 1], top=sigmas[0])
    assert plan.letters == "F" + whole.letters[start + 1 : stop]
    window = f"the run is a window: it takes steps {start + 1} to {stop} of the schedule's 8"
    assert plan.mapping == ("" if stop - start == 8 else window)
    assert not plan.lost


def test_a_shorter_run_from_top_to_bottom_is_no_window():
    sigmas = grid(4)
    for schedule in (Schedule.parse("FF|FPX@1|FXX"), made_for("FF|FPX@1|FXX", grid(8))):
        assert "mapped to 4" in make_plan(schedule, sigmas, top=sigmas[0]).mapping


def test_without_the_models_top_nothing_is_taken_for_a_window():
    assert "by position" in make_plan(Schedule.parse("FF|FPX@1|FXX"), grid(8)[:5]).mapping


def test_a_noise_level_takes_the_nearest_step_in_log_sigma():
    # 5 lies nearer to 1 in sigma (4 to 1 apart, 10 to 5: 5), but nearer to 10 in log sigma.
    plan = make_plan(made_for("FF|FX", [100.0, 10.0, 1.0, 0.1, 0.0]), [100.0, 5.0, 0.9, 0.11, 0.0])
    assert plan.letters == "FFFX"
    assert [step.segment for step in plan.steps] == [0, 1, 2, 2]


def test_the_same_count_on_another_grid_is_mapped_by_noise_level():
    teacher = grid(6)
    plan = make_plan(made_for("FFFXXX", teacher), grid(6, high=1.0))
    assert "6 steps mapped to 6 by noise level" in plan.mapping
    assert plan.letters != "FFFXXX"
    assert make_plan(Schedule.parse("FFFXXX"), grid(6, high=1.0)).letters == "FFFXXX"


@pytest.mark.parametrize("start", range(10))
def test_denoise_below_one_runs_the_schedules_own_end(start):
    text = "F|FPN@1|FXX|FPX@2"
    schedule, sigmas = Schedule.parse(text), grid(10)
    plan = make_plan(made_for(text, sigmas), sigmas[start:])
    assert plan.letters[0] == "F"
    assert plan.letters[1:] == schedule.letters[start + 1 :]


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (2, 6), (5, 10), (3, 4)])
def test_a_window_runs_the_schedules_own_steps_of_that_window(start, stop):
    text = "F|FPN@1|FXX|FPX@2"
    schedule, sigmas = Schedule.parse(text), grid(10)
    plan = make_plan(made_for(text, sigmas), sigmas[start : stop + 1])
    assert plan.letters == "F" + schedule.letters[start + 1 : stop]
    assert len(plan.steps) == stop - start


def test_removed_steps_leave_their_sigmas_out_and_the_last_sigma_stays():
    plan = make_plan(Schedule.parse("FNN|FXN|F"), [7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    assert plan.kept == (0, 3, 4, 6, 7)
    assert [plan.sigmas[i] for i in plan.kept] == [7.0, 4.0, 3.0, 1.0, 0.0]


def test_a_run_without_removed_steps_keeps_every_sigma():
    assert make_plan(Schedule.parse("FPPXX@1"), grid(5)).kept == (0, 1, 2, 3, 4, 5)


def test_the_first_sigma_of_a_run_is_never_removed(random_schedules):
    for schedule in random_schedules[:50]:
        for steps in (1, 3, 17):
            assert make_plan(schedule, grid(steps)).kept[0] == 0


@pytest.mark.parametrize("factor", [1.0, 1 + 5e-5, 1 - 5e-5])
@pytest.mark.parametrize("steps", [1, 2, 20, 50, 500])
def test_a_step_is_known_by_its_sigma_with_rounding(steps, factor):
    plan = make_plan(Schedule.parse(f"{steps}*(F)"), grid(steps))
    assert [plan.step_index(sigma * factor) for sigma in plan.sigmas[:-1]] == list(range(steps))


def test_a_float32_sigma_finds_its_float64_step():
    plan = make_plan(Schedule.parse("50*(F)"), grid(50))
    assert [plan.step_index(float(torch.tensor(sigma))) for sigma in plan.sigmas[:-1]] == list(range(50))


def test_between_two_sigmas_the_upper_step_runs():
    plan = make_plan(Schedule.parse("FFF"), [8.0, 4.0, 2.0, 0.0])
    assert [plan.step_index(sigma) for sigma in (9.0, 8.0, 6.0, 4.5, 3.0, 2.0, 1.0, 0.0)] == [0, 0, 0, 0, 1, 2, 2, 2]


def test_a_removed_step_is_never_the_one_that_runs():
    plan = make_plan(Schedule.parse("FNFX"), [8.0, 4.0, 2.0, 1.0, 0.0])
    assert [plan.step_index(sigma) for sigma in (8.0, 5.0, 4.0, 3.0, 2.0, 1.5, 1.0, 0.1)] == [0, 0, 0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize("text", ["FFFF", "FNFX", "FNNN", "FXXX"])
def test_places_are_in_steps_of_the_whole_run_removed_ones_too(text):
    plan = make_plan(Schedule.parse(text), [8.0, 4.0, 2.0, 1.0, 0.0])
    for factor in (1.0, 1 + 5e-5, 1 - 5e-5):
        assert [plan.place(factor * sigma) for sigma in (8.0, 4.0, 2.0, 1.0, 0.0)] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert [plan.place(sigma) for sigma in (6.0, 3.0, 1.5, 0.25)] == pytest.approx([0.5, 1.5, 2.5, 3.75])


@pytest.mark.parametrize(
    ("goes_back", "risen"), [(-1, [7.0, 6.0, 10.0, 9.9997]), (0, [7.0, 6.0, 10.0, 9.9997]), (1, [10.0, 9.9997])]
)
def test_new_noise_is_a_question_farther_up_than_the_sampler_goes_back(goes_back, risen):
    plan = make_plan(Schedule.parse("FFF"), [10.0, 7.0, 5.0, 0.0], SamplerTraits(goes_back=goes_back))
    assert [sigma for sigma in (0.0, 4.0, 5.0, 7.0, 6.0, 10.0, 9.9997) if plan.rises(sigma, lowest=5.0)] == risen
    assert not plan.rises(5.0003, lowest=5.0), "a level comes back with rounding"


def test_places_rise_as_sigma_falls(random_schedules):
    for schedule in random_schedules[:20]:
        plan = make_plan(schedule, grid(30))
        places = [plan.place(30 * 0.97**i) for i in range(300)]
        assert places == sorted(places)
        assert places[0] >= 0.0 and places[-1] <= 30.0


def test_a_full_step_keeps_its_feature_at_the_depth_of_its_segments_partial_steps():
    plan = make_plan(Schedule.parse("F|FPN@2|FX|FP@4"), grid(8))
    assert [plan.capture_depth(i) for i in range(8)] == [None, 2, 2, 2, None, None, 4, 4]


def test_a_segment_whose_partial_steps_are_mapped_away_keeps_no_feature():
    plan = make_plan(Schedule.parse("FPXXXXXX@2"), grid(2))
    assert plan.letters == "FX"
    assert plan.capture_depth(0) is None


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([], "the run has 0 steps"),
        ([1.0], "the run has 0 steps; a schedule needs at least one"),
        ([1.0, 2.0, 3.0], "do not fall from step to step"),
        ([0.0, 1.0], "do not fall"),
        ([3.0, 2.0, 2.0, 0.0], "do not fall"),
        ([math.nan, 1.0, 0.0], "do not fall"),
        ([math.inf, 1.0, 0.0], "do not fall"),
    ],
)
def test_a_run_that_does_not_denoise_is_refused(sigmas, message):
    with pytest.raises(ScheduleError, match=message):
        make_plan(Schedule.parse("FX"), sigmas)


def test_grids_are_one_up_to_rounding():
    assert same_grid([4.0, 1.0, 0.0], [4.0004, 1.0, 1e-7])
    assert not same_grid([4.0, 1.0, 0.0], [4.04, 1.0, 0.0])
    assert not same_grid([4.0, 1.0, 0.0], [4.0, 0.0])
