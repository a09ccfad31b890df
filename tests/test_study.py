"""Searches that are killed, resumed, started twice, and that run out of disk; in real processes where that is the point."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from optuna.trial import TrialState
from typer.testing import CliRunner

from flexi_core import FlexiError, Schedule, __version__
from flexi_core.runtime.file_model import FileModel
from search_tools.backends.teacher import JUDGE_SEEDS, TeacherSettings
from search_tools.backends.unet_file import UNetFileBackend
from search_tools.cli import app
from search_tools.deadline import Deadline
from search_tools.fitness import Evaluation
from search_tools.measures.judge import Row
from search_tools.settings import SearchSettings
from search_tools.space.space import Space
from search_tools.study import study as studies
from search_tools.study.heartbeat import Heartbeat
from search_tools.study.lock import server_lock, study_lock
from search_tools.study.storage import open_storage
from search_tools.study.study import candidates_of, open_study, run_search, spent_seconds, with_results

CANDIDATES = 13
SEARCH = ["search", "--steps", "5", "--speedup", "2", "--samples", "16", "--study", "s", "--evaluations", str(CANDIDATES)]
NOBODY = 65534


@pytest.fixture(scope="module")
def backend(unet_file, tmp_path_factory):
    return UNetFileBackend(TeacherSettings(steps=5, cfg=1.0), FileModel.load(unet_file), tmp_path_factory.mktemp("teacher"))


class KnownOptimum:
    """A fitness that costs nothing: full steps as near as possible to the end."""

    stages, macs, teacher_seconds = (1, 3), 0.0, 0.0

    def fitted(self, schedule: Schedule) -> Schedule:
        return schedule

    def staged(self, schedule: Schedule) -> Iterator[tuple[Schedule, float]]:
        for _ in self.stages:
            yield schedule, self.error(schedule)

    def error(self, latents: Schedule) -> float:
        return 1 + sum(len(latents) - i for i, letter in enumerate(latents.letters) if letter == "F") / len(latents)

    def evaluate(self, latents: Schedule) -> Evaluation:
        return Evaluation(rfid=self.error(latents), psnr_db=20.0, mse=self.error(latents))


@pytest.fixture
def search(backend):
    """A function of (storage, budgets): a search of one study in this process, without finals."""
    settings = SearchSettings.of(backend, 2.0, samples=16)

    def run(storage: str | optuna.Study, fitness=None, **budgets):
        study = open_study(storage, "s", settings) if isinstance(storage, str) else storage
        space = settings.space(backend.cost)
        return study, run_search(study, space, fitness or KnownOptimum(), finals=False, **budgets)

    return run


def _asked(database: Path) -> int:
    """Return how many candidates a search has asked for; by SQL, for Optuna takes its time to open a file."""
    try:
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            return connection.execute("SELECT count(*) FROM trials").fetchone()[0]
    except sqlite3.OperationalError:  # not made yet
        return 0


def _trials(database: Path) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="s", storage=open_storage(f"sqlite:///{database}")).trials


def _finished(trials: list[optuna.trial.FrozenTrial]) -> list[tuple[str, float]]:
    done = [t.user_attrs for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    return [(attributes["schedule"], attributes["errors"][-1]) for attributes in done]


def test_ten_kills_lose_no_finished_candidate_and_leave_the_search_as_if_there_had_been_none(
    start_flexi, unet_file, tmp_path, monkeypatch
):
    search = [*SEARCH, "--unet", str(unet_file), "--size", "16x16"]
    database, moments = tmp_path / "killed.db", random.Random(7)
    before, mid_candidate = [], 0
    for finishes in moments.sample([0, 1] * 5, 10):
        process = start_flexi([*search, "--storage", f"sqlite:///{database}"], tmp_path)
        while process.poll() is None and _asked(database) <= len(before) + finishes:
            time.sleep(0.005)
        seconds = [trial.user_attrs["seconds"] for trial in before if "seconds" in trial.user_attrs]
        time.sleep(moments.random() * min(seconds, default=0.1))  # the kill falls anywhere in a candidate
        process.kill()
        _, stderr = process.communicate()
        assert process.returncode == -signal.SIGKILL, stderr
        after = _trials(database)
        assert _finished(after)[: len(_finished(before))] == _finished(before)
        mid_candidate += after[-1].state is TrialState.RUNNING
        before = after
    assert mid_candidate >= 5 and 0 < len(_finished(before)) < CANDIDATES

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLEXI_CACHE", str(tmp_path / "cache"))
    schedules = {}
    for name in ("killed", "whole"):
        args = [*search, "--storage", f"sqlite:///{tmp_path}/{name}.db", "--out", f"{name}.json", "--json"]
        result = CliRunner().invoke(app, args)
        assert result.exit_code == 0, result.output
        schedules[name] = json.loads(result.stdout)["schedule"]
    killed, whole = _finished(_trials(database)), _finished(_trials(tmp_path / "whole.db"))
    assert killed[: len(_finished(before))] == _finished(before)
    assert [text for text, _ in killed] == [text for text, _ in whole] and len(killed) == CANDIDATES
    assert [error for _, error in killed] == pytest.approx([error for _, error in whole], rel=1e-4)
    assert schedules["killed"] == schedules["whole"]


def test_a_second_search_of_an_sqlite_study_is_refused_at_once_until_the_first_is_dead(tmp_path):
    url = f"sqlite:///{tmp_path}/studies.db"
    code = "import sys, time; from search_tools.study.lock import study_lock\n"
    code += f"with study_lock({url!r}, 's'): print('held', flush=True); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        result = CliRunner().invoke(app, [*SEARCH, "--storage", url, "--out", str(tmp_path / "s.json")])
        assert result.exit_code == 2
        assert "another process searches the study 's'" in result.stderr and "give another --study" in result.stderr
        assert not (tmp_path / "studies.db").exists(), "it did not come as far as the study"
        with study_lock(url, "another study of the same file"):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with study_lock(url, "s"):  # the lock's file is still there
        assert list(tmp_path.glob("*.lock"))


def test_a_storage_server_and_a_search_never_hold_one_sqlite_file_together(tmp_path):
    url = f"sqlite:///{tmp_path}/studies.db"
    with study_lock(url, "s"), pytest.raises(FlexiError, match="a search holds a study of"), server_lock(url):
        pass
    with server_lock(url):
        with pytest.raises(FlexiError, match="a storage server serves"), study_lock(url, "s"):
            pass
        with pytest.raises(FlexiError, match="another storage server"), server_lock(url):
            pass
    with study_lock(url, "s"):
        pass


def test_a_lock_makes_no_folder(tmp_path):
    with pytest.raises(FlexiError, match="there is no folder"), study_lock(f"sqlite:///{tmp_path}/no/studies.db", "s"):
        pass
    assert not (tmp_path / "no").exists()


@pytest.fixture
def public_folder():
    """A folder whose parents everybody may pass, as root's tests read and write whatever the permissions say."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


