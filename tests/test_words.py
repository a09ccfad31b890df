"""What strangers' files make the pack show: bounded in length and height, without control characters."""

import json

import pytest
import torch

from flexi_core import FlexiError, Schedule, ScheduleError, load_schedule
from flexi_core.run.plan import make_plan
from flexi_core.run.report import RunReport
from flexi_core.run.run import Run
from flexi_core.run.timeline import WIDTH, draw_message, draw_timeline
from flexi_core.schedule.file import made_for
from flexi_core.words import shortened, visible

TALLEST = 6_000  # pixels
LONG = "sampler" * 30_000


def finished(steps: int) -> Run:
    run = Run(make_plan(Schedule.parse(f"{steps}*(F)"), [float(steps - i) for i in range(steps + 1)]))
    for sigma in run.plan.sigmas[:-1]:
        run.predict(torch.zeros(1, 3), sigma, lambda: torch.zeros(1, 3))
    return run


@pytest.mark.parametrize("steps", [1, 1500])
@pytest.mark.parametrize("notes", [[LONG], ["a word " * 30_000], ["short"] * 5_000, ["line\n" * 5_000, "\x1b[31m"]])
def test_a_picture_of_a_run_is_never_higher_than_a_screen_or_five(steps, notes):
    picture = draw_timeline(RunReport(finished(steps), 1.0, notes, notes))
    assert picture.shape[1] <= TALLEST and picture.shape[2] == WIDTH
    assert draw_message("\n".join(notes)).shape[1] <= TALLEST


@pytest.mark.parametrize("key", ["sampler", "scheduler", "architecture", "weights"])
def test_a_name_of_200_000_letters_is_refused(tmp_path, key):
    file = tmp_path / "s.json"
    file.write_text(json.dumps({"format": "flexiffusion-schedule", "version": 1, "schedule": "FX", "teacher": {key: LONG}}))
    with pytest.raises(ScheduleError, match=f"teacher.{key} has 210000 characters; a name has at most 200"):
        load_schedule(file)


def test_the_line_of_a_file_is_one_line_of_500_characters():
    schedule = Schedule.parse("FX").with_info(
        teacher={"sampler": "e\x1b[2Ju\nler", "steps": 10**300, "cfg": 3}, measured={"psnr_db": 10**29},
        preset={"steps": LONG, "measured": {"psnr_db": 1, "plain_db": 2}},
    )  # fmt: skip
    words = made_for(schedule)
    assert len(words) <= 500 and words == visible(words, "")
    assert "e\\x1b[2Ju\\x0aler" in made_for(Schedule.parse("FX").with_info(teacher={"sampler": "e\x1b[2Ju\nler"}))


@pytest.mark.parametrize(
    "text", ["F" + "Q" * 90_000, "FX; " + "q" * 90_000, "X" * 9_000, "F~1" + "1" * 90_000, "F\x1b[31m", "F" + "\ud800"]
)
def test_an_error_is_short_and_shows_no_control_characters(text):
    with pytest.raises(FlexiError) as caught:
        Schedule.parse(text)
    assert len(str(caught.value)) <= 2_000 and str(caught.value) == visible(str(caught.value))
    str(caught.value).encode()


def test_cut_texts_say_how_long_they_were():
    assert shortened("a" * 100, 40) == "a" * (40 - len(" ... (100 characters)")) + " ... (100 characters)"
    assert shortened("a" * 40, 40) == "a" * 40


def test_unseen_characters_are_spelled_out():
    assert visible("a\x1b\x9b\u202e\ud800\tb\nc") == "a\\x1b\\x9b\\u202e\\ud800\tb\nc"
    assert visible("日本語 é ±", "") == "日本語 é ±"
