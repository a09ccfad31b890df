"""Options that several commands share, and the back end that they choose."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexi_core.errors import FlexiError
from flexi_core.files import file_stem
from flexi_core.runtime.sampling import SAMPLERS, SCHEDULERS

from ..space.space import FAMILIES
from ..strategies.strategies import STRATEGIES

if TYPE_CHECKING:
    from ..backends.protocol import Backend

Sampler = Enum("Sampler", {name: name for name in SAMPLERS})
Scheduler = Enum("Scheduler", {name: name for name in SCHEDULERS})
SpaceChoice = Enum("SpaceChoice", {name: name for name in ("all", *FAMILIES)})
Strategy = Enum("Strategy", {name: name for name in STRATEGIES})
TeacherSteps = Annotated[int, typer.Option(help="Steps of the teacher.")]
SamplerName = Annotated[
    str, typer.Option(help=f"Sampler of the teacher: {', '.join(SAMPLERS)}; with --checkpoint any of ComfyUI's.")
]
SchedulerName = Annotated[
    str, typer.Option(help=f"Scheduler of the teacher: {', '.join(SCHEDULERS)}; with --checkpoint any of ComfyUI's.")
]
TeacherCfg = Annotated[
    float | None, typer.Option(min=0.0, help="Guidance scale of the teacher. [default: 3; 1 without conditioning]")
]
UNetFile = Annotated[
    Path | None,
    typer.Option("--unet", help="A U-Net's safetensors file, docs/guide/unet-file.md. [default: the embedded model]"),
]
Size = Annotated[
    str | None,
    typer.Option(
        help="Latents of --unet, S or HxW [default: the file's]; pictures of --checkpoint, WxH pixels. [default: 512x512]"
    ),
]
ComfyUI = Annotated[Path | None, typer.Option("--comfyui", help="Folder of a ComfyUI: search for a run of its own.")]
OwnComfyUI = Annotated[
    Path | None,
    typer.Option("--comfyui", help="Folder of your ComfyUI, for a study of a run in it; it runs the study's workflow."),
]
WorkflowFile = Annotated[
    Path | None,
    typer.Option(
        "--workflow", help="A saved workflow, or its API form; its sampling node with all its settings is the teacher."
    ),
]
NodeId = Annotated[str | None, typer.Option("--node", help="Id of the sampling node, where the workflow has several.")]
PromptsFile = Annotated[
    Path | None,
    typer.Option("--prompts", help="Positive prompts, one a line, to take in turn. [default: the workflow's]"),
]
BaseDirectory = Annotated[Path | None, typer.Option(help="ComfyUI's own option: where its models and custom nodes are.")]
Checkpoint = Annotated[str | None, typer.Option(help="Instead of --workflow: a file in models/checkpoints.")]
Prompt = Annotated[str, typer.Option(help="Positive prompt, with --checkpoint.")]
Negative = Annotated[str, typer.Option(help="Negative prompt, with --checkpoint.")]
ClipVision = Annotated[
    str | None, typer.Option(help="Compare by a model in models/clip_vision. [default: the teacher network's own features]")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Seed = Annotated[int, typer.Option(help="Seed of the search.")]
Samples = Annotated[int, typer.Option(min=2, help="Samples to judge on; compare rFID of equal counts only.")]
Storage = Annotated[str, typer.Option(help="Optuna storage URL.")]
StudyName = Annotated[str | None, typer.Argument(help="Study. [default: the only one of the storage]", show_default=False)]
Grace = Annotated[
    float | None,
    typer.Option(min=1.0, help="Seconds of silence after which other workers take over this one's candidate. [default: 60]"),
]


@dataclass(frozen=True)
class HostChoice:
    """What the options of a command say about a run in ComfyUI; see the options' own help.

    Raises:
        FlexiError: some of them need others.
    """

    comfyui: Path | None = None
    workflow: Path | None = None
    node: str | None = None
    prompts: Path | None = None
    base_directory: Path | None = None
    checkpoint: str | None = None
    prompt: str = ""
    negative: str = ""
    clip_vision: str | None = None

    def __post_init__(self) -> None:
        given = [f"--{f.name.replace('_', '-')}" for f in fields(self) if getattr(self, f.name)]
        if given and self.comfyui is None:
            raise FlexiError(f"{', '.join(given)}: for a run in ComfyUI; give its folder with --comfyui")
        if given and (self.workflow is None) == (self.checkpoint is None):
            raise FlexiError(
                "--comfyui needs either --workflow, a workflow's file, or --checkpoint, a name in models/checkpoints"
            )

    def open(self, sampler: str, scheduler: str, steps: int, cfg: float | None, size: str | None) -> Backend:
        """Return the back end; the sampler and what follows it are those of a checkpoint's run."""
        from ..backends.comfyui import workflow
        from ..backends.comfyui.backend import ComfyBackend

        if self.workflow is not None:
            if size is not None:
                raise FlexiError("--size goes with --checkpoint or --unet; a workflow has its own")
            graph, name = workflow.read_workflow(self.workflow), self.workflow.stem
        else:
            width, height = _width_and_height(size or "512x512")
            graph = workflow.text_to_image(
                self.checkpoint, self.prompt, self.negative, sampler=sampler, scheduler=scheduler, steps=steps,
                cfg=7.0 if cfg is None else cfg, width=width, height=height,
            )  # fmt: skip
            name = Path(self.checkpoint).stem
        return ComfyBackend(
            str(self.comfyui.absolute()),
            graph,
            self.node,
            () if self.prompts is None else workflow.read_prompts(self.prompts),
            base_directory=None if self.base_directory is None else str(self.base_directory.absolute()),
            clip_vision=self.clip_vision,
            name=name,
        )


