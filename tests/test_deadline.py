"""Commands that are done in their time on machines of any speed, by a clock that only sampling moves."""

from __future__ import annotations

import copy
import json
from functools import partial

import optuna
import pytest
import torch
from typer.testing import CliRunner

from flexi_core import Schedule
from search_tools.backends.small_model import SmallModelBackend
from search_tools.backends.teacher import TeacherSettings
from search_tools.cli import app
from search_tools.commands import search as command
from search_tools.console import ProgressLines
from search_tools.deadline import FEWEST, Deadline, TooSlow
from search_tools.fitness import Evaluation
from search_tools.study.candidate import hold_finals
from search_tools.study.storage import open_storage
from search_tools.study.study import settings_of, spent_seconds

STEPS, SAMPLES, SPEEDUP = 12, 16, 3.0


class Clock:
    """Seconds that pass when something says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Colours:
    """Features [N, 3]: the mean colours."""

    name = "colours"

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.mean(dim=(2, 3))


class Slow(SmallModelBackend):
    """A tiny model on a machine that takes so many seconds for a full run of one sample."""

    kind, batch = "slow", 4

    def __init__(self, model, folder, clock: Clock, seconds: float, sampler: str = "euler") -> None:
        model = copy.copy(model)
        model.latent_shape = (3, 8, 8)
        super().__init__(TeacherSettings(sampler, "normal", STEPS, 1.0), model, Colours(), folder)
        self.clock, self.seconds = clock, seconds

    def prompts(self, seed: int, count: int) -> None:
        return None

    def draw_batch(self, schedule, seed, rows, *, progress, **how):
        def tick(done: int, total: int) -> None:
            self.clock.now += self.seconds * rows / STEPS * (schedule.letters[done - 1] in "FfPp")
            if progress is not None:
                progress(done, total)

        return super().draw_batch(schedule, seed, rows, progress=tick, **how)


@pytest.fixture
def slow(tiny_model, tmp_path, monkeypatch):
    """A function of (seconds of a full run, options): the result of `flexi search` on such a machine, and what it took."""
    monkeypatch.chdir(tmp_path)
    clock = Clock()
    monkeypatch.setattr("search_tools.deadline.Deadline", partial(Deadline, clock=clock))

    def run(seconds: float, *options: object, sampler: str = "euler"):
        backend = Slow(tiny_model, tmp_path / "teacher", clock, seconds, sampler)
        monkeypatch.setattr(command, "open_chosen_backend", lambda *_, **__: backend)
        before = clock.now
        args = ["search", "--speedup", SPEEDUP, "--samples", SAMPLES, "--study", "s", "--out", "s.json", "--json", *options]
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout), clock.now - before, result.stderr

    return run


def the_study() -> optuna.Study:
    return optuna.load_study(study_name="s", storage=open_storage("sqlite:///flexi_studies.db"))


@pytest.mark.parametrize(
    ("seconds", "sampler"), [(1.2, "euler"), (2.0, "euler"), (8.0, "euler"), (80.0, "euler"), (1.0, "heun"), (8.0, "heun")]
)
def test_a_search_is_done_in_its_minutes_on_a_machine_a_hundred_times_slower(slow, seconds, sampler):
    found, took, said = slow(seconds, "--minutes", 2, sampler=sampler)
    # What is done in any case: a teacher of the fewest samples, one candidate fitted beside it, and both judged.
    least = (2 if sampler == "heun" else 1) * seconds * (FEWEST * (3 + 3 / SPEEDUP) + FEWEST * 2 / STEPS)
    assert took <= max(1.1 * 120, 1.1 * least)
    assert found["candidates"] >= 1
    if seconds <= 2.0:
        assert took > 0.6 * 120, "the time is used"
    assert ("the result is judged on" in said) == ((seconds >= 2.0 and sampler == "euler") or seconds >= 8.0)
    assert ("candidates are compared on 4 samples, not on 16" in said) == (seconds >= 8.0)


def test_a_search_that_goes_on_counts_what_its_study_has_spent_and_keeps_its_fewer_samples(slow):
    first, took, said = slow(8.0, "--minutes", 2)
    assert "compared on 4 samples" in said
    again, more, said = slow(8.0, "--minutes", 2)
    assert again["candidates"] > first["candidates"], "the teacher's samples are there now"
    assert more < took
    assert "compared on" not in said
    assert settings_of(the_study()).samples == FEWEST
    assert 60 < spent_seconds(the_study()) < 120
    assert slow(8.0, "--minutes", 2)[0]["candidates"] == again["candidates"]


def test_a_part_of_a_deadline_ends_within_it():
    clock = Clock()
    whole = Deadline(1, lambda samples: samples * 1.0, 4, clock)
    whole.measure(8.0, 4.0)
    assert whole.to_search == 60 - 4 * 2.0 * 1.25
    part = whole.part(0.5)
    clock.now += 15
    assert part.to_search == 25.0 - 15
    assert whole.to_search == 35.0


def test_no_judging_keeps_more_free_than_its_share_and_fewer_samples_are_judged_in_what_is_left():
    clock = Clock()
    deadline = Deadline(1, lambda samples: samples * 1.0, 16, clock)
    assert deadline.judged_samples() == 16, "nothing is known of the machine"
    deadline.measure(8.0, 2.0)
    assert deadline.to_search == 60 * 0.6
    clock.now += 20
    assert deadline.judged_samples() == 8
    clock.now += 35
    assert deadline.judged_samples() == FEWEST


def test_work_is_broken_off_as_soon_as_it_is_clear_that_it_takes_too_long():
    clock = Clock()
    watched = Deadline(1, clock=clock).watched(lambda done, total: None, 10.0)
    clock.now += 2.0
    watched(1, 100)  # with what comes once, so that nothing is known yet
    clock.now += 0.5
    watched(11, 100)
    clock.now += 3.0
    with pytest.raises(TooSlow) as slow:
        watched(15, 100)
    assert (slow.value.seconds, slow.value.done) == (3.5, pytest.approx(0.14))
    assert slow.value.share == pytest.approx((15 + 4.5 * 14 / 3.5) / 100)
    watched(100, 100)


def test_work_whose_first_part_takes_more_than_all_the_time_is_broken_off_there():
    clock = Clock()
    watched = Deadline(1, clock=clock).watched(lambda done, total: None, 10.0)
    clock.now += 20.0
    with pytest.raises(TooSlow) as slow:
        watched(25, 100)
    assert slow.value.share == pytest.approx(0.125)


class Judged:
    """A fitness whose finals take 10 s each, and as long for the teacher's samples."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.finals = clock, 0

    def final(self, schedule: object) -> Evaluation:
        self.clock.now += 10 if self.finals else 20
        self.finals += 1
        return Evaluation(1.0, 30.0, 0.1)


