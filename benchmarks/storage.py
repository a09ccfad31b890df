"""What a storage bears: candidates per second with 1 to 64 workers, and what each of them costs.

    python benchmarks/storage.py                                                  # journal file, gRPC proxy before SQLite
    python benchmarks/storage.py --postgresql postgresql://USER@HOST/DATABASE     # and PostgreSQL, direct and by the proxy

Every worker is a process with the search's own loop, sampler, heartbeats and attributes; only the evaluation is a stub, which
sleeps for some seconds. What a candidate takes beyond them is the storage's and the sampler's. The studies have the genes
of 50 steps at 5x. The table is written to docs/results/storage.md.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from optuna.exceptions import ExperimentalWarning

from flexi_core.files import replace_file
from flexi_core.run.cost import NetworkCost
from flexi_core.schedule.schedule import Schedule
from search_tools.deadline import Deadline
from search_tools.fitness import Evaluation
from search_tools.settings import SearchSettings
from search_tools.study.heartbeat import Heartbeat
from search_tools.study.study import candidates_of, open_study, run_search

RESULTS = Path(__file__).parents[1] / "docs" / "results"
STEPS, SPEEDUP = 50, 5.0
# The embedded model's: partial steps of depth 1 to 3 cost 8, 22 and 38 % of a full one.
COST = NetworkCost(1000.0, {("input", 0): 80.0, ("input", 1): 140.0, ("input", 2): 160.0, ("input", 3): 620.0,
                            **{("output", i): 0.0 for i in range(4)}})  # fmt: skip
SETTINGS = SearchSettings({"kind": "stub"}, {"steps": STEPS}, {}, SPEEDUP, finalists=0, move=False)


class StubFitness:
    """A fitness of known cost, near enough for all schedules that none is dropped; it counts what it evaluates."""

    macs, teacher_seconds = 0.0, 0.0
    stages = SETTINGS.stages

    def __init__(self, seconds: float) -> None:
        self._seconds, self.count = seconds, 0

    def staged(self, schedule: Schedule) -> Iterator[tuple[Schedule, float]]:
        for _ in self.stages:
            time.sleep(self._seconds / len(self.stages))
            yield schedule, self.error(schedule)

    def fitted(self, schedule: Schedule) -> Schedule:
        return schedule

    def error(self, latents: Schedule) -> float:
        return 1 + 0.2 * latents.letters.rindex("F") / len(latents)

    def evaluate(self, latents: Schedule) -> Evaluation:
        self.count += 1
        return Evaluation(rfid=self.error(latents), psnr_db=20.0, mse=self.error(latents))


@dataclass(frozen=True)
class Measured:
    """What one number of workers did to one storage.

    Args:
        storage: which.
        workers: processes.
        before: candidates that the study had.
        rate: candidates per second, of all workers.
        overhead_ms: per candidate and worker, wall time beyond its evaluation.
        worker_ms, server_ms: CPU time per candidate, of the worker and of the server; None where there is no server.
    """

    storage: str
    workers: int
    before: int
    rate: float
    overhead_ms: float
    worker_ms: float
    server_ms: float | None


def main(
    postgresql: Annotated[str | None, typer.Option(help="URL of an empty database.")] = None,
    workers: Annotated[list[int], typer.Option(help="Numbers of workers.")] = [1, 4, 16, 64],  # noqa: B006 - Typer's form
    seconds: Annotated[float, typer.Option(help="Time of each measurement.")] = 30.0,
    evaluation: Annotated[float, typer.Option(help="Seconds of the stub's evaluation.")] = 15.0,
    before: Annotated[int, typer.Option(help="Candidates that the last rows' study has already.")] = 2000,
) -> None:
    """Measure every storage and write the table."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["search_tools.study.study"])
    rows: list[Measured] = []
    with tempfile.TemporaryDirectory() as folder:
        port, proxied = _free_port(), postgresql or f"sqlite:///{folder}/studies.db"
        server = context.Process(target=_serve, args=(proxied, port), daemon=True)
        server.start()
        named = {"journal file": f"journal:{folder}/studies.journal"}
        if postgresql:
            named |= {"PostgreSQL": postgresql, "gRPC, PostgreSQL": f"grpc://127.0.0.1:{port}"}
        else:
            named |= {"gRPC, SQLite": f"grpc://127.0.0.1:{port}"}
        for name, url in named.items():
            for count in [*workers, -1]:
                prefilled, count = (before, 1) if count < 0 else (0, count)
                made_at = proxied if url.startswith("grpc") else url  # the copies are many
                rows.append(_measure(context, name, url, made_at, count, seconds, evaluation, prefilled, server.pid))
                typer.echo(str(rows[-1]), err=True)
        server.terminate()
    _write(rows, seconds, evaluation)


