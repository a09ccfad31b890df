"""An API-format workflow as a graph: its sampling node, what lies upstream of it, the text of its prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flexi_core.errors import FlexiError

Graph = dict[str, dict[str, Any]]  # by node id: "class_type" and "inputs", whose links are [node id, output]

SAMPLING = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
SEEDS = {"KSampler": "seed", "KSamplerAdvanced": "noise_seed", "SamplerCustom": "noise_seed"}
_DECODING = ("VAEDecode", "VAEDecodeTiled")
# What the text encoders of the host and of most packs call their prompt.
_TEXTS = ("text", "caption", "prompt", "text_g", "text_l", "clip_l", "clip_g", "t5xxl", "llama")
_MAX_BYTES = 64 * 2**20


def read_graph(path: Path) -> Graph:
    """Return the graph of an API-format workflow file.

    Raises:
        FlexiError: it cannot be read, is a saved workflow and not its API form, or is no workflow.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise FlexiError(f"{path}: larger than {_MAX_BYTES >> 20} MiB; give an API-format workflow")
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FlexiError(f"{path}: cannot be read ({error.strerror or error}); give an API-format workflow") from error
    except ValueError as error:
        raise FlexiError(f"{path}: not JSON ({error}); give an API-format workflow") from error
    try:
        return checked(data)
    except FlexiError as error:
        raise FlexiError(f"{path}: {error}") from error


def checked(data: Any) -> Graph:
    """Return a graph, if it is one; what was posted to a server is unwrapped.

    Raises:
        FlexiError: it is none.
    """
    if isinstance(data, dict) and isinstance(data.get("nodes"), list):
        raise FlexiError("this is a saved workflow, not its API form; export it with Save (API) (menu: Workflow, Export (API))")
    if isinstance(data, dict) and isinstance(data.get("prompt"), dict):
        data = data["prompt"]
    if not isinstance(data, dict) or not data or not all(_is_node(node) for node in data.values()):
        raise FlexiError("not an API-format workflow: expected nodes by id, each with class_type and inputs")
    for name, node in data.items():
        for key, (origin, _) in _links(node):
            if origin not in data:
                raise FlexiError(f"the input {key} of node {name} comes from node {origin}, which is not in the workflow")
    return data


def find_sampler(graph: Graph, node: str | None = None) -> str:
    """Return the id of the sampling node, or of the one that was asked for.

    Raises:
        FlexiError: there is none, there are several to choose from, or the one asked for does not sample.
    """
    found = [name for name, each in graph.items() if each["class_type"] in SAMPLING]
    if not found:
        raise FlexiError(f"the workflow has no sampling node; a search needs one of {', '.join(SAMPLING)}")
    if node is None and len(found) > 1:
        listed = ", ".join(f"{name} ({_named(graph[name])})" for name in found)
        raise FlexiError(f"the workflow has {len(found)} sampling nodes: {listed}; choose one with --node")
    if node is not None and node not in found:
        what = f"node {node} is a {graph[node]['class_type']}" if node in graph else f"there is no node {node}"
        listed = ", ".join(f"{name} ({_named(graph[name])})" for name in found)
        raise FlexiError(f"{what}; the workflow's sampling nodes are: {listed}")
    return found[0] if node is None else node


def upstream(graph: Graph, node: str) -> Graph:
    """Return a node with everything that it is made from."""
    kept, waiting = {}, [node]
    while waiting:
        name = waiting.pop()
        if name not in kept:
            kept[name] = graph[name]
            waiting += [origin for _, (origin, _) in _links(graph[name])]
    return kept


def find_decoder(graph: Graph, node: str) -> str | None:
    """Return the nearest node that decodes what a node makes, None where there is none."""
    seen, level = {node}, [node]
    while level:
        level = [
            name for name, each in graph.items() if name not in seen and any(origin in level for _, (origin, _) in _links(each))
        ]
        seen.update(level)
        for name in level:
            if graph[name]["class_type"] in _DECODING and _link(graph[name]["inputs"].get("vae")):
                return name
    return None


def reduced(graph: Graph, sampler: str) -> Graph:
    """Return what a search needs of a graph: the sampling node, the nearest decoder of what it makes, all upstream of both."""
    kept, decoder = upstream(graph, sampler), find_decoder(graph, sampler)
    if decoder is None:
        return kept
    vae = graph[decoder]["inputs"]["vae"]
    node = {**graph[decoder], "inputs": {**graph[decoder]["inputs"], "samples": [sampler, 0]}}
    return {**kept, **upstream(graph, vae[0]), decoder: node}


