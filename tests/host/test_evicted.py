"""Nodes' results that the host drops between prompts: reports say the truth of the run that they are asked for."""

from __future__ import annotations

import importlib

import pytest

MODEL, APPLY, SAMPLER, REPORT, AGAIN = "1", "2", "7", "8", "9"


class Page:
    """Takes what the executor sends to a page."""

    client_id = last_node_id = last_prompt_id = None

    def __init__(self) -> None:
        self.shown: dict[str, dict] = {}
        self.failed: list[dict] = []
        self.client_id = "page"

    def send_sync(self, event, data, sid=None):
        if event == "executed" and data["output"]:
            self.shown[data["node"]] = data["output"]
        if event in ("execution_error", "execution_interrupted"):
            self.failed.append(data)


@pytest.fixture
def executor(host, pack):
    """A function of a graph that runs it in the host's executor and returns the texts shown by its nodes."""
    execution = importlib.import_module("execution")
    settings = {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}
    named = execution.PromptExecutor.__init__.__code__.co_varnames
    page = Page()
    runs = execution.PromptExecutor(page, **({"cache_args": settings} if "cache_args" in named else {}))

    def run(graph, outputs):
        page.shown.clear()
        runs.execute(graph, "prompt", {"client_id": "page"}, outputs)
        assert runs.success and not page.failed, page.failed
        return {key: shown["text"][0] for key, shown in page.shown.items() if "text" in shown}

    run.caches = runs.caches
    return run


@pytest.fixture
def graph():
    return {
        MODEL: {"class_type": "FlexiDemoModel", "inputs": {}},
        "3": {"class_type": "FlexiSchedule", "inputs": {"text": "3*(FX)"}},
        APPLY: {"class_type": "FlexiApply", "inputs": {"model": [MODEL, 0], "schedule": ["3", 0], "on_mismatch": "map"}},
        "4": {"class_type": "FlexiDemoPrompt", "inputs": {"caption": "a red circle"}},
        "5": {"class_type": "FlexiDemoPrompt", "inputs": {"caption": ""}},
        "6": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}},
        SAMPLER: {
            "class_type": "KSampler",
            "inputs": {
                **{"seed": 1, "steps": 6, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0},
                **{"model": [APPLY, 0], "positive": ["4", 0], "negative": ["5", 0], "latent_image": ["6", 0]},
            },
        },
        REPORT: {"class_type": "FlexiReport", "inputs": {"run": [APPLY, 1], "latent": [SAMPLER, 0]}},
    }


def drop(caches, node):
    """Drop a node's result, as a host does under memory pressure."""
    outputs = caches.outputs
    key = outputs.cache_key_set.get_data_key(node)
    assert outputs.cache.pop(key, None) is not None


@pytest.mark.matrix("Memory", "Flexi Apply's result dropped by the host between two prompts")
def test_a_report_whose_run_was_dropped_says_so(executor, graph, record_property):
    assert "6 steps: 3 full, 3 null (extrapolated)" in executor(graph, [REPORT])[REPORT]
    drop(executor.caches, APPLY)
    # Another report of the same latent: Flexi Apply runs again, the sampler does not.
    graph[AGAIN] = {"class_type": "FlexiReport", "inputs": {"run": [APPLY, 1], "latent": [SAMPLER, 0]}, "_meta": {"title": "b"}}
    drop(executor.caches, REPORT)
    shown = executor(graph, [REPORT, AGAIN])
    assert "sampling once more" in shown[AGAIN] and "this run's report is gone" in shown[AGAIN]
    assert "full," not in shown[AGAIN]
    graph[SAMPLER]["inputs"]["seed"] = 2
    assert "6 steps: 3 full, 3 null (extrapolated)" in executor(graph, [REPORT, AGAIN])[AGAIN]
    record_property("does", "the report says that it is gone; sampling once more makes one")


def test_a_dropped_report_is_made_again_from_its_own_run(executor, graph):
    first = executor(graph, [REPORT])[REPORT]
    drop(executor.caches, REPORT)
    assert executor(graph, [REPORT])[REPORT] == first
    drop(executor.caches, SAMPLER)
    drop(executor.caches, REPORT)
    again = executor(graph, [REPORT])[REPORT]
    assert "6 steps: 3 full, 3 null (extrapolated)" in again
