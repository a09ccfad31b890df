"""What the pack adds to a host's start and to its page: seconds of its import, and of its nodes' definitions.

`python benchmarks/pack_speed.py CHECKOUT[=PYTHON] ...` starts each ComfyUI checkout (with the interpreter that has its
packages) several times without a screen and writes docs/results/pack-speed.md. On an idle machine, for it is seconds it asks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

from flexi_core.files import write_text

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results" / "pack-speed.md"
STARTS, ASKED = 5, 100
MOST_IMPORT_S, MOST_DEFINITIONS_MS = 0.3, 5.0
# As the server starts; the pack comes as one of the custom nodes.
IN_HOST = """
import asyncio, json, sys, time
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import utils.install_util  # before a folder of that name is found elsewhere
import execution, nodes, server
before = set(nodes.NODE_CLASS_MAPPINGS)
began = time.perf_counter()
assert asyncio.run(nodes.load_custom_node({root!r}))
import_s = time.perf_counter() - began
ours = [cls for name, cls in nodes.NODE_CLASS_MAPPINGS.items() if name not in before]
spent = []
for _ in range({asked}):
    began = time.perf_counter()
    for cls in ours:
        cls.GET_NODE_INFO_V1()
    spent.append((time.perf_counter() - began) * 1000)
import comfyui_version
print(json.dumps([comfyui_version.__version__, len(ours), import_s, spent]))
"""


def started(checkout: Path, python: str) -> tuple[str, int, float, list[float]]:
    """Return the host's version, the pack's nodes, seconds of the import, and milliseconds of the nodes' definitions."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(checkout), *_added()])}
    code = IN_HOST.format(root=str(ROOT), asked=ASKED)
    done = subprocess.run(
        [python, "-c", code], cwd=checkout, env=environment, capture_output=True, text=True, encoding="utf-8", check=False
    )
    if done.returncode:
        raise SystemExit(f"{checkout} did not start with the pack:\n{done.stderr[-2000:]}")
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def _added() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def main(hosts: list[str]) -> None:
    lines = [
        "# What the pack adds to a host's start",
        "",
        f"Made by `python benchmarks/pack_speed.py CHECKOUT ...`, each host started {STARTS} times on one CPU thread: seconds",
        f"of the pack's import (to be below {MOST_IMPORT_S:g}), and milliseconds of all its nodes' definitions for one",
        f"`/object_info` (to be below {MOST_DEFINITIONS_MS:g}; asked for {ASKED} times in each).",
        "",
        "| ComfyUI | nodes | import, least | import, median | definitions, least | definitions, median |",
        "|-|-:|-:|-:|-:|-:|",
    ]
    for host in hosts:
        checkout, _, python = host.partition("=")
        found = [started(Path(checkout).expanduser().resolve(), python or sys.executable) for _ in range(STARTS)]
        imports, spent = [each[2] for each in found], [ms for each in found for ms in each[3]]
        lines.append(
            f"| {found[0][0]} | {found[0][1]} | {min(imports):.3f} s | {median(imports):.3f} s "
            f"| {min(spent):.2f} ms | {median(spent):.2f} ms |"
        )
    write_text(PAGE, "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    if not sys.argv[1:]:
        raise SystemExit(__doc__)
    main(sys.argv[1:])