def _measure(
    context: Any,
    name: str,
    url: str,
    made_at: str,
    workers: int,
    seconds: float,
    evaluation: float,
    before: int,
    server: int,
) -> Measured:
    study = f"{name}-{workers}-{uuid.uuid4().hex[:6]}"
    barrier, results = context.Barrier(workers + 1), context.Queue()
    maker = context.Process(target=_make, args=(made_at, study, before))
    maker.start()
    maker.join()
    processes = [
        context.Process(target=_work, args=(url, study, seconds, evaluation, rank / workers, barrier, results))
        for rank in range(workers)
    ]
    for process in processes:
        process.start()
    barrier.wait()
    server_began = _server_seconds(name, server)
    found = [results.get() for _ in processes]
    server_seconds = None if server_began is None else _server_seconds(name, server) - server_began
    for process in processes:
        process.join()
    total, elapsed = sum(count for count, _, _ in found), sum(wall for _, wall, _ in found) / workers
    return Measured(
        name,
        workers,
        before,
        total / elapsed,
        1000 * (workers * elapsed / total - evaluation),
        1000 * sum(cpu for _, _, cpu in found) / total,
        None if server_seconds is None else 1000 * server_seconds / total,
    )


def _make(url: str, name: str, before: int) -> None:
    """Make a study with finished candidates, which are copied from a short search in memory."""
    study = open_study(url, name, SETTINGS)
    if before:
        source = open_study("sqlite://", name, SETTINGS)
        run_search(source, SETTINGS.space(COST), StubFitness(0.0), evaluations=100, finals=False)
        study.add_trials(source.trials * (before // 100))
        # The sampler keeps the parents of every generation in the study; those of the copies are made here, once.
        run_search(study, SETTINGS.space(COST), StubFitness(0.0), evaluations=before + 1, finals=False)


def _work(url: str, name: str, seconds: float, evaluation: float, offset: float, barrier: Any, results: Any) -> None:
    study, fitness = open_study(url, name, SETTINGS), StubFitness(evaluation)
    candidates_of(study)  # what a worker reads once, when it joins
    barrier.wait()
    time.sleep(offset * evaluation)
    began, cpu = time.monotonic(), time.process_time()
    run_search(study, SETTINGS.space(COST), fitness, deadline=Deadline(seconds / 60), heartbeat=Heartbeat(study), finals=False)
    results.put((fitness.count, time.monotonic() - began, time.process_time() - cpu))


def _serve(url: str, port: int) -> None:
    from optuna.storages import get_storage, run_grpc_proxy_server

    from search_tools.study.storage import open_storage

    warnings.simplefilter("ignore", ExperimentalWarning)
    run_grpc_proxy_server(get_storage(open_storage(url)), host="127.0.0.1", port=port)


def _server_seconds(name: str, proxy: int) -> float | None:
    """Return the CPU seconds that a storage's servers on this machine have spent so far."""
    spent = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, fields = (process / "comm").read_text().strip(), (process / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has ended
            continue
        ours = int(process.name) == proxy and "gRPC" in name
        if ours or (command == "postgres" and "PostgreSQL" in name):
            # utime, stime; of the server also those of connections that have ended (proc(5))
            spent.append(sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK"))
    return sum(spent) if spent else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _write(rows: list[Measured], seconds: float, evaluation: float) -> None:
    lines = [
        "# What a storage of studies bears",
        "",
        f"Candidates of {evaluation:g} s, {seconds:g} s for each row, workers and servers on one machine with "
        f"{os.cpu_count()} cores.",
        "",
        "| storage | workers | candidates before | candidates/s | of the ideal | beyond the evaluation, ms "
        "| CPU of the worker, ms | CPU of the server, ms |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        server = "" if row.server_ms is None else f"{row.server_ms:.0f}"
        lines.append(
            f"| {row.storage} | {row.workers} | {row.before} | {row.rate:.2f} | {row.rate * evaluation / row.workers:.0%} "
            f"| {row.overhead_ms:.0f} | {row.worker_ms:.0f} | {server} |"
        )
    RESULTS.mkdir(exist_ok=True)
    with replace_file(RESULTS / "storage.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
