"""What the page asks of the pack: the strip of a node's schedule, as its widgets stand. All parsing is here."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

from ..flexi_core import FlexiError, Schedule, ScheduleError, load_schedule
from ..flexi_core.json_text import parse_json
from ..flexi_core.run.live import LiveRun
from ..flexi_core.run.plan import Plan
from ..flexi_core.schedule.file import MAX_BYTES, MAX_NESTING, schedule_from
from ..flexi_core.schedule.presets import MODELS, Preset
from ..flexi_core.schedule.strip import Strip, cycled, strip_of
from . import folder
from .metadata import Carrier

log = logging.getLogger(__name__)

ROUTE, FILES, EVENT = "/flexiffusion/strip", "/flexiffusion/files", "flexiffusion.run"
MOST_ASKED = 2 * MAX_BYTES  # of a question: a file in it is JSON within JSON


def server() -> Any:
    """Return the host's server; None where the host is used as a library."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


_carrier = Carrier()


def live(node: str | None) -> Callable[[Plan | None, str], LiveRun] | None:
    """Return what makes a run seen in a node of the page as it goes on, and its schedule a part of its pictures' metadata.

    Args:
        node: its id in the graph that runs; None where there is none.
    """
    host = server()
    if host is None or node is None:
        return None
    node = str(node)

    def begin(plan: Plan | None, text: str) -> LiveRun:
        _carrier.note(node, text)
        return LiveRun(lambda shown: host.send_sync(EVENT, {"node": node, **shown}, host.client_id), plan)

    return begin


def register() -> None:
    """Answer the page's questions, where the host has a server."""
    host = server()
    if host is None:
        return
    from aiohttp import web

    host.add_on_prompt_handler(_carrier.on_prompt)

    @host.routes.post(ROUTE)
    async def strip(request: web.Request) -> web.Response:
        asked = bytearray()
        async for chunk in request.content.iter_chunked(2**16):
            asked += chunk
            if len(asked) > MOST_ASKED:
                return web.json_response({"error": f"the question is longer than {MOST_ASKED} bytes"}, status=413)
        return web.json_response(await asyncio.to_thread(answer, bytes(asked)))

    @host.routes.get(FILES)
    async def files(_: web.Request) -> web.Response:
        return web.json_response(folder.names())


def tell(words: str, node: str) -> None:
    """Show words in a node of the page that has a strip; this never raises."""
    host = server()
    if host is None or not node:
        return
    try:
        host.send_sync(EVENT, {"node": node, **Strip("", words).as_dict(), "done": 0}, host.client_id)
    except Exception:  # the page may be gone
        log.exception("Flexiffusion: words could not be shown on node %s", node)


def answer(asked: bytes) -> dict[str, Any]:
    """Return what a node shows, or "error" in words.

    Args:
        asked: JSON: the `node`'s class, the `values` of its widgets by name, and for a schedule's text the `step` that was
            clicked, from 0; or the content and the `name` of a schedule `file` that was dropped.
    """
    try:
        question = parse_json(asked, MAX_NESTING)
        values = question.get("values")
        known = _KNOWN.get(question.get("node"))
        if known is None or not isinstance(values, dict):
            raise ScheduleError("the page asked for the strip of no node that has one")
        found = known(question, values)
        return found if isinstance(found, dict) else found.as_dict()
    except (FlexiError, ValueError, AttributeError, TypeError) as error:
        return {"error": str(error)}


def _typed(question: Mapping[str, Any], values: Mapping[str, Any]) -> Strip:
    if "file" in question:
        schedule = schedule_from(str(question["file"]).encode())
        return strip_of(schedule, str(schedule))
    schedule = Schedule.parse(values.get("text"))
    if "step" not in question:
        return strip_of(schedule)
    changed = cycled(schedule, int(question["step"]))
    return strip_of(changed, str(changed))


def _preset(_: Mapping[str, Any], values: Mapping[str, Any]) -> Strip:
    return strip_of(Preset(values.get("preset"), int(values.get("steps") or 0), values.get("model", MODELS[0])))


def _file(question: Mapping[str, Any], values: Mapping[str, Any]) -> Strip | dict[str, Any]:
    if "file" in question:
        schedule = schedule_from(str(question["file"]).encode())
        return {"file": folder.keep(schedule, str(question.get("name")), overwrite=False).name}
    return strip_of(load_schedule(folder.find(str(values.get("file")))))


_KNOWN: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], Strip | dict[str, Any]]] = {
    "FlexiSchedule": _typed,
    "FlexiPreset": _preset,
    "FlexiLoadSchedule": _file,
}
