"""The host's page for its tests: a real server, the page in a headless Chromium, official templates.

What is looked for, and the environment variable that says where it is: a ComfyUI checkout (`COMFYUI_PATH`, else the newest that
`tests/host/checkouts` lists), a Chromium (`CHROMIUM`), playwright-core for node (`PLAYWRIGHT_CORE`, its folder; the Python
package has one inside), the page (`COMFYUI_FRONTEND`, the folder of its index.html) and the templates (`COMFYUI_TEMPLATES`, a
folder). Where any of it is missing all is skipped, and the one reason says what.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PACK = Path(__file__).resolve().parents[2]
DRIVER = Path(__file__).parent / "export.cjs"
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def _host_tests() -> ModuleType:
    spec = importlib.util.spec_from_file_location("flexi_host_tests", PACK / "tests" / "host" / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


host_tests = _host_tests()
environment = host_tests.environment  # the fixture


@dataclass(frozen=True)
class Needs:
    """What the tests run with: folders, but for `node` and `chromium`, which are programs."""

    checkout: Path
    node: Path
    playwright: Path
    chromium: Path
    frontend: Path
    templates: Path

    @property
    def versions(self) -> str:
        """Return what is run, in words."""
        stated = re.search(r'__version__ = "(.+)"', (self.checkout / "comfyui_version.py").read_text(encoding="utf-8"))
        return f"ComfyUI {stated[1]}, {_package(self.frontend)}, {_package(self.templates)}."


@pytest.fixture(scope="session")
def needs() -> Needs:
    core, node = _playwright()
    found = {
        "a ComfyUI checkout (COMFYUI_PATH)": _checkout(),
        "node": node,
        "playwright-core (PLAYWRIGHT_CORE)": core,
        "a Chromium (CHROMIUM)": _first(
            os.environ.get("CHROMIUM"), *([] if "CHROMIUM" in os.environ else map(shutil.which, CHROMIUMS))
        ),
        "the page (COMFYUI_FRONTEND)": _asked("COMFYUI_FRONTEND", [_inside("comfyui_frontend_package", "static")]),
        "the templates (COMFYUI_TEMPLATES)": next(iter(host_tests.find_templates()), None),
    }
    missing = [name for name, path in found.items() if path is None]
    if missing:
        pytest.skip(f"the tests of the page need {', '.join(missing)}")
    return Needs(*found.values())


def _checkout() -> Path | None:
    if os.environ.get("COMFYUI_PATH"):
        return host_tests.find_checkout()
    listed = subprocess.run([PACK / "tests" / "host" / "checkouts"], capture_output=True, text=True, check=True)
    return next((Path(line) for line in reversed(listed.stdout.splitlines())), None)


def _playwright() -> tuple[Path | None, Path | None]:
    """Return the folder of playwright-core and the node to run it with."""
    driver, node = _inside("playwright", "driver"), shutil.which("node")
    candidates = [_inside("playwright", "driver/package"), PACK / "node_modules/playwright-core"]
    candidates.append(Path.home() / "node_modules/playwright-core")
    if shutil.which("npm"):
        everywhere = subprocess.run(["npm", "root", "-g"], capture_output=True, text=True, check=False).stdout.strip()
        candidates += [Path(everywhere) / name for name in ("playwright-core", "playwright/node_modules/playwright-core")]
    return _asked("PLAYWRIGHT_CORE", candidates), _first(node, driver and driver / "node")


def _asked(variable: str, candidates: Iterable[Path | None]) -> Path | None:
    """Return the folder that an environment variable names, and where there is none of it the first candidate."""
    return _first(*([os.environ[variable]] if os.environ.get(variable) else candidates))


def _first(*candidates: str | Path | None) -> Path | None:
    return next((Path(each).expanduser() for each in candidates if each and Path(each).expanduser().exists()), None)


def _package(folder: Path) -> str:
    """Return the name and the version of the package that a folder is the inside of."""
    package = folder.parent
    info = next(package.parent.glob(f"{package.name}-*.dist-info"), package)
    return " ".join(info.stem.split("-", 1) if info != package else [package.name])


def _inside(package: str, folder: str) -> Path | None:
    """Return a folder in an installed package."""
    spec = importlib.util.find_spec(package)
    return Path(next(iter(spec.submodule_search_locations))) / folder if spec else None


class Page:
    """The page of a running server."""

    def __init__(self, needs: Needs, server: Any) -> None:
        self._needs, self._server = needs, server
        self.definitions: dict[str, Any] = server.get("/object_info")

    def export(self, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
        """Return, by file name, what the page makes of saved workflows: "output" in API form, or "error"."""
        needs, answers = self._needs, self._server.base / "exported.jsonl"
        command = [needs.node, DRIVER, needs.playwright, needs.chromium, self._server.url, *files]
        with answers.open("wb") as output:
            subprocess.run([str(each) for each in command], stdout=output, check=True)
        said = [json.loads(line) for line in answers.read_bytes().split(b"\n") if line]  # prompts hold other ends of lines
        return {each["name"]: each for each in said}


@pytest.fixture(scope="session")
def page(needs: Needs, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    options = ["--front-end-root", str(needs.frontend)]
    with host_tests.serving(needs.checkout, environment, tmp_path_factory.mktemp("page"), *options) as server:
        yield Page(needs, server)