@contextmanager
def _read_only(folder: Path):
    folder.chmod(0o555)
    for file in folder.iterdir():
        file.chmod(0o444)
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
        for file in folder.iterdir():
            file.chmod(0o644)


def test_a_folder_that_turned_read_only_is_one_clear_error_and_the_study_goes_on_afterwards(search, public_folder):
    url = f"sqlite:///{public_folder}/studies.db"
    _, whole = search("sqlite://", evaluations=6)
    study, _ = search(url, evaluations=3)
    with _read_only(public_folder):
        with pytest.raises(FlexiError, match=r"the study 's' cannot go on.*It keeps its finished candidates"):
            search(study, evaluations=6)
        with pytest.raises(FlexiError, match=r"cannot be used.*denied.*; use a folder that can be written to"):
            study_lock(url, "s").__enter__()
    _, resumed = search(url, evaluations=6)
    assert _texts(resumed) == _texts(whole)


def _texts(result) -> list[str]:
    return [str(candidate.schedule) for candidate in result.candidates]


@contextmanager
def _small_files(folder: Path):
    """No file grows beyond what the database has, and a little: as on a disk that is nearly full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (folder / "studies.db").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 12_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def _full_disk(folder: Path):
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    try:
        yield
    finally:
        filler.unlink()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 400 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _goes_on_after(search, folder: Path, full, reason: str) -> None:
    url = f"sqlite:///{folder}/studies.db"
    _, whole = search("sqlite://", evaluations=12)
    _, begun = search(url, evaluations=3)
    with full(folder), pytest.raises(FlexiError, match=f"the study 's' cannot go on.*{reason}.*It keeps its finished"):
        search(url, evaluations=400)
    study, _ = search(url, evaluations=1)
    assert _texts(begun) == [str(c.schedule) for c in candidates_of(study)][:3]
    _, resumed = search(url, evaluations=12)
    assert _texts(resumed)[:12] == _texts(whole)


def test_a_full_disk_is_one_clear_error_and_the_study_goes_on_afterwards(search, small_disk):
    _goes_on_after(search, small_disk, _full_disk, "is full; the disk is full or failing: free some space")


def test_a_file_that_may_not_grow_is_one_clear_error_and_the_study_goes_on_afterwards(search, tmp_path):
    _goes_on_after(search, tmp_path, _small_files, "the disk is full or failing: free some space")


def test_a_worker_that_was_taken_for_lost_while_it_drew_draws_anew(search, backend, tmp_path, monkeypatch, caplog):
    study, _ = search(f"sqlite:///{tmp_path}/studies.db", evaluations=1)
    taken, distributions = [], Space.distributions

    def slow(self):
        for trial in study.get_trials(states=(TrialState.RUNNING,)) if not taken else ():
            taken.append(trial.number)
            study.tell(trial.number, state=TrialState.FAIL)  # by another worker
        return distributions(self)

    monkeypatch.setattr(Space, "distributions", slow)
    _, result = search(study, evaluations=2, heartbeat=Heartbeat(study))
    assert taken == [1] and "draws anew" in caplog.text and len(result.candidates) == 2
    assert [trial.state for trial in study.trials][1:] == [TrialState.FAIL, TrialState.COMPLETE]


@pytest.mark.parametrize("lost", ["spent", "seconds", "errors", "evaluation", "genes"])
def test_a_candidate_that_lost_a_part_is_named_in_one_line(search, tmp_path, lost):
    url = f"sqlite:///{tmp_path}/studies.db"
    search(url, evaluations=2)
    with closing(sqlite3.connect(tmp_path / "studies.db")) as connection:
        if lost == "genes":
            connection.execute("DELETE FROM trial_params")
        else:
            connection.execute("DELETE FROM trial_user_attributes WHERE key = ?", (lost,))
        connection.commit()
    with pytest.raises(FlexiError, match=f"candidate 0 of the study 's' lacks its {lost}: the storage was damaged"):
        search(url, evaluations=3)


def test_evaluations_are_of_the_whole_study(search, tmp_path):
    url = f"sqlite:///{tmp_path}/studies.db"
    assert len(search(url, evaluations=3)[1].candidates) == 3
    assert len(search(url, evaluations=5)[1].candidates) == 5
    assert len(search(url, evaluations=4)[1].candidates) == 5


def test_the_time_left_comes_from_the_measured_seconds_of_a_candidate(search, tmp_path):
    states = []
    search(f"sqlite:///{tmp_path}/studies.db", evaluations=4, on_progress=states.append)
    assert [state.finished for state in states] == [0, 1, 2, 3, 4]
    for state in states[1:]:
        assert state.seconds_left == pytest.approx((4 - state.finished) * state.seconds / state.finished)


def spent(study: optuna.Study, minutes: float) -> Deadline:
    """Return a deadline that counts what was spent on a study."""
    deadline = Deadline(minutes)
    deadline.earlier = spent_seconds(study)
    return deadline


def test_a_share_of_the_budget_is_of_minutes_or_evaluations_whichever_is_nearer_to_its_end(search, tmp_path, monkeypatch):
    shares, make = [], studies.make_sampler
    monkeypatch.setattr(studies, "make_sampler", lambda *args: shares.append(args[-1]) or make(*args))
    study, _ = search(f"sqlite:///{tmp_path}/studies.db", evaluations=4)
    finished = study.trials
    assert [shares[-1](finished[:count]) for count in (0, 1, 4)] == [0.0, 0.25, 1.0]
    seconds = [trial.user_attrs["seconds"] for trial in finished]
    search(study, deadline=spent(study, sum(seconds) / 120))
    assert len(study.trials) == 4
    assert [shares[-1](finished[:count]) for count in (0, 1, 4)] == pytest.approx([0.0, 2 * seconds[0] / sum(seconds), 2.0])
    search(study, deadline=spent(study, sum(seconds) / 120), evaluations=2)
    assert shares[-1](finished) == pytest.approx(2.0)


def test_the_time_left_is_that_of_the_nearer_budget():
    assert studies._seconds_left(0, 0.0, math.inf, 5) == 300.0  # a minute for each, as long as none is known
    assert studies._seconds_left(2, 10.0, math.inf, 5) == 15.0
    assert studies._seconds_left(2, 10.0, 6.0, 5) == 6.0
    assert studies._seconds_left(2, 10.0, 60.0, 5) == 15.0
    assert studies._seconds_left(2, 10.0, 60.0, None) == 60.0
    assert studies._seconds_left(2, 10.0, math.inf, None) == math.inf


def test_a_worker_waits_for_the_last_candidate_of_another_and_takes_it_over_when_that_is_lost(search):
    study, _ = search("sqlite://", evaluations=2)
    study.ask()  # another worker's, which is never heard of again
    study, result = search(study, evaluations=3, heartbeat=Heartbeat(study, grace=0.2))
    assert len(result.candidates) == 3
    assert [t.state for t in study.trials].count(TrialState.COMPLETE) == 3
    assert study.trials[2].state is TrialState.FAIL and study.trials[-1].user_attrs["beat"]


def test_settings_that_a_study_lacks_are_named(backend, tmp_path):
    settings, url = SearchSettings.of(backend, 2.0, samples=16), f"sqlite:///{tmp_path}/studies.db"
    study = open_study(url, "s", settings)
    (key,) = study.user_attrs
    study.set_user_attr(key, {name: value for name, value in study.user_attrs[key].items() if name != "speedup"})
    with pytest.raises(FlexiError, match=r"was made with other settings \(speedup\); give another --study name"):
        open_study(url, "s", settings)


def test_a_result_and_its_candidates_are_values(search):
    _, result = search("sqlite://", evaluations=1)
    for value in (result, result.candidates[0]):
        with pytest.raises(FrozenInstanceError):
            value.seconds = value.spent = 0.0


def test_a_schedules_file_says_what_was_measured_and_where_it_is_from():
    row = Row("name", "FX", 2.0, 1.9, float("inf"), 30.0, 31.0, 0.9, 0.1, None, "colours")
    found = with_results(Schedule.parse("FX"), {"steps": 2}, row, 64, optuna.create_study(study_name="s"), 7)
    assert found == Schedule.parse("FX") and found.info == {
        "teacher": {"steps": 2},
        "measured": {
            **{"speedup_macs": 2.0, "speedup_time": 1.9, "psnr_db": None, "psnr_low": 30.0, "psnr_high": 31.0, "ssim": 0.9},
            **{"rfid": 0.1, "caption_accuracy": None, "samples": 64, "first_seed": JUDGE_SEEDS, "features": "colours"},
            "by": "flexi search",
        },
        "provenance": {"tool": "flexiffusion", "version": __version__, "seed": 7, "study": "s"},
    }


class Clock:
    """Seconds that a test hands out."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def judged(number: int, seconds: float, state: TrialState = TrialState.COMPLETE) -> SimpleNamespace:
    """Return what the time of a candidate is read from."""
    return SimpleNamespace(number=number, state=state, user_attrs={"seconds": seconds, "spent": 10.0})


