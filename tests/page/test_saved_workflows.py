"""Saved workflows become what the page itself makes of them, in a real browser: the official templates, and our own cases."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flexi_core.files import write_text
from search_tools.backends.comfyui.saved_workflow import is_saved, to_api
from search_tools.backends.comfyui.workflow import SAMPLING, Graph

ROOT = Path(__file__).resolve().parents[2]
CASES = ROOT / "tests" / "workflows"
AGREE, OF = 300, 307  # at least this share of the official templates with all their nodes in the host
VIEWERS = {"Load3D", "Preview3D", "SaveGLB"}  # the page gives these widgets of its own, which no definition names
UPLOADED = re.compile(r".+-[0-9]{13}\.\w+ \[\w+\]")  # painted and uploaded as the page exports
FEW = 3  # differences that are told of a template


@dataclass(frozen=True)
class Compared:
    """A saved workflow as the page exports it, beside ours.

    Args:
        name: of its file.
        page: what the page makes of it; None where it fails.
        ours: in API form.
        unknown: node classes that this host does not have.
        error: the page's own.
    """

    name: str
    page: Graph | None
    ours: Graph
    unknown: tuple[str, ...]
    error: str = ""

    @cached_property
    def samplers(self) -> bool:
        """Whether anything is sampled in it."""
        return any(node["class_type"] in SAMPLING for node in (self.page or self.ours).values())

    @cached_property
    def agrees(self) -> bool:
        """Whether both are the same: upstream of what samples, and where nothing does everywhere."""
        return self.page is not None and _branches(self.page, self.samplers) == _branches(self.ours, self.samplers)

    @property
    def why_not(self) -> str:
        """Return why they are not the same, in words."""
        if self.page is None:
            return f"the page fails: {self.error}"
        told = f"not in this host: {', '.join(self.unknown)}" if self.unknown else "; ".join(self._differences()[:FEW])
        return told or "the nodes stand in another order"

    def _differences(self) -> list[str]:
        found = []
        for name in sorted({*self.page, *self.ours}):
            page, ours = self.page.get(name), self.ours.get(name)
            if page is None or ours is None:
                found.append(f"{(page or ours)['class_type']} ({name}) only {'here' if page is None else 'in the page'}")
                continue
            for key in sorted({*page["inputs"], *ours["inputs"]}):
                a, b = (each["inputs"].get(key, "nothing") for each in (page, ours))
                if a != b:
                    found.append(f"{page['class_type']} ({name}) {key}: the page {_short(a)}, ours {_short(b)}")
        return found


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _branches(graph: Graph, sampled: bool) -> list[str]:
    """Return digests of what lies upstream of each sampling node, or of each node; the page numbers some nodes anew."""
    known: dict[str, str] = {}

    def digest(name: str) -> str:
        if name not in known:
            known[name] = "missing" if name not in graph else "a circle"
            if name in graph:
                node = graph[name]
                inputs = sorted((key, *value_of(value)) for key, value in node["inputs"].items())
                known[name] = hashlib.sha256(json.dumps([node["class_type"], inputs]).encode()).hexdigest()
        return known[name]

    def value_of(value: Any) -> tuple[str, Any]:
        if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int):
            return digest(value[0]), value[1]
        number = isinstance(value, int | float) and not isinstance(value, bool)  # JSON of the page has 1 for 1.0
        return "value", json.dumps(float(value) if number else value, sort_keys=True)

    return sorted(digest(name) for name, node in graph.items() if not sampled or node["class_type"] in SAMPLING)


def compare(page: Any, files: Iterable[Path]) -> list[Compared]:
    saved = {path.name: (path, json.loads(path.read_text(encoding="utf-8"))) for path in files}
    saved = {name: each for name, each in saved.items() if is_saved(each[1])}
    exported = page.export([path for path, _ in saved.values()])
    found = []
    for name, (_, data) in saved.items():
        ours, told = to_api(data, page.definitions.get), exported[name]
        unknown = {node["class_type"] for node in ours.values()} - {*page.definitions}
        made = told.get("output")
        made = None if made is None else {key: _settled(node) for key, node in made.items() if "class_type" in node}
        ours = {key: _settled(node) for key, node in ours.items()}
        found.append(Compared(name, made, ours, tuple(sorted(unknown)), told.get("error", "")))
    return found


def _settled(node: dict[str, Any]) -> dict[str, Any]:
    """Return a node without the pictures that the page uploads as it exports, whose names hold the time."""
    inputs = {
        key: "" if isinstance(value, str) and UPLOADED.fullmatch(value) else value for key, value in node["inputs"].items()
    }
    return {**node, "inputs": inputs}


def test_our_own_cases_are_what_the_page_exports_of_them(page):
    files = [*sorted(CASES.glob("*.ui.json")), *sorted((ROOT / "example_workflows").glob("*.json"))]
    compared = compare(page, files)
    assert len(compared) > 6
    assert {each.name: each.why_not for each in compared if not each.agrees} == {}


def test_official_templates_are_what_the_page_exports_of_them(page, needs, frontend, templates, request):
    compared = compare(page, sorted(templates.glob("*.json")))
    if wanted := request.config.getoption("--saved-workflows"):
        write_text(Path(wanted), "\n".join(_sheet(compared, needs.versions(frontend, templates))) + "\n")
    whole = [each for each in compared if each.page is not None and not each.unknown]
    wrong = {each.name: each.why_not for each in whole if each.samplers and not each.agrees}
    assert not wrong
    told = [each for each in whole if VIEWERS.isdisjoint(node["class_type"] for node in each.ours.values())]
    assert sum(each.agrees for each in told) * OF >= AGREE * len(told) > 0


def _sheet(compared: list[Compared], versions: str) -> list[str]:
    """Return the lines of the page of results."""
    sampled, others = ([each for each in compared if each.samplers == kind] for kind in (True, False))
    known = [each for each in compared if each.page is not None and not each.unknown]
    lines = [
        "# Saved workflows, beside what the page makes of them",
        "",
        "Made by `pytest tests/page --saved-workflows docs/results/saved-workflows.md`. Every official template is loaded in",
        "the page, in a headless Chromium on a real server.",
        "What the page exports (`graphToPrompt`) is compared with what",
        "`search_tools/backends/comfyui/saved_workflow.py` makes of the file:",
        "everything upstream of what samples, and where nothing samples the whole graph. Node ids may differ, the page numbers",
        f"some anew. The page gives {', '.join(sorted(VIEWERS))} widgets of its own, which no definition names.",
        "",
        versions,
        "",
        "| templates | number | agree |",
        "|-|-|-|",
    ]
    for title, group in (
        ("all", compared),
        ("that sample", sampled),
        ("that do not", others),
        ("whose nodes this host has, all of them", known),
        ("of those, that sample", [each for each in known if each.samplers]),
    ):
        lines.append(f"| {title} | {len(group)} | {sum(each.agrees for each in group)} |")
    for title, group in (("sample", sampled), ("do not sample", others)):
        lines += ["", f"## Templates that {title} and do not agree", "", "| template | why |", "|-|-|"]
        lines += [f"| {each.name} | {each.why_not.replace('|', '/')} |" for each in group if not each.agrees]
    return lines
