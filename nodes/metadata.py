"""Pictures carry the text of the schedule that they were made with, beside the graph that the host puts into them.

What a picture carries is the `extra_pnginfo` of its prompt, which the host's own nodes write, or do not where it was started
with --disable-metadata. Schedules are known when sampling starts, long after the prompt was queued: an entry is put in then.
"""

from __future__ import annotations

import sys
import uuid
from typing import Any
from weakref import WeakValueDictionary

KEY = "flexiffusion"
_SAMPLED_WITH = ("FlexiApply", "FlexiTune", "FlexiTuneGuider", "FlexiLearn")


class _Carried(dict):
    """Schedule texts by the ids of the nodes that put them into a model; gone with its prompt."""


class Carrier:
    """Knows the prompts that wait or run, by their ids."""

    def __init__(self) -> None:
        self._prompts: WeakValueDictionary[str, _Carried] = WeakValueDictionary()

    def on_prompt(self, data: dict[str, Any]) -> dict[str, Any]:
        """Return a prompt as it was posted, with an empty entry for its schedules; the host calls this before it is queued."""
        nodes = data.get("prompt")
        if not isinstance(nodes, dict) or not any(_class_of(node) in _SAMPLED_WITH for node in nodes.values()):
            return data
        extra = data.setdefault("extra_data", {})
        info = extra.get("extra_pnginfo") or {}
        if not isinstance(info, dict):
            return data
        data["prompt_id"] = data.get("prompt_id") or str(uuid.uuid4())
        info[KEY] = self._prompts[str(data["prompt_id"])] = _Carried()
        extra["extra_pnginfo"] = info
        return data

    def note(self, node: str, text: str) -> None:
        """Put a schedule's text into what pictures of the prompt that runs now carry."""
        utils = sys.modules.get("comfy_execution.utils")
        running = getattr(utils, "get_executing_context", lambda: None)()
        carried = self._prompts.get(str(getattr(running, "prompt_id", "")))
        if carried is not None and text:
            carried[node] = text


def _class_of(node: Any) -> Any:
    return node.get("class_type") if isinstance(node, dict) else None
