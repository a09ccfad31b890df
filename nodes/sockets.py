"""The pack's own socket types, and what its nodes share."""

import inspect
from typing import Any

from comfy_api.latest import io

FlexiScheduleType = io.Custom("FLEXI_SCHEDULE")  # flexi_core.Schedule, or flexi_core.presets.Preset, which becomes one
FlexiRunType = io.Custom("FLEXI_RUN")  # flexi_core.host.RunHandle

CATEGORY = "Flexiffusion"
PAPER = "Flexiffusion, arXiv 2409.17566"

_SPEED = ("speed", "speed up", "accelerate", "faster", "fast", "cache", "deepcache", "teacache", "easycache", "skip steps")
_TAKES_ALIASES = "search_aliases" in inspect.signature(io.Schema).parameters


def found_as(*names: str) -> dict[str, Any]:
    """Return a schema's words under which people look for a node, where the host has them: those of speed, and others."""
    return {"search_aliases": [*_SPEED, *names]} if _TAKES_ALIASES else {}
