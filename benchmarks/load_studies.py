"""The parts of the load (see load.py) that search: disks that are full or read-only, damaged files, stopped workers."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import optuna
import torch
from load_outcome import Outcome
from optuna.trial import FrozenTrial, TrialState
from templates import tests_module
from typer.testing import CliRunner

from flexi_core import FlexiError, Schedule, load_schedule
from search_tools.backends.embedded import EmbeddedBackend
from search_tools.cli import app
from search_tools.fitness import Fitness
from search_tools.strategies.evolution import FINISHED
from search_tools.study.storage import open_storage
from search_tools.study.study import settings_of

STEPS, CANDIDATES = 5, 6
SEARCH = (
    "search",
    "--steps",
    str(STEPS),
    "--speedup",
    "2",
    "--samples",
    "16",
    "--finalists",
    "0",
    "--no-move",
    "--no-fit",
    "--study",
    "s",
)
DISK = 2**20  # bytes
# Bytes that are left on the disk: so that it is full for the first file, for the database, for the teacher, for a candidate.
LEFT = (0, 4, 24, 60, 100, 130, 160, 200)  # KiB
DAMAGES = 6  # in a round, of each kind of storage
WORKERS, OF_ALL, GRACE = 3, 24, 3.0
STOPS = 5  # in a round
_LONGEST_STOP = 20 * GRACE  # seconds: the others look between two candidates of theirs
_LIMIT = 1800.0  # seconds, of any process


def full_disk(folder: Path, comfyui: Path, rng: random.Random, outcome: Outcome) -> None:
    """Let a disk get full while a search begins or goes on, look at the study, make space, and go on."""
    kind, left = rng.choice(("sqlite:///", "journal:")), 1024 * (rng.choice(LEFT) + rng.randint(0, 12))
    with _disk(folder / "disk") as disk:
        storage = f"{kind}{disk}/studies"
        search = [*SEARCH, "--storage", storage, "--out", str(disk / "s.json")]
        begun: list[str] = []
        if rng.random() < 0.5:
            _expect(_flexi([*search, "--evaluations", "2"], disk), 0, "a search on an empty disk", outcome)
            begun = _texts(storage)
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        os.truncate(filler, max(0, filler.stat().st_size - left))
        _expect(_flexi([*search, "--evaluations", "400"], disk), 2, "a search on a full disk", outcome)
        outcome.counts["searches that met a full disk"] += 1
        before = list(begun)
        if begun:
            report = ["report", "--storage", storage, "--no-images", "--out", str(folder / "report.html")]
            _expect(_flexi(report, disk), 0, "a report of a study on a full disk", outcome)
            before = _texts(storage)
        _check_files(disk, outcome)
        filler.unlink()
        _expect(_flexi([*search, "--evaluations", str(len(before) + 2)], disk), 0, "a search after space was made", outcome)
        outcome.counts["gone on with"] += 1
        after = _texts(storage)
        outcome.check(before[: len(begun)] == begun and after[: len(before)] == before, "candidates were lost on a full disk")
        outcome.check(len(load_schedule(disk / "s.json")) == STEPS, "the schedule of a search is another run's")


def read_only(folder: Path, comfyui: Path, rng: random.Random, outcome: Outcome) -> None:
    """Open studies of a disk that was mounted read-only since, to read and to write."""
    with _disk(folder / "disk") as disk:
        urls = [f"sqlite:///{disk}/studies.db", f"journal:{disk}/studies.journal"]
        for url in urls:
            made = [*SEARCH, "--storage", url, "--evaluations", str(CANDIDATES), "--out", str(disk / "s.json")]
            # In a process of its own: no connection is left that may write.
            _expect(_end(_start(made, folder)), 0, "a search", outcome)
        _mount(disk, "remount,ro")
        out = ("--out", str(folder / "out"))
        for url in urls:
            read = {
                "a report": ["report", "--storage", url, "--no-images", *out],
                "the front": ["pareto", "--storage", url],
                "a schedule": ["pareto", "--storage", url, "--speedup", "1.5", "--out", str(folder / "p.json")],
            }
            more = str(CANDIDATES + 2)
            write = {
                "a search": [*SEARCH, "--storage", url, "--evaluations", more, *out],
                "a worker": ["worker", "--storage", url, "--study", "s", "--evaluations", more],
                "a new study": [*SEARCH, "--storage", url, "--study", "other", "--create-only"],
            }
            inside = {"a report into it": [*read["a report"][:-1], str(disk / "report.html")]}
            for code, commands in ((0, read), (2, write), (2, inside)):
                for name, args in commands.items():
                    _expect(_flexi(args, folder), code, f"{name} of {url.partition(':')[0]} on a read-only disk", outcome)
                    outcome.counts["commands"] += 1
        for args, code in ((["show", str(disk / "s.json")], 0), ([*SEARCH, "--evaluations", "1"], 2)):
            _expect(_flexi(args, disk), code, f"flexi {args[0]} in a read-only folder", outcome)
            outcome.counts["commands"] += 1


def damaged(folder: Path, comfyui: Path, rng: random.Random, outcome: Outcome) -> None:
    """Damage the files of a study, and open them with every command."""
    for name in ("journal:studies.journal", "sqlite:///studies.db"):
        kind, file = name.split("studies")[0], folder / f"studies{name.split('studies')[1]}"
        url = f"{kind}{file}"
        made = [*SEARCH, "--storage", url, "--evaluations", "4", "--out", str(folder / "s.json")]
        _expect(_flexi(made, folder), 0, "a search", outcome)
        whole = file.read_bytes()
        for _ in range(DAMAGES):
            how = rng.choice(list(_DAMAGE))
            content = _DAMAGE[how](whole, rng)
            for command in (
                ["report", "--storage", url, "--no-images", "--out", str(folder / "report.html")],
                ["pareto", "--storage", url],
                ["worker", "--storage", url, "--study", "s", "--evaluations", "5"],
                [*SEARCH, "--storage", url, "--evaluations", "5", "--out", str(folder / "s.json")],
            ):
                if command[0] == "worker" and kind.startswith("sqlite"):
                    continue
                file.write_bytes(content)
                code, stderr = _flexi(command, folder)
                outcome.counts["commands"] += 1
                outcome.counts["that went on"] += code == 0
                _expect((code, stderr), code, f"flexi {command[0]} on {kind} {how}", outcome)
                outcome.check(code in (0, 2), f"flexi {command[0]} on {kind} {how}: exit code {code}")
        outcome.counts[f"damaged {kind.partition(':')[0]} files"] += DAMAGES
        file.unlink()


def _cut_off(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def _overwritten(content: bytes, rng: random.Random) -> bytes:
    at, size = rng.randrange(len(content)), rng.randint(1, 2000)
    return content[:at] + rng.randbytes(size) + content[at + size :]


def _zeros(content: bytes, rng: random.Random) -> bytes:
    at, size = rng.randrange(len(content)), rng.randint(1, 4096)
    return content[:at] + bytes(size) + content[at + size :]


def _lacking(content: bytes, rng: random.Random) -> bytes:
    at, size = rng.randrange(len(content)), rng.randint(1, 4096)
    return content[:at] + content[at + size :]


def _without_lines(content: bytes, rng: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    return b"".join(lines[:at] + lines[at + rng.randint(1, 8) :])


def _garbage_line(content: bytes, rng: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    garbage = rng.choice((b"garbage\n", b"5\n", b"{}\n", b"\xff\xfe\n", b'{"op_code": 99}\n', b"\n", b"null\n"))
    return b"".join([*lines[: (at := rng.randint(0, len(lines)))], garbage, *lines[at:]])


_DAMAGE = {
    "cut off": _cut_off,
    "overwritten": _overwritten,
    "with zeros in it": _zeros,
    "without a piece": _lacking,
    "without some lines": _without_lines,
    "with a line of garbage": _garbage_line,
}


def workers(folder: Path, comfyui: Path, rng: random.Random, outcome: Outcome) -> None:
    """Let three workers search a study, and stop now one of them, now another, until it is taken for lost."""
    tests = tests_module("test_storage")
    with tests.postgresql_server() as url:
        _expect(_flexi([*SEARCH, "--storage", url, "--create-only"], folder), 0, "a new study", outcome)
        args = ["worker", "--storage", url, "--study", "s", "--evaluations", str(OF_ALL), "--grace", str(GRACE)]
        processes = [_start(args, folder) for _ in range(WORKERS)]
        study = optuna.load_study(study_name="s", storage=open_storage(url))
        try:
            while len(study.trials) < WORKERS and all(process.poll() is None for process in processes):
                time.sleep(0.1)
            for turn in range(STOPS):
                process = processes[turn % WORKERS]
                time.sleep(rng.uniform(0.0, 1.0))
                if process.poll() is not None:
                    break
                before, until = _lost(study), time.monotonic() + _LONGEST_STOP
                process.send_signal(signal.SIGSTOP)
                while _lost(study) == before and time.monotonic() < until:  # its candidate is taken over, if it was at one
                    time.sleep(0.2)
                time.sleep(rng.uniform(0.0, 1.0))
                process.send_signal(signal.SIGCONT)
                outcome.counts["stops"] += 1
            ended = [_end(process) for process in processes]
        finally:
            for process in processes:
                process.kill()
        for done in ended:
            _expect(done, 0, "a worker", outcome)
        _check_study(study, folder, outcome)


def _lost(study: optuna.Study) -> int:
    return len(study.get_trials(deepcopy=False, states=(TrialState.FAIL,)))


def _check_study(study: optuna.Study, folder: Path, outcome: Outcome) -> None:
    """Check that a study of several workers is whole, and what it says of each candidate."""
    trials = study.trials
    finished = [trial for trial in trials if trial.state in FINISHED]
    lost = [trial for trial in trials if trial.state is TrialState.FAIL]
    outcome.counts["candidates"] += len(finished)
    outcome.counts["taken over"] += len(lost)
    outcome.check(OF_ALL <= len(finished) <= OF_ALL + WORKERS - 1, f"{len(finished)} candidates of a budget of {OF_ALL}")
    unfinished = [trial.state.name for trial in trials if not trial.state.is_finished()]
    outcome.check(not unfinished, f"candidates were left {unfinished}")
    known = {trial.user_attrs["schedule"] for trial in finished}
    drawn = {trial.user_attrs["schedule"] for trial in lost if "schedule" in trial.user_attrs}
    outcome.check(drawn <= known, f"{len(drawn - known)} candidates were lost with their worker")
    again = [trial.user_attrs["schedule"] for trial in finished if "tries" in trial.user_attrs]
    outcome.check(len(again) == len(set(again)), "a candidate that was tried again was counted twice")
    settings = settings_of(study)
    fitness = Fitness(EmbeddedBackend(settings.teacher_settings, folder / "teacher"), settings.stages, fit=settings.fit)
    outcome.check(
        all(_judged_alike(trial, fitness) for trial in finished), "a candidate was judged otherwise than by one worker"
    )


def _judged_alike(trial: FrozenTrial, fitness: Fitness) -> bool:
    """Return whether a candidate has the errors that a process alone finds, as far as it was judged."""
    schedule, told = Schedule.parse(trial.user_attrs["schedule"]), trial.user_attrs["errors"]
    alone = [error for _, error in fitness.staged(fitness.fitted(schedule))][: len(told)]
    return torch.allclose(torch.tensor(told), torch.tensor(alone), rtol=1e-4)


def _start(args: Sequence[str], folder: Path) -> subprocess.Popen:
    environment = {**os.environ, "FLEXI_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from search_tools.cli import app; app()", *args]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _end(process: subprocess.Popen) -> tuple[int, str]:
    """Return a command's exit code and what it said on stderr; one that does not end is killed."""
    try:
        _, stderr = process.communicate(timeout=_LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        _, stderr = process.communicate()
        return 124, f"it did not end in {_LIMIT:.0f} s: {stderr}"
    return process.returncode, stderr


def _flexi(args: Sequence[str], folder: Path) -> tuple[int, str]:
    """Run a command in this process and in a folder, the teacher's samples in it too; return its exit code and stderr."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        done = CliRunner(env={"FLEXI_CACHE": str(folder / "cache")}).invoke(app, list(args))
    finally:
        os.chdir(before)
    unexpected = None if isinstance(done.exception, SystemExit) else done.exception
    lines = traceback.format_exception(unexpected) if unexpected else ()
    return done.exit_code, done.stderr + "".join(lines)


def _expect(done: tuple[int, str], code: int, what: str, outcome: Outcome) -> None:
    """Check a command's exit code, and that what it says of an error is one line, without a traceback."""
    returned, stderr = done
    said = " / ".join(stderr.strip().splitlines()[-2:])[:300]
    outcome.check(returned == code, f"{what}: exit code {returned}, not {code}: {said}")
    lines = [line for line in stderr.splitlines() if line.startswith("flexi: ")]
    outcome.check("Traceback" not in stderr, f"{what}: a traceback: {said}")
    outcome.check(returned != 2 or len(lines) == 1, f"{what}: {len(lines)} lines of the error: {said}")


def _texts(storage: str) -> list[str]:
    """Return the finished candidates of a study, in order."""
    study = optuna.load_study(study_name="s", storage=open_storage(storage))
    return [trial.user_attrs["schedule"] for trial in study.get_trials(states=FINISHED)]


def _check_files(folder: Path, outcome: Outcome) -> None:
    """Check that what a full disk left is whole: no temporary file, no half schedule."""
    outcome.check(not list(folder.rglob("*.part")), "a half file is left")
    for file in folder.glob("*.json"):
        try:
            load_schedule(file)
        except FlexiError as error:
            outcome.check(False, f"a file is broken: {error}")


@contextmanager
def _disk(folder: Path) -> Iterator[Path]:
    """Mount a disk of `DISK` bytes."""
    folder.mkdir()
    _mount(folder, f"size={DISK}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _mount(folder: Path, options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = shutil.which("mount") and subprocess.run(command, capture_output=True, text=True, check=False)
    if not done or done.returncode:
        raise FlexiError(f"mounting a small disk is not permitted here: {done.stderr if done else 'no mount'}")
