"""The host's page for its tests: a real server, the page in a headless Chromium, official templates.

What is looked for, and the environment variable that says where it is: a ComfyUI checkout (`COMFYUI_PATH`, else the newest that
`tests/host/checkouts` lists), a Chromium (`CHROMIUM`), playwright-core for node (`PLAYWRIGHT_CORE`, its folder; the Python
package has one inside), the page (`COMFYUI_FRONTEND`, the folder of its index.html; `COMFYUI_FRONTEND_OLD`, that of the one
which ComfyUI 0.3.64 brings) and, for saved workflows, the templates (`COMFYUI_TEMPLATES`, a folder). What a test needs and is
missing skips it, and the one reason says what. `--screens FOLDER` keeps pictures of the page.
"""

from __future__ import annotations

import base64
import functools
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image, ImageColor

from flexi_core import StepKind

PACK = Path(__file__).resolve().parents[2]
DRIVER, EXPORTER = (Path(__file__).parent / name for name in ("driver.cjs", "export.cjs"))
LETTERS = {ImageColor.getrgb(kind.colour): kind.value for kind in StepKind}
OLD, CLASSIC, VUE = VIEWS = ("old", "classic", "vue")
# Without the tour, which would lie over the graph, and without a question at every change of tabs.
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.InstalledVersion": "1.27.10", "Comfy.Queue.QPOV2": False}
IN_PAGE = f"() => {{ {(Path(__file__).parent / 'in_page.js').read_text(encoding='utf-8')} }}"
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

    def versions(self, *packages: Path) -> str:
        """Return what is run, in words: the host, and packages by folders inside them."""
        stated = re.search(r'__version__ = "(.+)"', (self.checkout / "comfyui_version.py").read_text(encoding="utf-8"))
        return f"{', '.join([f'ComfyUI {stated[1]}', *map(_package, packages)])}."


@pytest.fixture(scope="session")
def needs() -> Needs:
    core, node = _playwright()
    return Needs(
        *_all_of(
            {
                "a ComfyUI checkout (COMFYUI_PATH)": _checkout(),
                "node": node,
                "playwright-core (PLAYWRIGHT_CORE)": core,
                "a Chromium (CHROMIUM)": _first(
                    os.environ.get("CHROMIUM"), *([] if "CHROMIUM" in os.environ else map(shutil.which, CHROMIUMS))
                ),
            }
        )
    )


@pytest.fixture(scope="session")
def frontend() -> Path:
    """The newest page: the folder of its index.html."""
    installed = [_inside("comfyui_frontend_package", "static")]
    return _all_of({"the page (COMFYUI_FRONTEND)": _asked("COMFYUI_FRONTEND", installed)})[0]


@pytest.fixture(scope="session")
def templates() -> Path:
    """A folder of official templates."""
    return _all_of({"the templates (COMFYUI_TEMPLATES)": next(iter(host_tests.find_templates()), None)})[0]


