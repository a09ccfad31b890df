"""Storages, and several workers on one study: a real PostgreSQL server, a journal file, Optuna's gRPC proxy."""

from __future__ import annotations

import io
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import pytest
import torch
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, TrialState
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flexi_core import FlexiError
from flexi_core.run.cost import NetworkCost
from search_tools.backends.teacher import TeacherSettings, TeacherStore
from search_tools.cli import app
from search_tools.space.space import Space
from search_tools.strategies.evolution import EvolutionSampler
from search_tools.strategies.strategies import ask_schedule
from search_tools.study import storage as storages
from search_tools.study.heartbeat import Heartbeat
from search_tools.study.storage import open_storage, shown

CANDIDATES = 8
SEARCH = ["search", "--steps", "5", "--speedup", "2", "--samples", "16", "--study", "s"]
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
COST = NetworkCost(1000.0, {("input", 0): 80.0, ("input", 1): 920.0, ("output", 0): 0.0, ("output", 1): 0.0})


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def postgresql() -> Iterator[str]:
    """The URL of a PostgreSQL server of this test's own."""
    pytest.importorskip("psycopg", reason="the driver psycopg is not installed")
    with postgresql_server() as url:
        yield url


@contextmanager
def postgresql_server() -> Iterator[str]:
    """Run a PostgreSQL server on a free port; yield its URL."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin")) or [Path(p).parent for p in [shutil.which("initdb")] if p]
    if not found:
        pytest.skip("PostgreSQL's server binaries are not installed")
    binaries, port = found[-1], _free_port()
    data = Path(tempfile.mkdtemp(prefix="flexi-postgresql-"))
    user = {}
    if os.geteuid() == 0:  # the server refuses root
        shutil.chown(data, "nobody")
        user = {"user": "nobody"}

    def call(name: str, *args: str) -> None:
        done = subprocess.run([binaries / name, *args], cwd=data, capture_output=True, text=True, check=False, **user)
        assert done.returncode == 0, done.stderr + done.stdout

    try:
        call("initdb", "-D", str(data / "db"), "-U", "flexi", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        options = f"-p {port} -k {data} -c listen_addresses=127.0.0.1 -c fsync=off"
        call("pg_ctl", "-D", str(data / "db"), "-o", options, "-l", str(data / "log"), "-w", "start")
        try:
            yield f"postgresql://flexi@127.0.0.1:{port}/postgres"
        finally:
            call("pg_ctl", "-D", str(data / "db"), "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(data, ignore_errors=True)


@pytest.fixture
def journal(tmp_path) -> str:
    return f"journal:{tmp_path}/studies.journal"


@pytest.fixture
def proxy(start_flexi, tmp_path) -> Iterator[str]:
    """The URL of a storage server before an SQLite file."""
    pytest.importorskip("grpc", reason="grpcio is not installed")
    port = _free_port()
    server = start_flexi(["storage-server", "--storage", "sqlite:///studies.db", "--port", str(port)], tmp_path)
    yield f"grpc://127.0.0.1:{port}"
    server.send_signal(signal.SIGINT)
    _, stderr = server.communicate(timeout=60)
    assert server.returncode == 130 and "Traceback" not in stderr, stderr


def _until(condition: Callable, what: str, workers: list, seconds: float = 180.0):
    end = time.monotonic() + seconds
    while not (result := condition()):
        ended = [worker.communicate() for worker in workers if worker.poll() is not None]
        assert not ended and time.monotonic() < end, f"never {what}: {ended}"
        time.sleep(0.05)
    return result


@pytest.mark.parametrize("kind", ["postgresql", "journal", "proxy"])
def test_two_workers_search_one_study_and_what_a_killed_one_was_at_is_tried_again(
    kind, request, start_flexi, unet_file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLEXI_CACHE", str(tmp_path / "cache"))
    url = request.getfixturevalue(kind)
    made = CliRunner().invoke(app, [*SEARCH, "--unet", str(unet_file), "--storage", url, "--create-only"])
    assert made.exit_code == 0, made.output
    study = optuna.load_study(study_name="s", storage=open_storage(url))
    assert not study.trials

    def at(worker) -> FrozenTrial | None:
        """Return what a worker is evaluating."""
        running = study.get_trials(states=(TrialState.RUNNING,))
        return next((t for t in running if t.user_attrs.get("beat", [""])[-1].endswith(f":{worker.pid}")), None)

    args = ["worker", "--storage", url, "--study", "s", "--evaluations", str(CANDIDATES), "--grace", "3"]
    args += ["--shared", str(tmp_path / "shared")]
    workers = [start_flexi(args, tmp_path)]
    try:
        (dies,) = workers
        _until(lambda: at(dies), "at work", workers)
        dies.send_signal(signal.SIGSTOP)
        while not (lost := at(dies)):  # stopped between two candidates
            dies.send_signal(signal.SIGCONT)
            time.sleep(0.05)
            dies.send_signal(signal.SIGSTOP)
        # The other one cannot end before the time of grace: it is met at work however slow the machine is.
        stays = start_flexi(args, tmp_path)
        workers.append(stays)
        _until(lambda: at(stays), "at work together", [stays])
        dies.kill()
        stdout, stderr = stays.communicate(timeout=240)
        assert stays.returncode == 0, stderr
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()

    trials = study.trials
    finished = [t for t in trials if t.state in FINISHED]
    assert len(finished) == CANDIDATES
    assert trials[lost.number].state is TrialState.FAIL
    (again,) = (t for t in finished if "tries" in t.user_attrs)
    assert again.user_attrs["schedule"] == lost.user_attrs["schedule"] and again.user_attrs["tries"] == 2
    assert again.user_attrs["beat"][-1].endswith(f":{stays.pid}")
    assert not [t for t in trials if not t.state.is_finished()]
    assert f"study      s: {CANDIDATES} candidates" in stdout
    assert list((tmp_path / "shared").glob("*.safetensors")) and not (tmp_path / "cache").exists()


def _lost_study() -> tuple[optuna.Study, Space, FrozenTrial]:
    """Return a study with a candidate whose worker is gone."""
    space = Space(10, 2.0, COST)
    study = optuna.create_study(sampler=EvolutionSampler(space, 0))
    trial, _ = ask_schedule(study, space)
    return study, space, study.trials[trial.number]


def test_a_silent_candidate_is_tried_again_after_the_time_of_grace_and_not_before():
    study, space, lost = _lost_study()
    patient, hasty = Heartbeat(study, grace=1000.0), Heartbeat(study, grace=0.2)
    assert patient.watch(study.trials) == 1 and hasty.watch(study.trials) == 1
    time.sleep(0.3)
    assert patient.watch(study.trials) == 1 and hasty.watch(study.trials) == 0
    assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.WAITING]
    trial, schedule = ask_schedule(study, space)
    assert str(schedule) == lost.user_attrs["schedule"] and trial.params == lost.params
    assert space.decode(trial.params) == schedule


def test_a_candidate_that_took_three_workers_with_it_is_given_up(caplog):
    study, space, _ = _lost_study()
    for _ in range(3):
        heartbeat = Heartbeat(study, grace=0.1)
        heartbeat.watch(study.trials)
        time.sleep(0.2)
        heartbeat.watch(study.trials)
        if study.get_trials(states=(TrialState.WAITING,)):
            ask_schedule(study, space)
    assert [t.state for t in study.trials] == [TrialState.FAIL] * 3
    assert "not tried again: 3 workers were lost with it" in caplog.text


def test_a_slow_candidate_that_beats_is_left_alone():
    space = Space(10, 2.0, COST)
    study = optuna.create_study(sampler=EvolutionSampler(space, 0))
    other = Heartbeat(study, grace=0.1)  # the worker's own time of grace counts
    trial, _ = ask_schedule(study, space)
    with Heartbeat(study, grace=3.0).beating(trial):
        for _ in range(20):
            assert other.watch(study.trials) == 1
            time.sleep(0.2)
        study.tell(trial, 1.0)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE]
    assert study.trials[0].user_attrs["beat"][0] >= 2


def test_a_worker_that_was_taken_for_lost_drops_its_candidate_and_goes_on(caplog):
    study, _, _ = _lost_study()
    trial, _ = ask_schedule(study, Space(10, 2.0, COST))
    with caplog.at_level(logging.WARNING), Heartbeat(study).beating(trial):
        study.tell(trial.number, state=TrialState.FAIL)  # by another worker
        trial.set_user_attr("errors", [1.0])
        pytest.fail("Optuna takes attributes of a trial that has ended")
    assert "another worker has it now" in caplog.text


def test_a_worker_that_was_taken_for_lost_before_its_first_sign_of_life_goes_on(caplog):
    study, _, lost = _lost_study()
    study.tell(lost.number, state=TrialState.FAIL)  # by another worker
    trial = optuna.trial.Trial(study, lost._trial_id)
    with caplog.at_level(logging.WARNING), Heartbeat(study).beating(trial):
        trial.set_user_attr("spent", 1.0)
        pytest.fail("Optuna takes attributes of a trial that has ended")
    assert "another worker has it now" in caplog.text


@pytest.mark.parametrize(("error", "tries"), [(KeyboardInterrupt, 1), (MemoryError, 2), (ValueError, 2)])
def test_a_candidate_that_is_broken_off_goes_back_to_the_study_at_once(error, tries):
    study, _, lost = _lost_study()
    trial = optuna.trial.Trial(study, lost._trial_id)
    with pytest.raises(error), Heartbeat(study).beating(trial):
        raise error
    assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.WAITING]
    assert study.trials[1].user_attrs == {"schedule": lost.user_attrs["schedule"], "tries": tries}


def test_a_journal_survives_a_line_that_a_full_disk_cut_off(tmp_path):
    file = tmp_path / "j.journal"
    study = optuna.create_study(study_name="s", storage=open_storage(f"journal:{file}"))
    study.set_user_attr("a", 1)
    with file.open("ab") as journal:
        journal.write(b'{"op_code": 2, "worker_id"')
    study.set_user_attr("b", 2)
    assert optuna.load_study(study_name="s", storage=open_storage(f"journal:{file}")).user_attrs == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("garbage", "words"),
    [(b"garbage\n", "Expecting value"), (b"\0\0\n", "Expecting value"), (b"\xff\n", "decode"), (b"5\n", "no record")],
)
@pytest.mark.parametrize("opened_before", [False, True])
def test_a_damaged_line_of_a_journal_is_named_in_one_line(tmp_path, garbage, words, opened_before):
    file = tmp_path / "j.journal"
    study = optuna.create_study(study_name="s", storage=open_storage(f"journal:{file}"))
    study.set_user_attr("a", 1)
    whole = file.read_bytes()
    file.write_bytes(whole + garbage)
    damaged = len(whole.splitlines()) + 1
    with pytest.raises(
        FlexiError, match=rf"line {damaged} of the journal .* is damaged .*{words}.*head -n {damaged - 1} "
    ) as caught:
        if not opened_before:
            study = optuna.load_study(study_name="s", storage=open_storage(f"journal:{file}"))
        study.set_user_attr("b", 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://host", "is of no known kind; give sqlite:///FILE, postgresql://"),
        ("studies.db", "is of no known kind"),
        ("journal:", "names no file"),
        ("journal:/no/such/folder/j", "cannot be used: .*No such file"),
        ("grpc://host", "give grpc://HOST:PORT"),
        ("grpc://host:port", "give grpc://HOST:PORT"),
        ("grpc://:1", "give grpc://HOST:PORT"),
        ("postgresql://flexi@127.0.0.1:1/x", "cannot be used: .*connection"),
        ("oracle+cx_oracle://host/x", "cannot be used: No module named 'cx_[Oo]racle'"),
    ],
)
def test_a_storage_that_cannot_be_opened_says_why_in_one_line(url, message):
    with pytest.raises(FlexiError, match=message) as caught:
        open_storage(url)
    assert "\n" not in str(caught.value)


def test_a_server_that_does_not_answer_is_named(monkeypatch):
    pytest.importorskip("grpc", reason="grpcio is not installed")
    monkeypatch.setattr(storages, "_PROXY_WAIT", 0.2)
    with pytest.raises(FlexiError, match=r"no storage server answers at 127.0.0.1:1; start one with flexi storage-server"):
        open_storage("grpc://127.0.0.1:1")


def test_a_server_that_answers_is_the_storage_behind_it(tmp_path, recwarn):
    pytest.importorskip("grpc", reason="grpcio is not installed")
    from optuna.storages._grpc.server import make_server

    behind, port = open_storage(f"sqlite:///{tmp_path}/s.db"), _free_port()
    server = make_server(behind, "127.0.0.1", port)
    server.start()
    try:
        optuna.create_study(storage=open_storage(f"grpc://127.0.0.1:{port}/"), study_name="s")
    finally:
        server.stop(None).wait()
    assert [study.study_name for study in behind.get_all_studies()] == ["s"]
    assert not [warning for warning in recwarn if issubclass(warning.category, ExperimentalWarning)]


def test_an_sqlite_file_waits_a_minute_for_another_writer(tmp_path):
    with open_storage(f"sqlite:///{tmp_path}/s.db").engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 60_000


@pytest.mark.parametrize(
    ("url", "shared", "database", "file"),
    [
        ("sqlite:///studies.db", False, True, Path("studies.db")),
        ("sqlite:////home/me/studies.db", False, True, Path("/home/me/studies.db")),
        ("sqlite://", False, True, None),
        ("sqlite:///:memory:", False, True, None),
        ("postgresql://me@host/db", True, True, None),
        ("journal:studies.journal", True, False, None),
        ("grpc://host:1", True, False, None),
    ],
)
def test_a_url_tells_who_may_use_it_and_where_it_is(url, shared, database, file):
    assert storages.is_shared(url) is shared and storages.is_database(url) is database
    assert storages.sqlite_file(url) == file


def test_what_a_driver_raises_is_one_line_with_the_advice_and_what_it_does_not_passes():
    grpc = pytest.importorskip("grpc", reason="grpcio is not installed")
    full = "it failed: no space left; the disk is full or failing: free some space. Go on"
    for error, said in ((OSError("no space left\nin full"), full), (grpc.RpcError(), "it failed: RpcError. Go on")):
        with pytest.raises(FlexiError) as caught, storages.storage_errors("it failed", "Go on"):
            raise error
        assert str(caught.value) == said and caught.value.__cause__ is error
    with pytest.raises(ZeroDivisionError), storages.storage_errors("it failed"):
        raise ZeroDivisionError
    with (
        pytest.raises(FlexiError, match=r"^it failed: ZeroDivisionError$"),
        storages.storage_errors("it failed", anything=True),
    ):
        raise ZeroDivisionError


@pytest.mark.parametrize("block", [1, 2, 3, 100])
@pytest.mark.parametrize("content", [b"", b"a", b"\n", b"a\n", b"\nab", b"ab\ncd", b"ab\ncd\n", b"a\n\nbcdefg"])
def test_the_end_of_the_last_line_is_found_in_blocks_of_any_size(content, block):
    assert storages._end_of_last_line(io.BytesIO(content), len(content), block) == content.rfind(b"\n") + 1


def test_a_missing_driver_names_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(FlexiError, match=r"flexiffusion\[distributed\]"):
        open_storage("postgresql://flexi@127.0.0.1:1/x")


def test_a_password_is_never_printed():
    assert shown("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"
    with pytest.raises(FlexiError) as caught:
        open_storage("postgresql://me:secret@127.0.0.1:1/db")
    assert "secret" not in str(caught.value)


def test_workers_on_an_sqlite_file_are_refused_and_shown_what_to_use():
    result = CliRunner().invoke(app, ["worker", "--storage", "sqlite:///s.db", "--study", "s"])
    assert result.exit_code == 2
    assert all(word in result.stderr for word in ("PostgreSQL", "journal:FILE", "grpc://HOST:PORT"))


def test_a_server_of_a_journal_file_is_refused(tmp_path):
    result = CliRunner().invoke(app, ["storage-server", "--storage", f"journal:{tmp_path}/j"])
    assert result.exit_code == 2 and "serves a database" in result.stderr


def test_a_worker_with_other_weights_than_the_studys_is_refused(journal, tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXI_CACHE", str(tmp_path / "cache"))
    assert CliRunner().invoke(app, [*SEARCH, "--storage", journal, "--create-only"]).exit_code == 0
    study = optuna.load_study(study_name="s", storage=open_storage(journal))
    (key,) = study.user_attrs
    settings = study.user_attrs[key]
    study.set_user_attr(key, {**settings, "identity": {**settings["identity"], "weights": "of another training"}})
    result = CliRunner().invoke(app, ["worker", "--storage", journal, "--study", "s", "--evaluations", "1"])
    assert result.exit_code == 2 and "another weights" in result.stderr
    missing = CliRunner().invoke(app, ["worker", "--storage", journal, "--study", "t"])
    assert missing.exit_code == 2 and "no study 't'; it has s" in missing.stderr


def test_damaged_teacher_samples_are_made_again_and_said(tmp_path, caplog):
    store = TeacherStore(TeacherSettings(), {"model": "m"}, tmp_path)
    latents = torch.arange(12.0).reshape(3, 4)
    store.put(0, latents)
    assert (store.get(0, 2) == latents[:2]).all()
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert store.get(0, 2) is None and "its content is not what was stored" in caplog.text
    save_file({"latents": load_file(file)["latents"]}, file)  # without the hash of its content
    assert store.get(0, 2) is None
    store.put(0, latents)
    assert (store.get(0, 3) == latents).all()
