"""`flexi tune`: a schedule from a few full runs, without a search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.table import Table

from flexi_core import __version__, save_schedule
from flexi_core.schedule.presets import full_steps

from .. import console
from ..backends.protocol import Backend
from ..backends.teacher import SEARCH_SEEDS
from .options import (
    BaseDirectory,
    Checkpoint,
    ComfyUI,
    HostChoice,
    Json,
    Negative,
    NodeId,
    Prompt,
    PromptsFile,
    SamplerName,
    SchedulerName,
    Size,
    TeacherCfg,
    TeacherSteps,
    UNetFile,
    WorkflowFile,
    check_out,
    default_out,
    open_chosen_backend,
)

SHOWN = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)  # speed-ups of the front that are printed


@console.one_line_errors
def tune(
    steps: TeacherSteps = 50,
    sampler: SamplerName = "euler",
    scheduler: SchedulerName = "normal",
    cfg: TeacherCfg = None,
    unet: UNetFile = None,
    size: Size = None,
    comfyui: ComfyUI = None,
    workflow: WorkflowFile = None,
    node: NodeId = None,
    prompts: PromptsFile = None,
    base_directory: BaseDirectory = None,
    checkpoint: Checkpoint = None,
    prompt: Prompt = "",
    negative: Negative = "",
    speedup: Annotated[float, typer.Option(min=1.0, help="How many times fewer steps to compute.")] = 2.0,
    quality: Annotated[
        float | None,
        typer.Option(help="Instead of --speedup: how near the pictures are to come to those of all steps, PSNR in dB."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Full runs to learn from; 1 does at 2x, 4 are better above.")] = 4,
    fit: Annotated[bool, typer.Option("--fit/--no-fit", help="Fit the blends once more in runs of the schedule's own.")] = True,
    local: Annotated[
        float,
        typer.Option(min=0, help="Full runs' time for changing the schedule step by step; 100 is much."),
    ] = 0.0,
    out: Annotated[Path | None, typer.Option(help="Schedule file. [default: made from the settings]")] = None,
    as_json: Json = False,
) -> None:
    """Make a schedule for a sampling run from a few of its full runs, in the time of some fifteen of them.

    The run is one of the embedded model, of --unet, or, with --comfyui, of a workflow or a checkpoint of the user's own.
    """
    from flexi_core.tune import Effort, Tuner

    check_out(out)
    host = HostChoice(comfyui, workflow, node, prompts, base_directory, checkpoint, prompt, negative)
    backend = open_chosen_backend(sampler, scheduler, steps, cfg, unet=unet, size=size, host=host)
    with console.progress_bar("samples") as bar:
        tuner = Tuner(backend, Effort(samples, fit, local), progress=bar)
        front = tuner.front()
        tuned = tuner.chosen(front, speedup, quality)
    ahead = tuned is not None and tuned.is_ahead
    out = out or default_out(backend, tuner.steps / tuned.full if quality is not None and ahead else speedup)
    if ahead:
        save_schedule(tuned.schedule.with_info(**_info(backend, tuned, samples)), out)
    if as_json:
        console.print_json(
            {
                "schedule": str(tuned.schedule) if ahead else None,
                "file": str(out) if ahead else None,
                "full": tuned and tuned.full,
                "predicted_db": tuned and tuned.predicted_db,
                "made_db": tuned and tuned.made_db,
                "plain_db": tuned and tuned.plain_db,
                "full_runs": tuner.full_runs,
                "front": [
                    {"full": p.full, "predicted_db": p.predicted_db, "interval_db": p.interval_db, "schedule": str(p.schedule)}
                    for p in front
                ],
            }
        )
        return
    _print_front(front, tuner.steps)
    if tuned is None:
        console.out.print(f"No schedule is known that comes within {quality:g} dB: sample all {tuner.steps} steps.")
    elif not ahead:
        console.out.print(
            f"{tuned.full} plain steps of the same sampler come as near ({tuned.plain_db:.1f} dB, the schedule "
            f"{tuned.made_db:.1f} dB): take those. Nothing is written.",
            highlight=False,
        )
    else:
        console.out.print(
            f"{tuned.full} of {tuner.steps} steps computed: {tuned.made_db:.1f} dB to the pictures of all steps "
            f"(predicted {tuned.predicted_db:.1f}); {tuned.full} plain steps have {tuned.plain_db:.1f} dB.",
            highlight=False,
        )
        console.out.print(f"schedule   {tuned.schedule}", highlight=False, soft_wrap=True)
        console.out.print(f"written    {out}", highlight=False)
    console.out.print(f"took the network as long as {tuner.full_runs:.0f} full runs", highlight=False)


def _info(backend: Backend, tuned: Any, samples: int) -> dict[str, Any]:
    """Return what a tuned schedule's file says beside it."""
    return {
        "teacher": backend.identity,
        "measured": {
            "speedup_macs": backend.settings.steps / tuned.full,
            "psnr_db": tuned.made_db,
            "predicted_db": tuned.predicted_db,
            "plain_db": tuned.plain_db,
            "samples": samples,
            "first_seed": SEARCH_SEEDS,
            "by": "flexi tune",
        },
        "provenance": {"tool": "flexiffusion", "version": __version__},
    }


def _print_front(front: Any, steps: int) -> None:
    from flexi_core.tune import nearest

    table = Table(title="predicted", title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading in ("computed", "speed-up", "PSNR, dB", "between"):
        table.add_column(heading, justify="right")
    for planned in dict.fromkeys(nearest(front, full_steps(steps, speedup)) for speedup in SHOWN):
        table.add_row(
            str(planned.full),
            f"{steps / planned.full:.2f}x",
            f"{planned.predicted_db:.1f}",
            "{:.0f} and {:.0f}".format(*planned.interval_db),
        )
    console.out.print(table)
