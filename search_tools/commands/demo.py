"""`flexi demo`: a search on the embedded model, and what it is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexi_core import FlexiError, save_schedule

from .. import console
from ..backends.teacher import JUDGE_SEEDS, TeacherSettings
from .options import Json, Samples, Seed

CURVES = (2, 3, 5, 8)  # speed-ups
_ROWS = 4  # of the table at the speed-up: searched, fewer steps, two baselines


@console.one_line_errors
def demo(
    folder: Annotated[Path, typer.Option(help="Where the results go.")] = Path("flexi_demo"),
    steps: Annotated[int, typer.Option(help="Euler steps of the teacher.")] = 50,
    speedup: Annotated[float, typer.Option(min=1.0, help="Least reduction of the network's MACs.")] = 5.0,
    minutes: Annotated[float, typer.Option(min=0.01, help="For everything: search, table, pictures.")] = 3.5,
    samples: Samples = 32,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Search a schedule for the embedded model and show what it is worth: a schedule file, pictures and a table."""
    from ..backends.embedded import EmbeddedBackend
    from ..deadline import Deadline
    from ..measures.judge import Judge, baselines, judging_runs
    from ..report.pictures import save_image_rows, save_pareto
    from ..settings import SearchSettings
    from ..study.study import with_results
    from .running import run, say

    settings = TeacherSettings(steps=steps)
    deadline = Deadline(minutes, lambda judged: judging_runs(judged, steps, _ROWS / speedup, CURVES), samples)
    console.make_folder(folder)
    backend = EmbeddedBackend(settings)
    wanted = SearchSettings.of(backend, speedup, samples=24, seed=seed, finalists=0, move=False)
    study, space, result = run(backend, wanted, f"sqlite:///{folder / 'study.db'}", deadline=deadline)
    if result.best is None:
        raise FlexiError("the search was interrupted before its first candidate; run the same command to go on")
    file = folder / f"flexi_demo_{speedup:g}x.json"
    if result.interrupted:
        save_schedule(result.best.schedule.with_info(teacher=backend.identity), file)
        console.err.print(f"interrupted; {file} has the best schedule so far. The same command goes on with the search.")
    judged = deadline.judged_samples()
    if judged < samples:
        say(f"for lack of time the table is of {judged} samples, not of {samples}: give more --minutes")
    with console.progress_bar("samples") as bar:
        judge = Judge(backend, judged, JUDGE_SEEDS, bar)
        best, images = judge.judge("searched", result.best.schedule)
        rows = [judge.teacher_row, best]
        rows.append(judge.judge_fewer_steps(space.full_steps))
        pictures = [("teacher", judge.teacher_pictures), (f"searched, {best.speedup_macs:.1f}x fewer MACs", images)]
        for name, schedule in baselines(space)[:2]:
            row, images = judge.judge(name, schedule)
            rows.append(row)
            pictures.append((name, images))
        curves = judge.curves(CURVES)
    save_schedule(with_results(result.best.schedule, backend.identity, best, judged, study, seed), file)
    save_image_rows(folder / "images.png", pictures)
    title = f"{settings.steps} {settings.sampler} steps, {judged} unseen seeds"
    save_pareto(folder / "pareto.png", result.candidates, settings.steps, rows, curves, title)
    seconds = deadline.past
    if as_json:
        console.print_json({"schedule": str(result.best.schedule), "file": str(file), "rows": [r.as_dict() for r in rows],
                     "candidates": len(result.candidates), "seconds": seconds})  # fmt: skip
        return
    console.print_table(rows, title)
    console.out.print(f"schedule   {result.best.schedule}", highlight=False, soft_wrap=True)
    console.out.print(f"written    {file}, {folder / 'images.png'}, {folder / 'pareto.png'}", highlight=False, soft_wrap=True)
    console.out.print(f"took       {seconds:.0f} s, {len(result.candidates)} candidates", highlight=False)
