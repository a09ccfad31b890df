"""Presets fit any step count and cost what their names say."""

import pytest

from flexi_core import ScheduleError, StepKind
from flexi_core.cost import predicted_speedup
from flexi_core.presets import MODELS, PRESETS, all_full, deepcache, from_kinds, preset, segments_for_speedup, uniform
from flexi_core.schedule_file import made_for
from search_tools.embedded import EmbeddedBackend
from search_tools.teacher import TeacherSettings

STEPS = [*range(1, 61), 100, 999, 1000, 10_000]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_one_step_for_each_of_the_run_and_opens_in_full(name):
    for steps in STEPS:
        schedule = preset(name, steps)
        assert len(schedule) == steps
        assert schedule.letters.startswith("F")


SPEEDUPS = [("1.5x", 1.5), ("2x", 2), ("3x", 3), ("5x", 5)]


@pytest.mark.parametrize(("name", "speedup"), SPEEDUPS)
def test_a_speedup_preset_costs_its_share_to_half_a_step(name, speedup):
    for steps in STEPS:
        full = preset(name, steps).letters.count("F")
        assert abs(full - steps / speedup) <= 0.5 or (full == 1 and steps < speedup)


@pytest.mark.parametrize(("name", "speedup"), SPEEDUPS)
def test_a_speedup_preset_says_what_it_was_measured_on(name, speedup):
    for steps in (20, 25, 30, 50, 28):
        said = preset(name, steps).info["preset"]
        assert said["name"] == name and abs(said["steps"] - steps) <= 3
        assert all(measured["samples"] >= 8 and measured["psnr_db"] > 10 for measured in said["measured"].values())
        assert len(said["measured"]) == 4


@pytest.mark.parametrize("steps", [20, 25, 30, 50])
@pytest.mark.parametrize(("name", "speedup"), SPEEDUPS)
def test_the_embedded_model_has_a_searched_schedule_of_its_own(name, speedup, steps):
    searched, cost = preset(name, steps, "demo"), EmbeddedBackend(TeacherSettings("euler", "normal", steps)).cost
    teacher, measured = (searched.info[part] for part in ("teacher", "measured"))
    assert (len(searched), teacher["model"], teacher["sampler"], teacher["steps"]) == (steps, "embedded", "euler", steps)
    assert measured["speedup_macs"] == pytest.approx(predicted_speedup(searched, cost))
    assert measured["speedup_macs"] >= speedup
    said = made_for(searched)
    assert said.startswith(f"made for {steps} euler steps, normal, cfg 3, 32x32; ") and said.endswith(" dB")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("name", "steps"), [("5x", 28), ("deepcache", 20), ("all-full", 50)])
def test_what_no_search_was_made_for_is_the_same_for_every_model(name, steps, model):
    assert preset(name, steps, model) == preset(name, steps)
    assert made_for(preset(name, steps, model)) == made_for(preset(name, steps))


@pytest.mark.parametrize(("name", "speedup"), SPEEDUPS)
def test_nulls_of_the_speedup_presets_are_extrapolated(name, speedup):
    assert all(set(preset(name, steps).letters) == {"F", "X"} for steps in (7, 20, 30, 333))


def test_segments_of_a_speedup_have_their_first_full_steps_together_and_the_rest_evenly():
    for steps in (20, 25, 50, 100):
        for speedup in (2, 3, 5):
            letters = segments_for_speedup(steps, speedup).letters
            full = letters.count("F")
            head = len(letters) - len(letters.lstrip("F"))
            assert head >= round(0.3 * full)
            gaps = [len(gap) for gap in letters[head:].split("F")]
            assert max(gaps) - min(gaps[:-1]) <= 1 and gaps[-1] <= max(gaps)


def test_deepcache_is_one_full_step_then_partial_ones():
    schedule = preset("deepcache", 8)
    assert schedule.letters == "FPPFPPFP"
    assert {segment.depth for segment in schedule.segments} == {3}
    assert str(deepcache(10, interval=5, depth=1)) == "2*(FPPPP@1)"
    assert str(deepcache(10, interval=5, depth=1, forecast=1)) == "2*(FPPPP@1^1)"
    assert deepcache(4, interval=1) == all_full(4)


def test_all_full_is_the_teacher():
    for steps in STEPS:
        assert preset("all-full", steps).is_all_full


def test_uniform_spreads_its_full_steps_evenly():
    assert uniform(20, 5).letters == "FXXX" * 5
    assert uniform(20, 5, StepKind.NULL).letters == "FNNN" * 5
    for steps in (7, 25, 50):
        for full in range(1, steps + 1):
            letters = uniform(steps, full).letters
            assert letters.count("F") == full and letters[0] == "F"
            gaps = [len(gap) for gap in letters.split("F")[1:]]
            assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: preset("4x", 20), "unknown preset '4x'; known: 1.5x, 2x, 3x, 5x, deepcache, all-full"),
        (lambda: preset("2x", 20, "sdxl"), "unknown model 'sdxl' of a preset; known: any, demo"),
        (lambda: preset("2x", 0), "a run has 0 steps; presets are for 1 to 10000"),
        (lambda: preset("deepcache", -1), "a run has -1 steps"),
        (lambda: preset("all-full", 10_001), "a run has 10001 steps"),
        (lambda: deepcache(20, interval=0), "the interval is 0"),
        (lambda: deepcache(20, depth=0), "has depth 0; a depth is 1 to 1000"),
        (lambda: uniform(20, 0), "0 full steps do not fit a run of 20"),
        (lambda: uniform(20, 21), "21 full steps do not fit a run of 20"),
        (lambda: segments_for_speedup(20, 0.5), "the speed-up is 0.5; 1 means every step full"),
        (lambda: from_kinds([]), "the first step of a schedule is full"),
        (lambda: from_kinds([StepKind.NULL, StepKind.FULL]), "the first step of a schedule is full"),
        (lambda: from_kinds([StepKind.FULL, StepKind.PARTIAL]), "has depth None"),
    ],
)
def test_what_no_run_can_have_is_refused(make, message):
    with pytest.raises(ScheduleError, match=message):
        make()


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 20, 50])
def test_any_number_of_full_steps_can_be_asked_for(steps):
    for full in range(1, steps + 1):
        assert segments_for_speedup(steps, steps / full).letters.count("F") == full


def test_what_a_preset_was_measured_on_is_said_in_words():
    said = made_for(preset("3x", 28))
    assert said.startswith("30 steps measured, against fewer steps; embedded, euler: +")
    assert said.count(" dB") == 4


@pytest.mark.parametrize(
    "odd", ["x", {"measured": 3}, {"measured": {"a": 1}}, {"measured": {"a": {"over_fewer_steps_db": "x"}}}]
)
def test_an_odd_preset_entry_of_a_file_says_nothing(odd):
    assert made_for(all_full(3).with_info(preset=odd)) == ""
