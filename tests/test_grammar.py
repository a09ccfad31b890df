"""Schedule text: what is read, what is printed, what is refused."""

import time
from dataclasses import FrozenInstanceError, replace

import pytest

from flexi_core import FlexiError, Schedule, ScheduleError, Segment, StepKind
from flexi_core.schedule.schedule import SMALLEST_LEVEL


def test_printing_and_parsing_round_trips(random_schedules):
    for schedule in random_schedules:
        assert Schedule.parse(str(schedule)) == schedule


def test_printing_is_canonical(random_schedules):
    for schedule in random_schedules:
        assert str(Schedule.parse(str(schedule))) == str(schedule)


@pytest.mark.parametrize(
    ("text", "letters", "depths", "order"),
    [
        ("FPPNN@2|2*(FPNNN@1)|FPPPP@3", "FPPNNFPNNNFPNNNFPPPP", [2, 1, 1, 3], 1),
        ("FFXXX|FXXXX; order=2", "FFXXXFXXXX", [None, None, None], 2),
        ("10*(FX)", "FX" * 10, [None] * 10, 1),
        ("FPPNN", "FPPNN", [3], 1),
        (" 2*( FP@1 | 2*(FX) ) ;order=0", "FPFXFXFPFXFX", [1, None, None, 1, None, None], 0),
        ("FPFN@2", "FPFN", [2, None], 1),
        ("F", "F", [None], 1),
        ("FNXNX", "FNXNX", [None], 1),
        ("F|F;", "FF", [None, None], 1),
        ("FX; order=2, sigmas=14.6/.5/0", "FX", [None], 2),
        ("FX;sigmas = 14 / 1e-2 / 0 , order = 0", "FX", [None], 0),
        ("FX; sigmas=1e16/1/0", "FX", [None], 1),
    ],
)
def test_texts_read_as_their_steps(text, letters, depths, order):
    schedule = Schedule.parse(text)
    assert schedule.letters == letters
    assert [segment.depth for segment in schedule.segments] == depths
    assert schedule.order == order
    assert len(schedule) == len(letters)


@pytest.mark.parametrize("text", ["FX FX\nFNN", "2*(FX)\r\nFNN", "FX|\n2*(FX)", " 2*(FX\n)\tFNN ", "FX\n\n FX ; order=0"])
def test_a_line_end_stands_for_the_sign_between_segments(text):
    joined = Schedule.parse(text)
    assert joined.letters.startswith("FXFX") and Schedule.parse(str(joined)) == joined


def test_equal_neighbours_fold_into_a_repeat():
    assert str(Schedule.parse("FP@2|FP@2|FP@1|FX|FX|FX")) == "2*(FP@2)|FP@1|3*(FX)"
    assert str(Schedule.parse("FFFF")) == "4*(F)"