@pytest.mark.parametrize(("seconds", "held"), [(1e9, 3), (45.0, 3), (39.0, 2), (31.0, 2), (29.0, 0)])
def test_finals_are_of_as_many_as_there_is_time_for_and_never_of_one_alone(seconds, held):
    clock, study = Clock(), optuna.create_study()
    for i in range(3):
        attributes = {"schedule": "|".join("F" * (i + 1)), "mse": 0.1, "evaluation": vars(Evaluation(0.1 * i, 30.0, 0.1))}
        study.add_trial(optuna.trial.create_trial(value=0.1 * i, user_attrs=attributes))
    end, fitness = clock.now + seconds, Judged(clock)
    assert hold_finals(study, fitness, 4, lambda: end - clock.now, each=10.0, teacher=10.0) == held == fitness.finals
    assert hold_finals(study, fitness, 4, lambda: -1.0, each=10.0, teacher=10.0) == held, "what is known counts"
    assert hold_finals(study, fitness, 4) == 3


def test_where_nobody_watches_a_bar_a_line_is_written_now_and_then(capsys):
    clock = Clock()
    lines = ProgressLines(clock)
    for second in range(100):
        lines.say(lambda second=second: f"at {second} of 100")
        clock.now += 1
    said = capsys.readouterr().err.splitlines()
    assert said == ["10 s: at 10 of 100", "21 s: at 21 of 100", "34 s: at 34 of 100", "48 s: at 48 of 100",
                    "63 s: at 63 of 100", "80 s: at 80 of 100", "98 s: at 98 of 100"]  # fmt: skip


@pytest.mark.parametrize(("quality", "reached"), [(60.0, True), (85.0, True), (150.0, False)])
def test_a_quality_is_searched_for_from_where_it_is_predicted_and_said_to_be_reached_or_not(slow, quality, reached):
    found, _, _ = slow(0.1, "--quality", quality, "--evaluations", 2, "--no-move", "--finalists", 0)
    assert found["reached"] == reached
    assert found["quality"] == quality
    if not reached:
        assert found["schedule"] is None
        return
    assert found["search"]["psnr_db"] >= quality
    assert Schedule.parse(found["schedule"]).letters.count("F") == found["full"] < STEPS
    summaries = optuna.get_all_study_summaries(open_storage("sqlite:///flexi_studies.db"))
    assert f"s, {found['full']} full" in {summary.study_name for summary in summaries}