def open_chosen_backend(
    sampler: str,
    scheduler: str,
    steps: int,
    cfg: float | None,
    *,
    unet: Path | None = None,
    size: str | None = None,
    host: HostChoice | None = None,
) -> Backend:
    """Return the back end that the options of a command choose.

    Args:
        sampler, scheduler, steps: of the teacher.
        cfg: guidance scale of the teacher; None for the model's own: 1 where it takes no conditioning.
        unet: a U-Net's file; None for the embedded model.
        size: of the U-Net's latents, or of a checkpoint's pictures; None for their own.
        host: a run in ComfyUI.

    Raises:
        FlexiError: the file cannot be used, or an option does not go with it.
    """
    from flexi_core.demo.model import DEFAULT_CFG

    from ..backends.teacher import TeacherSettings

    if host is not None and host.comfyui is not None:
        if unet is not None:
            raise FlexiError("--unet is searched without a host; give either --unet or --comfyui")
        return host.open(sampler, scheduler, steps, cfg, size)
    if unet is None:
        from ..backends.embedded import EmbeddedBackend

        if size is not None:
            raise FlexiError("--size goes with --unet; the embedded model has one size")
        return EmbeddedBackend(TeacherSettings(sampler, scheduler, steps, DEFAULT_CFG if cfg is None else cfg))
    from flexi_core.runtime.file_model import FileModel, parse_size

    from ..backends.unet_file import UNetFileBackend

    model = FileModel.load(unet, None if size is None else parse_size(size))
    if cfg is None:
        cfg = DEFAULT_CFG if model.classes else 1.0
    return UNetFileBackend(TeacherSettings(sampler, scheduler, steps, cfg), model)


def check_out(out: Path | None) -> None:
    """Refuse a file for the result that cannot be written, before any work is done."""
    if out is not None and not out.parent.is_dir():
        raise FlexiError(f"the folder {out.parent} does not exist; make it or give another --out")
    if out is not None and out.is_dir():
        raise FlexiError(f"{out} is a folder; give --out the name of a file")


def default_out(backend: Backend, speedup: float) -> Path:
    """Return where a search for a reduction of MACs writes its result: where the host finds it, else here."""
    if backend.spec["kind"] == "comfyui":
        return backend.default_file(speedup)
    model = "" if backend.spec["kind"] == "embedded" else f"{file_stem(Path(backend.spec['file']).stem)}_"
    return Path(f"flexi_{model}{file_stem(backend.settings.sampler)}_{backend.settings.steps}_{speedup:g}x.json")


def _width_and_height(size: str) -> tuple[int, int]:
    """Return the sides of WxH pixels; the host makes pictures in steps of 8."""
    sides = re.fullmatch(r"(\d{2,5})x(\d{2,5})", size)
    if sides is None:
        raise FlexiError(f"--size is {size!r}; expected WxH in pixels, for example 1024x768")
    return int(sides[1]), int(sides[2])


def open_backend_of(teacher: Mapping[str, Any], file: Path, unet: Path | None = None) -> Backend:
    """Return the back end of the run that a schedule file was made for.

    Args:
        teacher: the file's part of that name.
        file: its path, for messages.
        unet: the U-Net's file, where the run is one of `flexi search --unet`.

    Raises:
        FlexiError: the file was made for another kind of model, or does not say for what run.
    """
    model = teacher.get("model", "an unnamed model")
    if model == "unet" and unet is None:
        raise FlexiError(f"{file}: made for a U-Net in a file; give that file, --unet")
    if model == "embedded" and unet is not None:
        raise FlexiError(f"{file}: made for the embedded model; leave --unet out")
    if model not in ("unet", "embedded"):
        raise FlexiError(f"{file}: made for {model}; one for the embedded model or for --unet is needed here")
    if missing := [key for key in ("sampler", "scheduler", "steps", "cfg") if key not in teacher]:
        raise FlexiError(f"{file}: its teacher lacks {', '.join(missing)}; write them into the file or search anew")
    size = teacher.get("size") if unet is not None else None
    return open_chosen_backend(
        *(teacher[key] for key in ("sampler", "scheduler", "steps", "cfg")),
        unet=unet,
        size=None if size is None else "x".join(map(str, size)),
    )
