"""`flexi evaluate`: schedule files judged on seeds that no search ever saw."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flexi_core import FlexiError, load_schedule

from .. import console
from ..backends.protocol import Backend
from ..backends.teacher import JUDGE_SEEDS
from .options import (
    BaseDirectory,
    Checkpoint,
    ClipVision,
    ComfyUI,
    HostChoice,
    Json,
    Negative,
    NodeId,
    Prompt,
    PromptsFile,
    Samples,
    Size,
    UNetFile,
    WorkflowFile,
    open_backend_of,
    open_chosen_backend,
)

_RUN = ("sampler", "scheduler", "steps", "cfg")  # what two schedules of one table have in common


@console.one_line_errors
def evaluate(
    files: Annotated[list[Path], typer.Argument(help="Schedule files made for the same run.")],
    samples: Samples = 64,
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
    clip_vision: ClipVision = None,
    first_seed: Annotated[int, typer.Option(min=JUDGE_SEEDS, help="First of the unseen seeds.")] = JUDGE_SEEDS,
    images: Annotated[
        str | None,
        typer.Option(help="Folder of png and jpg files to take FID, precision and recall against; or: scenes, for fresh ones."),
    ] = None,
    inception_weights: Annotated[
        Path | None, typer.Option(help="torch-fidelity's Inception weights, in place of the back end's own features.")
    ] = None,
    lpips_weights: Annotated[Path | None, typer.Option(help="torchvision's AlexNet weights, for LPIPS.")] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Print what else was measured: FID, precision, recall, inception score, LPIPS.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Judge schedules on seeds that no search ever saw, beside fewer steps and DeepCache at the cost of the first.

    A schedule for a run in ComfyUI needs that run: --comfyui with its --workflow or --checkpoint.
    """
    from ..measures.features import InceptionFeatures
    from ..measures.judge import Judge, baselines
    from ..measures.measures import Measures
    from ..space.space import Space

    schedules = {str(file): load_schedule(file) for file in files}
    teachers = {file: schedule.info.get("teacher", {}) for file, schedule in schedules.items()}
    first = teachers[str(files[0])]
    for file, teacher in teachers.items():
        if any(teacher.get(key) != first.get(key) for key in ("model", *_RUN)):
            raise FlexiError(f"{file} was made for another run than {files[0]}; judge it by a command of its own")
    host = HostChoice(comfyui, workflow, node, prompts, base_directory, checkpoint, prompt, negative, clip_vision)
    if comfyui is None:
        if size is not None:
            raise FlexiError("--size goes with --checkpoint; other runs are judged in the size that the schedule was made for")
        backend = open_backend_of(first, files[0], unet)
    else:
        backend = open_chosen_backend(*(first.get(key) for key in _RUN), unet=unet, size=size, host=host)
    for file, teacher in teachers.items():
        _check_run(file, teacher, backend)
    settings = backend.settings
    features = InceptionFeatures(inception_weights, backend.pictures) if inception_weights else backend.features

    def measure(teacher):
        return Measures(backend, teacher, features=features, images=images, lpips_weights=lpips_weights)

    speedup = settings.steps / Space(settings.steps, 1, backend.cost).spent(schedules[str(files[0])])
    space = Space(settings.steps, speedup, backend.cost)
    with console.progress_bar("samples") as bar:
        judge = Judge(backend, samples, first_seed, bar, features=features, measure=measure)
        rows = [judge.teacher_row, *(judge.judge(Path(file).stem, schedule)[0] for file, schedule in schedules.items())]
        rows += [judge.judge_fewer_steps(space.full_steps)]
        rows += [judge.judge(name, other)[0] for name, other in baselines(space)]
    not_measured = judge.measures.not_measured
    if as_json:
        console.print_json({"schedules": [str(schedule) for schedule in schedules.values()], "samples": samples,
                     "first_seed": first_seed, "rows": [row.as_dict() for row in rows],
                     "not_measured": not_measured})  # fmt: skip
        return
    console.print_table(rows, f"{settings.steps} {settings.sampler} steps, {samples} unseen seeds")
    if every or images or lpips_weights:
        console.print_measures(rows, not_measured)


def _check_run(file: str, teacher: dict[str, Any], backend: Backend) -> None:
    """Refuse a schedule for another kind of model; say so where the run has other settings or weights."""
    identity = backend.identity
    if teacher.get("model") != identity["model"]:
        raise FlexiError(f"{file}: made for {teacher.get('model', 'an unnamed model')}; this run is of {identity['model']}")
    for key in (*_RUN, "size", "architecture", "weights"):
        if key in teacher and teacher[key] != identity.get(key):
            console.err.print(f"{file}: made for other {key} than this run has", style="yellow", markup=False)
