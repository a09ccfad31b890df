"""The parts of the load (see load.py) that run in ComfyUI or write what its nodes write."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import re
import signal
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psutil
import torch
from load_outcome import Outcome
from safetensors.torch import load_file
from templates import tests_module

from flexi_core import FlexiError, Schedule, load_schedule, save_schedule
from flexi_core.run.cache import FeatureCache
from flexi_core.run.run import Run

CLIENTS, PROMPTS = 4, 40
INTERRUPTS = 12
RUNS, EARLY, PROBE_EVERY = 500, 50, 25
MOST_GROWTH = 32.0  # MiB, of a process that keeps nothing: its allocator's own
KILLS = 60  # in a round
_BIG, _WORD = 2**21, 1000  # bytes of a schedule's file; how often a word of it repeats its text
_MIB = 2**20
# What the clients sample: presets and texts with every kind of step, and the samplers under them.
KINDS: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("FlexiPreset", {"preset": "2x", "steps": 0}, "euler"),
    ("FlexiPreset", {"preset": "3x", "steps": 0}, "dpmpp_2m"),
    ("FlexiSchedule", {"text": "4*(FPPX@2)"}, "euler"),
    ("FlexiPreset", {"preset": "2x", "steps": 0}, "euler_ancestral"),
)
TEXTS = ("6*(FX)", "3*(FPPN@2)", "2*(F)|5*(FPPXX@1)", "FFXX|FXX", "2*(FpXf@2)|FN", "2*(FPPP@2^1)|FXX")
SAMPLERS = ("euler", "dpmpp_2m", "heun", "euler_ancestral", "dpmpp_sde")


def server(folder: Path, comfyui: Path, rng: random.Random, outcome: Outcome) -> None:
    """Send prompts from several clients to one server, interrupt some, and sample the same before and after."""
    tests = tests_module("host/conftest")
    ended: list[tuple[int, bool]] = []
    with tests.serving(comfyui, tests.host_environment(), folder / "base", "--disable-api-nodes") as running:
        probes = [_prompt(kind, steps=20, seed=1, batch=2) for kind in range(CLIENTS)]
        before = [_sampled(running, probe, outcome) for probe in probes]
        began, process = None, psutil.Process(running.process.pid)
        stop = threading.Event()

        def client(number: int) -> None:
            for turn in range(PROMPTS // CLIENTS):
                # Every prompt has a step count of its own, by which its report is known.
                steps = 20 + number + CLIENTS * turn
                graph = _prompt(number, steps, seed=100 * number + turn, batch=1 + (number + turn) % 4)
                try:
                    ended.append((steps, _ends_well(running, graph, steps, outcome)))
                except AssertionError as error:
                    outcome.check(False, f"a prompt of {steps} steps did not end: {str(error)[:200]}")

        def interrupt() -> None:
            while not stop.wait(rng.uniform(0.2, 3.0)):
                urllib.request.urlopen(
                    urllib.request.Request(f"{running.url}/interrupt", b"", method="POST"), timeout=30
                ).close()
                outcome.counts["interrupts sent"] += 1
                if outcome.counts["interrupts sent"] == INTERRUPTS:
                    return

        began = process.memory_info().rss
        interrupter = threading.Thread(target=interrupt, daemon=True)
        interrupter.start()
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(client, range(CLIENTS)))
        stop.set()
        interrupter.join()
        outcome.figures["MiB more in memory after the prompts than before"] = (process.memory_info().rss - began) / _MIB
        outcome.counts["prompts"] += PROMPTS
        outcome.counts["finished"] += sum(well for _, well in ended)
        outcome.counts["interrupted"] += sum(not well for _, well in ended)
        outcome.check(len(ended) == PROMPTS, f"{PROMPTS - len(ended)} prompts never ended")
        after = [_sampled(running, probe, outcome) for probe in probes]
        outcome.check(all(map(torch.equal, before, after)), "the server samples otherwise than before")
        outcome.counts["runs compared before and after"] += len(probes)
        log = (running.base / "server.log").read_text(encoding="utf-8", errors="replace")
        outcome.check("Flexiffusion: " not in log or "failed" not in log, "the pack logged a failure")


def _prompt(kind: int, steps: int, seed: int, batch: int) -> dict[str, Any]:
    """Return an API-format graph that samples the embedded model under one of `KINDS`."""
    name, inputs, sampler = KINDS[kind]
    settings = {"seed": seed, "steps": steps, "cfg": 3.0, "sampler_name": sampler, "scheduler": "normal", "denoise": 1.0}
    links = {"model": ["apply", 0], "positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["latent", 0]}
    nodes = {
        "model": ("FlexiDemoModel", {}),
        "schedule": (name, inputs),
        "apply": ("FlexiApply", {"model": ["model", 0], "schedule": ["schedule", 0], "on_mismatch": "map"}),
        "positive": ("FlexiDemoPrompt", {"caption": "a large red circle at the center on a navy background"}),
        "negative": ("FlexiDemoPrompt", {"caption": ""}),
        "latent": ("EmptyChromaRadianceLatentImage", {"width": 32, "height": 32, "batch_size": batch}),
        "sampler": ("KSampler", links | settings),
        "saved": ("SaveLatent", {"samples": ["sampler", 0], "filename_prefix": f"load/{kind}-{steps}-{seed}"}),
        "report": ("FlexiReport", {"run": ["apply", 1], "latent": ["sampler", 0]}),
    }
    return {key: {"class_type": kind_of, "inputs": values} for key, (kind_of, values) in nodes.items()}


def _ends_well(running: Any, graph: dict[str, Any], steps: int, outcome: Outcome) -> bool:
    """Return whether a prompt came to its end; it may be interrupted, and nothing else."""
    entry = running.end_of(graph)
    if not entry["status"]["completed"]:
        kinds = [name for name, _ in entry["status"]["messages"]]
        outcome.check("execution_interrupted" in kinds, f"a prompt ended otherwise than by an interrupt: {kinds}")
        return False
    text = entry["outputs"]["report"]["text"][0]
    told = re.search(r"^Flexiffusion: (\d+) steps", text, re.MULTILINE)
    outcome.check(
        bool(told) and int(told[1]) == steps, f"the report of a run of {steps} steps is another one's: {text[:200]!r}"
    )
    outcome.check(_latent(running, entry).isfinite().all().item(), "a latent is not finite")
    return True


def _sampled(running: Any, graph: dict[str, Any], outcome: Outcome) -> torch.Tensor:
    """Return the latent that a server samples for a graph, which must not be one that it had kept."""
    entry = running.run(graph)
    cached = [node for name, data in entry["status"]["messages"] if name == "execution_cached" for node in data["nodes"]]
    outcome.check("sampler" not in cached, "the server sampled nothing anew")
    return _latent(running, entry)


def _latent(running: Any, entry: dict[str, Any]) -> torch.Tensor:
    (saved,) = entry["outputs"]["saved"]["latents"]
    return load_file(running.base / "output" / saved["subfolder"] / saved["filename"])["latent_tensor"]


def runs(folder: Path, comfyui: Path, rng: random.Random, outcome: Outcome) -> None:
    """Sample with one loaded model again and again, every run another than the last."""
    torch.set_num_threads(1)
    host = tests_module("host/conftest").Host(comfyui, folder / "base")
    model = host.adapter.load_demo_model()
    cases = [
        {
            "text": rng.choice(TEXTS),
            "sampler": rng.choice(SAMPLERS),
            "steps": rng.randint(4, 10),
            "noise": (rng.randint(1, 2), rng.choice((16, 24, 32))),
            "cfg": rng.choice((1.0, 3.0)),
        }
        for _ in range(EARLY)
    ]

    def sample(case: dict[str, Any]) -> torch.Tensor:
        patched, handle = host.adapter.apply_schedule(model, Schedule.parse(case["text"]))
        options = {key: value for key, value in case.items() if key not in ("text", "noise")}
        latent = host.sample(patched, noise=host.noise(*case["noise"]), **options)
        outcome.check(handle.report_of(latent) is handle.report is not None, "a run has no report of its own")
        return latent

    first: list[torch.Tensor] = []
    early: dict[str, float] = {}
    with torch.inference_mode():
        for number in range(RUNS):
            latent = sample(cases[number % EARLY])
            if number < EARLY:
                first.append(latent)
            else:
                outcome.check(torch.equal(latent, first[number % EARLY]), "a run differs from the same run before")
            if number + 1 == EARLY:
                early = _held()
    del latent  # the early one was among the first
    late = _held()
    outcome.counts["runs"] += RUNS
    outcome.counts["compared with the same run before"] += RUNS - EARLY
    outcome.figures[f"MiB in memory after {EARLY} runs"] = early.pop("mib")
    outcome.figures[f"MiB after {RUNS}"] = late.pop("mib")
    growth = outcome.figures[f"MiB after {RUNS}"] - outcome.figures[f"MiB in memory after {EARLY} runs"]
    outcome.check(growth < MOST_GROWTH, f"memory grew by {growth:.0f} MiB")
    for what, count in late.items():
        outcome.check(count <= early[what], f"{count:g} {what} are kept, {early[what]:g} before")
    options = model.model_options.get("transformer_options", {})
    outcome.check(host.adapter.KEY not in options, "a run is left in the model's options")


def _held() -> dict[str, float]:
    """Return what this process holds: memory, open files, and how many objects of those that a run makes."""
    gc.collect()
    objects = gc.get_objects()
    found = {"mib": psutil.Process().memory_info().rss / _MIB, "open files": float(psutil.Process().num_fds())}
    kinds = {"tensors": torch.Tensor, "runs": Run, "caches": FeatureCache}
    return found | {name: float(sum(issubclass(type(one), kind) for one in objects)) for name, kind in kinds.items()}


def node_kills(folder: Path, comfyui: Path, rng: random.Random, outcome: Outcome) -> None:
    """Kill a server while the node saves, over one file, now this schedule, now that one."""
    tests = tests_module("host/conftest")
    written = {text: _big(text) for text in ("FX", "FXX")}
    base = folder / "base"
    with tests.serving(comfyui, tests.host_environment(), base, "--disable-api-nodes") as running:
        schedules = base / "models" / "flexi_schedules"
        for text, schedule in written.items():
            save_schedule(schedule, schedules / f"{text}.json")
        began = time.monotonic()
        for text in written:
            running.run(_saving(text))
        seconds = time.monotonic() - began

        def save() -> None:
            for turn in range(1000):
                try:
                    running.end_of(_saving(list(written)[turn % 2]))
                except (OSError, HTTPException, AssertionError):
                    return

        saver = threading.Thread(target=save, daemon=True)
        saver.start()
        time.sleep(seconds + rng.random() * seconds)
        running.process.kill()
        running.process.wait()
        saver.join(timeout=60)
    outcome.counts["kills"] += 1
    _check_saved(schedules, written, outcome)


def _saving(text: str) -> dict[str, Any]:
    return {
        "load": {"class_type": "FlexiLoadSchedule", "inputs": {"file": f"{text}.json"}},
        "save": {
            "class_type": "FlexiSaveSchedule",
            "inputs": {"schedule": ["load", 0], "file_name": "target", "overwrite": True},
        },
    }


def kills(folder: Path, comfyui: Path, rng: random.Random, outcome: Outcome) -> None:
    """Kill processes that do what the node does: save, over one file, now this schedule, now that one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["psutil", "typer", "search_tools.backends.comfyui.host", "search_tools.study.study"]
    )  # installed, not beside this file
    written = {text: _big(text) for text in ("FX", "FXX")}
    save_schedule(written["FX"], folder / "target.json")
    for _ in range(KILLS):
        saves = context.Event()
        process = context.Process(target=_save_forever, args=(folder / "target.json", saves), daemon=True)
        process.start()
        if not saves.wait(120):
            raise FlexiError("the process that saves did not start")
        while not list(folder.glob(".*.part")):  # a save has begun
            pass
        time.sleep(rng.random() * 0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        outcome.counts["kills"] += 1
        outcome.counts["in the middle of a save"] += len(list(folder.glob(".*.part"))) > 0
        _check_saved(folder, written, outcome)
        _age_leftovers(folder)
        save_schedule(written["FX"], folder / "target.json")
        outcome.check(not list(folder.glob(".*.part")), "what a killed save left is still there after a later one")


def _save_forever(target: Path, saves: Any) -> None:
    written = [_big("FX"), _big("FXX")]
    for turn in range(10**6):
        save_schedule(written[turn % 2], target)
        saves.set()


def _age_leftovers(folder: Path) -> None:
    """Make what a killed save left look as if it had been there since yesterday."""
    yesterday = time.time() - 86_400
    for left in folder.glob(".*.part"):
        os.utime(left, (yesterday, yesterday))


def _big(text: str) -> Schedule:
    """Return a schedule whose file has `_BIG` bytes."""
    return Schedule.parse(text).with_info(words=[text * _WORD] * (_BIG // (len(text) * _WORD)))


def _check_saved(folder: Path, written: dict[str, Schedule], outcome: Outcome) -> None:
    """Check that every schedule file of a folder is one of those that were written, whole."""
    for file in folder.glob("*.json"):
        try:
            found = load_schedule(file)
        except FlexiError as error:
            outcome.check(False, f"a file is broken: {str(error)[:200]}")
        else:
            outcome.check(
                found == written[str(found)] and found.info == written[str(found)].info, "a file is another than written"
            )
