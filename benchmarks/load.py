"""The pack and the search under load: many clients, long runs, kills, full and read-only disks, damaged files, stopped workers.

    python benchmarks/load.py --comfyui ~/comfy/ComfyUI                  # every part, about an hour on one core
    python benchmarks/load.py --only kills --only workers --rounds 1     # a first try of two of them

All of it is done for real: a ComfyUI server on the CPU, processes that are killed, a small disk that is mounted (by root), a
PostgreSQL server. It runs with the Python that runs ComfyUI, the packages of this pack's tests beside. What was found is kept
beside the page, round by round, and gone on with; `--anew` forgets it. Written: docs/results/load.md.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import load_host
import load_studies
import typer
from load_outcome import Outcome, together
from overhead import CHECKOUT
from rich.console import Console

from flexi_core import FlexiError
from flexi_core.files import write_text

PAGE = Path(__file__).parents[1] / "docs" / "results" / "load.md"
KEPT = PAGE.with_suffix(".json")
_err = Console(stderr=True)


@dataclass(frozen=True)
class Part:
    """A part of the load.

    Args:
        title: what is tried, for the page.
        held: what must hold, for the page.
        round: tries it once: a function of (a folder of its own, a ComfyUI checkout, random numbers, the outcome).
        rounds: how often.
    """

    title: str
    held: str
    round: Callable[[Path, Path, random.Random, Outcome], None]
    rounds: int


PARTS = {
    "server": Part(
        "A ComfyUI server, four clients at once, interrupts at random moments",
        "every prompt ends; every report is of its own run; samples afterwards as before, bit for bit",
        load_host.server,
        1,
    ),
    "runs": Part(
        "One loaded model, one process: sizes, batches, steps, samplers and schedules change from run to run",
        "a run repeats bit for bit; no feature, run or handle is kept; memory stays",
        load_host.runs,
        1,
    ),
    "node-kills": Part(
        "The server killed (-9) while Flexi Save Schedule writes over a file of 2 MiB",
        "the file is one of the two that were written, whole",
        load_host.node_kills,
        5,
    ),
    "kills": Part(
        "A process killed (-9) while it does nothing but save over a file of 2 MiB",
        "the file is one of the two that were written, whole; what a killed save left goes with a later one",
        load_host.kills,
        10,
    ),
    "full-disk": Part(
        "`flexi search` on a disk that is full at once or after some KiB, database, journal, teacher and file on it",
        "one line, exit code 2; the study is readable on the full disk, and goes on with its candidates after space is made",
        load_studies.full_disk,
        16,
    ),
    "read-only": Part(
        "Every command that opens a study, on a disk mounted read-only",
        "one line and exit code 2 where something is to be written; what only reads works",
        load_studies.read_only,
        1,
    ),
    "damaged": Part(
        "Every command that opens a study, on a journal and an SQLite file that are cut off, overwritten, or lack a piece",
        "one line, or it goes on",
        load_studies.damaged,
        10,
    ),
    "workers": Part(
        "Three workers on PostgreSQL, one after another stopped (SIGSTOP) for longer than the grace and continued",
        "all end well; no candidate is lost or counted twice; each is judged as one worker judges it",
        load_studies.workers,
        6,
    ),
}


def main(
    comfyui: Annotated[Path, typer.Option(help="A ComfyUI checkout.")] = CHECKOUT,
    only: Annotated[list[str] | None, typer.Option(help=f"A part, may be given again: {', '.join(PARTS)}.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of each part. [default: each part's own]")] = None,
    seed: Annotated[int, typer.Option(help="Of the random moments.")] = 0,
    anew: Annotated[bool, typer.Option("--anew", help="Forget what was found of these parts.")] = False,
) -> None:
    """Try the parts, print and write the page."""
    chosen = only or list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        raise FlexiError(f"no part {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    for name in chosen:
        done = [] if anew else _read().get(name, [])
        for number in range(len(done), rounds or PARTS[name].rounds):
            _err.print(f"{name}: round {number + 1}", highlight=False)
            outcome = Outcome()
            with tempfile.TemporaryDirectory(prefix="flexi-load-") as folder:
                PARTS[name].round(Path(folder), comfyui.expanduser(), random.Random(f"{seed} {name} {number}"), outcome)
            _err.print(str(outcome), highlight=False, markup=False, soft_wrap=True)
            done.append(outcome.as_dict())
            _keep(name, done)
    found = _read()
    print(_page(found))
    if any(together(found.get(name, [])).broken for name in chosen):
        raise FlexiError("not everything held")


def _read() -> dict[str, list[dict[str, Any]]]:
    """Return what was found so far, round by round, of each part."""
    return json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else {}


def _keep(name: str, rounds: list[dict[str, Any]]) -> None:
    """Write what was found of a part, and the page; another process may be at another part."""
    found = _read() | {name: rounds}
    write_text(KEPT, json.dumps(found, indent=1) + "\n")
    write_text(PAGE, _page(found))


def _page(found: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "# Under load",
        "",
        "Made by `python benchmarks/load.py --comfyui CHECKOUT` (each row also by its own `--only`): everything is done for",
        "real, with the embedded model on a CPU, one thread. A row names what broke where not all held. Figures are the",
        "largest of all rounds.",
        "",
        "| part | what was tried | how often | what must hold | held | figures |",
        "|-|-|-|-|-|-|",
    ]
    for name, part in PARTS.items():
        if done := found.get(name):
            whole = together(done)
            often = ", ".join(f"{count} {what}" for what, count in whole.counts.items() if count)
            figures = ", ".join(f"{value:.4g} {what}" for what, value in whole.figures.items())
            held = "yes" if not whole.broken else f"**no**: {'; '.join(dict.fromkeys(whole.broken))}"
            cells = (f"`{name}`", part.title, often, part.held, held, figures)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    if missing := [f"`{name}`" for name in PARTS if not found.get(name)]:
        lines += ["", f"Not tried yet: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    try:
        typer.run(main)
    except FlexiError as error:
        sys.exit(str(error))
