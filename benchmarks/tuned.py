"""Tuned schedules on unseen seeds: what one full run, four, and a hundred are worth, against preset and plain steps.

    python benchmarks/tuned.py --dit scene_dit.safetensors      # both networks, some hours on one core; goes on where it was
    python benchmarks/tuned.py --only "U-Net, euler 50"         # runs of which this is a part of the name

Everything is judged on seeds that nothing was tuned on. The U-Net is the embedded one, the transformer that of `scene_dit.py`
in the host. Written: docs/results/tuned.md, with a plot of what was predicted against what came out, and the figures.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import scipy.stats
import torch
import typer
from rich.console import Console

from flexi_core import FlexiError, Schedule
from flexi_core.files import write_text
from flexi_core.metrics import data_range, psnr_db
from flexi_core.schedule.presets import Preset, all_full, full_steps
from flexi_core.tune import EFFORTS, Effort, Recorded, Tuner, nearest
from flexi_core.tune.learning import RUNS as LEARNED_FROM
from flexi_core.tune.placement import SPREAD_DB
from search_tools.backends.batches import BatchedBackend
from search_tools.backends.embedded import EmbeddedBackend
from search_tools.backends.teacher import JUDGE_SEEDS, SEARCH_SEEDS, TeacherSettings

RESULTS = Path(__file__).parents[1] / "docs" / "results"
KEPT, PAGE, PLOT = (RESULTS / f"tuned.{kind}" for kind in ("json", "md", "png"))
RUNS = (
    TeacherSettings("euler", "normal", 50),
    TeacherSettings("euler", "normal", 20),
    TeacherSettings("dpmpp_2m", "normal", 25),
    TeacherSettings("euler_ancestral", "normal", 28),
    TeacherSettings("dpmpp_2m_sde", "karras", 25),
)
SPEEDUPS = (1.5, 2.0, 3.0, 5.0)
QUALITIES = (45.0, 50.0)  # dB
REPEATS = 3  # tunings for each quality, each from samples of its own
APART = 1000  # seeds from one repeat's samples to the next one's
_err = Console(stderr=True)


class Judge:
    """Judges schedules of one run on unseen seeds."""

    def __init__(self, backend: BatchedBackend, judged: int) -> None:
        self._backend, self._judged = backend, judged
        self._teacher = backend.teacher(JUDGE_SEEDS, judged)

    def db(self, schedule: Schedule) -> list[float]:
        """Return each sample's PSNR to the teacher, dB."""
        steps = len(schedule) if schedule.is_all_full and len(schedule) != self._backend.settings.steps else None
        made = self._backend.sample(schedule, JUDGE_SEEDS, self._judged, steps=steps).latents
        found = psnr_db(made.float(), self._teacher.float(), data_range(self._teacher)).clamp(max=99)
        return [round(float(db), 3) for db in found]


@dataclass(frozen=True)
class Made:
    """A schedule with what finding it took, in full runs of one sample."""

    schedule: Schedule
    full_runs: float
    predicted_db: float | None = None


def tuned(backend: BatchedBackend, effort: str) -> Iterator[tuple[float, Made | None]]:
    """Yield what each speed-up's tuning makes; the recorded runs are shared, and counted for each."""
    recorded = Recorded()
    for speedup in SPEEDUPS:
        tuner = Tuner(backend, EFFORTS[effort], recorded=recorded)
        had = len(recorded.watched)
        made = tuner.chosen(tuner.front(), speedup)
        spent = tuner.full_runs + (EFFORTS[effort].samples if had else 0)
        yield speedup, Made(made.schedule, spent, made.predicted_db)


def learned(backend: BatchedBackend) -> Iterator[tuple[float, Made | None]]:
    """Yield what Flexi Learn takes at each speed-up, from runs that are made anyway."""
    front = Tuner(backend, Effort(LEARNED_FROM, fit=False)).front(measured=False)
    for speedup in SPEEDUPS:
        planned = nearest(front, full_steps(backend.settings.steps, speedup))
        yield speedup, Made(planned.schedule, 0.0, planned.predicted_db)


