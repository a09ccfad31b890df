"""`flexi search`: a schedule for one sampling run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from flexi_core import FlexiError, save_schedule
from flexi_core.demo.model import DEFAULT_CFG

from .. import console
from ..teacher import JUDGE_SEEDS, TeacherSettings
from .options import Json, Sampler, Scheduler, Seed, SpaceChoice


@console.one_line_errors
def search(
    steps: Annotated[int, typer.Option(help="Steps of the teacher.")] = 50,
    sampler: Annotated[Sampler, typer.Option(help="Sampler of the teacher.")] = Sampler.euler,
    scheduler: Annotated[Scheduler, typer.Option(help="Scheduler of the teacher.")] = Scheduler.normal,
    cfg: Annotated[float, typer.Option(min=0.0, help="Guidance scale of the teacher.")] = DEFAULT_CFG,
    speedup: Annotated[float, typer.Option(min=1.0, help="Least reduction of the network's MACs.")] = 5.0,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Budget of the study, evaluation time. [default: 10]")] = None,
    evaluations: Annotated[int | None, typer.Option(min=1, help="Budget of the study, candidates.")] = None,
    seed: Seed = 0,
    storage: Annotated[str, typer.Option(help="Optuna storage URL.")] = "sqlite:///flexi_studies.db",
    study: Annotated[str | None, typer.Option(help="Study name. [default: made from the settings]")] = None,
    out: Annotated[Path | None, typer.Option(help="Schedule file. [default: made from the settings]")] = None,
    space: Annotated[
        SpaceChoice, typer.Option(help="paper: full, partial, removed null; free: full and extrapolated null.")
    ] = (SpaceChoice.all),
    samples: Annotated[int, typer.Option(min=16, help="Teacher samples that the search compares with.")] = 32,
    as_json: Json = False,
) -> None:
    """Search a schedule for a sampling run of the embedded model; the same command goes on where it was stopped."""
    from ..embedded import EmbeddedBackend
    from ..judge import Judge
    from ..settings import SearchSettings
    from ..space import FAMILIES
    from ..study import with_results
    from .running import run

    settings = TeacherSettings(sampler.value, scheduler.value, steps, cfg)
    if minutes is None and evaluations is None:
        minutes = 10.0
    out = out or Path(f"flexi_{settings.sampler}_{steps}_{speedup:g}x.json")
    if not out.parent.is_dir():
        raise FlexiError(f"the folder {out.parent} does not exist; make it or give another --out")
    if out.is_dir():
        raise FlexiError(f"{out} is a folder; give --out the name of a file")
    backend = EmbeddedBackend(settings)
    families = FAMILIES if space is SpaceChoice.all else (space.value,)
    wanted = SearchSettings.of(backend, speedup, samples, families=families, seed=seed)
    opened, _, result = run(backend, wanted, storage, study, minutes=minutes, evaluations=evaluations)
    if result.best is None:
        raise FlexiError("the search was interrupted before its first candidate; run the same command to go on")
    if result.interrupted:
        save_schedule(result.best.schedule.with_info(teacher=backend.identity), out)
        console.err.print(f"interrupted; {out} has the best schedule so far. The same command goes on with the search.")
    with console.progress_bar("samples") as bar:
        row, _ = Judge(backend, 16, JUDGE_SEEDS, bar).judge("searched", result.best.schedule)
    save_schedule(with_results(result.best.schedule, backend.identity, row, 16, opened, seed), out)
    if as_json:
        console.print_json({"schedule": str(result.best.schedule), "file": str(out), "study": opened.study_name,
                     "interrupted": result.interrupted, "candidates": len(result.candidates), "seconds": result.seconds,
                     "search": asdict(result.best.evaluation), "judged": row.as_dict()})  # fmt: skip
        return
    console.print_table([row], "16 unseen seeds")
    console.out.print(f"schedule   {result.best.schedule}", highlight=False, soft_wrap=True)
    console.out.print(f"written    {out}", highlight=False)
    console.out.print(
        f"study      {opened.study_name}: {len(result.candidates)} candidates, {result.seconds:.0f} s", highlight=False
    )