def test_the_default_order_is_not_printed():
    assert str(Schedule.parse("FX; order=1")) == "FX"
    assert str(Schedule.parse("FX; order=0")) == "FX; order=0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the schedule text is empty; write one letter"),
        (" \n ", "the schedule text is empty"),
        ("NFF", "at character 1: a segment starts with a full step, this one is 'NFF'; put an F first"),
        ("XF", "starts with a full step"),
        ("PPF", "starts with a full step"),
        ("FF|NNF", "at character 4: a segment starts with a full step"),
        ("fpp", "the first step has no guidance to reuse; start with F"),
        ("Fx", "at character 2: unknown step 'x'.*did you mean X"),
        ("F|fP", "after f only one half has a deep feature, this segment is 'fP'; write p, or F first"),
        ("FX@2^1", "'FX' has depth 2 and no partial step P"),
        ("FP@2^4", "has forecast order 4; it is 0 to 3"),
        ("FP^1", "unexpected"),
        ("FP@2^x", "expected a forecast order"),
        ("FN~1", "'FN' has a blend and no extrapolated step X; leave out the ~"),
        ("FX~", "expected a factor of a blend such as 0.98, found 'the end'"),
        ("FX~1,x", "expected a factor of a blend such as 0.98, found 'x'"),
        ("FX~1,1,1,1,1", "a blend has 5 factors; it is 1 to 4"),
        ("FX~1e5", "factors are -100 to 100"),
        ("FX~101", "factors are -100 to 100"),
        ("FPQ", "at character 3: unknown step 'Q'; steps are F"),
        ("FN@2", "'FN' has depth 2 and no partial step P to run at it; leave out @2"),
        ("FP@0", "a depth is 1 to 1000 blocks"),
        ("FP@1001", "a depth is 1 to 1000 blocks"),
        ("FP@", r"expected a depth \(a whole number of at most 6 digits\), found 'the end'"),
        ("FP@-1", "expected a depth .*found '-1'"),
        ("FP@1.5", "expected a depth .*found '1.5'"),
        ("FP@1234567", "expected a depth"),
        ("FNP@2", "partial steps come before the null steps"),
        ("FX; depth=2", "unknown option 'depth'; known: order"),
        ("FX; order", "expected '=', found 'the end'"),
        ("FX; order=", "expected the extrapolation order"),
        ("FX; order=4", "the extrapolation order is 4; it is 0"),
        ("FX; =2", "expected an option such as order=2"),
        ("FX; sigmas=", "expected a noise level such as 14.6, found 'the end'"),
        ("FX; sigmas=14/x/0", "expected a noise level such as 14.6, found 'x'"),
        ("FX; sigmas=14/1", "the schedule of 2 steps has 2 noise levels; it is 3, the end's too"),
        ("FX; sigmas=14/-1/-2", "a noise level of the schedule is not a number from 0 up"),
        ("FX; sigmas=14/14/0", "the schedule's noise levels do not fall"),
        ("FX; order=2 order=1", "unexpected 'order'"),
        ("F||F", r"expected steps: letters F, P, N, X, f, p, found '\|'"),
        ("|F", "expected steps"),
        ("F|", "expected steps.*found 'the end'"),
        ("2(F)", r"expected '\*', found '\('"),
        ("2*F", r"expected '\(', found 'F'"),
        ("2*(F", r"expected '\)', found 'the end'"),
        ("2*F)", r"expected '\('"),
        ("F)", r"unexpected '\)'; segments are joined by \|"),
        ("0*(F)", "a repeat count of 0 leaves no steps"),
        ("F, F", "unexpected ','"),
        ("F P", "unexpected 'P'"),
        ("F\x00", "unexpected"),
        ("F€2", "unexpected '€'"),
    ],
)
def test_what_is_no_schedule_is_refused_with_its_reason(text, message):
    with pytest.raises(ScheduleError, match=message):
        Schedule.parse(text)


@pytest.mark.parametrize("value", [None, 3, b"FX", ["FX"]])
def test_what_is_no_text_is_refused(value):
    with pytest.raises(ScheduleError, match="a schedule is text, this is"):
        Schedule.parse(value)


def test_every_refusal_is_one_of_ours():
    with pytest.raises(FlexiError):
        Schedule.parse("N")


def test_a_long_text_is_clipped_in_its_error():
    with pytest.raises(ScheduleError) as refused:
        Schedule.parse("F|" * 5000)
    assert len(str(refused.value)) < 200


def test_a_text_of_sixty_characters_is_shown_whole_in_its_error():
    for text, shown in (("F" * 59 + ")", "F" * 59 + ")"), ("F" * 60 + ")", "F" * 57 + "...")):
        with pytest.raises(ScheduleError) as refused:
            Schedule.parse(text)
        assert f"of the schedule {shown!r}: " in str(refused.value)


@pytest.mark.parametrize(("text", "place"), [("F P", 3), ("F, F", 2), ("2*(F", 5), ("F | PN", 5), ("FP@x", 4), ("FPQQ", 3)])
def test_an_error_names_its_character(text, place):
    with pytest.raises(ScheduleError, match=f"^at character {place}( of|:)"):
        Schedule.parse(text)


def test_repeats_nest_eight_deep_and_no_deeper():
    assert len(Schedule.parse("2*(" * 8 + "F" + ")" * 8)) == 256
    with pytest.raises(ScheduleError, match="nested more than 8 deep"):
        Schedule.parse("1*(" * 9 + "F" + ")" * 9)


@pytest.mark.parametrize("text", ["F" * 10_000, "F" + "X" * 9_999, "10000*(F)", "100*(100*(F))", "5000*(FX)"])
def test_ten_thousand_steps_are_read(text):
    assert len(Schedule.parse(text)) == 10_000


@pytest.mark.parametrize(
    "text",
    ["F" * 10_001, "F" + "X" * 10_000, "10001*(F)", "5001*(FX)", "100*(100*(F))|F", "5000*(FX)|F", "|".join("F" * 10_001)],
)
def test_one_step_more_is_refused(text):
    with pytest.raises(ScheduleError, match="at most 10000"):
        Schedule.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "999999*(FX)",
        "9999*(9999*(9999*(9999*(F))))",
        "|".join(["9999*(F)"] * 5_000),
        "2*(" * 8 + "9999*(F)" + ")" * 8,
        "F" * 200_000,
        "F" + " " * 99_000,
        " " * 49_000 + "F" + " " * 49_000,
        "(" * 90_000,
        "F@" * 45_000,
        "9" * 90_000,
    ],
)
def test_no_text_of_any_size_takes_long(text):
    began = time.perf_counter()
    try:
        assert len(Schedule.parse(text)) <= 10_000
    except ScheduleError as error:
        assert len(str(error)) < 300
    assert time.perf_counter() - began < 1.0


