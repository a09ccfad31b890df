"""Runs that would leave the finite numbers: their noise levels are refused, their steps computed in full from there on."""

import json
import math

import pytest
import torch

from flexi_core import Schedule, ScheduleError, load_schedule
from flexi_core.run.plan import make_plan
from flexi_core.run.report import RunReport
from flexi_core.run.run import Run
from flexi_core.runtime.sampling import sample_dpmpp_2m, sample_euler
from flexi_core.schedule.levels import between_ends, check_levels
from flexi_core.schedule.presets import all_full

NEAR = math.nextafter(4.0, 0.0)  # another float64, the same float32
WILD = "FFX~100,100|FX~100,100|FX~-100,100|FX~100,100|FX~100,100|FX~100,100|F"


@pytest.mark.parametrize("level", [NEAR, 4.0 * (1 - 2**-23), 4.0 * (1 - 1e-6), 4.0 * (1 - 0.9e-4)])
def test_levels_that_samplers_cannot_tell_apart_are_refused(level):
    with pytest.raises(ScheduleError, match="which samplers do not bear"):
        Schedule.parse(f"FFF; sigmas=14/4/{level!r}/0")


@pytest.mark.parametrize("ends", ["1e300/4/1/0", "1e19/4/1/0", "14/4/1e-9/0", "14/4/1e-45/0", "14/4/1/1e-320"])
def test_levels_beyond_what_float32_can_divide_by_are_refused(ends):
    with pytest.raises(ScheduleError, match="noise levels"):
        Schedule.parse(f"FFF; sigmas={ends}")


def test_levels_are_told_apart_up_to_the_smallest_gap():
    assert Schedule.parse("FFF; sigmas=14/4/3.999/0").sigmas == (14, 4, 3.999, 0)


def test_a_run_or_a_file_whose_levels_fall_in_float64_alone_is_refused(tmp_path):
    with pytest.raises(ScheduleError, match="do not fall"):
        check_levels([14.0, 4.0, NEAR, 0.0])
    file = tmp_path / "s.json"
    teacher = {"sigmas": [14.0, 4.0, NEAR, 0.0]}
    file.write_text(json.dumps({"format": "flexiffusion-schedule", "version": 1, "schedule": "FFX", "teacher": teacher}))
    with pytest.raises(ScheduleError, match=r"teacher\.sigmas does not fall"):
        load_schedule(file)


def test_levels_too_near_to_the_ends_of_the_run_are_not_taken():
    assert between_ends((14.0, 13.99, 0.0), (14.0, 7.0, 0.0)) == (14.0, 13.99, 0.0)
    assert between_ends((14.0, 13.99, 0.0), (13.9900001, 7.0, 0.0)) is None


@pytest.mark.parametrize("sampler", [sample_euler, sample_dpmpp_2m])
def test_blends_that_multiply_each_other_become_full_steps_and_the_report_says_from_where(gaussian, sampler):
    sigmas, x = gaussian.sigmas(14), gaussian.start(10.0)
    plain = sampler(gaussian.denoise, x, sigmas)
    sampled, run = gaussian.sample(sampler, WILD, sigmas, x)
    fallen = [i + 1 for i, record in enumerate(run.records) if record.fallbacks]
    assert fallen and (sampled - plain).abs().max() < 1
    words = str(RunReport(run, 1.0))
    assert f"From step {fallen[0]} on the run's numbers were far beyond" in words
    assert "every later step was computed in full" in words
    assert fallen == [i + 1 for i, step in enumerate(run.plan.steps) if step.kind.value == "X" and i + 1 >= fallen[0]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("text", ["FP@1|FP@1|F", "F|fX|F|FX"])
def test_a_cheaper_step_that_is_not_finite_is_computed_again_in_full(text, value):
    sigmas = [5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.0][: len(Schedule.parse(text).letters) + 1]
    run = Run(make_plan(Schedule.parse(text), sigmas))
    x, asked = torch.ones(2, 3), []

    def compute(index: int):
        asked.append((index, run.lost))
        cheap = not run.lost and run.plan.steps[index].kind.value in "Ppf"
        answer = torch.full((2, 3), 0.5)
        answer[1, 2] = value if cheap else 0.5  # of one row alone
        return answer

    answers = [run.predict(x, sigma, lambda i=i: compute(i)) for i, sigma in enumerate(sigmas[:-1])]
    assert all(answer.isfinite().all() for answer in answers)
    assert asked[1] == (1, "") and asked[2] == (1, "from step 2 on the run's numbers were not finite")
    assert run.partial_depth(4.0) is None
    assert {index for index, _ in asked} == set(range(len(sigmas) - 1)), "every later step is computed"


def test_a_full_step_that_is_not_finite_is_said(gaussian):
    sigmas, x = gaussian.sigmas(4), gaussian.start(10.0)
    run = Run(make_plan(Schedule.parse("FXFX"), sigmas.tolist()))
    sample_euler(lambda x, s: run.predict(x, float(s), lambda: x * float("nan")), x, sigmas)
    assert run.lost == "from step 1 on the run's numbers were not finite"


def test_plain_sampling_is_not_judged():
    run = Run(make_plan(all_full(2), [4.0, 2.0, 0.0]))
    for sigma in (4.0, 2.0):
        run.predict(torch.ones(1, 2), sigma, lambda: torch.full((1, 2), float("nan")))
    assert run.lost == ""


def test_steps_that_drift_off_together_do_not_excuse_each_other():
    run = Run(make_plan(Schedule.parse("10*(FX)"), [20.0 - i for i in range(20)] + [0.0]))
    for i in range(20):
        x, step = torch.ones(1, 4), 20.0 - i
        run.predict(x, step, lambda i=i, x=x, step=step: x - step * torch.full((1, 4), 6.0**i))
    assert run.lost.startswith("from step 3 on") or run.lost.startswith("from step 5 on")
