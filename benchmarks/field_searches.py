"""Searches under samplers that people use, stochastic ones among them, against the preset and plain steps.

    python benchmarks/field_searches.py                          # six searches of 40 candidates, about an hour on one core
    python benchmarks/field_searches.py --only euler_ancestral

The embedded model; searched on one range of seeds, judged on another. Each search is a study: an interrupted one is gone on
with. Written: docs/results/field-searches.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from embedded import search
from rich.console import Console

from flexi_core import FlexiError
from flexi_core.files import write_text
from flexi_core.run.replay import PredictionStore
from flexi_core.schedule.presets import Preset
from search_tools.backends.embedded import EmbeddedBackend
from search_tools.backends.teacher import TeacherSettings
from search_tools.fitness import Fitness, stages_to
from search_tools.measures.judge import Judge, Row
from search_tools.settings import SearchSettings

RESULTS = Path(__file__).parents[1] / "docs" / "results"
RUNS = (
    TeacherSettings("euler_ancestral", "normal", 28),
    TeacherSettings("dpmpp_2m_sde", "karras", 25),
    TeacherSettings("res_multistep", "simple", 20),
)
SPEEDUPS = (2.0, 3.0)
_err = Console(stderr=True)


def measure(settings: TeacherSettings, speedup: float, evaluations: int, samples: int, judged: int) -> dict[str, Any]:
    """Return the rows of a search, the preset and as many plain steps, and the schedule that was found."""
    backend = EmbeddedBackend(settings)
    wanted = SearchSettings.of(backend, speedup, samples, guesses=0)
    fitness = Fitness(backend, stages_to(samples), predictions=PredictionStore())
    name = f"{settings.sampler} {settings.steps}, {speedup:g}x, {evaluations} candidates of {samples} samples"
    result, _ = search(name, backend, wanted, fitness, evaluations=evaluations)
    judge = Judge(backend, judged, progress=lambda row, done, total: None)
    preset = Preset(f"{speedup:g}x").resolve(backend.traits, backend.sigmas.tolist(), guided=True).schedule
    rows: list[Row] = [judge.judge("searched", result.best.schedule)[0]]
    if preset is not None:
        rows.append(judge.judge("preset", preset)[0])
    rows.append(judge.judge_fewer_steps(int(settings.steps / speedup)))
    return {
        "schedule": str(result.best.schedule),
        "preset": None if preset is None else str(preset),
        "rows": [row.as_dict() for row in rows],
        "judged": judged,
    }


def main(
    only: Annotated[str, typer.Option(help="Name of a sampler.")] = "",
    evaluations: Annotated[int, typer.Option(help="Candidates of each search.")] = 40,
    samples: Annotated[int, typer.Option(help="To search with.")] = 16,
    judged: Annotated[int, typer.Option(help="To judge on.")] = 32,
) -> None:
    """Search, judge, and write the page."""
    kept = RESULTS / "field-searches.json"
    known = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    for settings in RUNS:
        for speedup in SPEEDUPS:
            key = f"{settings.steps} {settings.sampler} {settings.scheduler}, {speedup:g}x"
            if key in known or (only and settings.sampler != only):
                continue
            known[key] = measure(settings, speedup, evaluations, samples, judged)
            found = {row["name"]: round(row["psnr_db"], 1) for row in known[key]["rows"]}
            _err.print(f"{key}: {found}", highlight=False)
            write_text(kept, json.dumps(known, indent=1) + "\n")
    page = [
        "# Searches under samplers that people use",
        "",
        f"Made by `python benchmarks/field_searches.py`: embedded model, cfg 3, {evaluations} candidates on {samples} samples,",
        "judged on seeds that no search has seen. PSNR in dB to the run of all steps, in brackets its 95 % interval.",
        "",
        "| run | schedule | MACs | PSNR | rFID | captions |",
        "|-|-|-|-|-|-|",
    ]
    for key, measured in known.items():
        for row in measured["rows"]:
            psnr = f"{row['psnr_db']:.1f} ({row['psnr_low']:.1f} to {row['psnr_high']:.1f})"
            read = f"{row['caption_accuracy']:.1%}"
            page.append(f"| {key} | {row['name']} | {row['speedup_macs']:.2f}x | {psnr} | {row['rfid']:.3g} | {read} |")
    page += ["", *(f"- {key}: `{measured['schedule']}`" for key, measured in known.items())]
    write_text(RESULTS / "field-searches.md", "\n".join(page) + "\n")
    print("\n".join(page))


if __name__ == "__main__":
    try:
        typer.run(main)
    except FlexiError as error:
        raise SystemExit(str(error)) from error