def ending_of(trials, minutes=10.0, teacher=0.0, full_run=1.0, steps=5, **changes):
    """Return what is reckoned of a search's end, and the settings that decide it."""
    deadline = Deadline(minutes, clock=Clock())
    if full_run:
        deadline.measure(full_run, 1.0)
    fitness = SimpleNamespace(stages=(2, 16), teacher_seconds=teacher)
    settings = SimpleNamespace(**{"finalists": 3, "reuse_guidance": False, **changes})
    return studies._Ending(trials, fitness, settings, deadline, steps), deadline


def test_the_end_is_reckoned_from_the_dearest_candidate_but_the_first():
    ending, deadline = ending_of([judged(0, 9.0), judged(1, 4.0), judged(2, 6.0), judged(3, 8.0, TrialState.PRUNED)])
    assert ending.candidate == ending.finalist == 6.0
    assert ending_of([judged(0, 9.0)])[0].candidate == 9.0, "there is no other"
    assert ending_of([judged(0, 9.0, TrialState.PRUNED)])[0].candidate == 0.0
    # Twice the samples, by full runs where these are known to take longer.
    assert ending.teacher == 2 * 16 * deadline.full_run
    assert ending_of([judged(0, 9.0)], teacher=1000.0)[0].teacher == 2000.0
    # A moved schedule is evaluated once more, and meets its start where no finals did.
    assert ending.result == 6.0 + 6.0
    assert ending_of([judged(0, 9.0), judged(1, 6.0)], finalists=0)[0].result == 6.0 + 2 * 6.0
    dear, _ = ending_of([judged(0, 9.0), judged(1, 6.0)], reuse_guidance=True)
    assert dear.finalist == 12.0 and dear.result == 6.0 + 12.0


