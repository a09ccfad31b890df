"""The GPU check of benchmarks/ on a CPU: every part of it runs, and a page that is cut short is whole all the same."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
PAGE = Path(__file__).parents[2] / "docs" / "results" / "gpu.md"
TITLES = [
    "Laws",
    "SD1.5, 64x64 latents",
    "SDXL, 128x128 latents",
    "A Flux of 4 double and 8 single blocks, 1024x1024 pixels",
    "Memory after many runs",
    "A Wan 2.1 of 10 blocks, 33 frames of 832x480 pixels",
    "LTX-2 of 6 blocks, pictures and sound",
    "A compiled network",
]


@pytest.fixture
def check(checkout, environment, tmp_path):
    """A function of options that runs the check on tiny networks and returns its exit status, its messages and its page."""
    page = tmp_path / "results" / "gpu.md"
    command = [sys.executable, str(SCRIPT), "--comfyui", str(checkout), "--device", "cpu", "--tiny", "--dtype", "fp32"]

    def run(*options: str) -> tuple[int, str, str]:
        done = subprocess.run([*command, "--out", str(page), *options], env=environment, capture_output=True, text=True)
        return done.returncode, done.stderr, page.read_text(encoding="utf-8") if page.is_file() else ""

    return run


def titles(page: str) -> list[str]:
    return re.findall(r"^## (.+)$", page, re.MULTILINE)


def test_every_part_of_the_check_runs(check, checkout):
    if not (checkout / "comfy_api" / "torch_helpers").is_dir():
        pytest.skip("this host compiles models otherwise")
    status, messages, page = check()
    assert status == 0, messages
    assert titles(page) == TITLES
    laws = 21 if "Not checked: this host has no LTXAV" in page else 25
    assert f"{laws} laws held; 0 did not" in page and "The check took" in page
    assert not re.search("Failed|Left out|Cut off|nan|could not be counted|ran F", page), page
    # Every depth, two schedules and three places of every network; tables are rows of one length.
    assert page.count("| depth |") == page.count("| cache of ") == 4
    blocks = [block.splitlines() for block in page.split("\n\n") if block.startswith("|")]
    for head, rule, *rows in blocks:
        cells = {len(re.split(r"(?<!\\)\|", line)) for line in (head, rule, *rows)}
        assert len(cells) == 1 and rows, head


def test_a_check_without_time_names_what_it_left_out(check):
    status, messages, page = check("--minutes", "0")
    assert status == 0, messages
    assert titles(page) == TITLES and page.count("Left out: the time was over.") == len(TITLES)


def test_a_try_does_not_write_the_page_of_the_check(checkout, environment):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "--comfyui", str(checkout)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "give another with --out" in done.stderr


def test_the_page_is_one_that_a_gpu_has_made():
    if PAGE.is_file():
        assert PAGE.read_text(encoding="utf-8").startswith("# The check on a GPU\n\nMade by `python benchmarks/gpu.py")