def _all_of(found: dict[str, Path | None]) -> list[Path]:
    """Return what was found, by its name; where any of it is missing the test is skipped."""
    missing = [name for name, path in found.items() if path is None]
    if missing:
        pytest.skip(f"the tests of the page need {', '.join(missing)}")
    return list(found.values())


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
    """The page of a running server, for saved workflows."""

    def __init__(self, needs: Needs, server: Any) -> None:
        self._needs, self._server = needs, server
        self.definitions: dict[str, Any] = server.get("/object_info")

    def export(self, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
        """Return, by file name, what the page makes of saved workflows: "output" in API form, or "error"."""
        needs, answers = self._needs, self._server.base / "exported.jsonl"
        command = [needs.node, EXPORTER, needs.playwright, needs.chromium, self._server.url, *files]
        with answers.open("wb") as output:
            subprocess.run([str(each) for each in command], stdout=output, check=True)
        said = [json.loads(line) for line in answers.read_bytes().split(b"\n") if line]  # prompts hold other ends of lines
        return {each["name"]: each for each in said}


@pytest.fixture(scope="session")
def servers(needs: Needs, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A function that returns the server of a page, by the page's folder; there is one for each."""
    with ExitStack() as stack:

        @functools.cache
        def of(frontend: Path) -> Any:
            options = ["--front-end-root", str(frontend)]
            base = tmp_path_factory.mktemp("page")
            return stack.enter_context(host_tests.serving(needs.checkout, environment, base, *options))

        yield of


@pytest.fixture(scope="session")
def page(needs: Needs, frontend: Path, servers: Any) -> Page:
    return Page(needs, servers(frontend))


class Driver:
    """A headless Chromium that does what it is told; see `driver.cjs`."""

    def __init__(self, needs: Needs) -> None:
        command = [str(each) for each in (needs.node, DRIVER, needs.playwright, needs.chromium)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, view: str, do: str, *args: Any) -> Any:
        self._process.stdin.write(json.dumps({"view": view, "do": do, "args": args}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"error": "the browser is gone"}')
        assert "error" not in answer, answer["error"]
        return answer["value"]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=30)


@pytest.fixture(scope="session")
def driver(needs: Needs) -> Iterator[Driver]:
    running = Driver(needs)
    yield running
    running.close()


class View:
    """One of the ways in which people see the page.

    Args:
        name: of `VIEWS`.
        driver: of the browser.
        server: of this page.
        is_vue: whether the nodes are Nodes 2.0.
        screens: folder for pictures of it; None keeps none.
    """

    def __init__(self, name: str, driver: Driver, server: Any, is_vue: bool, screens: str | None) -> None:
        self.name, self.server, self.is_vue = name, server, is_vue
        self._do, self._screens = functools.partial(driver, name), screens
        self._settings = {**SETTINGS, "Comfy.VueNodes.Enabled": is_vue}
        self._do("open", server.url, self._settings)
        self.do(IN_PAGE)
        self.loaded: list[str] = self.said()

    def do(self, source: str, argument: Any = None) -> Any:
        """Return what a function of the page, in JavaScript, returns."""
        return self._do("evaluate", source, argument)

    def until(self, source: str, argument: Any = None, limit_s: float = 15) -> Any:
        """Return what a function of the page returns as soon as that is something."""
        end = time.monotonic() + limit_s
        while not (found := self.do(source, argument)):
            assert time.monotonic() < end, f"not after {limit_s} s: {source} {argument}; the page said {self.said()[-5:]}"
            time.sleep(0.1)
        return found

    def reload(self) -> None:
        self._do("reload", self._settings)
        self.do(IN_PAGE)

    def said(self) -> list[str]:
        """Return what the page has written to its console since it was last asked."""
        return self._do("said")

    def click(self, x: float, y: float) -> None:
        self._do("click", x, y)

    def move(self, x: float, y: float) -> None:
        self._do("move", x, y)

    def drag(self, start: list[float], end: list[float]) -> None:
        self._do("drag", start, end)

    def press(self, key: str) -> None:
        self._do("press", key)

    def type(self, text: str) -> None:
        self._do("type", text)

    def drop(self, x: float, y: float, name: str, content: bytes, kind: str) -> None:
        """Let a file fall on a point of the page."""
        self._do("drop", x, y, [{"name": name, "type": kind, "base64": base64.b64encode(content).decode()}])

    def screen(self, name: str) -> Image.Image:
        """Return a picture of the page as it is seen; it is kept under a name, where pictures are kept."""
        image = Image.open(io.BytesIO(base64.b64decode(self._do("screenshot")))).convert("RGB")
        if self._screens:
            image.save(Path(self._screens) / f"{self.name} {name}.png")
        return image

    def letters(self, node: int, name: str = "strip") -> str:
        """Return the kinds of steps that a node's strip shows by the colours of its cells, as they are seen; "." is another."""
        left, _, right, bottom = self.do("flexi.strip", node)
        count = self.do("(id) => flexi.panel(id).shown.letters?.length ?? 0", node)
        image = self.screen(name)
        places = [int(left + (i + 0.5) * (right - left) / count) for i in range(count)]
        return "".join(LETTERS.get(image.getpixel((x, int(bottom) - 2)), ".") for x in places)

    def words(self, node: int) -> str:
        """Return what is written under a node's strip."""
        return self.do("flexi.words", node)

    def run(self) -> None:
        """Queue the graph as the page's own button does, and wait for its end."""
        self.do("() => app.queuePrompt(0, 1)")
        self.until("flexi.idle", limit_s=120)
        self.do("() => new Promise((done) => setTimeout(done, 300))")  # the last messages come after the queue is empty


@pytest.fixture(scope="session")
def views(driver: Driver, servers: Any, request: pytest.FixtureRequest) -> Any:
    """A function that returns a view by its name; each is opened once."""

    @functools.cache
    def opened(name: str) -> View:
        if name == OLD:
            page = _all_of({"the page of ComfyUI 0.3.64 (COMFYUI_FRONTEND_OLD)": _asked("COMFYUI_FRONTEND_OLD", [])})[0]
        else:
            page = request.getfixturevalue("frontend")
        return View(name, driver, servers(page), name == VUE, request.config.getoption("--screens"))

    return opened


@pytest.fixture(params=VIEWS)
def view(request: pytest.FixtureRequest, views: Any) -> View:
    """Each of the views, with an empty graph."""
    found = views(request.param)
    found.do("() => flexi.clear()")
    found.click(750, 950)  # no tooltip, no menu
    found.said()
    return found
