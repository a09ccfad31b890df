"""Saved workflows: the cases that people's files hold, each beside what the page itself exports of it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from flexi_core.errors import FlexiError
from search_tools.backends.comfyui import workflow
from search_tools.backends.comfyui.saved_workflow import first_of_each, is_saved, to_api

FOLDER = Path(__file__).parent / "workflows"
CASES = sorted(path.name.removesuffix(".ui.json") for path in FOLDER.glob("*.ui.json"))
DEFINITIONS = json.loads((FOLDER / "definitions.json").read_text(encoding="utf-8"))  # of ComfyUI 0.33.0


def read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def converted(saved: dict[str, Any]) -> dict[str, Any]:
    """Return the API form without titles, which the page's export of the cases does not have."""
    return {name: {k: v for k, v in node.items() if k != "_meta"} for name, node in to_api(saved, DEFINITIONS.get).items()}


def a_node(number: int, kind: str, values: Any = (), links: dict[str, int] | None = None, **others: Any) -> dict[str, Any]:
    """Return a saved node; `links` are those of its inputs by name."""
    inputs = [{"name": name, "type": "*", "link": link} for name, link in (links or {}).items()]
    return {"id": number, "type": kind, "mode": 0, "inputs": inputs, "outputs": [], "widgets_values": values, **others}


def saved(*nodes: dict[str, Any], links: list[list[Any]] | None = None, **others: Any) -> dict[str, Any]:
    return {"nodes": list(nodes), "links": links or [], **others}


@pytest.mark.parametrize("case", CASES)
def test_a_saved_workflow_is_what_the_page_exports_of_it(case):
    assert is_saved(read(f"{case}.ui.json")) and not is_saved(read(f"{case}.api.json"))
    assert converted(read(f"{case}.ui.json")) == read(f"{case}.api.json")


@pytest.mark.parametrize("case", CASES)
def test_converting_leaves_the_workflow_as_it_is(case):
    given = read(f"{case}.ui.json")
    before = copy.deepcopy(given)
    converted(given)
    assert given == before


def test_ids_and_links_may_be_of_any_type_that_json_has():
    given = read("2_bypass_mute.ui.json")
    for node in given["nodes"]:
        node["id"] = str(node["id"])
    given["links"] = [
        dict(zip(("id", "origin_id", "origin_slot", "target_id", "target_slot", "type"), link, strict=True))
        for link in given["links"]
    ]
    assert converted(given) == read("2_bypass_mute.api.json")


def test_values_by_name_are_taken_by_name():
    found = converted(saved(a_node(1, "EmptyLatentImage", {"height": 32, "width": 48, "page_only": 1})))
    assert found["1"]["inputs"] == {"width": 48, "height": 32, "batch_size": 1}


def test_a_list_as_a_value_is_no_link():
    found = converted(saved(a_node(1, "SaveLatent", [["a", 0]])))
    assert found["1"]["inputs"] == {"filename_prefix": {"__value__": ["a", 0]}}


@pytest.mark.parametrize("values", [[], [{"before": "/api/view?filename=a.png"}]])
def test_pictures_that_a_comparison_shows_are_not_sent(values):
    define = {"ImageCompare": {"input": {"optional": {"compare_view": ["IMAGECOMPARE", {}]}}}}
    found = to_api(saved(a_node(1, "ImageCompare", values)), define.get)
    assert found["1"]["inputs"] == {"compare_view": {"__value__": ["", ""]}}


def test_nodes_that_the_host_does_not_know_stay_by_their_type():
    link = [1, 1, 0, 2, 0, "MODEL"]
    found = converted(saved(a_node(1, "GetNode", ["m"]), a_node(2, "KSampler", [], {"model": 1}), links=[link]))
    assert found["1"] == {"class_type": "GetNode", "inputs": {}}
    assert found["2"]["inputs"]["model"] == ["1", 0]