def presets(backend: BatchedBackend) -> Iterator[tuple[float, Made | None]]:
    """Yield the preset of each speed-up; None where it samples plainly."""
    for speedup in SPEEDUPS:
        preset = Preset(f"{speedup:g}x")
        found = preset.resolve(backend.traits, backend.sigmas.tolist(), guided=backend.settings.cfg != 1).schedule
        yield speedup, found and Made(found, 0.0)


def plain(backend: BatchedBackend) -> Iterator[tuple[float, Made | None]]:
    """Yield as many plain steps as each speed-up has."""
    for speedup in SPEEDUPS:
        yield speedup, Made(all_full(full_steps(backend.settings.steps, speedup)), 0.0)


ARMS: dict[str, Callable[[BatchedBackend], Iterator[tuple[float, Made | None]]]] = {
    "plain steps": plain,
    "preset": presets,
    "learned": learned,
    **{effort: lambda backend, effort=effort: tuned(backend, effort) for effort in EFFORTS},
}


def by_quality(backend: BatchedBackend, judge: Judge, effort: str = "good") -> list[dict[str, Any]]:
    """Return what asking for a quality gives, from several sets of samples."""
    found = []
    for wanted in QUALITIES:
        for repeat in range(REPEATS):
            tuner = Tuner(backend, EFFORTS[effort], seed=SEARCH_SEEDS + repeat * APART)
            made = tuner.chosen(tuner.front(), 1.0, wanted)
            db = statistics.fmean(judge.db(made.schedule)) if made else 99.0
            found.append({"wanted_db": wanted, "full": made.full if made else tuner.steps, "db": db})
    return found


def fronts(backend: BatchedBackend, judge: Judge) -> list[dict[str, Any]]:
    """Return what was predicted of points all along the front, and what came out, with no run of their own before."""
    tuner = Tuner(backend, EFFORTS["good"])
    front = tuner.front()
    points = dict.fromkeys(nearest(front, full_steps(tuner.steps, speedup)) for speedup in (1.25, 1.5, 2, 2.5, 3, 4, 5))
    return [{"full": p.full, "predicted_db": p.predicted_db, "db": statistics.fmean(judge.db(p.schedule))} for p in points]


def measured(bed: str, backend: BatchedBackend, judged: int, known: dict[str, Any], keep: Callable[[], None]) -> None:
    """Measure what is not known yet of one run on one network."""
    judge: Judge | None = None
    for name, arm in ARMS.items():
        if name in known.setdefault("arms", {}):
            continue
        judge = judge or Judge(backend, judged)
        rows = known["arms"][name] = []
        for speedup, made in arm(backend):
            row: dict[str, Any] = {"speedup": speedup}
            if made is not None:
                row |= {"schedule": str(made.schedule), "db": judge.db(made.schedule), "full_runs": made.full_runs}
                row["predicted_db"] = made.predicted_db
            rows.append(row)
            said = statistics.fmean(row["db"]) if made else math.nan
            _err.print(f"{bed}: {name} {speedup:g}x {said:.1f} dB", highlight=False)
        keep()
    for name, measure in (("front", fronts), ("quality", by_quality)):
        if name not in known:
            judge = judge or Judge(backend, judged)
            known[name] = measure(backend, judge)
            _err.print(f"{bed}: {name} {known[name]}", highlight=False)
            keep()


