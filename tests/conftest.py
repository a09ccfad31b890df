"""What the tests share: a tiny random U-Net, a tiny untrained embedded model, Gaussian data with their exact denoiser."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import sqlite3
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flexi_core import Schedule, Segment, StepKind
from flexi_core.demo.captions import TABLE_ROWS
from flexi_core.demo.model import DemoModel, training_sigmas
from flexi_core.networks.unet import NetworkCall
from flexi_core.run.plan import make_plan
from flexi_core.run.run import Run
from flexi_core.runtime.unet import UNet
from flexi_core.runtime.unet_config import unet_arguments
from search_tools.backends.embedded import EmbeddedBackend
from search_tools.backends.teacher import TeacherSettings

TINY = {
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "channel_mult": [1, 1],
    "num_res_blocks": [1, 1],
    "transformer_depth": [0, 1],
    "transformer_depth_output": [0, 0, 1, 1],
    "transformer_depth_middle": 1,
    "num_head_channels": 16,
    "context_dim": 8,
}
TINY_BLOCKS = 4
# As the host's checkpoints say it: without conditioning, for latents of 8x8.
TINY_FILE = {
    "image_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "channel_mult": [1, 1],
    "num_res_blocks": 1,
    "transformer_depth": [0, 0],
    "transformer_depth_output": [0, 0, 0, 0],
    "transformer_depth_middle": -1,
    "num_heads": 2,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", help="write the table of what was tested in the host to this Markdown file")
    parser.addoption("--saved-workflows", help="write how many saved workflows are what the page makes of them to this file")
    parser.addoption("--commands", help="write the page of the command line to this file")
    parser.addoption("--screens", help="keep pictures of the page as tests see it in this folder")


@pytest.fixture(scope="session", autouse=True)
def unsynced_sqlite() -> Iterator[None]:
    """Let SQLite not wait for the disk in this process: what a loss of power leaves of a study is no law of these tests."""
    try:
        from sqlalchemy import Engine, event
    except ImportError:  # the search's packages are not installed
        yield
        return

    def relax(connection: object, _: object) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", relax)
    yield
    event.remove(Engine, "connect", relax)


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pack as the registry gets it: a zip of the files that git tracks, without those that .comfyignore names."""
    root = Path(__file__).parents[1]
    if shutil.which("git") is None or not (root / ".git").exists():
        pytest.skip("the archive is made of the files that git tracks; this is no git checkout")
    files = tracked(root) - tracked(root, "--ignored", "--exclude-from=.comfyignore")
    path = tmp_path_factory.mktemp("archive") / "node.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for file in sorted(files):
            made.write(root / file, file)
    return path


def tracked(root: Path, *options: str) -> set[str]:
    """Return the files that git tracks, all or those that options leave."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", *options]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {file for file in listed.split("\0") if file and (root / file).is_file()}


def tiny_unet(**changes: object) -> UNet:
    """Return a U-Net of 4 input and 4 output blocks with random weights (its own start has zeros, which hide errors)."""
    unet = UNet(**{**TINY, **changes}).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for value in unet.parameters():
        value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    return unet


@pytest.fixture(scope="session")
def unet() -> UNet:
    return tiny_unet()


@pytest.fixture(scope="session")
def make_unet():
    return tiny_unet


@pytest.fixture
def make_call():
    """A function of (slots, uuids, seed): a network call, 2 rows for each slot, cond (0) and uncond (1)."""

    def call(slots=(1, 0), uuids=None, seed: int = 0, size: int = 16, **options: object) -> NetworkCall:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2, 3, size, size, generator=generator)
        contexts = torch.randn(2, 1, 5, 8, generator=torch.Generator().manual_seed(1)).expand(2, 2, 5, 8)
        options = {"cond_or_uncond": list(slots), "uuids": list(uuids or [f"slot {s}" for s in slots]), **options}
        return NetworkCall(
            torch.cat([x] * len(slots)),
            torch.full((2 * len(slots),), 500.0),
            torch.cat([contexts[slot] for slot in slots]),
            options=options,
        )

    return call


@pytest.fixture(scope="session")
def tiny_model(unet: UNet) -> DemoModel:
    """The embedded model untrained and tiny: enough for every law that does not speak of pictures."""
    table = torch.randn(TABLE_ROWS, 8, generator=torch.Generator().manual_seed(2))
    return DemoModel(unet, table, dict(TINY), training_sigmas("linear 0.00085 0.012"))


@pytest.fixture
def tiny_embedded(tiny_model: DemoModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tiny model be the embedded one, where a law does not speak of what the embedded one draws."""
    monkeypatch.setattr(DemoModel, "load", lambda: tiny_model)


@pytest.fixture(scope="session")
def small_model() -> DemoModel:
    """The embedded model for latents of 16x16: trained answers at a quarter of the work, in which nothing is to be seen."""
    model = DemoModel.load()
    model.latent_shape = (3, 16, 16)
    return model


@pytest.fixture(scope="session")
def backend_on(tmp_path_factory: pytest.TempPathFactory):
    """A function of (model, settings, kind): the embedded back end on another model, with a teacher's store of its own."""

    def make(model: DemoModel, settings: TeacherSettings, kind: type[EmbeddedBackend] = EmbeddedBackend) -> EmbeddedBackend:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DemoModel, "load", lambda: model)
            return kind(settings, tmp_path_factory.mktemp("teacher"))

    return make


