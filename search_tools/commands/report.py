"""`flexi report`: what a search found, as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import console
from .options import BaseDirectory, Json, OwnComfyUI, Storage, StudyName


@console.one_line_errors
def report(
    study: StudyName = None,
    storage: Storage = "sqlite:///flexi_studies.db",
    out: Annotated[Path | None, typer.Option(help="HTML file. [default: made from the study's name]")] = None,
    samples: Annotated[int, typer.Option(min=1, max=64, help="Images in a row.")] = 6,
    images: Annotated[bool, typer.Option("--images/--no-images", help="Sample teacher and candidates for image rows.")] = True,
    comfyui: OwnComfyUI = None,
    base_directory: BaseDirectory = None,
    as_json: Json = False,
) -> None:
    """Write one HTML file of a study, finished or not: front, progress, schedules, images; it needs no network."""
    from ..report.page import file_name_of, write_report
    from ..study.reopen import OwnHost
    from .reading import read_study

    own = OwnHost(comfyui, base_directory)
    opened = read_study(storage, study)
    out = out or Path(file_name_of(opened.study_name))
    with console.progress_bar("samples") as bar:
        no_images = write_report(opened, out, samples, images=images, progress=bar, own=own)
    if as_json:
        console.print_json({"file": str(out), "study": opened.study_name, "no_images": no_images})
        return
    if no_images and images:
        console.err.print(f"without images: {no_images}", markup=False, highlight=False, soft_wrap=True)
    console.out.print(f"written    {out}", markup=False, highlight=False, soft_wrap=True)
