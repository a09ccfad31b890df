"""Files that nobody would write, each read once: what came of it, in which CPU time and memory.

`python benchmarks/hostile.py` (about a minute on one core) writes docs/results/hostile.md. Each file is read by a process of
its own, forked when all is imported; time and memory are those beyond that.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from flexi_core.errors import FlexiError
from flexi_core.files import write_text
from flexi_core.runtime.file_model import FileModel
from search_tools.backends.comfyui import workflow
from search_tools.backends.comfyui.saved_workflow import is_saved, to_api

PAGE = Path(__file__).parents[1] / "docs" / "results" / "hostile.md"
NODES = 20_000
CONFIG = {
    "image_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "channel_mult": [1],
    "num_res_blocks": [1],
    "transformer_depth": [0],
    "transformer_depth_output": [0, 0],
    "transformer_depth_middle": -1,
}


def unet(changes: dict | str, tensors: dict[str, torch.Tensor] | None = None) -> Callable[[Path], None]:
    """Return what writes a U-Net's file."""
    config = changes if isinstance(changes, str) else json.dumps(CONFIG | changes)
    said = {"unet_config": config, "prediction": "eps", "beta_schedule": "linear 0.001 0.012"}
    return lambda path: save_file(tensors or {"a": torch.zeros(1)}, path, said)


def hole(gib: int) -> Callable[[Path], None]:
    """Return what writes a file of one tensor of so many GiB, which take no room on the disk."""
    said = {"unet_config": json.dumps(CONFIG), "prediction": "eps", "beta_schedule": "linear 0.001 0.012"}

    def write(path: Path) -> None:
        tensor = {"dtype": "F16", "shape": [gib * 2**29], "data_offsets": [0, gib * 2**30]}
        header = json.dumps({"__metadata__": said, "a": tensor}).encode()
        with open(path, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + gib * 2**30)

    return write


def spoiled(path: Path) -> None:
    """Write a U-Net's file that has every tensor, of numbers that are not finite."""
    from flexi_core.runtime.unet import UNet
    from flexi_core.runtime.unet_config import unet_arguments

    weights = {
        name: torch.full_like(value, float("nan")) for name, value in UNet(**unet_arguments(CONFIG)).state_dict().items()
    }
    unet({}, weights)(path)


def graph(make: Callable[[int], Any]) -> Callable[[Path], None]:
    """Return what writes a workflow of many nodes."""
    return lambda path: path.write_text(json.dumps(make(NODES)))


def chain(n: int) -> dict:
    nodes = {str(i): a_node("LoraLoader", model=[str(i - 1), 0], clip=[str(i - 1), 1]) for i in range(1, n)}
    return {"0": a_node("CheckpointLoaderSimple"), **nodes, **ends(str(n - 1))}


def fan(n: int) -> dict:
    wide = a_node("Wide", **{f"i{i}": [str(i), 0] for i in range(n)})
    return {**{str(i): a_node("Leaf") for i in range(n)}, "wide": wide, **ends("wide")}


def ends(last: str) -> dict:
    return {
        "sampler": a_node("KSampler", model=[last, 0], positive=[last, 0], negative=[last, 0], latent_image=[last, 0]),
        "decoder": a_node("VAEDecode", samples=["sampler", 0], vae=["0", 0]),
    }


def a_node(kind: str, **inputs: Any) -> dict:
    return {"class_type": kind, "inputs": inputs}


def saved(number: int, kind: str = "T", links: Any = (), **more: Any) -> dict:
    inputs = [{"name": f"x{i}", "type": "*", "link": link} for i, link in enumerate(links)]
    return {"id": number, "type": kind, "inputs": inputs, "outputs": [{"type": "*"}], **more}


def saved_chain(kind: str, mode: int = 0) -> Callable[[int], dict]:
    return lambda n: {
        "nodes": [saved(0), *(saved(i, kind, [i], mode=mode) for i in range(1, n)), saved(n, "KSampler", [n])],
        "links": [[i, i - 1, 0, i, 0, "*"] for i in range(1, n + 1)],
    }


