"""What the project says of itself in several places is the same in all of them."""

import importlib.metadata
import re
from pathlib import Path

import pytest

import flexi_core
from flexi_core.schedule.presets import preset
from search_tools.backends.embedded import EmbeddedBackend
from search_tools.backends.teacher import TeacherSettings

ROOT = Path(__file__).parents[1]
SHIPPED_WITH_THE_HOST = {"safetensors", "numpy", "scipy", "einops", "pillow"}


def names(file: str) -> dict[str, str]:
    """Return the requirements of a file by normalised name."""
    lines = [line.split("#")[0].strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]
    return {normal(re.split(r"[=<>~!;\[ ]", line)[0]): line for line in lines if line}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_version_is_one():
    assert importlib.metadata.version("flexiffusion") == flexi_core.__version__
    assert f"## [{flexi_core.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_requirements_ask_for_nothing_that_the_host_lacks_and_never_for_torch():
    requirements = names("requirements.txt")
    assert set(requirements) <= SHIPPED_WITH_THE_HOST
    assert all(line == name for name, line in requirements.items()), "a bound could move a package of the host"


def test_every_package_that_we_ask_for_is_pinned():
    asked = {normal(re.split(r"[ ;<>=!~\[]", line)[0]) for line in importlib.metadata.requires("flexiffusion")}
    pins = names("constraints.txt")
    assert {"torch", "optuna", "typer", "pytest", "ruff"} <= asked
    assert not asked - set(pins)
    assert all("==" in line for line in pins.values())
    assert pins["torch"] == "torch==2.13.0"


def test_every_package_that_we_ask_for_has_a_lower_bound_that_its_pin_meets():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    part = text[text.index("dependencies = [") : text.index("[project.scripts]")]
    asked, pins = re.findall(r'"([a-z][\w-]*)(?:\[\w+\])?([^"]*)"', part), names("constraints.txt")
    assert len(asked) > 20
    for name, bound in asked:
        assert re.fullmatch(r">=\d+(\.\d+)*", bound), name
        pinned = pins[normal(name)].split(";")[0].split("==")[1].strip()
        assert numbers(pinned) >= numbers(bound.removeprefix(">=")), name


def numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def test_an_installed_core_has_its_weights():
    files = {path.as_posix() for path in Path(flexi_core.__file__).parent.rglob("*.safetensors")}
    assert {Path(file).name for file in files} >= {"unet.safetensors", "classifier.safetensors"}


@pytest.mark.parametrize("path", sorted((ROOT / "flexi_core" / "schedules").glob("*.json")), ids=lambda path: path.stem)
def test_every_bundled_schedule_was_searched_for_the_model_that_is_shipped(path):
    was_searched_for_the_model_that_is_shipped(flexi_core.load_schedule(path))


@pytest.mark.parametrize("steps", [20, 25, 30, 50])
def test_the_presets_of_the_demo_model_were_searched_for_the_model_that_is_shipped(steps):
    for name in ("1.5x", "2x", "3x", "5x"):
        was_searched_for_the_model_that_is_shipped(preset(name, steps, "demo"))


def was_searched_for_the_model_that_is_shipped(schedule):
    settings = {key: schedule.info["teacher"][key] for key in ("sampler", "scheduler", "steps", "cfg")}
    teacher = EmbeddedBackend(TeacherSettings(**settings)).identity
    # Another processor's last bit may be another.
    assert schedule.info["teacher"] == {**teacher, "sigmas": pytest.approx(teacher["sigmas"], rel=1e-6)}
    assert schedule.info["measured"]["samples"] >= 64 and schedule.info["provenance"]["study"]


def test_the_public_names_of_the_core_stay():
    assert set(flexi_core.__all__) >= {"FlexiError", "Schedule", "load_schedule", "save_schedule"}
    assert all(hasattr(flexi_core, name) for name in flexi_core.__all__)
    assert issubclass(flexi_core.ScheduleError, flexi_core.FlexiError)
