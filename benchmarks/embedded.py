"""Tables on the embedded model, one of them the README's: searched schedules, the paper's, what a user would otherwise run.

    python benchmarks/embedded.py                  # every table, about an hour on two cores
    python benchmarks/embedded.py --only euler-5x  # one of them

Every row is judged on samples that no search has seen. Tables are written as CSV and Markdown, with pictures, to
docs/results/, and the searched schedules to flexi_core/schedules/, from where the pack ships them. Searches are
studies: an interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path
from typing import Annotated

import optuna
import typer
from rich.console import Console

from flexi_core import FlexiError, save_schedule
from flexi_core.files import write_text
from flexi_core.run.replay import PredictionStore
from search_tools.backends.embedded import EmbeddedBackend
from search_tools.backends.teacher import TeacherSettings
from search_tools.deadline import Deadline
from search_tools.fitness import Fitness, stages_to
from search_tools.measures.judge import Judge, Row, baselines
from search_tools.report.pictures import save_image_rows, save_pareto
from search_tools.settings import SearchSettings
from search_tools.space.space import FAMILIES, Space
from search_tools.strategies.guesses import with_guesses
from search_tools.study.study import SearchResult, SearchState, open_study, run_search, spent_seconds, with_results

RESULTS = Path(__file__).parents[1] / "docs" / "results"
BUNDLED = Path(__file__).parents[1] / "flexi_core" / "schedules"
TABLES = {
    "euler-5x": (TeacherSettings("euler", "normal", 50), 5.0),
    "dpmpp_2m-2x": (TeacherSettings("dpmpp_2m", "normal", 25), 2.0),
    "dpmpp_2m-3x": (TeacherSettings("dpmpp_2m", "normal", 25), 3.0),
}
SEARCHES = {"searched, wider space": FAMILIES, "searched, paper's space": ("paper",)}
FILES = ("", "-paper")  # what the schedule files of the searches are called, behind the table's name
_err = Console(stderr=True)


def main(
    only: Annotated[str | None, typer.Option(help=f"One table: {', '.join(TABLES)}.")] = None,
    minutes: Annotated[float, typer.Option(help="Evaluation time of each search.")] = 8.0,
    search_samples: Annotated[int, typer.Option(help="To search with.")] = 64,
    samples: Annotated[int, typer.Option(help="To judge on.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the searches.")] = 0,
) -> None:
    """Search, judge, and write the tables."""
    if only is not None and only not in TABLES:
        raise typer.BadParameter(f"known tables: {', '.join(TABLES)}", param_hint="--only")
    RESULTS.mkdir(exist_ok=True)
    BUNDLED.mkdir(exist_ok=True)
    for name in [only] if only else TABLES:
        make_table(name, minutes, search_samples, samples, seed)


def make_table(name: str, minutes: float, search_samples: int, samples: int, seed: int) -> None:
    """Make one table of `TABLES`."""
    settings, speedup = TABLES[name]
    backend = EmbeddedBackend(settings)
    whole = Space(settings.steps, speedup, backend.cost)
    fitness = Fitness(backend, stages_to(search_samples), predictions=PredictionStore())
    found, candidates, studies = {}, [], {}
    for label, families in SEARCHES.items():
        wanted = SearchSettings.of(backend, speedup, search_samples, families=families, seed=seed)
        result, studies[label] = search(f"{name}, {label}, seed {seed}", backend, wanted, fitness, minutes=minutes)
        found[label] = result.best.schedule
        candidates += result.candidates
    judge = Judge(backend, samples, progress=lambda row, done, total: None)
    rows, pictures = [judge.teacher_row], [("teacher", judge.teacher_pictures)]
    for label, schedule in [*found.items(), *baselines(whole)]:
        _err.print(f"{name}: judging {label}")
        row, images = judge.judge(label, schedule)
        rows.append(row)
        pictures.append((label, images))
    rows.append(judge.judge_fewer_steps(whole.full_steps))
    for row, file in zip(rows[1:], FILES, strict=False):
        best = with_results(found[row.name], backend.identity, row, samples, studies[row.name], seed)
        save_schedule(best, BUNDLED / f"demo-{name}{file}.json")
    write_text(RESULTS / f"{name}.csv", _csv(rows))
    command = " ".join(["python benchmarks/embedded.py", *sys.argv[1:]])
    about = f"Made by `{command}`: the embedded model, cfg {settings.cfg:g}, judged on {samples} unseen seeds."
    head = f"# {settings.steps} {settings.sampler} steps at {speedup:g}x"
    write_text(RESULTS / f"{name}.md", f"{head}\n\n{about}\n\n{markdown(rows)}")
    save_image_rows(RESULTS / f"{name}_images.png", pictures)
    title = f"{settings.steps} {settings.sampler} steps, {samples} unseen seeds"
    save_pareto(RESULTS / f"{name}.png", candidates, settings.steps, rows, judge.curves((1.5, 2, 3, 5, 8)), title)
    print(f"{name}: {title}\n{markdown(rows)}")


def search(
    name: str,
    backend: EmbeddedBackend,
    wanted: SearchSettings,
    fitness: Fitness,
    minutes: float | None = None,
    evaluations: int | None = None,
) -> tuple[SearchResult, optuna.Study]:
    """Return the result of a search, run or read from its study, and the study; what it spent earlier counts."""
    study = open_study(f"sqlite:///{RESULTS / 'studies.db'}", name, wanted)
    deadline = Deadline(minutes)
    deadline.earlier = spent_seconds(study)
    space = with_guesses(study, backend, wanted.space(backend.cost, backend.identity["sigmas"], backend.traits), wanted.guesses)

    def say(state: SearchState) -> None:
        _err.print(f"{name}: {state.finished} candidates, {state.seconds_left:.0f} s left", highlight=False)

    result = run_search(study, space, fitness, on_progress=say, deadline=deadline, evaluations=evaluations)
    if result.interrupted or result.best is None:
        raise typer.Exit(130)
    return result, study


def markdown(rows: list[Row]) -> str:
    """Return the table."""
    lines = ["| | MACs | time | PSNR dB (95 %) | SSIM | rFID | captions |", "|-|-|-|-|-|-|-|"]
    for row in rows:
        psnr = "same" if row.psnr_db == float("inf") else f"{row.psnr_db:.1f} ({row.psnr_low:.1f}-{row.psnr_high:.1f})"
        lines.append(
            f"| {row.name} | {row.speedup_macs:.2f}x | {row.speedup_time:.2f}x | {psnr} | {row.ssim:.4f} "
            f"| {'0' if psnr == 'same' else format(row.rfid, '.3g')} | {row.caption_accuracy:.1%} |"
        )
    return "\n".join(lines) + "\n"


def _csv(rows: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0].as_dict()))
    writer.writeheader()
    writer.writerows(row.as_dict() for row in rows)
    return text.getvalue()


if __name__ == "__main__":
    try:
        typer.run(main)
    except FlexiError as error:
        raise SystemExit(str(error)) from error
