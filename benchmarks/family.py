"""Ready-made schedules of the embedded model: searched at 1.5x, 2x, 3x and 5x for 20, 25, 30 and 50 Euler steps.

    python benchmarks/family.py             # about three hours on one core
    python benchmarks/family.py --steps 20  # of one step count

Every schedule is judged on samples that no search has seen, beside as few plain steps and Flexi Preset's for any model.
Written: flexi_core/schedule/data/presets-demo.json, which Flexi Preset offers, and docs/results/family.md.
Searches are studies, and what is in the file is not searched again: an interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from embedded import RESULTS, search
from rich.console import Console

from flexi_core import FlexiError
from flexi_core.files import replace_file
from flexi_core.run.replay import PredictionStore
from flexi_core.schedule.file import to_dict
from flexi_core.schedule.presets import DEMO_FAMILY, preset
from search_tools.backends.embedded import EmbeddedBackend
from search_tools.backends.teacher import TeacherSettings
from search_tools.fitness import Fitness
from search_tools.measures.judge import Judge, Row
from search_tools.settings import SearchSettings
from search_tools.study.study import with_results

SPEEDUPS = {1.5: 16, 2.0: 16, 3.0: 32, 5.0: 32}  # samples to search with: the farther from the teacher, the more they differ
STEPS = (20, 25, 30, 50)
PLAIN, ANY = "as few plain steps", "for any model"
_err = Console(stderr=True)


def main(
    steps: Annotated[str, typer.Option(help="Step counts, separated by commas.")] = ",".join(map(str, STEPS)),
    evaluations: Annotated[int, typer.Option(help="Candidates of each search.")] = 32,
    samples: Annotated[int, typer.Option(help="To judge on.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the searches.")] = 0,
    out: Annotated[Path, typer.Option(help="The schedules' file; what it has stays.")] = DEMO_FAMILY,
) -> None:
    """Search, judge and write the ready-made schedules of the embedded model."""
    known = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    for count in map(int, steps.split(",")):
        backend, judge = EmbeddedBackend(TeacherSettings("euler", "normal", count)), None
        for speedup, search_samples in SPEEDUPS.items():
            name = f"{speedup:g}x"
            entries = known.setdefault(name, {})
            if str(count) in entries:
                continue
            wanted = SearchSettings.of(backend, speedup, search_samples, seed=seed)
            title = f"family, {count} steps, {name}, {search_samples} samples, seed {seed}"
            fitness = Fitness(backend, wanted.stages, predictions=PredictionStore())
            result, study = search(title, backend, wanted, fitness, evaluations=evaluations)
            schedule = result.best.schedule
            judge = judge or Judge(backend, samples)
            row, _ = judge.judge("searched", schedule)
            best = with_results(schedule, backend.identity, row, samples, study, seed)
            plain = judge.judge_fewer_steps(best.letters.count("F"))
            generic, _ = judge.judge(ANY, preset(name, count))
            beside = {PLAIN: beside_of(plain), ANY: beside_of(generic)}
            entries[str(count)] = to_dict(best.with_info(measured={**best.info["measured"], "beside": beside}))
            _err.print(f"{name}, {count} steps: {row.psnr_db:.1f} dB, {beside}", highlight=False)
            with replace_file(out) as temporary:
                temporary.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    text = f"# Ready-made schedules of the embedded model\n\nMade by `python benchmarks/family.py`.\n\n{markdown(known)}"
    with replace_file(RESULTS / "family.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(text)


def beside_of(row: Row) -> dict[str, float]:
    """Return what the file keeps of a row beside the searched one."""
    return {"speedup_macs": round(row.speedup_macs, 3), "psnr_db": round(row.psnr_db, 2), "rfid": float(f"{row.rfid:.3g}")}


def markdown(known: dict[str, dict[str, dict]]) -> str:
    """Return the table of all schedules in the file."""
    lines = [
        f"| | steps | MACs | PSNR dB (95 %) | SSIM | rFID | captions | {PLAIN}: dB, rFID | {ANY}: dB, rFID |",
        "|-|-|-|-|-|-|-|-|-|",
    ]
    for name, entries in known.items():
        for steps, entry in sorted(entries.items(), key=lambda item: int(item[0])):
            found = entry["measured"]
            others = [
                f"{m['psnr_db']:.1f}, {m['rfid']:.3g}"
                + (f" at {m['speedup_macs']:.2f}x" if abs(m["speedup_macs"] - found["speedup_macs"]) > 0.01 else "")
                for m in found["beside"].values()
            ]
            psnr = f"{found['psnr_db']:.1f} ({found['psnr_low']:.1f}-{found['psnr_high']:.1f})"
            lines.append(
                f"| {name} | {steps} | {found['speedup_macs']:.2f}x | {psnr} | {found['ssim']:.4f} | {found['rfid']:.3g} "
                f"| {found['caption_accuracy']:.1%} | " + " | ".join(others) + " |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    try:
        typer.run(main)
    except FlexiError as error:
        sys.exit(str(error))
