"""How near a given number of full steps can come to the teacher, with guidance and without, and what the teacher itself is off.

    python benchmarks/floor.py                      # 25 dpmpp_2m steps, about a quarter of an hour on one core
    python benchmarks/floor.py --sampler euler --steps 50 --full 8,9,10,12

On the embedded model. Every row is a search of full steps at noise levels of their own (`--space levels`), with fitted blends
and moved levels, judged on unseen seeds: the best that a multistep solver of so many evaluations is known to do. Without
guidance the same network is a smoother function of the noise level; the difference is guidance's share of the error. The
teacher's distance to its own converged solution is what its solver's steps cost. The table goes to
docs/results/floor-*.md; searches are studies in --folder.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flexi_core import FlexiError, Schedule
from flexi_core.files import replace_file
from flexi_core.metrics import data_range, psnr_db
from flexi_core.run.replay import PredictionStore
from search_tools.backends.embedded import EmbeddedBackend
from search_tools.backends.teacher import JUDGE_SEEDS, TeacherSettings
from search_tools.fitness import Fitness
from search_tools.measures.judge import Judge
from search_tools.settings import SearchSettings
from search_tools.study.study import open_study, run_search

RESULTS = Path(__file__).parents[1] / "docs" / "results"
CONVERGED = 4  # times the teacher's steps
_err = Console(stderr=True)


def main(
    sampler: Annotated[str, typer.Option(help="The teacher's.")] = "dpmpp_2m",
    steps: Annotated[int, typer.Option(min=8, help="The teacher's.")] = 25,
    full: Annotated[str, typer.Option(help="Numbers of full steps, separated by commas.")] = "7,8,9,10",
    cfgs: Annotated[str, typer.Option(help="Guidance scales, separated by commas.")] = "3,1",
    evaluations: Annotated[int, typer.Option(min=1, help="Candidates of each search; moves are twice as many.")] = 30,
    search_samples: Annotated[int, typer.Option(help="To search with.")] = 32,
    samples: Annotated[int, typer.Option(min=2, help="To judge on.")] = 48,
    folder: Annotated[Path, typer.Option(help="Where the studies are kept.")] = Path("flexi_benchmark"),
) -> None:
    """Search, judge, and write the table."""
    folder.mkdir(parents=True, exist_ok=True)
    RESULTS.mkdir(exist_ok=True)
    command = " ".join(["python benchmarks/floor.py", *sys.argv[1:]])
    lines = [
        f"# The floor of few full steps: {steps} {sampler} steps",
        "",
        f"Made by `{command}`. PSNR on {samples} unseen seeds; marked =: no farther from the teacher than the teacher is from "
        f"its converged solution, {CONVERGED * steps} steps.",
        "",
        "| guidance | teacher to converged, dB | full steps | MACs | PSNR dB |",
        "|-|-|-|-|-|",
    ]
    for cfg in map(float, cfgs.split(",")):
        backend = EmbeddedBackend(TeacherSettings(sampler, "normal", steps, cfg))
        judge, own = Judge(backend, samples), converged_psnr(backend, samples)
        for count in map(int, full.split(",")):
            row = judge.judge(f"{count} full steps", searched(backend, count, evaluations, search_samples, folder))[0]
            mark = " =" if row.psnr_db >= own else ""
            lines.append(
                f"| {cfg:g} | {own:.1f} | {count} | {row.speedup_macs:.2f}x "
                f"| {row.psnr_db:.1f} ({row.psnr_low:.1f}-{row.psnr_high:.1f}){mark} |"
            )
            _err.print(lines[-1])
    with replace_file(RESULTS / f"floor-{sampler}-{steps}.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def converged_psnr(backend: EmbeddedBackend, samples: int) -> float:
    """Return the mean PSNR of the teacher's samples to those of several times its steps."""
    finer = EmbeddedBackend(replace(backend.settings, steps=CONVERGED * backend.settings.steps))
    own, converged = backend.teacher(JUDGE_SEEDS, samples), finer.teacher(JUDGE_SEEDS, samples)
    return float(psnr_db(own, converged, data_range(own)).mean())


def searched(backend: EmbeddedBackend, full: int, evaluations: int, samples: int, folder: Path) -> Schedule:
    """Return the best schedule of so many full steps that a search finds."""
    speedup = backend.settings.steps / full
    wanted = SearchSettings.of(backend, speedup, samples, families=("levels",))
    name = f"{backend.settings.sampler}, cfg {backend.settings.cfg:g}, {full} full steps"
    study = open_study(f"sqlite:///{folder / 'floor.db'}", name, wanted)
    fitness = Fitness(backend, wanted.stages, predictions=PredictionStore())
    space = wanted.space(backend.cost, backend.identity["sigmas"], backend.traits)
    result = run_search(study, space, fitness, evaluations=evaluations)
    if result.interrupted or result.best is None:
        raise typer.Exit(130)
    return result.best.schedule


if __name__ == "__main__":
    try:
        typer.run(main)
    except FlexiError as error:
        raise SystemExit(str(error)) from error
