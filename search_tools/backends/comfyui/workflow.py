"""A workflow as a graph, which is its API form: its sampling node, what lies upstream of it, the text of its prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from flexi_core.errors import FlexiError
from flexi_core.files import read_bounded
from flexi_core.json_text import parse_json
from flexi_core.words import shortened

from .saved_workflow import Define

Graph = dict[str, dict[str, Any]]  # by node id: "class_type" and "inputs", whose links are [node id, output]

SAMPLING = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
SEEDS = {"KSampler": "seed", "KSamplerAdvanced": "noise_seed", "SamplerCustom": "noise_seed"}
_DECODING = ("VAEDecode", "VAEDecodeTiled")
# What the text encoders of the host and of most packs call their prompt.
_TEXTS = ("text", "caption", "prompt", "text_g", "text_l", "clip_l", "clip_g", "t5xxl", "llama")
_STRINGS = ("value", "string", *_TEXTS)  # and what nodes that only hold a text call it
_HEARD = ("CONDITIONING", "GUIDER")  # types of the links that a prompt goes by to the sampler
_MAX_BYTES = 64 * 2**20
_LONGEST_TITLE = 100
_MOST_OUTPUTS = 10_000
_MOST_SHARING = 32  # sampling nodes in a run; videos of several experts have two or three
_MOST_LISTED = 20  # nodes that a message names
_MOST_NESTED = 100  # lists and objects in each other; the page's own files have about ten


def read_workflow(path: Path) -> dict[str, Any]:
    """Return what is in a workflow file: an API form, or what the page saves.

    Raises:
        FlexiError: it cannot be read, or is no JSON object.
    """
    wanted = "give a workflow that the page saved, or its API form"
    try:
        content = read_bounded(path, _MAX_BYTES)
    except (OSError, ValueError) as error:
        raise FlexiError(f"{path}: cannot be read ({error}); {wanted}") from error
    try:
        data = parse_json(content, _MOST_NESTED)
    except ValueError as error:
        raise FlexiError(f"{path}: not JSON ({error}); {wanted}") from error
    if not isinstance(data, dict):
        raise FlexiError(f"{path}: not a workflow, which is an object of nodes; {wanted}")
    return data


def checked(data: Any) -> Graph:
    """Return a graph, if it is one; what was posted to a server is unwrapped, ids and numbers of outputs are made alike.

    Raises:
        FlexiError: it is none.
    """
    if isinstance(data, dict) and isinstance(data.get("prompt"), dict):
        data = data["prompt"]
    if not isinstance(data, dict) or not data or not any(_is_node(node) for node in data.values()):
        raise FlexiError("not an API-format workflow: expected nodes by id, each with class_type and inputs")
    for name, node in data.items():
        if not _is_node(node):
            title = _title(node) if isinstance(node, dict) else None
            named = f"node {name}" + (f" ({title})" if title else "")
            raise FlexiError(f"{named} has no class_type and inputs; export the workflow again")
    return {
        name: {**node, "inputs": {key: _alike(value) for key, value in node["inputs"].items()}} for name, node in data.items()
    }


def unmarked(graph: Graph, sampler: str) -> Graph:
    """Return a graph without what makes no difference to a search: titles, and the seeds that each sample has of its own."""
    seeded = {*find_run(graph, sampler)}
    noises = (graph[name]["inputs"].get("noise") for name in seeded)
    seeded |= {noise[0] for noise in noises if _link(noise)}
    return {
        name: {
            "class_type": node["class_type"],
            "inputs": {
                key: 0 if name in seeded and key in SEEDS.values() and not _link(value) else value
                for key, value in node["inputs"].items()
            },
        }
        for name, node in graph.items()
    }


def find_sampler(graph: Graph, node: str | None = None) -> str:
    """Return the id of the sampling node, or of the one that was asked for; the last of those that share a run.

    Raises:
        FlexiError: there is none, there are several to choose from, or the one asked for does not sample.
    """
    found = [name for name, each in graph.items() if each["class_type"] in SAMPLING]
    if not found:
        raise FlexiError(f"the workflow has no sampling node; a search needs one of {', '.join(SAMPLING)}")
    if node is None and len(found) > 1:
        before = {_before(graph, name) for name in found}
        found = [name for name in found if name not in before] or found
    if node is None and len(found) > 1:
        raise FlexiError(f"the workflow has {len(found)} sampling nodes: {_listed(graph, found)}; choose one with --node")
    if node is not None and node not in found:
        what = f"node {node} is a {graph[node]['class_type']}" if node in graph else f"there is no node {node}"
        raise FlexiError(f"{what}; the workflow's sampling nodes are: {_listed(graph, found)}")
    return found[0] if node is None else node


def find_run(graph: Graph, node: str) -> tuple[str, ...]:
    """Return the ids of the sampling nodes that share a run, in order, up to a node of it.

    A node that adds no noise goes on with the run of the node that its latent comes from.

    Raises:
        FlexiError: it goes on from something else than what a sampling node leaves, or from too many of them.
    """
    run = [node]
    while (before := _before(graph, run[0])) is not None and before not in run:
        if len(run) == _MOST_SHARING:
            raise FlexiError(f"node {node} ends a run of over {_MOST_SHARING} sampling nodes; choose an earlier one, --node")
        run.insert(0, before)
    first = graph[run[0]]
    latent = first["inputs"].get("latent_image")
    if not _adds_noise(graph, run[0]) and _link(latent) and latent[0] in graph:
        sampled = [name for name, each in upstream(graph, latent[0]).items() if each["class_type"] in SAMPLING]
        if sampled:
            raise FlexiError(_told_of_break(graph, run[0], latent, sampled[0]))
    return tuple(run)


def begun(graph: Graph, name: str, run: Sequence[str]) -> Graph:
    """Return a graph in which a node of a run begins with the latent of the run's first: what it gets is computed unsampled.

    Raises:
        FlexiError: another input of it comes from a node of the run.
    """
    if name == run[0]:
        return graph
    latent = graph[run[0]]["inputs"].get("latent_image")
    moved = {**graph, name: {**graph[name], "inputs": {**graph[name]["inputs"], "latent_image": latent}}}
    before = upstream(moved, name)
    if made := [other for other in run if other != name and other in before]:
        raise FlexiError(
            f"node {name} ({_named(graph[name])}) goes on with the run of node {made[0]} and has another input that is made of "
            f"what that node samples; each sample would need its own, search node {made[0]} alone with --node {made[0]}"
        )
    return moved


def _told_of_break(graph: Graph, name: str, latent: list, sampler: str) -> str:
    """Return why a node that adds no noise is not searched for with the sampling node that its latent comes from."""
    origin = graph[latent[0]]
    found = f"node {name} ({_named(graph[name])}) adds no noise and goes on from node {latent[0]} ({_named(origin)})"
    found += f", output {latent[1] + 1}" if latent[0] == sampler else f", which stands between it and node {sampler}"
    return (
        f"{found}: a search would compare one picture many times. Link its latent_image to the first output of node {sampler} "
        f"({_named(graph[sampler])}), so that both are one run, or search that one alone with --node {sampler}"
    )


def _before(graph: Graph, name: str) -> str | None:
    """Return the sampling node whose run a sampling node goes on with; None where it begins one."""
    latent = graph[name]["inputs"].get("latent_image")
    if _adds_noise(graph, name) or not _link(latent) or latent[1] != 0:
        return None
    return latent[0] if graph.get(latent[0], {}).get("class_type") in SAMPLING else None


def _adds_noise(graph: Graph, name: str) -> bool:
    """Return whether a sampling node adds noise of its own, as far as its graph says."""
    inputs = graph[name]["inputs"]
    noise = inputs.get("noise")
    silent = _link(noise) and graph.get(noise[0], {}).get("class_type") == "DisableNoise"
    return not silent and inputs.get("add_noise") not in ("disable", False)


def upstream(graph: Graph, node: str) -> Graph:
    """Return a node with everything that it is made from.

    Raises:
        FlexiError: some of that is not in the graph.
    """
    kept, waiting = {}, [node]
    while waiting:
        name = waiting.pop()
        if name not in kept:
            kept[name] = graph[name]
            for key, (origin, _) in _links(graph[name]):
                if origin not in graph:
                    raise FlexiError(f"the input {key} of node {name} comes from node {origin}, which is not in the workflow")
                waiting.append(origin)
    return kept


def find_decoder(graph: Graph, node: str) -> str | None:
    """Return the nearest node that decodes what a node makes, None where there is none."""
    order = {name: i for i, name in enumerate(graph)}
    takers: dict[str, list[str]] = {}
    for name, each in graph.items():
        for _, (origin, _) in _links(each):
            takers.setdefault(origin, []).append(name)
    seen, level = {node}, [node]
    while level:
        found = {taker for name in level for taker in takers.get(name, ())} - seen
        seen |= found
        level = sorted(found, key=order.__getitem__)
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


def find_texts(graph: Graph, sampler: str, define: Define = lambda kind: None) -> tuple[str, tuple[str, ...]]:
    """Return the node that holds the positive prompt of a sampling node, and the names of its texts.

    The way goes from the sampling node by guider and conditioning alone, and from a text encoder to where its text comes from.

    Args:
        graph: with everything upstream of the sampling node.
        sampler: its id.
        define: the host's definition of a node class; without it every way but the negative one is gone.

    Raises:
        FlexiError: no text is found on that way.
    """
    start = graph[sampler]["inputs"].get("guider") or graph[sampler]["inputs"].get("positive")
    seen, level = set(), [start[0]] if _link(start) else []
    while level:
        for name in level:
            inputs = graph[name]["inputs"]
            texts = tuple(key for key in _TEXTS if isinstance(inputs.get(key), str))
            if texts:
                return name, texts
            if told := next((inputs[key][0] for key in _TEXTS if _link(inputs.get(key))), None):
                return _text_behind(graph, told, sampler)
        seen.update(level)
        following = (origin for name in level for origin in _towards_prompt(graph[name], define) if origin not in seen)
        level = [*dict.fromkeys(following)]
    raise FlexiError(
        f"no node with a text of its own ({', '.join(_TEXTS)}) leads to the positive conditioning of node {sampler}; "
        "type the prompt into the text node, or search without --prompts"
    )


def _text_behind(graph: Graph, name: str, sampler: str) -> tuple[str, tuple[str, ...]]:
    """Return the node that a text comes from, which only holds it, and the name of its text."""
    inputs = graph[name]["inputs"]
    texts = [key for key in _STRINGS if isinstance(inputs.get(key), str)]
    if len(texts) == 1 and not any(True for _ in _links(graph[name])):
        return name, tuple(texts)
    raise FlexiError(
        f"the prompt of node {sampler} is made by node {name} ({_named(graph[name])}); "
        "type it into the text node itself, or search without --prompts"
    )


def with_prompt(graph: Graph, sampler: str, prompt: str, define: Define = lambda kind: None) -> Graph:
    """Return a graph with another positive prompt for all sampling nodes of a run; see `find_texts`."""
    for node in find_run(graph, sampler):
        name, texts = find_texts(graph, node, define)
        graph = {**graph, name: {**graph[name], "inputs": {**graph[name]["inputs"], **dict.fromkeys(texts, prompt)}}}
    return graph


def with_paths(graph: Graph, options: Callable[[str, str], list]) -> Graph:
    """Return a graph whose names of files are written as this machine writes them: SDXL\\a.safetensors is SDXL/a.safetensors.

    Args:
        graph: from any machine.
        options: what may be chosen for a node class and an input; empty where that is not a choice.
    """

    @cache
    def known(kind: str, key: str) -> set[str]:
        return {each for each in options(kind, key) if isinstance(each, str)}

    def here(kind: str, key: str, value: Any) -> Any:
        if not isinstance(value, str) or not {"/", "\\"} & {*value}:
            return value
        ways = (value, value.replace("\\", "/"), value.replace("/", "\\"))
        return next((each for each in ways if each in known(kind, key)), value)

    return {
        name: {**node, "inputs": {key: here(node["class_type"], key, value) for key, value in node["inputs"].items()}}
        for name, node in graph.items()
    }


def find_value(graph: Graph, node: str, key: str) -> Any:
    """Return the nearest value of a name upstream of a node, None where there is none."""
    level, seen = [node], set()
    while level:
        for name in level:
            value = graph[name]["inputs"].get(key)
            if value is not None and not _link(value):
                return value
        seen.update(level)
        level = [*dict.fromkeys(origin for name in level for _, (origin, _) in _links(graph[name]) if origin not in seen)]
    return None


def digest(graph: Graph, sampler: str) -> str:
    """Return a digest of everything upstream of a sampling node but its seed, which each sample has of its own."""
    plain = [[name, node["class_type"], node["inputs"]] for name, node in unmarked(upstream(graph, sampler), sampler).items()]
    return f"sha256:{hashlib.sha256(json.dumps(sorted(plain), sort_keys=True).encode()).hexdigest()[:16]}"


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
        lines = path.read_text(encoding="utf-8-sig").splitlines()
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


def _alike(value: Any) -> Any:
    """Return a link as [text, whole number], and anything else as it is."""
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int) and isinstance(value[1], int | float):
        return [str(value[0]), int(value[1])] if value[1] in range(_MOST_OUTPUTS) else value
    return value


def _towards_prompt(node: Mapping[str, Any], define: Define) -> list[str]:
    """Return where a node's positive conditioning comes from: its own input of that name, else any but the negative one."""
    links = dict(_links(node))
    if "positive" in links:
        return [links["positive"][0]]
    types = {}
    for part in ((define(node["class_type"]) or {}).get("input") or {}).values():
        types |= {key: spec[0] for key, spec in part.items() if isinstance(spec, list | tuple) and spec}
    return [origin for key, (origin, _) in links.items() if key != "negative" and types.get(key, _HEARD[0]) in _HEARD]


def _title(node: Mapping[str, Any]) -> str:
    """Return the title that a node was given in the page; empty where it has none."""
    meta = node.get("_meta")
    title = meta.get("title") if isinstance(meta, Mapping) else None
    return shortened(title, _LONGEST_TITLE) if isinstance(title, str) else ""


def _listed(graph: Graph, names: Sequence[str]) -> str:
    named = [f"{name} ({_named(graph[name])})" for name in names[:_MOST_LISTED]]
    return ", ".join(named) + (f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else "")


def _named(node: Mapping[str, Any]) -> str:
    title = _title(node)
    return f"{node['class_type']}, {title!r}" if title and title != node["class_type"] else node["class_type"]
