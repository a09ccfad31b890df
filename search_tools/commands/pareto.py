"""`flexi pareto`: the schedules of a study by speed-up."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.table import Table

from flexi_core import FlexiError, save_schedule
from flexi_core.files import file_stem

from .. import console
from ..backends.protocol import Backend
from ..settings import SearchSettings
from ..study.front import Found, best_at, evaluated, found_in, front, with_search_results
from ..study.reopen import OwnHost, reopen
from .options import BaseDirectory, Json, OwnComfyUI, Storage, StudyName, default_out


@console.one_line_errors
def pareto(
    study: StudyName = None,
    speedup: Annotated[float | None, typer.Option(min=1.0, help="Write the best schedule that is at least this fast.")] = None,
    storage: Storage = "sqlite:///flexi_studies.db",
    out: Annotated[Path | None, typer.Option(help="Schedule file. [default: made from the settings]")] = None,
    comfyui: OwnComfyUI = None,
    base_directory: BaseDirectory = None,
    as_json: Json = False,
) -> None:
    """Show the front of a study; with --speedup, write the schedule at any wanted speed-up without a new search."""
    from ..study.study import settings_of
    from .reading import read_study

    own = OwnHost(comfyui, base_directory)
    opened = read_study(storage, study)
    settings, found = settings_of(opened), found_in(opened)
    if speedup is None:
        if out is not None:
            raise FlexiError("--out is for the schedule at a wanted speed-up; give --speedup too")
        _show(front(found), f"{opened.study_name}: {len(found)} candidates, {len(evaluated(found))} fully evaluated", as_json)
        return
    best = best_at(found, speedup)
    backend = _reopened(settings, own)
    teacher, features = (settings.identity, None) if backend is None else (dict(backend.identity), backend.features.name)
    run = settings.teacher_settings
    if out is None:
        out = (
            default_out(backend, speedup) if backend else Path(f"flexi_{file_stem(run.sampler)}_{run.steps}_{speedup:g}x.json")
        )
    save_schedule(with_search_results(best, settings, opened.study_name, teacher, features, by="flexi pareto"), out)
    if as_json:
        console.print_json({"file": str(out), "study": opened.study_name, **_row(best)})
        return
    console.out.print(
        f"candidate  {best.number}: {best.speedup:.2f}x, PSNR {best.evaluation.psnr_db:.2f} dB, "
        f"rFID {best.evaluation.rfid:.3g} on the search's {settings.samples} samples",
        highlight=False,
        soft_wrap=True,
    )
    console.out.print(f"schedule   {best.schedule}", highlight=False, soft_wrap=True)
    console.out.print(f"written    {out}", markup=False, highlight=False, soft_wrap=True)


def _show(on_front: list[Found], title: str, as_json: bool) -> None:
    if as_json:
        console.print_json([_row(one) for one in on_front])
        return
    if not on_front:
        raise FlexiError("the study has no fully evaluated candidate yet; search on with it")
    table = Table(title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading in ("candidate", "MACs", "error", "PSNR, dB", "rFID"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("schedule", overflow="fold")
    for one in on_front:
        measured = one.evaluation
        figures = (f"{one.speedup:.2f}x", f"{measured.mse:.3g}", f"{measured.psnr_db:.2f}", f"{measured.rfid:.3g}")
        table.add_row(str(one.number), *figures, str(one.schedule))
    console.out.print(title, markup=False, highlight=False, soft_wrap=True)
    console.out.print(table)


def _row(one: Found) -> dict:
    measured = one.evaluation
    psnr = None if measured.psnr_db == float("inf") else measured.psnr_db
    return {
        "candidate": one.number,
        "schedule": str(one.schedule),
        "speedup_macs": one.speedup,
        "mse": measured.mse,
        "psnr_db": psnr,
        "rfid": measured.rfid,
    }


def _reopened(settings: SearchSettings, own: OwnHost) -> Backend | None:
    """Return the study's back end; None, with a word about it, where it cannot be opened here."""
    try:
        return reopen(settings, own)
    except FlexiError as error:
        console.err.print(
            f"{error}; the file has no noise levels, another run is mapped to it by position",
            style="yellow",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        return None