def test_a_full_run_is_measured_by_the_dearest_candidate_where_nothing_else_did():
    # 16 samples and 2 fitted ones of 10 evaluations in runs of 5 steps; the first candidate's fit samples the teacher too.
    _, later = ending_of([judged(0, 9.0), judged(1, 72.0)], full_run=0.0)
    _, known = ending_of([judged(1, 72.0)], full_run=2.0)
    _, first = ending_of([judged(0, 76.0)], full_run=0.0)
    twice = Deadline(10.0, clock=Clock())
    twice.measure(2.0, 1.0)
    assert later.full_run == known.full_run == first.full_run == twice.full_run > 0


def test_time_is_kept_free_for_as_many_finalists_as_there_is_room_for():
    ending, _ = ending_of([judged(0, 9.0), judged(1, 6.0)])
    teacher = ending.teacher
    assert ending.reserved(math.inf, True, True) == 0.0
    assert ending.reserved(1000.0, False, False) == 0.0
    assert ending.reserved(teacher + 18.0, True, False) == teacher + 18.0
    assert ending.reserved(teacher + 17.9, True, False) == teacher + 12.0
    assert ending.reserved(teacher + 11.9, True, False) == 0.0, "one alone has nobody to meet"
    # Moves take a quarter of the minutes, as far as there is room; none where one would not come to an end.
    assert ending.reserved(1000.0, True, True) == teacher + 18.0 + 150.0
    assert ending.reserved(teacher + 18.0 + 20.0, True, True) == teacher + 18.0 + 20.0
    assert ending.reserved(teacher + 18.0 + 18.0, True, True) == teacher + 18.0
    assert ending.reserved(1000.0, False, True) == 150.0
    # Without finals, the teacher's samples are the moves' to make.
    assert ending.reserved(teacher + 18.0, False, True) == 0.0
    assert ending.reserved(teacher + 19.0, False, True) == teacher + 19.0


