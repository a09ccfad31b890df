"""Nodes that make, load and save schedules."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from comfy_api.latest import io, ui

from ..flexi_core import FlexiError, Schedule, ScheduleError, load_schedule
from ..flexi_core.files import read_bounded
from ..flexi_core.schedule.file import MAX_BYTES, made_for
from ..flexi_core.schedule.presets import MODELS, PRESETS, Preset
from ..flexi_core.schedule.presets import preset as make_preset
from ..flexi_core.schedule.segment import MAX_STEPS
from ..flexi_core.schedule.strip import strip_of
from . import folder
from .sockets import CATEGORY, PAPER, FlexiScheduleType, found_as

_EXAMPLE = "10*(FX)"
_KINDS = (
    "F full, P partial (the shallow blocks only), N removed, X extrapolated, f and p like F and P with the last guidance reused"
)


class FlexiSchedule(io.ComfyNode):
    """Schedule text -> schedule."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlexiSchedule",
            **found_as(),
            display_name="Flexi Schedule",
            category=CATEGORY,
            description=f"A sampling schedule from its text, one letter for each step: {_KINDS}. {PAPER}; partial steps are "
            "those of DeepCache (Ma et al., 2023).",
            inputs=[
                io.String.Input(
                    "text",
                    default=_EXAMPLE,
                    multiline=True,
                    dynamic_prompts=False,
                    tooltip=f"One letter for each step: {_KINDS}. | ends a segment, @k sets the depth of its partial steps "
                    "(blocks), n*(...) repeats, ; order=k sets the extrapolation (0 holds, 1 is linear). "
                    "Example, 20 steps: FPPNN@2|2*(FPNNN@1)|FPPPP@3. Fewer F steps sample faster.",
                )
            ],
            outputs=[FlexiScheduleType.Output(display_name="schedule")],
        )

    @classmethod
    def validate_inputs(cls, text: str | None) -> bool | str:
        return _valid(lambda: Schedule.parse(text)) if text is not None else True

    @classmethod
    def execute(cls, text: str) -> io.NodeOutput:
        schedule = Schedule.parse(text)
        return io.NodeOutput(schedule, ui=shown(schedule))


class FlexiPreset(io.ComfyNode):
    """A ready schedule, which knows the run when sampling starts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlexiPreset",
            **found_as(),
            display_name="Flexi Preset (Speed, DeepCache)",
            category=CATEGORY,
            description="A ready schedule for any sampler and number of steps, chosen when sampling starts. 1.25x to 5x "
            f"compute four fifths to a fifth of the steps and extrapolate the others ({PAPER}); where nothing beats as many "
            "plain steps, less is saved or the run is sampled plainly, and Flexi Report says so. deepcache computes every "
            "third step in full and the others with the shallow blocks (DeepCache, Ma et al., 2023); all-full is plain "
            "sampling.",
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="2x",
                    tooltip="How much to save: 2x takes about half the time of plain sampling, 5x a fifth, further from its "
                    "image. Less is saved where no schedule so fast beats fewer plain steps. A schedule found by a search for "
                    "your own run does better.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=MAX_STEPS,
                    tooltip="0 takes the sampler's own number of steps, whatever it is. Another number makes the schedule for "
                    "that many steps; where the sampler has more or fewer it is mapped, and Flexi Report says so.",
                ),
                io.Combo.Input(
                    "model",
                    display_name="made for",
                    options=list(MODELS),
                    default=MODELS[0],
                    optional=True,
                    tooltip="any: placements of steps that were furthest ahead on several runs. demo: for the Flexi Demo "
                    "Model, found by a search for 20, 25, 30 or 50 Euler steps of the scheduler normal at cfg 3, each nearer "
                    "to its image; at other step counts those for any.",
                ),
            ],
            outputs=[FlexiScheduleType.Output(display_name="schedule")],
        )

    @classmethod
    def execute(cls, preset: str, steps: int, model: str = MODELS[0]) -> io.NodeOutput:
        chosen = Preset(preset, steps, model)
        known = chosen.before_run()
        letters = known.schedule.letters if known.schedule else ""
        return io.NodeOutput(chosen, ui=shown(chosen, letters) | ui.PreviewText("\n".join(known.words)).as_dict())


class FlexiLoadSchedule(io.ComfyNode):
    """A schedule file -> schedule."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlexiLoadSchedule",
            **found_as(),
            display_name="Flexi Load Schedule",
            category=CATEGORY,
            description=f"A schedule from a file in models/{folder.FOLDER}, or one that comes with the pack. A file knows the "
            f"run that it was found for: the node shows it, and Flexi Apply tells and maps another run. {PAPER}.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=folder.names(),
                    tooltip=f"A .json file in models/{folder.FOLDER}; files marked (bundled) come with the pack. "
                    "It decides which steps are computed, and so how fast and how close sampling is.",
                )
            ],
            outputs=[FlexiScheduleType.Output(display_name="schedule")],
        )

    @classmethod
    def validate_inputs(cls, file: str | None) -> bool | str:
        return _valid(lambda: load_schedule(folder.find(file))) if file is not None else True

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        return hashlib.sha256(read_bounded(folder.find(file), MAX_BYTES)).hexdigest()

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        schedule = load_schedule(folder.find(file))
        return io.NodeOutput(schedule, ui=shown(schedule) | ui.PreviewText(made_for(schedule)).as_dict())