def saved_subgraphs(n: int) -> dict:
    inside = [saved(i, "T", [i + 1]) for i in range(n // 2)]
    subgraph = {"id": "s", "nodes": inside, "links": [[i + 1, -10, i, i, 0, "*"] for i in range(n // 2)],
                "inputs": [{"name": f"x{i}"} for i in range(n // 2)]}  # fmt: skip
    outer = [*(saved(i) for i in range(n // 2)), saved(n, "s", range(1, n // 2 + 1)), saved(n + 1, "KSampler")]
    links = [[i + 1, i, 0, n, i, "*"] for i in range(n // 2)]
    return {"nodes": outer, "links": links, "definitions": {"subgraphs": [subgraph]}}


def saved_nested(n: int) -> dict:
    notes = [{"id": i, "type": "Note"} for i in range(n // 10)]
    subgraph = {"id": "s", "nodes": notes, "links": []}
    return {"nodes": [saved(i, "s") for i in range(2_000)], "links": [], "definitions": {"subgraphs": [subgraph]}}


def read_workflow(path: Path) -> None:
    data = workflow.read_workflow(path)
    data = workflow.checked(to_api(data, lambda kind: {}) if is_saved(data) else data)
    sampler = workflow.find_sampler(data)
    reduced = workflow.unmarked(workflow.reduced(data, sampler), sampler)
    workflow.find_value(reduced, sampler, "scheduler")
    workflow.digest(reduced, sampler)


UNETS = {
    "negative width": unet({"model_channels": -32}),
    "width of 2^40": unet({"model_channels": 2**40}),
    "a truth value for a number": unet({"num_res_blocks": [True]}),
    "ten million blocks": unet({"num_res_blocks": [10_000_000]}),
    "16 levels of 64 times the width": unet({"channel_mult": [1] + [64] * 15, "num_res_blocks": [4] * 16,
                                             "model_channels": 8192, "transformer_depth": [0] * 64,
                                             "transformer_depth_output": [0] * 80}),
    "JSON 90,000 deep": unet('{"a":' + "[" * 90_000),
    "a configuration of 20 MB": unet('{"a":[' + "1," * 10_000_000 + "1]}"),
    "weights that are not finite": spoiled,
    "a tensor of 7 GiB that is not the network's": hole(7),
    "a file of 9 GiB": hole(9),
}  # fmt: skip
WORKFLOWS = {
    "a chain": graph(chain),
    "a node with all others at its inputs": graph(fan),
    "saved: a chain": graph(saved_chain("T")),
    "saved: a chain of reroutes": graph(saved_chain("Reroute")),
    "saved: a chain of bypassed nodes": graph(saved_chain("T", 4)),
    "saved: a subgraph with half of them at its inputs": graph(saved_subgraphs),
    "saved: 2,000 instances of a subgraph of 2,000 notes": graph(saved_nested),
}


def read_once(kind: str, path: Path) -> dict[str, Any]:
    """Return what came of reading a file."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        FileModel.load(path) if kind == "unet" else read_workflow(path)
        words = "read"
    except FlexiError as error:
        words = str(error).replace(str(path), "FILE")
    mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": time.process_time() - started, "mib": mib, "words": words}


def measured(kind: str, write: Callable[[Path], None], folder: Path) -> dict[str, Any]:
    path = folder / "hostile"
    write(path)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found = pool.apply(read_once, (kind, path))
    path.unlink()
    return found


def main() -> None:
    lines = [
        "# Files that nobody would write",
        "",
        "Made by `python benchmarks/hostile.py`: CPU seconds and memory beyond a Python with the same imports, one",
        f"thread. A workflow has about {NODES:,} nodes where nothing else is said. `tests/test_bounds.py` counts what is",
        "looked at in it; wrong teacher files, pipes and devices are tried in `tests/test_damaged.py` and",
        "`tests/test_bounds.py`, drawn texts and files in `tests/test_fuzz.py`.",
    ]
    sections = (("A U-Net's file (`--unet`)", "unet", UNETS), ("A workflow (`--workflow`)", "workflow", WORKFLOWS))
    with tempfile.TemporaryDirectory() as folder:
        for title, kind, cases in sections:
            lines += ["", f"## {title}", "", "| what | seconds | MiB | what came of it |", "|-|-|-|-|"]
            for name, write in cases.items():
                found = measured(kind, write, Path(folder))
                words = found["words"] if len(found["words"]) < 140 else found["words"][:130] + " ..."
                row = f"| {name} | {found['seconds']:.2f} | {found['mib']:.0f} | {words.replace('|', '&#124;')} |"
                print(row, file=sys.stderr, flush=True)
                lines.append(row)
    write_text(PAGE, "\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