@pytest.mark.parametrize("mode", [2, 4])
def test_what_a_muted_or_bypassed_node_made_does_not_come_through(mode):
    link = [1, 1, 0, 2, 0, "MODEL"]
    loader = a_node(1, "CheckpointLoaderSimple", ["a"], outputs=[{"name": "MODEL", "type": "MODEL"}])
    found = converted(saved({**loader, "mode": mode}, a_node(2, "KSampler", [], {"model": 1}), links=[link]))
    assert set(found) == {"2"} and "model" not in found["2"]["inputs"]


def test_a_subgraph_that_contains_itself_is_refused_in_words():
    inner = {"id": "self", "nodes": [a_node(1, "self")], "links": [], "inputs": [], "outputs": []}
    with pytest.raises(FlexiError, match="contains itself"):
        converted(saved(a_node(5, "self"), definitions={"subgraphs": [inner]}))


@pytest.mark.parametrize(
    "broken",
    [
        {"nodes": [{"id": 1}]},
        {"nodes": [3]},
        {"nodes": [a_node(1, "KSampler")], "links": [[1, 2]]},
        {"nodes": [a_node(1, "Reroute"), a_node(2, "KSampler", [], {"model": 1})], "links": [[1, 1, 0, 2, 0, "*"]]},
        {"nodes": [], "links": 5},
    ],
)
def test_a_broken_file_is_one_sentence(broken):
    with pytest.raises(FlexiError, match="saved workflow cannot be read"):
        converted(broken)


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("a {red|blue} cat", "a red cat"),
        ("{a {b|c}|d}", "a b"),
        (r"a \{b|c\}", "a {b|c}"),
        ("a cat // no dog\nin a hat /* or\n two */", "a cat \nin a hat "),
        ("plain (text:1.2)", "plain (text:1.2)"),
    ],
)
def test_prompts_are_sent_as_the_page_sends_them(text, sent):
    assert first_of_each(text) == sent


# What is done with a graph, whichever form it came in


def graph() -> dict[str, Any]:
    return read("3_subgraph_twice.api.json")


def test_a_byte_order_mark_and_broken_files(tmp_path):
    file = tmp_path / "w.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(graph()).encode())
    assert workflow.checked(workflow.read_workflow(file)) == graph()
    for content, words in ((b"{", "not JSON"), (b"[1]", "not a workflow"), (b"[" * 100_000, "not JSON")):
        file.write_bytes(content)
        with pytest.raises(FlexiError, match=words):
            workflow.read_workflow(file)
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes(b"\xef\xbb\xbfa cat\n# not this\na dog\n")
    assert workflow.read_prompts(prompts) == ("a cat", "a dog")


def test_a_node_without_a_class_is_named():
    with pytest.raises(FlexiError, match=r"node 9 \(Reroute\) has no class_type"):
        workflow.checked({**graph(), "9": {"inputs": {}, "_meta": {"title": "Reroute"}}})


def test_a_dangling_link_matters_on_the_samplers_own_branch_alone():
    beside = {**graph(), "59": {"class_type": "SaveLatent", "inputs": {"samples": ["404", 0]}}}
    assert set(workflow.upstream(workflow.checked(beside), "57:3")) == {"10", "11", "57:1", "57:2", "57:3"}
    broken = {**graph(), "11": {"class_type": "EmptyLatentImage", "inputs": {"width": ["404", 0]}}}
    with pytest.raises(FlexiError, match="width of node 11 comes from node 404"):
        workflow.upstream(workflow.checked(broken), "57:3")


def test_links_are_made_alike_and_other_lists_left():
    given = {"1": {"class_type": "A", "inputs": {"a": [10, 0.0], "b": ["10", 1], "c": ["10", 0.5], "d": [1, 2, 3]}}}
    assert workflow.checked(given)["1"]["inputs"] == {"a": ["10", 0], "b": ["10", 1], "c": ["10", 0.5], "d": [1, 2, 3]}