@pytest.fixture(scope="session")
def unet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random U-Net's file, for `flexi search --unet`: what is no law of pictures is searched on it, at cfg 1."""
    path = tmp_path_factory.mktemp("unet") / "tiny.safetensors"
    generator = torch.Generator().manual_seed(0)
    shapes = {name: value.shape for name, value in UNet(**unet_arguments(TINY_FILE)).state_dict().items()}
    weights = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    said = {"unet_config": json.dumps(TINY_FILE), "prediction": "eps", "beta_schedule": "linear 0.00085 0.012"}
    save_file(weights, path, metadata=said)
    return path


_FLEXI = """
import os, signal, sys
for number, file in enumerate({files!r}, 1):
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
os.chdir({folder!r})
os.environ["FLEXI_CACHE"] = os.path.join({folder!r}, "cache")
# A shell's background job ignores Ctrl-C, and so do its children unless they ask for it.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = ["flexi", *{args!r}]
from search_tools.cli import app
app()
"""


class FlexiProcess:
    """A command of `flexi` in a process of its own, with what of `subprocess.Popen` the tests need."""

    def __init__(self, context: multiprocessing.context.ForkServerContext, args: list[str], folder: Path, files: Path) -> None:
        self._files = [str(files / name) for name in ("stdout", "stderr")]
        code = _FLEXI.format(files=self._files, folder=str(folder), args=args)
        self._process = context.Process(target=exec, args=(code, {}))
        self._process.start()
        self.pid, self.kill = self._process.pid, self._process.kill

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, ...]:
        """Wait for the end; return stdout and stderr."""
        self._process.join(timeout)
        assert self.poll() is not None, f"it has not ended in {timeout} s"
        return tuple(Path(file).read_text(encoding="utf-8") if Path(file).exists() else "" for file in self._files)


@pytest.fixture(scope="session")
def start_flexi(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str], Path], FlexiProcess]:
    """A function of (arguments, folder) that starts `flexi` there; forked from a process that has imported it already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["search_tools.cli", "search_tools.commands.running", "search_tools.backends.unet_file"])
    return lambda args, folder: FlexiProcess(context, args, folder, tmp_path_factory.mktemp("process"))


class GaussianData:
    """Data x0 ~ N(mean, diag(variance)), float64: denoiser and trajectories in closed form (Karras et al., 2022)."""

    mean = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    variance = torch.tensor([4.0, 0.25, 0.01], dtype=torch.float64)

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        return self.mean + self.variance / (self.variance + sigma**2) * (x - self.mean)

    def end(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """Return where the probability flow brings x from sigma to 0."""
        return self.mean + (self.variance / (self.variance + sigma**2)).sqrt() * (x - self.mean)

    def start(self, sigma: float, count: int = 8) -> torch.Tensor:
        return sigma * torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def sigmas(self, steps: int, high: float = 10.0, low: float = 0.05) -> torch.Tensor:
        """Return the grid of Karras et al. (2022), Eq. 5, with a last 0 [steps + 1], float64."""
        ends = torch.tensor([high, low], dtype=torch.float64) ** (1 / 7)
        grid = (ends[0] + torch.linspace(0, 1, steps, dtype=torch.float64) * (ends[1] - ends[0])) ** 7
        return torch.cat([grid, torch.zeros(1, dtype=torch.float64)])

    def sample(self, sampler, schedule: str | Schedule, sigmas: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, Run]:
        """Sample from x under a schedule; the run stands between sampler and denoiser as it does in the host."""
        schedule = Schedule.parse(schedule) if isinstance(schedule, str) else schedule
        run = Run(make_plan(schedule, sigmas.tolist()))

        def model(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            return run.predict(x, float(sigma), lambda: self.denoise(x, sigma))

        return sampler(model, x, run.plan.sampled(sigmas)), run


@pytest.fixture(scope="session")
def gaussian() -> GaussianData:
    return GaussianData()


@pytest.fixture(scope="session")
def random_schedules() -> list[Schedule]:
    """400 schedules of 1 to 40 segments: every kind of segment, depth, blend, order, and noise levels; from one seed."""
    rng = random.Random(20240917)
    schedules = []
    for _ in range(400):
        segments = []
        for _ in range(rng.choice([1, 2, 3, 5, 8, 40])):
            partial = rng.choice([0, 0, 1, 2, 4])
            nulls = rng.choices([StepKind.NULL, StepKind.EXTRAPOLATED], k=rng.choice([0, 1, 3]))
            reuses = bool(segments) and rng.random() < 0.2
            full, shallow = (
                (StepKind.FULL_CONDITIONAL, StepKind.PARTIAL_CONDITIONAL) if reuses else (StepKind.FULL, StepKind.PARTIAL)
            )
            kinds = (full, *[shallow] * partial, *nulls)
            blend = tuple(round(rng.uniform(-2, 2), 4) for _ in range(rng.choice([1, 2, 3, 4])))
            blend = blend if StepKind.EXTRAPOLATED in nulls and rng.random() < 0.5 else None
            depth, forecast = (rng.choice([1, 2, 3, 12, 1000]), rng.choice([0, 0, 1, 2])) if partial else (None, 0)
            segments += [Segment(kinds, depth, blend, forecast)] * rng.choice([1, 1, 2, 3])
        steps = sum(map(len, segments))
        sigmas = None
        if rng.random() < 0.15:
            sigmas = tuple(15 * (1 - (i + rng.uniform(0, 0.8)) / (steps + 1)) for i in range(steps + 1))
        schedules.append(Schedule(tuple(segments), rng.choice([0, 1, 1, 1, 2, 3]), sigmas))
    return schedules
