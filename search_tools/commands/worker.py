"""`flexi worker`: one more process, on any machine, for a study that others search too."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Annotated

import typer

from flexi_core import FlexiError

from .. import console
from .options import BaseDirectory, Grace, Json, OwnComfyUI


@console.one_line_errors
def worker(
    storage: Annotated[str, typer.Option(help="postgresql://..., journal:FILE or grpc://HOST:PORT.")],
    study: Annotated[str, typer.Option(help="Study name, made by flexi search.")],
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Wall time of this worker. [default: no end]")] = None,
    evaluations: Annotated[int | None, typer.Option(min=1, help="Candidates of the study, of all workers.")] = None,
    shared: Annotated[
        Path | None, typer.Option(envvar="FLEXI_CACHE", help="Folder of the teacher's samples that the workers share.")
    ] = None,
    comfyui: OwnComfyUI = None,
    base_directory: BaseDirectory = None,
    grace: Grace = None,
    as_json: Json = False,
) -> None:
    """Search a study together with other workers, until a budget is spent or Ctrl-C; what is needed comes from the study."""
    from ..deadline import Deadline
    from ..study.reopen import OwnHost, reopen
    from ..study.storage import FOR_MANY, is_shared
    from ..study.study import settings_of
    from .reading import read_study
    from .running import GRACE, run

    deadline = Deadline(minutes)
    own = OwnHost(comfyui, base_directory)
    if not is_shared(storage):
        raise FlexiError(f"an SQLite file is for one process; workers need {FOR_MANY}")
    if shared is not None:
        os.environ["FLEXI_CACHE"] = str(shared)
    # A cluster ends its jobs so; the candidate goes back to the study at once.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    opened = read_study(storage, study)
    settings = settings_of(opened)
    _, _, result = run(
        reopen(settings, own),
        settings,
        storage,
        study,
        deadline=deadline,
        evaluations=evaluations,
        grace=grace or GRACE,
        finals=False,
    )
    best = result.best and str(result.best.schedule)
    if as_json:
        console.print_json({"study": study, "candidates": len(result.candidates), "best": best,
                     "interrupted": result.interrupted, "seconds": result.seconds})  # fmt: skip
        return
    console.out.print(f"study      {study}: {len(result.candidates)} candidates", markup=False, highlight=False, soft_wrap=True)
    console.out.print(f"best       {best or 'none yet'}", markup=False, highlight=False, soft_wrap=True)
