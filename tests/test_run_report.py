"""The report of a run: what the user got comes first, in words, and nothing is said twice."""

from __future__ import annotations

import pytest
import torch

from flexi_core import Schedule
from flexi_core.run.plan import make_plan
from flexi_core.run.report import RunReport
from flexi_core.run.run import FULL_DEPTH, Run
from flexi_core.run.timeline import WIDTH, draw_timeline

WORDS = ["10 of 20 steps are computed, 2x fewer.", "Hardly a difference can be seen: 42 dB to the picture of all steps."]
LEVELS = [20.0 - i for i in range(21)]


def finished(text: str, levels=LEVELS, must_compute: str = "") -> Run:
    """Return a run in which every step was asked for once."""
    run = Run(make_plan(Schedule.parse(text), levels))
    for sigma in run.plan.sampled(torch.tensor(levels)).tolist()[:-1]:

        def compute(sigma=sigma):
            record = run.records[run.plan.step_index(sigma)]
            record.calls[FULL_DEPTH] += 1
            record.network_calls += 1
            return torch.zeros(1, 3, 4, 4)

        run.predict(torch.zeros(1, 3, 4, 4), sigma, compute, must_compute)
    return run


def test_the_words_of_a_preset_come_first_and_its_schedule_last():
    lines = str(RunReport(finished("10*(FX)"), 1.0, ["A note."], WORDS, Schedule.parse("10*(FX)"))).splitlines()
    assert lines[:2] == WORDS
    assert lines[2].startswith("1.00 s instead of about ") and lines[2].endswith(" as fast: 10 of 20 steps computed.")
    assert lines[3:5] == ["Flexiffusion: 20 steps: 10 full, 10 null (extrapolated).", "FX" * 10]
    assert lines[-2:] == ["A note.", "As text for Flexi Schedule: 10*(FX)"]
    assert len(set(lines)) == len(lines)


def test_what_was_saved_stands_before_the_counts():
    first, second, *_ = str(RunReport(finished("10*(FX)"), 1.0)).splitlines()
    assert first.startswith("1.00 s instead of about ") and second.startswith("Flexiffusion: 20 steps: 10 full, 10 null")


def test_a_run_that_saves_nothing_says_so_and_claims_no_speed_up():
    text = str(RunReport(finished("4*(F)", LEVELS[-5:]), 1.0))
    assert text.startswith("1.00 s: every step was computed.\n") and "as many MACs as all steps full" in text
    assert "1.00x" not in text and "instead of" not in text


def test_plain_sampling_says_why_in_its_second_line():
    report = RunReport(None, 1.0, ["A note."], ["For 3 steps no schedule was found."])
    assert str(report).splitlines() == [
        "Flexiffusion: plain sampling, every step full.",
        "For 3 steps no schedule was found.",
        "A note.",
        "1.00 s.",
    ]
    assert report.steps == ()


def test_a_lost_saving_is_told_once():
    run = finished("10*(FX)", LEVELS[:4])
    assert run.plan.lost
    report = RunReport(run, 1.0, (), [run.plan.lost])
    assert str(report).splitlines()[0] == run.plan.lost
    assert not report.notes, "how it was mapped says the same"
    assert "mapped to 13 by position" in str(RunReport(finished("10*(FX)", LEVELS[:14]), 1.0))


def test_steps_that_ran_in_full_against_the_plan_come_first_of_all():
    lines = str(RunReport(finished("10*(FX)", must_compute="the sampler listens"), 1.0, (), WORDS)).splitlines()
    assert lines[0] == "20 of 20 steps were computed in full, 10 more than the schedule says: see below."
    assert lines[1:3] == WORDS and "10 evaluations ran in full: the sampler listens." in lines


@pytest.mark.parametrize(
    "words", [[], WORDS, ["A very long sentence, which takes more than a line of the picture. " * 3, *WORDS]]
)
def test_the_picture_has_the_first_words_as_its_headline(words):
    bare = draw_timeline(RunReport(finished("10*(FX)"), 1.0))
    picture = draw_timeline(RunReport(finished("10*(FX)"), 1.0, (), words))
    assert picture.shape[0] == 1 and picture.shape[2:] == (WIDTH, 3)
    assert (picture.shape[1] > bare.shape[1]) is bool(words)
    assert 0 <= picture.min() < picture.max() <= 1
