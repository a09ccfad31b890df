"""The host for its tests: finds a ComfyUI checkout, brings it up on the CPU, and samples in it.

Nothing of the host is imported before the first fixture asks for it, so that without a checkout the tests are skipped for
that one reason, and so that collecting them does not make this pack's own entry believe that it runs inside the host.
"""

from __future__ import annotations

import ast
import asyncio
import functools
import importlib
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from search_tools.backends.comfyui.saved_workflow import to_api

PACK = Path(__file__).resolve().parents[2]
STANDIN = Path(__file__).parent / "standin"
CAPTION = "a large red circle at the center on a navy background"
SERVER_START_S = 120
PICTURES = "two samples of the embedded model at 8 steps, where it has something for them, else at 20, cfg 3"


def find_checkout() -> Path | None:
    """Return the ComfyUI checkout: the first of $COMFYUI_PATH, else comfy-cli's place, else the one around this pack."""
    asked = [Path(path) for path in os.environ.get("COMFYUI_PATH", "").split(os.pathsep) if path]
    candidates = asked or [Path.home() / "comfy" / "ComfyUI", PACK.parents[1]]
    return next((path.resolve() for path in candidates if (path / "comfy" / "samplers.py").is_file()), None)


def find_templates() -> list[Path]:
    """Return the folders of official templates: of $COMFYUI_TEMPLATES, else those of the packages that are installed."""
    asked = [Path(path) for path in os.environ.get("COMFYUI_TEMPLATES", "").split(os.pathsep) if path]
    specs = [importlib.util.find_spec(f"comfyui_workflow_templates{which}") for which in ("_json", "")]
    installed = [Path(next(iter(spec.submodule_search_locations))) / "templates" for spec in specs if spec]
    return [folder for folder in asked or installed if folder.is_dir()]


