"""The ready-made schedules: placements of full steps that serve every testbed, chosen by measurement.

    python benchmarks/presets.py --dit scene_dit.safetensors --comfyui ~/comfy/ComfyUI   # about an hour on one core

For every wanted speed-up and step count, several placements of the full steps are sampled on four testbeds: the embedded U-Net
and the small transformer of `scene_dit.py`, each with Euler and dpmpp_2m. The one that is furthest ahead of the same solver
with fewer steps, on average, is kept, and judged on seeds that took no part in the choice. Written: flexi_core/presets.json,
which Flexi Preset offers, and benchmarks/results/presets.md.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from scene_dit import SCHEDULER, scene_model
from scene_host import SceneBackend, SceneModel, embedded_model

from flexi_core import FlexiError, Schedule
from flexi_core.files import replace_file
from flexi_core.metrics import data_range, psnr_db
from flexi_core.presets import FAMILY, from_kinds, segments_for_speedup
from flexi_core.schedule import StepKind
from search_tools.comfyui_host import open_host
from search_tools.teacher import JUDGE_SEEDS, SEARCH_SEEDS, TeacherSettings

RESULTS = Path(__file__).parent / "results"
SPEEDUPS = {1.5: 2, 2.0: 2, 3.0: 2, 5.0: 8}  # samples to choose on: the farther from the teacher, the more they differ
STEPS = (20, 25, 30, 50)
# Towards the start, the end. Bent to both, the places are about those of a grid of Karras et al. (2022).
BENDS = ((1.0, 1.0), (0.8, 1.0), (1.3, 1.0), (1.0, 1.25), (1.0, 1.6), (0.8, 1.4))
BENDS += ((1.3, 1.3), (1.3, 1.6), (1.6, 1.6), (1.3, 2.0), (1.6, 2.0))
BLENDS = ((1.0, 1.0), (1.0, 0.7), (1.0, 0.4), (1.0, 0.8, 0.3), (1.0, 1.0, 0.3))  # of every extrapolated stretch alike
_err = Console(stderr=True)


class Bed:
    """One model under one solver, at any number of steps."""

    def __init__(self, scenes: SceneModel, sampler: str, scheduler: str) -> None:
        self.name, self._scenes = f"{scenes.name}, {sampler}", scenes
        self._sampler, self._scheduler = sampler, scheduler
        self._backends: dict[int, SceneBackend] = {}
        self._fewer: dict[tuple[int, int, int, int], float] = {}

    def gain(self, schedule: Schedule, seed: int, count: int) -> tuple[float, float]:
        """Return the PSNR of a schedule's samples to the teacher's, and by how much it is above that of fewer steps, dB."""
        full = schedule.letters.count("F")
        found, key = self._psnr(schedule, seed, count, None), (len(schedule), full, seed, count)
        if key not in self._fewer:
            self._fewer[key] = self._psnr(Schedule.parse(f"{full}*(F)"), seed, count, len(schedule))
        return found, found - self._fewer[key]

    def _psnr(self, schedule: Schedule, seed: int, count: int, teacher_steps: int | None) -> float:
        steps = teacher_steps or len(schedule)
        if steps not in self._backends:
            self._backends[steps] = SceneBackend(self._scenes, TeacherSettings(self._sampler, self._scheduler, steps))
        backend = self._backends[steps]
        teacher = backend.pictures(backend.teacher(seed, count))
        made = backend.sample(schedule, seed, count, steps=len(schedule) if teacher_steps else None).latents
        return float(psnr_db(backend.pictures(made), teacher, data_range(teacher)).mean())


def placements(steps: int, speedup: float) -> Iterator[Schedule]:
    """Yield schedules of steps / speedup full steps, one for each way to place them, all extrapolated linearly."""
    full = max(2, round(steps / speedup))
    yield segments_for_speedup(steps, speedup)
    for start, end in BENDS:
        u = np.linspace(0, 1, full)
        bent = 1 - (1 - u**start) ** end if end != 1 else u**start
        places = sorted({round(float(place) * (steps - 1)) for place in bent})
        while len(places) < full:  # two that fell together
            gaps = [b - a for a, b in pairwise(places)]
            widest = int(np.argmax(gaps))
            places.insert(widest + 1, (places[widest] + places[widest + 1]) // 2)
        kinds = [StepKind.FULL if i in set(places) else StepKind.EXTRAPOLATED for i in range(steps)]
        yield from_kinds(kinds)


def blended(schedule: Schedule, blend: tuple[float, ...]) -> Schedule:
    """Return a schedule with one blend for all its extrapolated stretches."""
    text = ",".join(f"{factor:g}" for factor in blend)
    parts = [str(Schedule.parse(s.letters)) + (f"~{text}" if "X" in s.letters else "") for s in schedule.segments]
    return Schedule.parse("|".join(parts))


def choose(beds: list[Bed], steps: int, speedup: float, samples: int) -> Schedule:
    """Return the schedule that is furthest ahead of fewer steps on average over the testbeds."""

    def mean_gain(schedule: Schedule) -> float:
        return statistics.mean(bed.gain(schedule, SEARCH_SEEDS, samples)[1] for bed in beds)

    best = max({str(s): s for s in placements(steps, speedup)}.values(), key=mean_gain)
    return max((blended(best, blend) for blend in BLENDS), key=mean_gain)


def main(
    dit: Annotated[Path, typer.Option(help="Weights of scene_dit.py.")],
    comfyui: Annotated[str, typer.Option(help="A ComfyUI checkout.")] = "~/comfy/ComfyUI",
    judged: Annotated[int, typer.Option(help="To judge on.")] = 8,
    out: Annotated[Path, typer.Option(help="The presets' file; what it has for other step counts stays.")] = FAMILY,
) -> None:
    """Choose, judge and write the ready-made schedules."""
    open_host(comfyui)
    models = embedded_model(), scene_model(dit)
    grids = ("normal", SCHEDULER)
    beds = [Bed(scenes, sampler, grid) for scenes, grid in zip(models, grids, strict=True) for sampler in ("euler", "dpmpp_2m")]
    known = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    for speedup, samples in SPEEDUPS.items():
        for steps in STEPS:
            entries = known.setdefault(f"{speedup:g}x", {})
            if str(steps) in entries:
                continue
            schedule = choose(beds, steps, speedup, samples)
            measured = {bed.name: bed.gain(schedule, JUDGE_SEEDS, judged) for bed in beds}
            entries[str(steps)] = {
                "schedule": str(schedule),
                "measured": {
                    name: {"psnr_db": round(psnr, 2), "over_fewer_steps_db": round(gain, 2), "samples": judged}
                    for name, (psnr, gain) in measured.items()
                },
            }
            _err.print(f"{speedup:g}x, {steps} steps: {schedule} {[f'{gain:+.1f}' for _, gain in measured.values()]}")
            with replace_file(out) as temporary:
                temporary.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    names = [bed.name for bed in beds]
    lines = [
        "# Ready-made schedules",
        "",
        "Made by `python benchmarks/presets.py`. PSNR to the teacher, dB (above the same",
        "",
    ]
    lines[2] += f" solver with as few steps), {judged} unseen seeds."
    lines += ["| | steps | " + " | ".join(names) + " |", "|-|-|" + "-|" * len(names)]
    for speedup, entries in known.items():
        for steps, entry in entries.items():
            cells = [f"{m['psnr_db']:.1f} ({m['over_fewer_steps_db']:+.1f})" for m in entry["measured"].values()]
            lines.append(f"| {speedup} | {steps} | " + " | ".join(cells) + " |")
    with replace_file(RESULTS / "presets.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    try:
        typer.run(main)
    except FlexiError as error:
        sys.exit(str(error))
