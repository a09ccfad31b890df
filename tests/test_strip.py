"""What people see of a schedule before it runs, and a step that is changed by a click."""

import pytest

from flexi_core import Schedule, ScheduleError
from flexi_core.schedule.presets import PRESETS, Preset
from flexi_core.schedule.strip import MOST_SHOWN, cycled, in_words, strip_of


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("10*(FX)", "20 steps, 10 computed, about 2.0x"),
        ("4*(FXXXX)", "20 steps, 4 computed, about 5.0x"),
        ("4*(FPPPN@2)", "20 steps, 4 computed, 12 in part, up to 5.0x"),
        ("F|f|f", "3 steps, 3 computed, about 1.5x"),
        ("6*(F)", "6 steps, all computed: plain sampling"),
        ("F", "1 step, all computed: plain sampling"),
    ],
)
def test_a_line_says_how_many_steps_are_computed_and_what_that_saves(text, words):
    assert in_words(Schedule.parse(text)) == words


def test_what_a_page_draws_is_bounded():
    shown = strip_of(Schedule.parse("5000*(FX)")).as_dict()
    assert len(shown["letters"]) == MOST_SHOWN and shown["words"].startswith("10000 steps, 5000 computed")
    assert set(shown["kinds"]) == {"F", "X"}
    assert shown["kinds"]["F"]["colour"] != shown["kinds"]["X"]["colour"]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("steps", [0, 20])
def test_every_preset_has_a_line_before_it_runs(name, steps):
    shown = strip_of(Preset(name, steps))
    assert shown.words and "\n" not in shown.words
    assert (len(shown.letters) == 20) == bool(steps)


def test_a_step_goes_through_the_kinds_and_comes_back():
    schedule, seen = Schedule.parse("F|F|F; order=2"), []
    for _ in range(4):
        schedule = cycled(schedule, 1)
        seen.append(str(schedule))
    assert seen == ["FP@3|F; order=2", "FX|F; order=2", "FN|F; order=2", "3*(F); order=2"]


def test_a_changed_step_leaves_depths_and_blends_as_they_were():
    assert str(cycled(Schedule.parse("FPPX@2~0.5,1|FX~0.9|F"), 2)) == "FPXX@2~0.5,1|FX~0.9|F"
    assert str(cycled(Schedule.parse("FPX@5|F"), 3)) == "FPXX@5"


def test_no_change_makes_what_is_no_schedule(random_schedules):
    changed = 0
    for schedule in random_schedules[:120]:
        for index in range(0, len(schedule), 3):
            try:
                other = cycled(schedule, index)
            except ScheduleError:
                continue
            assert Schedule.parse(str(other)) == other
            differ = [a != b for a, b in zip(schedule.letters, other.letters, strict=True)]
            assert differ == [i == index for i in range(len(schedule))]
            changed += 1
    assert changed > 500


@pytest.mark.parametrize(
    ("text", "index", "why"),
    [("FX", 0, "first step stays full"), ("FX|FP", 2, "live off it"), ("FX", 2, "no step 3"), ("FX", -1, "no step 0")],
)
def test_a_step_that_cannot_change_says_why(text, index, why):
    with pytest.raises(ScheduleError, match=why):
        cycled(Schedule.parse(text), index)