class FlexiSaveSchedule(io.ComfyNode):
    """Schedule -> a file that FlexiLoadSchedule finds."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlexiSaveSchedule",
            display_name="Flexi Save Schedule",
            category=CATEGORY,
            description=f"Writes a schedule to models/{folder.FOLDER}, for Flexi Load Schedule and for sharing. {PAPER}.",
            inputs=[
                FlexiScheduleType.Input(
                    "schedule",
                    tooltip="The schedule to write, with all that its own file said. A Flexi Preset needs its steps set.",
                ),
                io.String.Input(
                    "file_name",
                    default="my_schedule",
                    tooltip=f"Name of the file in models/{folder.FOLDER}, without a folder; .json is added.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Replace a file of this name that holds another schedule. Off: such a file is an error.",
                ),
            ],
            outputs=[FlexiScheduleType.Output(display_name="schedule")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, file_name: str | None) -> bool | str:
        return _valid(lambda: folder.checked_stem(file_name)) if file_name is not None else True

    @classmethod
    def execute(cls, schedule: Schedule | Preset, file_name: str, overwrite: bool) -> io.NodeOutput:
        given, schedule = schedule, _to_save(schedule)
        path = folder.keep(schedule, file_name, overwrite)
        words = f"Saved as {path}; Flexi Load Schedule has it as {path.name}."
        return io.NodeOutput(given, ui=shown(schedule, details=words) | ui.PreviewText(words).as_dict())


def _to_save(schedule: Schedule | Preset) -> Schedule:
    """Return the schedule of a preset with steps; another is one already.

    Raises:
        ScheduleError: the preset becomes a schedule only when sampling starts.
    """
    if not isinstance(schedule, Preset):
        return schedule
    if not schedule.steps:
        raise ScheduleError(
            "a Flexi Preset whose steps are 0 becomes a schedule when sampling starts, and cannot be saved before; set its "
            "steps to the sampler's, or copy the last line of Flexi Report, the schedule that ran, into Flexi Schedule"
        )
    return make_preset(schedule.name, schedule.steps, schedule.model)


def shown(schedule: Schedule | Preset, letters: str | None = None, details: str = "") -> dict[str, Any]:
    """Return what the page shows in a node of its schedule.

    Args:
        schedule: that the node gives.
        letters: of its steps, by default the schedule's own.
        details: words under it, by default those of its file or preset.
    """
    strip = strip_of(schedule)
    strip = replace(strip, details=details) if details else strip
    return {"flexi_steps": (schedule.letters if letters is None else letters,), "flexi_strip": (strip.as_dict(),)}


def _valid(check: Callable[[], Any]) -> bool | str:
    try:
        check()
    except FlexiError as error:
        return str(error)
    return True