def test_a_rolled_seed_and_a_renamed_title_make_no_difference_to_a_search():
    rolled = graph()
    rolled["57:3"] = {**rolled["57:3"], "_meta": {"title": "My sampler"}}
    rolled["57:3"]["inputs"] = {**rolled["57:3"]["inputs"], "seed": 12345}
    assert workflow.unmarked(rolled, "57:3") == workflow.unmarked(graph(), "57:3")
    assert workflow.digest(rolled, "57:3") == workflow.digest(graph(), "57:3")
    rolled["57:3"]["inputs"]["cfg"] = 4.5
    assert workflow.digest(rolled, "57:3") != workflow.digest(graph(), "57:3")


@pytest.mark.parametrize("written", ["SDXL\\a.safetensors", "SDXL/a.safetensors"])
@pytest.mark.parametrize("here", ["SDXL\\a.safetensors", "SDXL/a.safetensors"])
def test_paths_are_written_as_this_machine_writes_them(written, here):
    given = {"1": {"class_type": "Loader", "inputs": {"file": written, "text": "a/b", "model": ["2", 0]}}}
    found = workflow.with_paths(given, lambda kind, key: [here] if (kind, key) == ("Loader", "file") else [])
    assert found["1"]["inputs"] == {"file": here, "text": "a/b", "model": ["2", 0]}


def prompted(**nodes: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """Return a graph of a KSampler, 5, with more nodes."""
    made = {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}
    return {"5": {"class_type": "KSampler", "inputs": {"positive": ["p", 0], "model": ["m", 0]}}, **made}


@pytest.mark.parametrize(
    ("nodes", "changed"),
    [
        ({"p": ("CLIPTextEncode", {"text": "old", "clip": ["m", 1]})}, ("p", "text")),
        (
            {"p": ("CLIPTextEncode", {"text": ["t", 0], "clip": ["m", 1]}), "t": ("PrimitiveString", {"value": "old"})},
            ("t", "value"),
        ),
        ({"p": ("FluxGuidance", {"conditioning": ["q", 0]}), "q": ("CLIPTextEncode", {"text": "old"})}, ("q", "text")),
        (
            {"p": ("ReferenceLatent", {"conditioning": ["q", 0], "latent": ["w", 0]}), "q": ("CLIPTextEncode", {"text": "old"})}
            | {"w": ("DrawText", {"text": "a caption that no sampler hears"})},
            ("q", "text"),
        ),
    ],
)
def test_another_prompt_reaches_the_text_that_the_sampler_hears(nodes, changed):
    types = {
        "FluxGuidance": {"input": {"required": {"conditioning": ["CONDITIONING"]}}},
        "ReferenceLatent": {"input": {"required": {"conditioning": ["CONDITIONING"]}, "optional": {"latent": ["LATENT"]}}},
    }
    loader = {"m": ("Loader", {"text": "a text of the model's own"})}
    given = prompted(**nodes, **loader)
    if "w" in nodes:  # the way that is no conditioning comes first
        given["p"]["inputs"] = dict(reversed(given["p"]["inputs"].items()))
    found = workflow.with_prompt(given, "5", "new", types.get)
    name, key = changed
    assert found[name]["inputs"][key] == "new"
    assert {n: v for n, v in found.items() if n != name} == {n: v for n, v in given.items() if n != name}


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ({"p": ("CLIPTextEncode", {"text": ["t", 0]}), "t": ("Join", {"string": "a", "value": ["u", 0]})}, r"made by node t"),
        ({"p": ("ConditioningZeroOut", {"conditioning": ["q", 0]}), "q": ("Load", {"file": "x"})}, "no node with a text"),
    ],
)
def test_a_prompt_that_cannot_be_changed_is_refused(nodes, words):
    given = prompted(**nodes, m=("Loader", {}), u=("Words", {"text": "x"}))
    with pytest.raises(FlexiError, match=words):
        workflow.with_prompt(given, "5", "new")