def find_texts(graph: Graph, sampler: str) -> tuple[str, tuple[str, ...]]:
    """Return the node that holds the positive prompt of a sampling node, and the names of its texts.

    Raises:
        FlexiError: nothing upstream of the positive conditioning has a text of its own.
    """
    start = graph[sampler]["inputs"].get("guider") or graph[sampler]["inputs"].get("positive")
    seen, level = set(), [start[0]] if _link(start) else []
    while level:
        for name in level:
            texts = tuple(key for key in _TEXTS if isinstance(graph[name]["inputs"].get(key), str))
            if texts:
                return name, texts
        seen.update(level)
        level = [origin for name in level for origin in _towards_prompt(graph[name]) if origin not in seen]
    raise FlexiError(
        f"no node with a text of its own ({', '.join(_TEXTS)}) leads to the positive conditioning of node {sampler}; "
        "type the prompt into the text node, or search without --prompts"
    )


def with_prompt(graph: Graph, sampler: str, prompt: str) -> Graph:
    """Return a graph with another positive prompt."""
    name, texts = find_texts(graph, sampler)
    return {**graph, name: {**graph[name], "inputs": {**graph[name]["inputs"], **dict.fromkeys(texts, prompt)}}}


def find_value(graph: Graph, node: str, key: str) -> Any:
    """Return the nearest value of a name upstream of a node, None where there is none."""
    level, seen = [node], set()
    while level:
        for name in level:
            value = graph[name]["inputs"].get(key)
            if value is not None and not _link(value):
                return value
        seen.update(level)
        level = [origin for name in level for _, (origin, _) in _links(graph[name]) if origin not in seen]
    return None


def digest(graph: Graph, sampler: str) -> str:
    """Return a digest of everything upstream of a sampling node but its seed, which each sample has of its own."""
    noise = graph[sampler]["inputs"].get("noise")
    seeded = {sampler, *([noise[0]] if _link(noise) else [])}
    plain = {
        name: [node["class_type"], {k: v for k, v in node["inputs"].items() if name not in seeded or k not in SEEDS.values()}]
        for name, node in upstream(graph, sampler).items()
    }
    return f"sha256:{hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]}"


def text_to_image(
    checkpoint: str,
    prompt: str,
    negative: str,
    *,
    sampler: str,
    scheduler: str,
    steps: int,
    cfg: float,
    width: int,
    height: int,
) -> Graph:
    """Return the plain workflow from text to image of a checkpoint; sizes in pixels."""
    nodes = {
        "1": ("CheckpointLoaderSimple", {"ckpt_name": checkpoint}),
        "2": ("CLIPTextEncode", {"clip": ["1", 1], "text": prompt}),
        "3": ("CLIPTextEncode", {"clip": ["1", 1], "text": negative}),
        "4": ("EmptyLatentImage", {"width": width, "height": height, "batch_size": 1}),
        "5": (
            "KSampler",
            {
                "model": ["1", 0],
                "positive": ["2", 0],
                "negative": ["3", 0],
                "latent_image": ["4", 0],
                "seed": 0,
                "steps": steps,
                "cfg": cfg,
                "sampler_name": sampler,
                "scheduler": scheduler,
                "denoise": 1.0,
            },
        ),
        "6": ("VAEDecode", {"samples": ["5", 0], "vae": ["1", 2]}),
    }
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def read_prompts(path: Path) -> tuple[str, ...]:
    """Return the prompts of a file: one for each line, without blank lines and those that start with #.

    Raises:
        FlexiError: it cannot be read, or has none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FlexiError(f"{path}: cannot be read ({error}); give a text file with one prompt in each line") from error
    prompts = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not prompts:
        raise FlexiError(f"{path}: no prompt in it; give a text file with one prompt in each line")
    return prompts


def _is_node(node: Any) -> bool:
    return isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)


def _link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def _links(node: Mapping[str, Any]) -> Iterator[tuple[str, list]]:
    return ((key, value) for key, value in node["inputs"].items() if _link(value))


def _towards_prompt(node: Mapping[str, Any]) -> list[str]:
    """Return where a node's positive conditioning comes from: its own input of that name, else any but the negative one."""
    links = dict(_links(node))
    if "positive" in links:
        return [links["positive"][0]]
    return [origin for key, (origin, _) in links.items() if key != "negative"]


def _named(node: Mapping[str, Any]) -> str:
    title = (node.get("_meta") or {}).get("title")
    return f"{node['class_type']}, {title!r}" if title and title != node["class_type"] else node["class_type"]