def host_version() -> str:
    """Return the host's name and the version that its checkout states."""
    file = (find_checkout() or Path()) / "comfyui_version.py"
    stated = re.search(r'__version__ = "(.+)"', file.read_text(encoding="utf-8")) if file.is_file() else None
    return f"ComfyUI {stated[1]}" if stated else "ComfyUI"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give `sampler_name` and `scheduler_name` every name of the host, read from its source: collecting imports nothing."""
    found = find_checkout()
    source = (found / "comfy" / "samplers.py").read_text(encoding="utf-8") if found else ""
    if "sampler_name" in metafunc.fixturenames:
        lists = re.findall(r"^K?SAMPLER_NAMES = (?:KSAMPLER_NAMES \+ )?(\[.*?\])", source, re.MULTILINE | re.DOTALL)
        metafunc.parametrize("sampler_name", [name for text in lists for name in ast.literal_eval(text)] or ["euler"])
    if "scheduler_name" in metafunc.fixturenames:
        metafunc.parametrize("scheduler_name", re.findall(r'"(\w+)": SchedulerHandler\(', source) or ["normal"])


@functools.cache
def imports_torchvision() -> bool:
    """Return whether the real torchvision and torchaudio import; those linked to CUDA do not beside a CPU torch."""
    probe = [sys.executable, "-c", "import torchaudio, torchvision.transforms"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "matrix(group, row): a cell of the compatibility table; {names} of parameters in row are filled in"
    )
    config.addinivalue_line("markers", "smoke: a test of a door that every version of the host is opened by; see `make smoke`")
    config.pluginmanager.register(MatrixTable(config.getoption("--matrix")), "flexi-matrix")


class MatrixTable:
    """Collects the results of the tests marked `matrix` and writes them as the compatibility table."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._rows: dict[tuple[str, str], list[bool]] = {}
        self._does: dict[tuple[str, str], str] = {}
        self._pictures: dict[tuple[str, str], str] = {}
        self._keys: dict[str, tuple[str, str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if marker := item.get_closest_marker("matrix"):
                group, row = marker.args
                callspec = getattr(item, "callspec", None)
                self._keys[item.nodeid] = group, row.format(**(callspec.params if callspec else {}))
                self._rows.setdefault(self._keys[item.nodeid], [])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        key = self._keys.get(report.nodeid)
        if key is None or (report.when != "call" and report.passed):
            return
        if report.skipped:
            self._does.setdefault(key, str(report.longrepr[-1]).removeprefix("Skipped: "))
            return
        self._rows[key].append(report.passed)
        told = dict(report.user_properties)
        self._does[key] = told.get("does", self._does.get(key, ""))
        self._pictures[key] = told.get("picture", self._pictures.get(key, ""))

    def pytest_sessionfinish(self) -> None:
        if not self._path:
            return
        page = Path(self._path)
        data = page.with_suffix(".json")
        versions = json.loads(data.read_text(encoding="utf-8")) if data.exists() else {}
        found: dict[str, dict[str, Any]] = {}
        for (group, row), results in self._rows.items():
            told = {"passed": sum(results), "of": len(results)}
            told |= {"does": self._does.get((group, row), ""), "picture": self._pictures.get((group, row), "")}
            found.setdefault(group, {})[row] = told
        versions[host_version()] = found
        versions = dict(sorted(versions.items(), key=lambda item: [int(part) for part in re.findall(r"\d+", item[0])]))
        for path, text in ((data, json.dumps(versions, indent=1)), (page, "\n".join(_page(versions)))):
            temporary = path.with_name(f"{path.name}.new")
            temporary.write_text(text + "\n", encoding="utf-8")
            temporary.replace(path)


def _page(versions: dict[str, Any]) -> list[str]:
    """Return the lines of the compatibility page, a column for each version of the host, the oldest first."""
    lines = [
        "# What was tested in the host",
        "",
        f"{', '.join(versions)}: `pytest tests/host --matrix=docs/compatibility.md`, for each with `COMFYUI_PATH` set to it.",
        "In every row a schedule of full steps gives the latent of plain sampling bit for bit; a mixed one gives a finite",
        "latent with the steps that the row names, and the same latent again. Pictures are compared with those of all",
        f"steps: the PSNR of Flexi Preset 2x, and of as many plain steps, over {PICTURES}.",
        "A version's column says how many tests passed; what the pack does and the pictures are the newest version's.",
    ]
    for group in dict.fromkeys(group for found in versions.values() for group in found):
        # A version of which the doors alone were tried (`make smoke`) is in their table alone.
        tried = {
            name: found[group] for name, found in versions.items() if any(told["of"] for told in found.get(group, {}).values())
        }
        numbers, of_group = [name.removeprefix("ComfyUI ") for name in tried], list(tried.values())
        rows = dict.fromkeys(row for found in of_group for row in found)
        pictures = any(told["picture"] for found in of_group for told in found.values())
        lines += ["", f"## {group}", ""]
        lines += [f"| | {' | '.join(numbers)} | what the pack does |" + " pictures |" * pictures]
        lines += ["|-|" + "-|" * (len(numbers) + 1 + pictures)]
        for row in rows:
            told = [found.get(row, {}) for found in of_group]
            newest = next(each for each in reversed(told) if each)
            cells = [row, *map(_passed, told), newest["does"], *[newest["picture"]] * pictures]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _passed(told: dict[str, Any]) -> str:
    """Return a cell of the compatibility page: how many tests of a row passed in a version."""
    if not told or not told["of"]:
        return "not run"
    return f"{told['passed']} passed" if told["passed"] == told["of"] else f"{told['passed']} of {told['of']}: FAILED"


def require_v3_nodes() -> None:
    """Skip where the host is older than the nodes' interface; sampling with the adapter is tested all the same."""
    if not (find_checkout() / "comfy_api" / "latest").is_dir():
        pytest.skip("this host has no comfy_api.latest: the nodes need ComfyUI 0.3.48 or newer")


class Host:
    """The host as a library, on the CPU, with folders of its own: nothing is written into the checkout."""

    def __init__(self, checkout: Path, base: Path) -> None:
        self.base = base
        sys.path.insert(0, str(checkout))
        if not imports_torchvision():
            sys.path.append(str(STANDIN))
        args = importlib.import_module("comfy.cli_args").args
        args.cpu = args.use_pytorch_cross_attention = True  # both are read when comfy.model_management is imported
        args.base_directory = str(base)  # and this one with folder_paths
        if importlib.util.find_spec("comfy_compatibility"):  # the installable ComfyUI, which keeps modules elsewhere, has this
            importlib.import_module("comfy.nodes.base_nodes")  # first: its modules import one another in a circle
            importlib.import_module("comfy_compatibility.vanilla").prepare_vanilla_environment()
        self.comfy = importlib.import_module("comfy")
        for name in ("sample", "samplers", "model_management", "model_base", "model_patcher", "model_sampling"):
            importlib.import_module(f"comfy.{name}")
        self.adapter = importlib.import_module("flexi_core.host")
        self.positive = self.adapter.demo_conditioning(CAPTION)
        self.negative = self.adapter.demo_conditioning("")

    size = 32  # of latents that no size is given for; see `small_latents`

    def noise(self, batch: int = 2, size: int | None = None, seed: int = 0) -> torch.Tensor:
        size = size or self.size
        return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))

    def sample(self, model: Any, sampler: str = "euler", steps: int = 8, **options: Any) -> torch.Tensor:
        """Sample with core's own function, cfg 3 on the normal grid unless told."""
        noise = options.pop("noise", None)
        noise = self.noise() if noise is None else noise
        defaults = {"scheduler": "normal", "positive": self.positive, "negative": self.negative, "cfg": 3.0}
        defaults |= {"latent_image": noise * 0.0, "seed": 0, "disable_pbar": True}
        options = {**defaults, **options}
        return self.comfy.sample.sample(model, noise, steps, sampler_name=sampler, **options)

    def sigmas(self, model: Any, scheduler: str, steps: int) -> torch.Tensor:
        return self.comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)

    def model_of_type(self, kind: str) -> Any:
        """Return the embedded network as a model that predicts v or a flow's velocity: its pictures mean nothing."""
        model = self.adapter.load_demo_model()
        inner = self.comfy.model_base.BaseModel(
            model.model.model_config, getattr(self.comfy.model_base.ModelType, kind), device=torch.device("cpu")
        )
        inner.diffusion_model.load_state_dict(model.model.diffusion_model.state_dict())
        device = torch.device("cpu")
        return self.comfy.model_patcher.ModelPatcher(inner.eval(), load_device=device, offload_device=device)