def test_a_text_of_200_kb_is_refused():
    with pytest.raises(ScheduleError, match="has 200000 characters; at most 100000"):
        Schedule.parse("F" * 200_000)


def test_the_steps_of_a_schedule_know_their_segment_and_depth():
    steps = list(Schedule.parse("FPN@2^3|FX~0.5").steps())
    assert [(step.kind.value, step.depth, step.segment, step.forecast, step.blend) for step in steps] == [
        ("F", None, 0, 0, None),
        ("P", 2, 0, 3, None),
        ("N", None, 0, 0, None),
        ("F", None, 1, 0, None),
        ("X", None, 1, 0, (0.5,)),
    ]


def test_a_schedule_its_segments_and_its_steps_are_values():
    schedule = Schedule.parse("FX")
    for value in (schedule, schedule.segments[0], next(schedule.steps())):
        assert hash(value) == hash(replace(value))
        with pytest.raises(FrozenInstanceError):
            value.blend = (1.0,)


def test_noise_levels_at_the_bounds_are_taken_and_beyond_them_refused():
    segments = Schedule.parse("F").segments
    for level in (SMALLEST_LEVEL, 1.0, 1e18):
        assert Schedule(segments, sigmas=(level, 0.0)).sigmas == (level, 0.0)
    for level in (0.99 * SMALLEST_LEVEL, 1.01e18):
        with pytest.raises(ScheduleError, match=r"a level is 0, or 1e-06 to 1e\+18"):
            Schedule(segments, sigmas=(level, 0.0))


def test_numbers_are_read_up_to_a_length_and_clipped_in_errors():
    assert Schedule.parse("FX~0." + 28 * "1").segments[0].blend == (float("0." + 28 * "1"),)
    for text in ("FX~0." + 29 * "1", "FX~" + 31 * "1", "FP@" + 31 * "1"):
        with pytest.raises(ScheduleError, match=f"found '{text[3:23]}'$"):
            Schedule.parse(text)


@pytest.mark.parametrize(("text", "interval"), [("F", 1), ("FX", 1), ("FPP@1", 3), ("FPPNNX@1", 3)])
def test_the_interval_counts_full_and_partial_steps(text, interval):
    (segment,) = Schedule.parse(text).segments
    assert segment.interval == interval


@pytest.mark.parametrize(
    ("kinds", "depth", "message"),
    [
        ("", None, "this one is 'empty'"),
        ("P", 1, "starts with a full step"),
        ("FF", None, "one full step, this one is 'FF'"),
        ("FXP", 1, "move its P forward"),
        ("FP", None, "has depth None"),
        ("FX", 1, "a depth belongs to a segment with P steps"),
    ],
)
def test_no_segment_out_of_order_can_be_made(kinds, depth, message):
    with pytest.raises(ScheduleError, match=message):
        Segment(tuple(StepKind(letter) for letter in kinds), depth)


def test_a_schedule_without_segments_cannot_be_made():
    with pytest.raises(ScheduleError, match="the schedule is empty"):
        Schedule(())


def test_what_a_file_says_takes_no_part_in_equality():
    assert Schedule.parse("FX").with_info(note="mine") == Schedule.parse("FX")
    assert Schedule.parse("FX") != Schedule.parse("FX; order=2")


@pytest.mark.parametrize(("text", "expected"), [("FFF", True), ("3*(F)", True), ("FX", False), ("FP@1", False), ("FN", False)])
def test_all_full_is_known(text, expected):
    assert Schedule.parse(text).is_all_full is expected


@pytest.mark.parametrize("factor", [1e-05, -3.0000000000000004, 0.1, 99.99999999999999, 5e-324])
def test_a_blend_of_any_factor_round_trips(factor):
    schedule = Schedule((Segment((StepKind.FULL, StepKind.EXTRAPOLATED), blend=(1.0, factor)),))
    assert Schedule.parse(str(schedule)) == schedule


def test_a_segment_that_is_put_together_by_hand_is_held_to_the_same():
    with pytest.raises(ScheduleError, match="has a blend and no extrapolated step X"):
        Segment((StepKind.FULL, StepKind.NULL), None, (1.0,))