@pytest.mark.parametrize(
    ("wanted", "held", "tried", "words"),
    [
        (3, 3, 5, ()),
        (3, 2, 5, ("for lack of time 2 of the 3 finalists met again on more samples",)),
        (3, 0, 5, ("for lack of time none of the 3 finalists met again on more samples",)),
        (1, 0, 5, ()),
        (2, 2, 0, ("for lack of time no noise levels were moved",)),
    ],
)
def test_what_was_left_out_in_the_end_is_said_and_its_seconds_are_kept(monkeypatch, wanted, held, tried, words):
    ending, deadline = ending_of([judged(0, 9.0), judged(1, 6.0)])
    study, asked = optuna.create_study(), []

    def hold(*given):
        asked.append(given)
        deadline.clock.now += 7.0
        return held

    def move(*given):
        asked.append(given)
        deadline.clock.now += 5.0
        return tried

    monkeypatch.setattr(studies, "finalists", lambda _, most: list(range(wanted)))
    monkeypatch.setattr(studies, "hold_finals", hold)
    monkeypatch.setattr(studies, "move_levels", move)
    settings = SimpleNamespace(finalists=3)
    state = studies.SearchState(2, 15.0, 0.0, None, moving=True)

    def run(moves):
        return studies._end(study, None, settings, deadline, ending, moves, 40, state, lambda _: None)

    assert run(True) == words
    assert study.user_attrs[studies._ENDING] == 12.0
    assert run(False) == tuple(word for word in words if "levels" not in word), "moves were not wanted"
    assert study.user_attrs[studies._ENDING] == 19.0, "with what an earlier command took"
    finals, moves = asked[:2]
    assert finals[2] == 3 and finals[4:] == (ending.finalist, ending.teacher)
    assert moves[2] == 40 and moves[3] == 0.25 * 600.0
    # What a moved schedule's judging takes is kept free, with the teacher's samples where no finals made them.
    kept = deadline.to_search - moves[6]()
    assert kept == ending.result + (0.0 if held else ending.teacher)