@pytest.fixture(scope="session")
def checkout() -> Path:
    found = find_checkout()
    if found is None:
        pytest.skip("no ComfyUI checkout; set COMFYUI_PATH to one")
    return found


@pytest.fixture(scope="session")
def template() -> Any:
    """A function that returns the text of an official template, as downloaded."""

    def read(name: str) -> str:
        file = next((folder / f"{name}.json" for folder in find_templates() if (folder / f"{name}.json").is_file()), None)
        if file is None:
            pytest.skip(f"no official template {name}; set COMFYUI_TEMPLATES to their folder")
        return file.read_text(encoding="utf-8")

    return read


@pytest.fixture(scope="session")
def host(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Host:
    return Host(checkout, tmp_path_factory.mktemp("comfyui"))


@pytest.fixture(scope="module")
def small_latents(host: Host) -> Iterator[None]:
    """Sample latents of 16x16 in a file whose laws hold at any size: the embedded model's pictures take four times as long."""
    host.size = 16
    yield
    host.size = 32


@pytest.fixture(scope="session")
def extra(host: Host, checkout: Path) -> Any:
    """A function of (module of comfy_extras, name) that returns a node as a function of its values and of its outputs.

    A test is skipped where the host has no such node; which of the host's two interfaces the node has makes no difference.
    """

    def find(module: str, name: str) -> Any:
        paths = (path.relative_to(checkout).with_suffix("") for path in (checkout / "comfy_extras").rglob(f"nodes_{module}.py"))
        found = (importlib.import_module(".".join(path.parts)) for path in paths)
        cls = next((getattr(module, name) for module in found if hasattr(module, name)), None)
        if cls is None:
            pytest.skip(f"this host has no node {name}")
        if "INPUT_TYPES" in vars(cls):
            return getattr(cls(), cls.FUNCTION)

        @functools.wraps(cls.execute)
        def outputs(*values: Any, **named: Any) -> tuple:
            out = cls.execute(*values, **named)
            return getattr(out, "args", out)

        return outputs

    return find


@pytest.fixture(scope="session")
def demo_model(host: Host) -> Any:
    return host.adapter.load_demo_model()


@pytest.fixture(scope="session")
def repatched(host: Host) -> None:
    """Skip where the host, without this pack, leaves a loaded model's weights as they are when another clone of it samples."""
    model = host.adapter.load_demo_model()
    name = "diffusion_model.output_blocks.5.0.in_layers.2.weight"
    lora = model.clone()
    lora.add_patches({name: ("diff", (torch.ones_like(model.model.state_dict()[name]) * 0.05,))})
    before, patched, after = (host.sample(each, steps=1) for each in (model, lora, model))
    if torch.equal(before, patched) or not torch.equal(before, after):
        pytest.skip("plain sampling in this host does not change and restore the weights of a loaded model")


@pytest.fixture(scope="session")
def apply(host: Host) -> Any:
    """A function of (model, schedule text, on_mismatch) that returns the patched model and its reports' handle."""
    from flexi_core import Schedule

    return lambda model, text, *args: host.adapter.apply_schedule(model, Schedule.parse(text), *args)


@pytest.fixture
def cell(apply: Any, record_property: Any) -> Any:
    """A function that asserts the laws of one cell of the matrix; see `docs/compatibility.md`.

    check(model, sample, text, ran=None, does=None, plain=None): `sample(model)` returns a latent [B, ...]; `text` is a mixed
    schedule, and `ran` the letters of the steps that are expected to run, `text`'s own by default. Returns the mixed run's
    report. `does` is what the table says; by default it is made from the kinds of step that ran.
    """
    from flexi_core import Schedule

    def check(model: Any, sample: Any, text: str, ran: str | None = None, does: str | None = None) -> Any:
        letters = Schedule.parse(text).letters
        plain = sample(model)
        full, handle = apply(model, f"{len(letters)}*(F)")
        assert torch.equal(sample(full), plain), "a schedule of full steps changed the latent"
        assert set(handle.report.letters) <= {"F"}
        mixed, handle = apply(model, text)
        first = sample(mixed)
        assert first.isfinite().all() and first.shape == plain.shape
        report = handle.report
        assert report.letters == (letters if ran is None else ran), str(report)
        assert torch.equal(sample(mixed), first), "the second run differs from the first"
        assert handle.report.letters == report.letters
        record_property("does", does or _kinds(report))
        return report

    return check


def _kinds(report: Any) -> str:
    names = {"F": "full", "f": "conditional", "P": "partial", "p": "conditional partial", "N": "removed", "X": "extrapolated"}
    return ", ".join(name for letter, name in names.items() if letter in report.letters) + " steps as planned"


@pytest.fixture(scope="session")
def pack(host: Host) -> ModuleType:
    """The pack as the host imports it: by its own loader, from custom_nodes, under a path-like name."""
    require_v3_nodes()
    link = host.base / "custom_nodes" / "flexiffusion"
    link.parent.mkdir()
    link.symlink_to(PACK, target_is_directory=True)
    nodes = importlib.import_module("nodes")
    assert asyncio.run(nodes.load_custom_node(str(link))), "the host did not load the pack"
    return sys.modules[str(link).replace(".", "_x_")]


@pytest.fixture(scope="session")
def node(pack: ModuleType) -> Any:
    """A function that returns a node class of the pack by its id."""
    extension = asyncio.run(pack.comfy_entrypoint())
    classes = {cls.GET_SCHEMA().node_id: cls for cls in asyncio.run(extension.get_node_list())}
    return classes.__getitem__


@pytest.fixture(scope="session")
def schedule_folder(host: Host, pack: ModuleType) -> Path:
    folder = host.base / "models" / "flexi_schedules"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Server:
    """A running ComfyUI with the pack in its custom_nodes."""

    def __init__(self, url: str, base: Path, process: subprocess.Popen) -> None:
        self.url, self.base, self.process = url, base, process

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            body = answer.read()
        return json.loads(body) if answer.headers.get_content_type() == "application/json" else body

    def post(self, graph: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Queue an API-format graph; return the status and the answer."""
        body = json.dumps({"prompt": graph}).encode()
        request = urllib.request.Request(self.url + "/prompt", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def api_form(self, workflow: dict[str, Any]) -> dict[str, Any]:
        """Return the API form of a saved workflow; notes and other page-only nodes fall out."""
        known = self.get("/object_info")
        return {name: node for name, node in to_api(workflow, known.get).items() if node["class_type"] in known}

    def run(self, graph: dict[str, Any], limit_s: float = 180) -> dict[str, Any]:
        """Queue a graph, wait for its end, and return its history entry."""
        entry = self.end_of(graph, limit_s)
        assert entry["status"]["completed"], entry["status"]["messages"]
        return entry

    def end_of(self, graph: dict[str, Any], limit_s: float = 180) -> dict[str, Any]:
        """Queue a graph, wait for its end, good or bad, and return its history entry."""
        status, answer = self.post(graph)
        assert status == 200, answer
        until = time.monotonic() + limit_s
        while time.monotonic() < until:
            entry = self.get(f"/history/{answer['prompt_id']}").get(answer["prompt_id"])
            if entry and (entry["status"]["completed"] or entry["status"]["status_str"] == "error"):
                return entry
            time.sleep(0.2)
        raise AssertionError(f"the graph was not done after {limit_s} s")


def host_environment() -> dict[str, str]:
    """Return the environment of another process that imports the host."""
    found = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    if not imports_torchvision():
        found["PYTHONPATH"] = os.pathsep.join(filter(None, [found.get("PYTHONPATH"), str(STANDIN)]))
    return found


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The environment of another process that imports the host."""
    return host_environment()


@pytest.fixture(scope="session")
def server(checkout: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real server on a free port, with a base directory of its own: nothing is written into the checkout."""
    require_v3_nodes()
    with serving(checkout, environment, tmp_path_factory.mktemp("server"), "--disable-api-nodes") as running:
        yield running


@pytest.fixture(scope="session")
def serve(checkout: Path, environment: dict[str, str]) -> Callable[..., AbstractContextManager[Server]]:
    """A function of (base, options, packs) that runs one more server; see `serving`."""
    require_v3_nodes()
    return functools.partial(serving, checkout, environment)


@contextmanager
def serving(
    checkout: Path, environment: dict[str, str], base: Path, *options: str, packs: Mapping[str, Path] | None = None
) -> Iterator[Server]:
    """Run a server with a base directory, more options and packs (folders by name) of its own, until it is done with."""
    for name in ("custom_nodes", "models/flexi_schedules", "input", "output", "user", "temp"):
        (base / name).mkdir(parents=True)
    for name, folder in (packs or {"flexiffusion": PACK}).items():
        (base / "custom_nodes" / name).symlink_to(folder, target_is_directory=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(checkout / "main.py"), "--cpu", "--listen", "127.0.0.1", "--port", str(port)]
    command += ["--use-pytorch-cross-attention", "--base-directory", str(base), "--database-url", "sqlite:///:memory:"]
    command += ["--disable-auto-launch", *options]
    log = base / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=base)
    running = Server(f"http://127.0.0.1:{port}", base, process)
    try:
        until = time.monotonic() + SERVER_START_S
        while True:
            assert process.poll() is None, f"the server ended:\n{log.read_text()[-4000:]}"
            assert time.monotonic() < until, f"no answer after {SERVER_START_S} s:\n{log.read_text()[-4000:]}"
            try:
                running.get("/system_stats")
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.3)
        yield running
    finally:
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(base / "temp", ignore_errors=True)


# Smallest networks in which everything of the layout occurs: 6 input blocks on two levels, transformers on the first or second.
_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "context_dim": 32,
    "channel_mult": [1, 2],
    "num_res_blocks": [2, 2],
    "transformer_depth_middle": 1,
    "use_spatial_transformer": True,
    "use_temporal_attention": False,
    "legacy": False,
    "dtype": torch.float32,
}
_SD15 = {
    **_UNET,
    "model_channels": 32,
    "transformer_depth": [1, 1, 1, 1],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1],
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
}
_SDXL = {
    **_UNET,
    "model_channels": 64,
    "transformer_depth": [0, 0, 1, 1],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1],
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}


@pytest.fixture(scope="session")
def generated(host: Host) -> Any:
    """A function of (network, seed) that fills a network of the host with random weights, scaled to keep what goes through."""

    def fill(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
        rng = torch.Generator().manual_seed(seed)
        for name, value in network.named_parameters():
            drawn = torch.randn(value.shape, generator=rng)
            if value.ndim > 1:
                value.data.copy_(drawn * value[0].numel() ** -0.5)
            else:
                value.data.copy_(drawn * 0.1 + name.endswith("weight"))
        return network.eval()

    return fill


@pytest.fixture(scope="session")
def typed_model(host: Host, generated: Any) -> Any:
    """A function of (class in comfy.supported_models, unet_config, settings) that returns a generated model of that type."""

    def make(name: str, unet_config: dict[str, Any], **settings: Any) -> Any:
        config = getattr(importlib.import_module("comfy.supported_models"), name)(unet_config)
        for setting, value in settings.items():
            setattr(config, setting, value)
        cpu = torch.device("cpu")
        inner = config.get_model({}, device=cpu)
        generated(inner.diffusion_model)
        return host.comfy.model_patcher.ModelPatcher(inner.eval(), load_device=cpu, offload_device=cpu)

    return make


@pytest.fixture(scope="session")
def sd15_model(typed_model: Any) -> Any:
    """A U-Net of 6 input blocks with generated weights that the host takes for Stable Diffusion 1.5; see `prompt`."""
    return typed_model("SD15", _SD15)


@pytest.fixture(scope="session")
def sdxl_model(typed_model: Any) -> Any:
    """A U-Net of 6 input blocks with generated weights that the host takes for SDXL, pooled text included; see `prompt`."""
    return typed_model("SDXL", _SDXL)


@pytest.fixture(scope="session")
def prompt() -> Any:
    """A function of (seed, tokens) that returns a CONDITIONING for `sd15_model` and `sdxl_model`."""

    def make(seed: int, tokens: int = 8) -> list:
        rng = torch.Generator().manual_seed(seed)
        return [[torch.randn(1, tokens, 32, generator=rng), {"pooled_output": torch.randn(1, 1280, generator=rng)}]]

    return make
