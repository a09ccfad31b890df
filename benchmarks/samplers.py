"""Every sampler of the host under the presets, beside as many plain steps of the same sampler and scheduler.

    python benchmarks/samplers.py --comfyui ~/comfy/ComfyUI        # 20 steps, about half an hour on two cores
    python benchmarks/samplers.py --short                          # 4, 6, 8 and 10 steps of the samplers that people use

The embedded model in the real host, cfg 3, the same seeds for the run of all steps, the preset and the plain steps. A preset
that stands down is plain sampling, bit for bit. What was measured is kept beside the page and gone on with. Written:
docs/results/samplers.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from scene_host import SceneBackend, embedded_model, open_comfy

from flexi_core import FlexiError
from flexi_core.files import write_text
from flexi_core.metrics import bootstrap_interval, data_range, psnr_db
from flexi_core.schedule.presets import Preset
from search_tools.backends.teacher import JUDGE_SEEDS, TeacherSettings

RESULTS = Path(__file__).parents[1] / "docs" / "results"
SHORT_STEPS = (4, 6, 8, 10)
SHORT_SAMPLERS = ("euler", "dpmpp_2m", "res_multistep", "euler_ancestral", "lcm", "er_sde")
LOSS = 0.5  # dB: what a preset may be behind plain steps
LEAD = 5.0  # dB at 2x
FIRST_SEED = JUDGE_SEEDS + 500_000  # neither chosen nor judged on
_err = Console(stderr=True)


class Cell:
    """One sampler on one scheduler's grid: the run of all steps, presets and plain steps.

    Args:
        sampler, scheduler: names of the host's.
        steps: of the run.
        samples: seeds from `FIRST_SEED` on.
    """

    def __init__(self, sampler: str, scheduler: str, steps: int, samples: int) -> None:
        self._backend = SceneBackend(embedded_model(), TeacherSettings(sampler, scheduler, steps))
        self._samples = samples
        self._teacher = self._backend.draw(self._backend.scenes.model, FIRST_SEED, samples)
        self._plain: dict[int, torch.Tensor] = {}

    def teacher_read(self) -> float:
        """Return the share of captions that the run of all steps reads."""
        return self._read(self._teacher)

    def measure(self, preset: str) -> dict[str, Any]:
        """Return what a preset did: full steps, captions, PSNR with its interval, and the same of as many plain steps."""
        from flexi_core.host import apply_schedule

        backend = self._backend
        patched, handle = apply_schedule(backend.scenes.model, Preset(preset))
        latents = backend.draw(patched, FIRST_SEED, self._samples)
        run = handle.report.run
        if run is None:
            if not torch.equal(latents, self._teacher):
                raise FlexiError(f"{backend.settings}: {preset} stood down and changed the picture")
            return {"full": None, "words": str(handle.report)}
        full = run.plan.letters.count("F")
        if full not in self._plain:
            self._plain[full] = backend.draw(backend.scenes.model, FIRST_SEED, self._samples, steps=full)
        made, plain = self._psnr(latents), self._psnr(self._plain[full])
        return {
            "full": full,
            "schedule": run.plan.letters,
            "read": self._read(latents),
            "plain_read": self._read(self._plain[full]),
            "psnr_db": _with_interval(made),
            "plain_db": _with_interval(plain),
            "lead_db": _with_interval(made - plain),
        }

    def _psnr(self, latents: torch.Tensor) -> torch.Tensor:
        made = self._backend.pictures(latents).nan_to_num(nan=1e3, posinf=1e3, neginf=-1e3)
        return psnr_db(made, self._backend.pictures(self._teacher), data_range(self._teacher)).clamp(max=99)

    def _read(self, latents: torch.Tensor) -> float:
        return float(self._backend.caption_accuracy(latents, FIRST_SEED).double().mean())


def _with_interval(values: torch.Tensor) -> list[float]:
    """Return a mean and its 95 % interval."""
    low, high = bootstrap_interval(values.double())
    return [round(float(v), 2) for v in (values.mean(), low, high)]


def cells(short: bool) -> Iterator[tuple[str, str, int, Sequence[str]]]:
    """Yield sampler, scheduler, steps and presets of every cell."""
    import comfy.samplers

    if short:
        for steps in SHORT_STEPS:
            for sampler in SHORT_SAMPLERS:
                yield sampler, "normal", steps, ("1.25x", "1.5x", "2x", "3x")
        return
    for name in comfy.samplers.SAMPLER_NAMES:
        if not name.endswith("_gpu"):  # on a CPU the same as without
            for scheduler in ("karras" if name.startswith("dpmpp") else "normal", "simple"):
                yield name, scheduler, 20, ("1.5x", "2x", "3x")


def main(
    comfyui: Annotated[Path, typer.Option(help="A ComfyUI checkout.")] = Path("~/comfy/ComfyUI"),
    short: Annotated[bool, typer.Option("--short", help="Few steps, in place of 20.")] = False,
    samples: Annotated[int, typer.Option(min=2, help="Seeds.")] = 12,
    only: Annotated[str, typer.Option(help="Names of samplers, separated by commas.")] = "",
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is kept.")] = False,
) -> None:
    """Measure, print and write the tables."""
    open_comfy(comfyui)
    kept = RESULTS / "samplers.json"
    known = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    for sampler, scheduler, steps, presets in list(cells(short)):
        if only and sampler not in only.split(","):
            continue
        key = f"{sampler}, {scheduler}, {steps}"
        if key in known and not fresh:
            continue
        cell = Cell(sampler, scheduler, steps, samples)
        known[key] = {"read": cell.teacher_read(), "samples": samples, "presets": {p: cell.measure(p) for p in presets}}
        leads = {p: (m["full"] and m["lead_db"][0]) for p, m in known[key]["presets"].items()}
        _err.print(f"{key}: {leads}", highlight=False)
        write_text(kept, json.dumps(known, indent=1) + "\n")
    page = "\n".join(_page(known)) + "\n"
    write_text(RESULTS / "samplers.md", page)
    print(page)


def _page(known: dict[str, Any]) -> list[str]:
    """Return the lines of the page."""
    lines = [
        "# Samplers under the presets",
        "",
        "Made by `python benchmarks/samplers.py` and `python benchmarks/samplers.py --short`: the embedded model in ComfyUI,",
        "cfg 3, seeds that no preset was chosen or judged on. PSNR in dB to the run of all steps with the same seed, in",
        "brackets its 95 % interval; beside it as many plain steps of the same sampler and scheduler. Captions: the share that",
        "is read right.",
        "`all` means that the preset stands down: plain sampling, bit for bit.",
    ]
    for title, of_length in (("20 steps", lambda n: n == 20), ("4 to 10 steps", lambda n: n <= 10)):
        chosen = {key: cell for key, cell in known.items() if of_length(int(key.rsplit(", ", 1)[1]))}
        if not chosen:
            continue
        measured = [(key, preset, m) for key, cell in chosen.items() for preset, m in cell["presets"].items() if m["full"]]
        worse = [(key, preset) for key, preset, m in measured if m["lead_db"][0] < -LOSS or m["read"] < m["plain_read"]]
        lines += ["", f"## {title}", "", *_summary(chosen, worse), ""]
        lines += [
            "| run | preset | computed | preset, dB | plain, dB | lead, dB | captions (all, preset, plain) |",
        ]
        lines += ["|-|-|-|-|-|-|-|"]
        for key, cell in chosen.items():
            for preset, m in cell["presets"].items():
                if m["full"] is None:
                    lines.append(f"| {key} | {preset} | all | | | | {cell['read']:.2f} |")
                    continue
                made, plain, lead = (
                    f"{v[0]:.1f} ({v[1]:.1f} to {v[2]:.1f})" for v in (m["psnr_db"], m["plain_db"], m["lead_db"])
                )
                mark = " **worse**" if (key, preset) in worse else ""
                captions = f"{cell['read']:.2f}, {m['read']:.2f}, {m['plain_read']:.2f}"
                lines.append(f"| {key} | {preset} | {m['full']} | {made} | {plain} | {lead}{mark} | {captions} |")
    return lines


def _summary(chosen: dict[str, Any], worse: Sequence[tuple[str, str]]) -> list[str]:
    """Return how many cells are behind plain steps, and at 2x how many samplers are well ahead."""
    samplers = sorted({key.split(",")[0] for key in chosen})
    leads: dict[str, list[float]] = {name: [] for name in samplers}
    for key, cell in chosen.items():
        m = cell["presets"]["2x"]
        leads[key.split(",")[0]].append(m["lead_db"][0] if m["full"] else 0.0)
    ahead = [name for name, values in leads.items() if max(values) >= LEAD]
    everywhere = [name for name, values in leads.items() if min(values) >= LEAD]
    return [
        f"Behind plain steps by more than {LOSS} dB, or fewer captions read: {len(worse)} cells"
        + (f" ({'; '.join(f'{key}: {preset}' for key, preset in worse)})." if worse else "."),
        f"At 2x at least {LEAD:g} dB ahead on a grid: {len(ahead)} of {len(samplers)} samplers ({', '.join(ahead)}); "
        f"on every grid: {len(everywhere)}.",
    ]


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    try:
        typer.run(main)
    except FlexiError as error:
        sys.exit(str(error))
