"""Whether what the project asks for can be installed, by Python version: with its pins, newest, and the oldest that it takes.

`python benchmarks/installs.py` asks uv (`pip install uv`), which reads the registry's metadata and downloads no wheel, and
writes docs/results/installs.md. Licences are those that the installed packages state of themselves.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from flexi_core.files import write_text

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results" / "installs.md"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
WAYS = {"pins": ["-c", "constraints.txt"], "newest": [], "oldest": ["--resolution", "lowest-direct"]}
EXTRAS = ("search", "distributed", "dev")
PLATFORM = "x86_64-manylinux_2_28"
COMMAND = ["uv", "pip", "compile", "--no-config", "--quiet", "--no-build", "--no-header", "--no-annotate", "pyproject.toml"]


def command(python: str, way: str) -> list[str]:
    """Return the command that resolves the project and its extras from wheels alone."""
    extras = [part for extra in EXTRAS for part in ("--extra", extra)]
    return [*COMMAND, *extras, "--python-version", python, "--python-platform", PLATFORM, *WAYS[way]]


def resolved(python: str, way: str) -> dict[str, str]:
    """Return the versions by package; empty where there is no solution."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.txt"
        done = subprocess.run([*command(python, way), "-o", str(out)], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            print(python, way, done.stderr, file=sys.stderr)
            return {}
        return dict(line.split("==") for line in out.read_text().split() if "==" in line)


def asked() -> list[str]:
    """Return the packages that the project names itself, in the order of pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    part = text[text.index("dependencies = [") : text.index("[project.scripts]")]
    found = re.findall(r'"([a-z][a-z0-9-]+)(?:\[\w+\])?>=', part)
    return [*dict.fromkeys(found)]


def licence(name: str) -> str:
    """Return what an installed package says of its licence in a few words."""
    try:
        said = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    classes = [each.rsplit("::", 1)[1].strip() for each in said.get_all("Classifier") or [] if each.startswith("License ::")]
    stated = said.get("License-Expression") or (said.get("License") or "").strip()
    return stated if stated and "\n" not in stated and len(stated) < 80 else ", ".join(classes) or "in its files"


def main() -> None:
    names = asked()
    found = {(python, way): resolved(python, way) for python in PYTHONS for way in WAYS}
    lines = [
        "# Installing it",
        "",
        "Made by `python benchmarks/installs.py`: versions that are found for Linux (x86_64), of wheels alone, by",
        "",
        "    " + " ".join(command(PYTHONS[0], "pins")),
        "",
        "with constraints.txt (pins), without it (newest), and with `--resolution lowest-direct` (oldest that is taken).",
        "That these versions are found together says nothing about how each pair of them runs; the tests run with the pins.",
        "",
        "| Python | pins | newest | oldest |",
        "|-|-|-|-|",
    ]
    for python in PYTHONS:
        cells = (f"{len(found[python, way])} packages" if found[python, way] else "no solution" for way in WAYS)
        lines.append(f"| {python} | " + " | ".join(cells) + " |")
    lines += ["", "What the project asks for itself: pinned (Python 3.10 to 3.14) and oldest (the same), and its licence.", ""]
    lines += ["| package | pinned | oldest | licence |", "|-|-|-|-|"]
    for name in names:
        shown = (
            ", ".join(dict.fromkeys(found[python, way].get(name, "none") for python in PYTHONS)) for way in ("pins", "oldest")
        )
        lines.append(f"| {name} | " + " | ".join(shown) + f" | {licence(name)} |")
    others = sorted({name for versions in found.values() for name in versions} - {*names})
    lines += ["", "Licences of what these ask for in turn, where it is installed:", "", "| package | licence |", "|-|-|"]
    lines += [f"| {name} | {licence(name)} |" for name in others if licence(name) != "not installed"]
    write_text(PAGE, "\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
