"""The node that learns a schedule from the runs that are made anyway."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..flexi_core import Schedule, ScheduleError
from ..flexi_core.host import apply_schedule
from ..flexi_core.tune import Learner, Shelf
from . import folder
from .page import live, server
from .sockets import CATEGORY, PAPER, FlexiRunType, found_as, speed_or_quality

LEARNED = "learned"  # folder of models/flexi_schedules
_MOST_FROZEN = 16  # schedules, one a line
_MOST_NODES = 64  # whose learner is at hand for the buttons
_learners: OrderedDict[str, Learner] = OrderedDict()  # by node


class FlexiLearn(io.ComfyNode):
    """Model -> a model whose first full runs are recorded, and which then samples under what they taught."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlexiLearn",
            **found_as("calibrate", "automatic", "learn"),
            display_name="Flexi Learn (Accelerate)",
            category=CATEGORY,
            description="Makes sampling faster from the runs that you make anyway: the first two sample plainly and are "
            "recorded, from then on the schedule that they taught runs. Nothing to set up and nothing to wait for. Another "
            f"model, LoRA, sampler, size or guidance learns for itself. {PAPER}.",
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with, LoRAs and all."),
                *speed_or_quality(),
                io.String.Input(
                    "frozen",
                    default="",
                    multiline=True,
                    dynamic_prompts=False,
                    optional=True,
                    tooltip="Schedules that are taken as they are, one a line, each for runs of its number of steps: nothing "
                    "is learned of these. Freeze fills it, and a shared workflow then needs no learning.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="Connect it to the sampler."),
                FlexiRunType.Output(display_name="run", tooltip="For Flexi Report."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, frozen: str | None = None) -> bool | str:
        try:
            frozen_schedules(frozen or "")
        except ScheduleError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, model, speedup: float, quality_db: float, frozen: str = "") -> io.NodeOutput:
        node = str(getattr(cls.hidden, "unique_id", ""))
        learner = Learner(Shelf(shelf_folder()), speedup, quality_db, frozen=frozen_schedules(frozen))
        _learners[node] = learner
        _learners.move_to_end(node)
        while len(_learners) > _MOST_NODES:
            _learners.popitem(last=False)
        return io.NodeOutput(*apply_schedule(model, learner, live=live(node or None)))


def shelf_folder() -> Path:
    """Return where recordings are kept."""
    return Path(folder_paths.get_folder_paths(folder.FOLDER)[0]) / LEARNED


def frozen_schedules(text: str) -> list[Schedule]:
    """Return the schedules of a text, one a line.

    Raises:
        ScheduleError: a line is none, or there are too many.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > _MOST_FROZEN:
        raise ScheduleError(f"{len(lines)} schedules are frozen; {_MOST_FROZEN} at most, one a line")
    return [Schedule.parse(line) for line in lines]


def register_routes() -> None:
    """Add what the node's buttons ask the server for: what was learned in a node's runs, and to forget it."""
    page = server()
    if page is None:
        return
    from aiohttp import web

    @page.routes.get("/flexiffusion/learned/{node}")
    async def learned(request):
        learner = _learners.get(request.match_info["node"])
        return web.json_response({"schedules": [str(schedule) for schedule in learner.learned] if learner else []})

    @page.routes.post("/flexiffusion/forget/{node}")
    async def forget(request):
        learner = _learners.get(request.match_info["node"])
        return web.json_response({"forgotten": learner.forget() if learner else 0})
