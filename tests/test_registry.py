"""What the Comfy registry gets: its fields in pyproject.toml, and an archive with what the pack needs and no more."""

import re
import struct
import zipfile
from pathlib import Path, PurePosixPath

import pytest

tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")

ROOT = Path(__file__).parents[1]
MOST_BYTES = 11_000_000
NEEDED = {
    "__init__.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md", "CHANGELOG.md", "nodes/__init__.py",
    "flexi_core/schedule/data/presets.json", "flexi_core/demo/weights/unet.safetensors", "search_tools/cli.py",
    "search_tools/report/templates/report.html.j2",
    "example_workflows/flexiffusion_demo.json", "example_workflows/flexiffusion_demo.jpg",
    "locales/en/nodeDefs.json", "web/flexiffusion.js", "web/docs/FlexiApply.md", "docs/guide/search.md",
}  # fmt: skip
FOLDERS = {"docs", "example_workflows", "flexi_core", "locales", "nodes", "search_tools", "web"}


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def listed(archive):
    with zipfile.ZipFile(archive) as made:
        return {info.filename: info.file_size for info in made.infolist()}


def test_the_name_is_one_that_the_registry_takes(project):
    name, version = project["project"]["name"], project["project"]["version"]
    assert re.fullmatch(r"[a-z][a-z0-9]*([-_.][a-z0-9]+)*", name) and len(name) < 100 and "comfyui" not in name
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)


def test_the_registry_knows_whose_it_is_where_it_is_and_what_it_runs_in(project):
    comfy, urls = project["tool"]["comfy"], project["project"]["urls"]
    repository = urls["Repository"]
    assert re.fullmatch(r"https://github\.com/[\w-]+/[\w.-]+", repository)
    assert all(url.startswith(repository) for url in urls.values())
    assert comfy["PublisherId"] and comfy["DisplayName"]
    assert project["project"]["classifiers"] == ["Operating System :: OS Independent"]
    told = re.search(r"needs ComfyUI (\d+\.\d+\.\d+) or newer", (ROOT / "__init__.py").read_text(encoding="utf-8"))[1]
    assert comfy["requires-comfyui"] == f">={told}"


@pytest.mark.parametrize(("field", "most", "ratio"), [("Icon", (800, 400), 1), ("Banner", (2100, 900), 21 / 9)])
def test_its_pictures_are_in_the_repository_and_of_the_registrys_sizes(project, field, most, ratio):
    raw = project["project"]["urls"]["Repository"].replace("github.com", "raw.githubusercontent.com") + "/main/"
    url = project["tool"]["comfy"][field]
    assert url.startswith(raw)
    head = (ROOT / url.removeprefix(raw)).read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    assert width <= most[0] and height <= most[1] and width / height == pytest.approx(ratio, rel=0.01)


def test_the_archive_has_what_the_pack_needs_and_nothing_else(listed):
    assert set(listed) >= NEEDED
    assert {PurePosixPath(file).parts[0] for file in listed if "/" in file} == FOLDERS
    assert not [file for file in listed if file.startswith(("docs/results", "docs/pictures"))]


def test_the_archive_is_small(archive):
    assert archive.stat().st_size < MOST_BYTES


def test_what_is_published_is_what_was_raised():
    workflow = (ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8")
    assert "Comfy-Org/publish-node-action@" in workflow and "secrets.REGISTRY_ACCESS_TOKEN" in workflow
    assert "paths: [pyproject.toml]" in workflow
