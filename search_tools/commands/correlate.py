"""`flexi correlate`: whether the cheap fitnesses rank schedules as true FID does."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from flexi_core import FlexiError

from .. import console
from ..backends.teacher import TeacherSettings
from .options import Json, Sampler, Scheduler


@console.one_line_errors
def correlate(
    steps: Annotated[int, typer.Option(help="Steps of the teacher.")] = 50,
    sampler: Annotated[Sampler, typer.Option(help="Sampler of the teacher.")] = Sampler.euler,
    scheduler: Annotated[Scheduler, typer.Option(help="Scheduler of the teacher.")] = Scheduler.normal,
    speedups: Annotated[str, typer.Option(help="Budgets that candidates are drawn at.")] = "2,3,4,5,6,7,8",
    each: Annotated[int, typer.Option(min=1, help="Candidates at each budget.")] = 6,
    counts: Annotated[str, typer.Option(help="Sample counts of the cheap fitnesses.")] = "16,32,64,128,256",
    fid_samples: Annotated[int, typer.Option(min=4, help="Each candidate's own samples for true FID.")] = 1024,
    scenes: Annotated[int, typer.Option(min=2, help="Fresh scenes that true FID compares with.")] = 10_000,
    folder: Annotated[Path, typer.Option(help="Measurements and results.")] = Path("flexi_correlate"),
    seed: Annotated[int, typer.Option(help="Of the random schedules.")] = 0,
    as_json: Json = False,
) -> None:
    """Compare what ranks schedules cheaply with true FID on the embedded model; the same command goes on where it stopped.

    Hours at the defaults. Start with fewer --fid-samples: with more of them, or other --counts, only what is new is measured.
    """
    from ..backends.embedded import EmbeddedBackend
    from ..correlate.correlate import CorrelateSettings
    from ..correlate.correlate import correlate as compare
    from ..correlate.files import interval, save_correlation, share
    from ..measures.references import features_of
    from ..measures.references import scenes as fresh_scenes

    wanted = CorrelateSettings(tuple(_numbers(speedups, float)), each, tuple(_numbers(counts, int)), fid_samples, seed)
    console.make_folder(folder)
    if not os.access(folder, os.W_OK):
        raise FlexiError(f"{folder}: cannot be written to; give another --folder")
    backend = EmbeddedBackend(TeacherSettings(sampler.value, scheduler.value, steps))
    reference = features_of(backend.features, fresh_scenes(scenes))
    with console.progress_bar("full steps") as bar:
        last, began, first = "", time.monotonic(), None

        def on_progress(name: str, done: float, total: float) -> None:
            nonlocal last, first
            bar(name, int(done), int(total))
            first = done if first is None else first
            if name != last and not console.err.is_terminal:
                seconds = (total - done) * (time.monotonic() - began) / (done - first) if done > first else float("nan")
                console.err.print(f"{name}: {done / total:.0%}, {seconds:.0f} s left", highlight=False)
            last = name

        found = compare(backend, reference, wanted, folder, on_progress)
    title = (
        f"{len(found.candidates)} random schedules at {speedups} times fewer MACs, {steps} {sampler.value} steps; true FID: "
        f"{fid_samples} samples, {scenes} scenes"
    )
    files = save_correlation(folder, found, title)
    if as_json:
        console.print_json({**found.as_dict(), "files": [str(file) for file in files]})
        return
    rows = [
        (
            row.fitness,
            str(row.samples or ""),
            interval(row.tau, row.low, row.high),
            interval(row.tau_within, row.low_within, row.high_within),
            share(row, found),
        )
        for row in [*found.agreements, found.halves]
    ]
    console.print_columns(("", "n", "tau (95 %)", "within budgets", "cost"), rows, "Kendall's tau with true FID")
    console.out.print(title, highlight=False, soft_wrap=True)
    cost = f"{found.fid_macs / 1e9:.1f} GMACs and {found.fid_seconds:.1f} s"
    console.out.print(f"true FID   {cost} for each candidate: 100 % of the cost", highlight=False)
    console.out.print(f"written    {', '.join(map(str, files))}", highlight=False, soft_wrap=True)


def _numbers(text: str, kind: type) -> list:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise FlexiError(f"{text!r} is no list of numbers; write them as 16,32,64") from error
