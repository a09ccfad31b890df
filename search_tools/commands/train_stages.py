"""`flexi train-stages`: decoders for stages of noise levels."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexi_core.errors import FlexiError
from flexi_core.json_text import parse_json

from .. import console
from ..measures.references import SCENES
from .options import Json, Seed, UNetFile

if TYPE_CHECKING:
    from flexi_core.demo.model import DemoModel
    from flexi_core.runtime.file_model import FileModel
    from flexi_core.stages.training import StageTrainer

CHECKPOINT = "stages.checkpoint"
_NAMES = {1: ("all",), 2: ("high", "low"), 3: ("high", "middle", "low")}
_LONGEST_FILE = 100_000_000  # bytes; `flexi stages --json` writes a matrix
_OF_SCENES = "MIT (trained on the pack's own scenes)"


class Device(str, Enum):
    """What trains."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Middle(str, Enum):
    """Whether each stage has a middle block of its own."""

    shared = "shared"
    own = "own"


@console.one_line_errors
def train_stages(
    source: Annotated[
        str,
        typer.Argument(
            help="scenes, or a folder: of pictures or latents, or of a sub-folder of them for each class that --unet knows."
        ),
    ] = SCENES,
    boundaries: Annotated[
        str,
        typer.Option(help="Noise levels between the stages, sigma, falling: 6.07,2.18; or a file of flexi stages --json."),
    ] = "",
    widths: Annotated[
        str,
        typer.Option(
            help="Channels of each decoder, from high noise to low: 32,64,96. [default: the base's; with those its own decoder "
            "is begun from]"
        ),
    ] = "",
    names: Annotated[str, typer.Option(help="Of the stages, from high noise to low. [default: high,middle,low]")] = "",
    unet: UNetFile = None,
    scratch: Annotated[
        bool, typer.Option("--scratch", help="No base: encoder and decoders begin anew, without conditioning.")
    ] = False,
    channels: Annotated[int, typer.Option(min=32, help="With --scratch: width of the encoder, a multiple of 32.")] = 64,
    mult: Annotated[str, typer.Option(help="With --scratch: width of each level, in --channels.")] = "1,1,2",
    blocks: Annotated[str, typer.Option(help="With --scratch: residual blocks of each level. [default: 1 each]")] = "",
    config: Annotated[
        Path | None, typer.Option(help="With --scratch: JSON, the arguments of the host's UNetModel, in place of these.")
    ] = None,
    size: Annotated[int, typer.Option(min=1, help="With --scratch: side of the pictures.")] = 32,
    encoder: Annotated[
        bool | None,
        typer.Option(
            "--train-encoder/--freeze-encoder",
            help="Whether encoder, time embedding and a shared middle block train. [default: with --scratch; frozen, the file "
            "fits the base]",
        ),
    ] = None,
    middle: Annotated[Middle, typer.Option(help="One middle block, as published for VP and latents, or one each (EDM).")] = (
        Middle.shared
    ),
    density: Annotated[
        str, typer.Option(help="How often each stage is drawn, from high noise to low: 1,2,1. [default: all the same]")
    ] = "",
    iterations: Annotated[int, typer.Option(min=0, help="In all, those of a checkpoint included.")] = 10_000,
    batch: Annotated[int, typer.Option(min=1, help="Pictures in each, all of one stage.")] = 32,
    rate: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 2e-4,
    warmup: Annotated[int, typer.Option(min=0, help="Iterations over which it rises.")] = 1000,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradients.")] = 1.0,
    ema: Annotated[float, typer.Option(help="Share of the averaged weights that stays at each iteration.")] = 0.9999,
    bf16: Annotated[bool, typer.Option("--bf16", help="Products in bfloat16.")] = False,
    device: Annotated[Device, typer.Option(help="auto: a CUDA GPU where there is one.")] = Device.auto,
    data: Annotated[int, typer.Option(min=2, help="Most pictures of a folder; scenes kept, where they are not the base's.")] = (
        20_000
    ),
    licence: Annotated[
        str, typer.Option(help=f"Of what is trained, in words; needed with a folder. [default: {_OF_SCENES}]")
    ] = "",
    folder: Annotated[Path, typer.Option(help="Where checkpoint and files go; a checkpoint in it is continued.")] = Path(
        "flexi_stage_training"
    ),
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train decoders for stages of noise levels, from a base or from scratch (multi-stage framework, arXiv 2312.09181)."""
    from flexi_core.stages.bounds import Stages
    from flexi_core.stages.trained_files import base_stage, write_trained
    from flexi_core.stages.training import StageTrainer, StageTraining

    from ..stage_data import draw_of, objective_of

    if source != SCENES and not licence.strip():
        raise FlexiError(f"what is trained on {source} is somebody's work too: say in words under what licence, --licence")
    if not scratch and (given := _of_scratch(config, channels, mult, blocks, size)):
        raise FlexiError(f"{given} describes a network that begins anew; add --scratch, or leave it out")
    bounds = _boundaries(boundaries)
    called = tuple(name.strip() for name in names.split(",")) if names else _NAMES.get(
        len(bounds) + 1, tuple(f"stage {i + 1}" for i in range(len(bounds) + 1))
    )  # fmt: skip
    console.make_folder(folder)
    base = _base(unet, scratch, _config(config, channels, mult, blocks), (size, size), folder)
    settings = StageTraining(
        Stages(bounds, called),
        tuple(_numbers(widths, int, "--widths")) or (base.unet_config["model_channels"],) * len(called),
        scratch=scratch,
        encoder=scratch if encoder is None else encoder,
        own_middle=middle is Middle.own,
        density=tuple(_numbers(density, float, "--density")),
        batch=batch,
        learning_rate=rate,
        warmup=warmup,
        clip=clip,
        ema=ema,
        bf16=bf16,
        seed=seed,
    )
    draw, objective = draw_of(base, source, data, seed), objective_of(base)
    trainer = StageTrainer(base, settings, draw, objective, folder / CHECKPOINT, _device(device))
    with console.progress_bar("iterations") as bar, _asked_to_stop() as stop:
        finished = trainer.run(iterations, lambda trainer, left: bar(_told(trainer, left), trainer.done, iterations), stop)
    if not finished:
        again = shlex.join(["flexi", *sys.argv[1:]])
        console.err.print(
            f"flexi: stopped after {trainer.done} of {iterations} iterations, kept in {folder / CHECKPOINT}; to go on: {again}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(130)
    files = write_trained(base, trainer, folder, licence.strip() or _OF_SCENES)
    result = {
        "files": [str(file) for file in files],
        "iterations": trainer.done,
        "stages": [
            {"name": name, "width": width, "iterations": count, "loss": loss}
            for name, width, count, loss in zip(called, settings.widths, trainer.batches, trainer.losses, strict=True)
        ],
    }
    if as_json:
        console.print_json(result)
        return
    rows = [
        [row["name"], str(row["width"]), str(row["iterations"]), "" if row["loss"] is None else f"{row['loss']:.4f}"]
        for row in result["stages"]
    ]
    console.print_columns(["stage", "width", "iterations", "loss of late"], rows, f"{trainer.done} iterations")
    console.out.print(f"written    {', '.join(result['files'])}", highlight=False, markup=False, soft_wrap=True)
    console.out.print(_fits(settings.encoder, base_stage(trainer), called, unet), highlight=False, markup=False, soft_wrap=True)


def _fits(encoder: bool, stage: int | None, names: tuple[str, ...], unet: Path | None) -> str:
    """Return in words what a stage file goes with."""
    if not encoder:
        return f"The encoder stayed as it was: the stage file goes with {unet or 'the embedded model'}."
    said = "The encoder trained: the stage file goes with the base written beside it, "
    if stage is None:
        return said + "whose own decoder is untrained, as no stage has the base's width: use it with the stage file only."
    return said + f"whose own decoder is that of the stage {names[stage]!r}."


def _told(trainer: StageTrainer, left: float) -> str:
    losses = " / ".join("-" if loss is None else f"{loss:.4f}" for loss in trainer.losses)
    time_left = "" if console.err.is_terminal else f", {left:.0f} s left"
    return f"training, loss by stage {losses}{time_left}"


@contextmanager
def _asked_to_stop() -> Iterator[Any]:
    """Yield a function that says whether Ctrl-C, or the system, has asked to stop; a second Ctrl-C stops at once."""
    asked: list[int] = []

    def ask(number: int, _: object) -> None:
        asked.append(number)
        signal.signal(number, before[number])

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, ask)
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _numbers(text: str, kind: type, option: str) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")] if text.strip() else []
    except ValueError as error:
        raise FlexiError(f"{option} is {text!r}; expected numbers with commas between them") from error


def _boundaries(text: str) -> tuple[float, ...]:
    """Return noise levels that are given by themselves, or as the output of `flexi stages --json`."""
    if not text.endswith(".json"):
        return tuple(_numbers(text, float, "--boundaries"))
    try:
        path = Path(text)
        if path.stat().st_size > _LONGEST_FILE:
            raise FlexiError(f"{path}: larger than {_LONGEST_FILE // 10**6} MB; expected what flexi stages --json printed")
        return tuple(float(row["sigma"]) for row in json.loads(path.read_text(encoding="utf-8"))["boundaries"])
    except OSError as error:
        raise FlexiError(f"{text}: cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise FlexiError(f"{text}: no boundaries in it; expected what flexi stages --json printed") from error


def _of_scratch(config: Path | None, channels: int, mult: str, blocks: str, size: int) -> str:
    given = {"--config": config, "--channels": channels != 64, "--mult": mult != "1,1,2", "--blocks": blocks}
    return next((name for name, value in {**given, "--size": size != 32}.items() if value), "")


def _config(path: Path | None, channels: int, mult: str, blocks: str) -> dict[str, Any]:
    """Return the arguments of a network that begins anew: those of a file, or one without transformers."""
    if path is not None:
        try:
            found = parse_json(path.read_bytes(), 8)
        except (OSError, ValueError) as error:
            raise FlexiError(f"{path}: cannot be read as JSON ({error})") from error
        if not isinstance(found, dict):
            raise FlexiError(f"{path}: expected an object, the arguments of the host's UNetModel")
        return found
    levels = _numbers(mult, int, "--mult")
    each = _numbers(blocks, int, "--blocks") or [1] * len(levels)
    return {
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": channels,
        "channel_mult": levels,
        "num_res_blocks": each,
        "transformer_depth": [0] * sum(each),
        "transformer_depth_output": [0] * (sum(each) + len(each)),
        "transformer_depth_middle": -1,
        "use_scale_shift_norm": True,
    }


def _base(
    unet: Path | None, scratch: bool, config: dict[str, Any], size: tuple[int, int], folder: Path
) -> DemoModel | FileModel:
    from flexi_core.demo.model import DemoModel
    from flexi_core.runtime.file_model import FileModel
    from flexi_core.stages.trained_files import BASE

    if scratch and unet is not None:
        raise FlexiError("--unet is a base, and --scratch is without one; give one of them")
    if scratch:
        return FileModel.untrained(config, size, folder / BASE)
    return DemoModel.load() if unet is None else FileModel.load(unet)


def _device(asked: Device) -> str:
    import torch

    if asked is Device.cuda and not torch.cuda.is_available():
        raise FlexiError("no CUDA GPU is there for --device cuda; leave the option out")
    return "cuda" if asked is not Device.cpu and torch.cuda.is_available() else "cpu"