@pytest.mark.parametrize("many", [False, True])
def test_the_share_that_is_spent_is_this_workers_own_of_what_all_of_them_spent(search, backend, tmp_path, monkeypatch, many):
    shares, make = [], studies.make_sampler

    def kept(name, space, seed, share):
        shares.append(share)
        return make(name, space, seed, share)

    monkeypatch.setattr(studies, "make_sampler", kept)
    settings = SearchSettings.of(backend, 2.0, samples=16)
    deadline = Deadline(10.0, clock=Clock())

    class Slow(KnownOptimum):
        def staged(self, schedule):
            deadline.clock.now += 0.1
            yield from super().staged(schedule)

    def passes(state):
        deadline.clock.now += 15.0

    study = open_study(f"sqlite:///{tmp_path}/s.db", "s", settings)
    heartbeat = Heartbeat(study) if many else None
    search(study, Slow(), evaluations=3, deadline=deadline, on_progress=passes, heartbeat=heartbeat)
    spent = 6000.0 * (deadline.past / studies._seconds(study.trials) if many else 1.0)
    assert shares[-1]([judged(0, 6000.0)]) == pytest.approx(spent / 600.0)
    assert shares[-1]([judged(0, 0.0)] * 2) == pytest.approx(2 / 3)


def test_a_result_is_near_with_its_best_candidate_alone(search, tmp_path):
    _, found = search(f"sqlite:///{tmp_path}/s.db", evaluations=2)
    assert found.best.evaluation.psnr_db == 20.0
    assert found.is_near(20.0) is True and found.is_near(20.1) is False
    assert replace(found, best=None).is_near(0.0) is False


def test_who_watches_is_told_when_the_end_begins(backend, tmp_path, monkeypatch):
    settings, met = SearchSettings.of(backend, 2.0, samples=16), []
    study = open_study(f"sqlite:///{tmp_path}/s.db", "s", settings)
    monkeypatch.setattr(studies, "_end", lambda *given: met.append(given[7]) or ("in short",))
    result = run_search(study, settings.space(backend.cost), KnownOptimum(), evaluations=2, on_progress=met.append)
    assert [state.moving for state in met] == [False, False, False, True] and met[-1].finished == 2
    assert result.words == ("in short",)
