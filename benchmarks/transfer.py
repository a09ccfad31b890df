"""What a schedule is worth on another model than the one that it was searched on.

    python benchmarks/transfer.py --dit scene_dit.safetensors --folder flexi_rivals   # after benchmarks/rivals.py, 5 minutes

The searched schedules of `rivals.py` (wider space) of the embedded U-Net are sampled on the small transformer and the other way
round, under the same solver and step count: as they are (moved noise levels at the same places of the other grid), with
linear extrapolation in place of their blends, and with blends fitted to the new teacher. Beside them the schedule that was
searched there, and as few plain steps. Judged on seeds that no search has seen; written to docs/results/transfer.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import optuna
import typer
from rival_tables import OURS
from rivals import BEDS, RESULTS
from scene_dit import scene_model
from scene_host import SceneBackend, embedded_model

from flexi_core import FlexiError, Schedule
from flexi_core.files import replace_file
from flexi_core.metrics import data_range, psnr_db
from flexi_core.tune.levels import shortest
from search_tools.backends.comfyui.host import open_host
from search_tools.backends.teacher import JUDGE_SEEDS, SEARCH_SEEDS
from search_tools.study.study import best_of

PAIRS = {"euler-50": "dit-euler-50", "dpmpp_2m-25": "dit-dpmpp_2m-25"}
FITTED_ON = 8


def found(folder: Path, bed: str) -> dict[str, Schedule]:
    """Return the best schedules of a testbed's searches in the wider space, by speed-up."""
    storage = f"sqlite:///{folder / 'rivals.db'}"
    start = f"{bed}, {OURS[1]}, "
    names = [name for name in optuna.get_all_study_names(storage) if name.startswith(start)]
    studies = {name.removeprefix(start).split(",")[0]: optuna.load_study(study_name=name, storage=storage) for name in names}
    return {speedup: best.schedule for speedup, study in studies.items() if (best := best_of(study))}


def unblended(schedule: Schedule) -> Schedule:
    """Return a schedule with linear extrapolation in place of its blends."""
    segments = tuple(replace(segment, blend=None) for segment in schedule.segments)
    return replace(schedule, segments=segments, order=1)


def placed(schedule: Schedule, own: Sequence[float], other: Sequence[float]) -> Schedule:
    """Return a schedule with its noise levels at the same places of another run's grid.

    Args:
        schedule: whose levels lie on `own`.
        own, other: sigmas [n + 1] that end at 0; between two of them places are even in log sigma, in the last step in sigma.
    """
    if schedule.sigmas is None:
        return schedule
    last, levels = len(own) - 2, np.array(schedule.sigmas)
    upper, (logs, onto) = levels >= own[-2], (np.log(np.array(grid[:-1])) for grid in (own, other))
    steps = np.arange(last + 1)
    places = np.interp(-np.log(np.maximum(levels, own[-2])), -logs, steps)
    moved = np.where(upper, np.exp(np.interp(places, steps, onto)), levels / own[-2] * other[-2])
    return replace(schedule, sigmas=tuple(map(shortest, moved)))


def main(
    dit: Annotated[Path, typer.Option(help="Weights of scene_dit.py.")],
    folder: Annotated[Path, typer.Option(help="Where rivals.py kept its studies.")] = Path("flexi_rivals"),
    comfyui: Annotated[str, typer.Option(help="A ComfyUI checkout.")] = "~/comfy/ComfyUI",
    samples: Annotated[int, typer.Option(help="To judge on.")] = 16,
) -> None:
    """Measure and write the table."""
    open_host(comfyui)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    models = {"embedded": embedded_model(), "dit": scene_model(dit)}
    backends = {name: SceneBackend(models[kind], settings) for name, (kind, settings) in BEDS.items()}
    lines = [
        "# A schedule on another model than its own",
        "",
        f"Made by `python benchmarks/transfer.py`: PSNR to the teacher, dB, {samples} unseen seeds; fitted on {FITTED_ON}. "
        "Moved noise levels are taken to the same places of the other model's grid.",
        "",
        "| used on | MACs | searched there | searched on the other model: as it is | without its blends | blends fitted anew "
        "| as few plain steps |",
        "|-|-|-|-|-|-|-|",
    ]
    for first, second in PAIRS.items():
        for here, there in ((first, second), (second, first)):
            backend, own, foreign = backends[here], found(folder, here), found(folder, there)
            teacher = backend.pictures(backend.teacher(JUDGE_SEEDS, samples))

            def quality(schedule: Schedule, backend=backend, teacher=teacher, steps: int | None = None) -> float:
                made = backend.sample(schedule, JUDGE_SEEDS, samples, steps=steps).latents
                return float(psnr_db(backend.pictures(made), teacher, data_range(teacher)).mean())

            for speedup in sorted(own.keys() & foreign.keys(), key=lambda speedup: float(speedup.removesuffix("x"))):
                grids = (backends[name].identity["sigmas"] for name in (there, here))
                schedule = placed(foreign[speedup], *grids)
                refitted, _ = backend.fit(unblended(schedule), SEARCH_SEEDS, FITTED_ON)
                count = schedule.letters.count("F")
                cells = [quality(each) for each in (own[speedup], schedule, unblended(schedule), refitted)]
                cells.append(quality(Schedule.parse(f"{count}*(F)"), steps=count))
                lines.append(f"| {here} | {len(schedule) / count:.3g}x | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")
                print(lines[-1], flush=True)
    with replace_file(RESULTS / "transfer.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        typer.run(main)
    except FlexiError as error:
        sys.exit(str(error))
