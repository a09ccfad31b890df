"""Measured sampling time of a schedule in a running ComfyUI with this pack, against all steps full in the same server.

    python benchmarks/host.py --server http://127.0.0.1:8188 --schedule models/flexi_schedules/flexi_demo_5x.json

Queues the embedded model's graph with core's own KSampler, alternately with every step full and with the schedule, and takes
the seconds and the MACs from the Flexi Report node. Times are medians; the first run of each is thrown away.
"""

from __future__ import annotations

import json
import re
import statistics
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated

import typer

from flexi_core import FlexiError, Schedule, load_schedule
from flexi_core.schedule.presets import all_full

CAPTION = "a large red circle at the center on a navy background"
_SECONDS = re.compile(r"^([\d.]+) s;", re.MULTILINE)
_SPEEDUP = re.compile(r"([\d.]+)x fewer MACs")


def main(
    schedule: Annotated[Path, typer.Option(help="Schedule file.")],
    server: Annotated[str, typer.Option(help="Address of a running ComfyUI.")] = "http://127.0.0.1:8188",
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each.")] = 5,
    batch: Annotated[int, typer.Option(min=1, help="Images at once.")] = 4,
) -> None:
    """Time a schedule file in the host, loaded by Flexi Load Schedule where the server has it."""
    chosen = load_schedule(schedule)
    teacher = chosen.info.get("teacher", {})
    settings = {"sampler_name": teacher.get("sampler", "euler"), "scheduler": teacher.get("scheduler", "normal")}
    settings |= {"steps": len(chosen), "cfg": float(teacher.get("cfg", 3.0)), "denoise": 1.0}
    rows = {"all full": _text_node(all_full(len(chosen))), schedule.name: _file_node(server, schedule, chosen)}
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    macs: dict[str, float] = {}
    for repeat in range(repeats + 1):
        for name, value in rows.items():
            text = _run(server, _graph(value, settings, batch, seed=repeat))
            if repeat:
                seconds[name].append(float(_SECONDS.search(text)[1]))
            macs[name] = float(_SPEEDUP.search(text)[1])
    full, fast = (statistics.median(values) for values in seconds.values())
    spread = ", ".join(f"{name} {min(values):.2f}-{max(values):.2f} s" for name, values in seconds.items())
    print(f"{schedule.name}, batch {batch}, {repeats} runs each ({spread})")
    print(f"MACs     {macs[schedule.name]:.2f}x fewer")
    print(f"time     {full / fast:.2f}x faster: {full:.2f} s with all steps full, {fast:.2f} s with the schedule")
    print(f"time / MACs ratio {full / fast / macs[schedule.name]:.2f}")


def _node(kind: str, **inputs: object) -> dict:
    return {"class_type": kind, "inputs": inputs}


def _text_node(schedule: Schedule) -> dict:
    return _node("FlexiSchedule", text=str(schedule))


def _file_node(server: str, path: Path, schedule: Schedule) -> dict:
    """Return the node that loads a schedule file, where the server has it, else one with its text."""
    inputs = _get(f"{server}/object_info/FlexiLoadSchedule")["FlexiLoadSchedule"]["input"]["required"]["file"]
    offered = json.dumps(inputs)
    for name in (path.name, f"{path.name} (bundled)"):
        if json.dumps(name) in offered:
            return _node("FlexiLoadSchedule", file=name)
    print(f"{path.name} is not in the server's models/flexi_schedules; its text is sent")
    return _text_node(schedule)


def _graph(schedule: dict, settings: dict, batch: int, seed: int) -> dict:
    sampler = {"model": ["apply", 0], "positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["latent", 0]}
    return {
        "model": _node("FlexiDemoModel"),
        "schedule": schedule,
        "apply": _node("FlexiApply", model=["model", 0], schedule=["schedule", 0], on_mismatch="map"),
        "positive": _node("FlexiDemoPrompt", caption=CAPTION),
        "negative": _node("FlexiDemoPrompt", caption=""),
        "latent": _node("EmptyChromaRadianceLatentImage", width=32, height=32, batch_size=batch),
        "sampler": _node("KSampler", **sampler, **settings, seed=seed),
        "report": _node("FlexiReport", run=["apply", 1], latent=["sampler", 0]),
    }


def _get(url: str) -> dict:
    try:
        with urllib.request.urlopen(url) as answer:
            return json.load(answer)
    except (urllib.error.URLError, ConnectionError) as error:
        raise FlexiError(f"{url} does not answer ({error}); start ComfyUI with this pack in custom_nodes") from error


def _run(server: str, graph: dict) -> str:
    """Queue a graph, wait for it, and return the report's text."""
    request = urllib.request.Request(f"{server}/prompt", json.dumps({"prompt": graph}).encode())
    try:
        with urllib.request.urlopen(request) as answer:
            prompt = json.load(answer)["prompt_id"]
    except urllib.error.HTTPError as error:
        raise FlexiError(f"{server} refused the graph: {error.read().decode()[:500]}") from error
    while not (history := _get(f"{server}/history/{prompt}").get(prompt)):
        time.sleep(0.1)
    if history["status"]["status_str"] != "success":
        raise FlexiError(f"the graph failed: {history['status']['messages'][-1]}")
    return history["outputs"]["report"]["text"][0]


if __name__ == "__main__":
    try:
        typer.run(main)
    except FlexiError as error:
        raise SystemExit(str(error)) from error
