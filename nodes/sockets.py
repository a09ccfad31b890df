"""The pack's own socket types, and what its nodes share."""

import inspect
from typing import Any

from comfy_api.latest import io

FlexiScheduleType = io.Custom("FLEXI_SCHEDULE")  # flexi_core.Schedule, or flexi_core.schedule.presets.Preset, which becomes one
FlexiRunType = io.Custom("FLEXI_RUN")  # flexi_core.host.RunHandle

CATEGORY = "Flexiffusion"
PAPER = "Flexiffusion, arXiv 2409.17566"

_SPEED = ("speed", "speed up", "accelerate", "faster", "fast", "cache", "deepcache", "teacache", "easycache", "skip steps")
_TAKES_ALIASES = "search_aliases" in inspect.signature(io.Schema).parameters


def found_as(*names: str) -> dict[str, Any]:
    """Return a schema's words under which people look for a node, where the host has them: those of speed, and others."""
    return {"search_aliases": [*_SPEED, *names]} if _TAKES_ALIASES else {}


def speed_or_quality() -> list[Any]:
    """Return the inputs that say how fast, or how near, a schedule is to be that is made for a run."""
    return [
        io.Float.Input(
            "speedup",
            default=2.0,
            min=1.1,
            max=10.0,
            step=0.1,
            tooltip="How many times fewer steps to compute: 2 takes about half the time.",
        ),
        io.Float.Input(
            "quality_db",
            default=0.0,
            min=0.0,
            max=90.0,
            step=1.0,
            tooltip="Above 0 it is asked for in place of the speed-up: how near the picture is to come to that of all "
            "steps, PSNR in dB. 40 is hard to tell apart, 30 is the same picture with other details.",
        ),
    ]