def page(found: dict[str, Any], judged: int) -> str:
    """Return the page."""
    lines = [
        "# Tuned schedules on unseen seeds",
        "",
        f"Made by `python benchmarks/tuned.py --dit FILE`: mean PSNR in dB to the run of all steps on {judged} seeds that",
        "nothing was tuned on, cfg 3; in brackets what finding the schedule took, in full runs of one picture. `learned` is",
        "Flexi Learn's, from two runs that are made anyway. `instant` looks at one full run, `good` at four and fits in runs",
        "of the schedule's own, `thorough` at eight and changes the schedule step by step for a hundred. A preset that is not",
        "offered for a run is `-`.",
        "",
        f"| run | | {' | '.join(ARMS)} |",
        f"|-|-|{'-|' * len(ARMS)}",
    ]
    for run, known in found.items():
        for at, speedup in enumerate(SPEEDUPS):
            cells = []
            for arm in ARMS:
                row = known.get("arms", {}).get(arm, [{}] * len(SPEEDUPS))[at]
                spent = f" ({row['full_runs']:.0f})" if row.get("full_runs") else ""
                cells.append(f"{statistics.fmean(row['db']):.1f}{spent}" if "db" in row else "-")
            lines.append(f"| {run} | {speedup:g}x | {' | '.join(cells)} |")
    points = [(p["predicted_db"], p["db"]) for known in found.values() for p in known.get("front", ())]
    if len(points) > 2:
        errors = [true - predicted for predicted, true in points]
        within = sum(abs(error) <= 2 * SPREAD_DB for error in errors) / len(errors)
        tau = scipy.stats.kendalltau(*zip(*points, strict=True)).statistic
        lines += [
            "",
            "## Predicted and true",
            "",
            f"{len(points)} schedules of the fronts that four full runs and an accelerated one gave, none tried before:",
            f"what came out on unseen seeds less what was predicted is {statistics.fmean(errors):+.1f} dB on average, standard",
            f"deviation {statistics.stdev(errors):.1f}; {within:.0%} lie within {2 * SPREAD_DB:g} dB; Kendall's tau {tau:.2f}.",
            "",
            f"![predicted and true]({PLOT.name})",
        ]
    asked = [(row["wanted_db"], row["db"], run) for run, known in found.items() for row in known.get("quality", ())]
    if asked:
        reached = sum(db >= wanted for wanted, db, _ in asked) / len(asked)
        short = [f"{run} {wanted:g} dB: {db:.1f}" for wanted, db, run in asked if db < wanted]
        lines += [
            "",
            "## Asked for by quality",
            "",
            f"Of {len(asked)} tunings for {' or '.join(f'{q:g}' for q in QUALITIES)} dB, {reached:.0%} have at least that on",
            f"average over the unseen seeds. Short of it: {'; '.join(short) or 'none'}.",
        ]
    return "\n".join(lines) + "\n"


def plot(found: dict[str, Any]) -> None:
    """Draw what was predicted against what came out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 6), layout="constrained")
    low, high = math.inf, -math.inf
    for run, known in found.items():
        points = [(p["predicted_db"], p["db"]) for p in known.get("front", ())]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=run, markersize=4, linewidth=0.8)
            low, high = min(low, *map(min, points)), max(high, *map(max, points))
    axes.plot([low, high], [low, high], color="grey", linewidth=1)
    axes.set(xlabel="predicted PSNR, dB", ylabel="on unseen seeds, dB", title="What full runs foretell of every speed-up")
    axes.legend(fontsize=8)
    figure.savefig(PLOT, dpi=110)
    pyplot.close(figure)


def beds(dit: Path | None, comfyui: Path) -> Iterator[tuple[str, BatchedBackend]]:
    """Yield the runs by name, each with its back end."""
    for settings in RUNS:
        yield f"U-Net, {settings.sampler} {settings.steps} {settings.scheduler}", EmbeddedBackend(settings)
    if dit is None:
        return
    from scene_dit import scene_model
    from scene_host import SceneBackend, open_comfy

    open_comfy(comfyui)
    model = scene_model(dit)
    for settings in RUNS:
        yield f"transformer, {settings.sampler} {settings.steps} {settings.scheduler}", SceneBackend(model, settings)


def main(
    dit: Annotated[Path | None, typer.Option(help="Weights of the transformer, as scene_dit.py writes them.")] = None,
    comfyui: Annotated[Path, typer.Option(help="A ComfyUI checkout.")] = Path("~/comfy/ComfyUI"),
    only: Annotated[str, typer.Option(help="Part of a run's name.")] = "",
    judged: Annotated[int, typer.Option(help="Unseen seeds.")] = 96,
) -> None:
    """Measure, and write the page."""
    torch.set_num_threads(1)
    found = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else {}
    for name, backend in beds(dit, comfyui):
        if only in name:
            measured(name, backend, judged, found.setdefault(name, {}), lambda: write_text(KEPT, json.dumps(found) + "\n"))
    plot(found)
    write_text(PAGE, page(found, judged))
    print(page(found, judged))


if __name__ == "__main__":
    try:
        typer.run(main)
    except FlexiError as error:
        raise SystemExit(str(error)) from error
