"""`flexi tune` and what is behind it, on the embedded model."""

import json

import pytest
import torch
from typer.testing import CliRunner

from flexi_core import FlexiError, load_schedule
from flexi_core.tune import Tuner, cheapest, nearest
from search_tools.backends.embedded import EmbeddedBackend
from search_tools.backends.teacher import SEARCH_SEEDS, TeacherSettings
from search_tools.cli import app

STEPS = 12


class Counted(EmbeddedBackend):
    """The embedded model with small batches, and a list of what was sampled."""

    batch = 2

    def __init__(self, sampler: str = "euler", steps: int = STEPS) -> None:
        super().__init__(TeacherSettings(sampler, "normal", steps))
        self.drawn: list[tuple[str, int]] = []

    def draw_batch(self, schedule, seed, rows, **how):
        self.drawn.append((schedule.letters, rows))
        return super().draw_batch(schedule, seed, rows, **how)


@pytest.fixture(scope="module")
def tuned():
    backend = Counted()
    told = []
    tuner = Tuner(backend, 3, progress=lambda *said: told.append(said))
    front = tuner.front()
    recorded = list(backend.drawn)
    return tuner, front, recorded, tuner.confirmed(nearest(front, 8)), told


def test_a_front_takes_the_full_runs_and_one_accelerated_one(tuned):
    _, front, recorded, _, told = tuned
    full = "F" * STEPS
    assert recorded[:2] == [(full, 2), (full, 1)]
    assert len(recorded) == 3
    letters, rows = recorded[2]
    assert letters.count("F") == STEPS // 2
    assert rows == 2
    assert told[:2] == [("full runs", 2, 3), ("full runs", 3, 3)]
    assert len(front) >= 5


def test_what_comes_out_is_near_what_was_predicted_and_ahead_of_plain_steps(tuned):
    tuner, _, recorded, confirmed, _ = tuned
    assert confirmed.full == 8
    assert confirmed.made_db == pytest.approx(confirmed.predicted_db, abs=6)
    assert confirmed.is_ahead
    assert confirmed.made_db > confirmed.plain_db + 3
    spent = sum(letters.count("F") * rows for letters, rows in tuner._runs.drawn) / STEPS
    assert tuner.full_runs == pytest.approx(spent, rel=1e-6)
    assert tuner.full_runs > sum(rows for _, rows in recorded[:2])


def test_recorded_runs_are_plain_sampling(tuned):
    tuner = tuned[0]
    assert torch.equal(tuner._teacher, EmbeddedBackend.teacher(Counted(), SEARCH_SEEDS, 3))


def test_the_second_tuning_equals_the_first(tuned):
    assert Tuner(Counted(), 3).front() == tuned[1]


def test_a_schedule_is_chosen_by_full_steps_or_by_quality(tuned):
    front = tuned[1]
    assert nearest(front, 7).full <= 7
    assert nearest(front, 0) == front[0]
    wanted = front[2].predicted_db
    assert cheapest(front, wanted) == front[2]
    assert cheapest(front, wanted + 1e-6) == front[3]
    assert cheapest(front, 1e3) is None


def test_what_a_few_samples_make_sure_is_below_their_mean(tuned):
    _, front, _, confirmed, _ = tuned
    assert confirmed.made_db - 15 < confirmed.sure_db < confirmed.made_db
    for planned in front:
        low, high = planned.interval_db
        assert low < planned.predicted_db < high


def test_a_sampler_that_asks_twice_a_step_is_refused_in_words():
    with pytest.raises(FlexiError, match="heun asks the network several times a step"):
        Tuner(Counted("heun", 4), 1).front()


def test_a_run_too_short_to_skip_anything_is_refused():
    with pytest.raises(FlexiError, match="2 steps; there is nothing to skip"):
        Tuner(Counted(steps=2), 1)


def flexi(*words: str):
    """Return what the command line says."""
    return CliRunner().invoke(app, ["tune", "--steps", str(STEPS), "--samples", "1", *words])


def test_the_command_writes_a_schedule_that_says_what_it_is_for(tmp_path):
    result = flexi("--speedup", "2", "--out", str(tmp_path / "t.json"), "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    written = load_schedule(tmp_path / "t.json")
    assert str(written) == said["schedule"]
    assert written.letters.count("F") == said["full"] == 6
    assert written.info["teacher"]["sampler"] == "euler"
    assert written.info["measured"]["psnr_db"] == said["made_db"]
    assert written.info["measured"]["by"] == "flexi tune"
    assert [p["full"] for p in said["front"]] == sorted(p["full"] for p in said["front"])


def test_a_quality_that_was_asked_for_comes_out_or_is_said_to_be_out_of_reach(tmp_path):
    said = json.loads(flexi("--quality", "40", "--out", str(tmp_path / "t.json"), "--json").stdout)
    assert said["made_db"] >= 40 + 4  # of one sample, so much is needed to be sure
    result = flexi("--quality", "98", "--out", str(tmp_path / "no.json"))
    assert result.exit_code == 0
    assert f"sample all {STEPS} steps" in result.output
    assert not (tmp_path / "no.json").exists()


def test_a_folder_that_is_not_there_is_said_before_anything_is_sampled(tmp_path):
    result = flexi("--out", str(tmp_path / "none" / "t.json"))
    assert result.exit_code == 2
    assert "does not exist" in result.output
