"""`flexi evaluate`: schedule files judged on seeds that no search ever saw."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexi_core import FlexiError, Schedule, load_schedule

from .. import console
from ..teacher import JUDGE_SEEDS, TeacherSettings
from .options import Json, Samples


@console.one_line_errors
def evaluate(
    files: Annotated[list[Path], typer.Argument(help="Schedule files made for the same run of the embedded model.")],
    samples: Samples = 64,
    first_seed: Annotated[int, typer.Option(min=JUDGE_SEEDS, help="First of the unseen seeds.")] = JUDGE_SEEDS,
    as_json: Json = False,
) -> None:
    """Judge schedules on seeds that no search ever saw, beside fewer steps and DeepCache at the cost of the first."""
    from ..embedded import EmbeddedBackend
    from ..judge import Judge, baselines
    from ..space import Space

    schedules = {str(file): load_schedule(file) for file in files}
    settings = _settings_of(schedules[str(files[0])], files[0])
    for file, schedule in schedules.items():
        if _settings_of(schedule, Path(file)) != settings:
            raise FlexiError(f"{file} was made for another run than {files[0]}; judge it by a command of its own")
    backend = EmbeddedBackend(settings)
    for file, schedule in schedules.items():
        for key in ("architecture", "weights"):
            if schedule.info["teacher"].get(key, backend.identity[key]) != backend.identity[key]:
                console.err.print(f"{file}: made for other {key} than the embedded model has now", style="yellow", markup=False)
    speedup = settings.steps / Space(settings.steps, 1, backend.cost).spent(schedules[str(files[0])])
    space = Space(settings.steps, speedup, backend.cost)
    with console.progress_bar("samples") as bar:
        judge = Judge(backend, samples, first_seed, bar)
        rows = [judge.teacher_row, *(judge.judge(Path(file).stem, schedule)[0] for file, schedule in schedules.items())]
        rows += [judge.judge_fewer_steps(space.full_steps)]
        rows += [judge.judge(name, other)[0] for name, other in baselines(space)]
    if as_json:
        console.print_json({"schedules": [str(schedule) for schedule in schedules.values()], "samples": samples,
                     "first_seed": first_seed, "rows": [row.as_dict() for row in rows]})  # fmt: skip
        return
    console.print_table(rows, f"{settings.steps} {settings.sampler} steps, {samples} unseen seeds")


def _settings_of(schedule: Schedule, file: Path) -> TeacherSettings:
    teacher = schedule.info.get("teacher", {})
    if teacher.get("model") != "embedded":
        raise FlexiError(
            f"{file}: made for {teacher.get('model', 'an unnamed model')}; evaluate needs one for the embedded model"
        )
    missing = [key for key in ("sampler", "scheduler", "steps", "cfg") if key not in teacher]
    if missing:
        raise FlexiError(f"{file}: its teacher lacks {', '.join(missing)}; write them into the file or search anew")
    return TeacherSettings(teacher["sampler"], teacher["scheduler"], teacher["steps"], teacher["cfg"])
