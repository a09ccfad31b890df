"""What is read from strangers is bounded before work is done on it: bytes, depth, counts; every node is visited once."""

import json
import os
import random
from collections import Counter

import pytest

from flexi_core import FlexiError, Schedule, ScheduleError, load_schedule
from flexi_core.files import read_bounded
from flexi_core.json_text import _CHUNK, parse_json
from flexi_core.schedule import grammar
from search_tools.backends.comfyui import workflow
from search_tools.backends.comfyui.saved_workflow import first_of_each, to_api


class Counted(dict):
    """A graph that counts how often each node is looked at."""

    def __init__(self, nodes):
        super().__init__(nodes)
        self.visits = Counter()

    def __getitem__(self, name):
        self.visits[name] += 1
        return super().__getitem__(name)

    def items(self):
        for name in self:
            self.visits[name] += 1
            yield name, super().__getitem__(name)


def a_node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def loras(count: int) -> Counted:
    """Return a workflow of LoRA loaders in a chain, each linked twice with the one before; a sampling node and a decoder."""
    nodes = {"0": a_node("CheckpointLoaderSimple", ckpt_name="a.safetensors")}
    for i in range(1, count + 1):
        nodes[str(i)] = a_node("LoraLoader", model=[str(i - 1), 0], clip=[str(i - 1), 1], strength=1.0)
    last = str(count)
    nodes["sampler"] = a_node("KSampler", model=[last, 0], positive=[last, 1], negative=[last, 1], latent_image=[last, 0])
    nodes["decoder"] = a_node("VAEDecode", samples=["sampler", 0], vae=["0", 2])
    return Counted(nodes)


@pytest.mark.parametrize("count", [40, 20_000])
def test_each_node_of_a_workflow_is_visited_a_few_times_however_it_is_linked(count):
    graph = loras(count)
    assert workflow.find_value(graph, "sampler", "scheduler") is None
    assert max(graph.visits.values()) <= 2
    with pytest.raises(FlexiError, match="no node with a text"):
        workflow.find_texts(graph, "sampler")
    assert workflow.find_decoder(graph, "sampler") == "decoder"
    assert workflow.find_decoder(graph, "0") == "decoder"
    assert max(graph.visits.values()) <= 12


def test_a_run_of_20_000_sampling_nodes_is_refused_before_all_are_visited():
    nodes = {str(i): a_node("KSampler", latent_image=[str(i - 1), 0], add_noise="disable") for i in range(1, 20_000)}
    graph = Counted({"0": a_node("KSampler", latent_image=["x", 0]), **nodes})
    with pytest.raises(FlexiError, match="ends a run of over 32 sampling nodes"):
        workflow.find_run(graph, "19999")
    assert sum(graph.visits.values()) < 1_000


def test_of_20_000_sampling_nodes_a_message_names_a_few():
    graph = {str(i): a_node("KSampler", latent_image=["x", 0]) for i in range(20_000)}
    for node in (None, "x"):
        with pytest.raises(FlexiError, match="and 19980 more") as refused:
            workflow.find_sampler(graph, node)
        assert len(str(refused.value)) < 1_000


def test_what_may_be_chosen_is_asked_for_once():
    asked = Counter()

    def options(kind, key):
        asked[kind, key] += 1
        return ["a/b", {"no": "text"}]

    graph = {str(i): a_node("LoraLoader", name="a\\b") for i in range(1_000)}
    assert all(node["inputs"] == {"name": "a/b"} for node in workflow.with_paths(graph, options).values())
    assert set(asked.values()) == {1}


def test_a_file_of_20_000_nodes_is_read_and_reduced(tmp_path):
    file = tmp_path / "w.json"
    file.write_text(json.dumps(loras(20_000)))
    graph = workflow.checked(workflow.read_workflow(file))
    reduced = workflow.unmarked(workflow.reduced(graph, workflow.find_sampler(graph)), "sampler")
    assert len(reduced) == 20_003


def test_a_saved_workflow_asks_for_each_definition_once():
    asked = Counter()

    def define(kind):
        asked[kind] += 1
        return {"input": {"required": {"a": ("INT", {"default": 1})}}}

    nodes = [{"id": i, "type": f"T{i % 3}", "widgets_values": [i], "inputs": [{"name": "x", "link": i}]} for i in range(20_000)]
    links = [[i, i - 1, 0, i, 0, "*"] for i in range(1, 20_000)]
    assert len(to_api({"nodes": nodes, "links": links}, define)) == 20_000
    assert set(asked.values()) == {1}


def test_subgraphs_that_hold_two_of_the_next_are_refused():
    inside = lambda i: [{"id": k, "type": f"s{i + 1}" if i < 30 else "Leaf"} for k in (1, 2)]  # noqa: E731 (short)
    subgraphs = [{"id": f"s{i}", "nodes": inside(i)} for i in range(31)]
    with pytest.raises(FlexiError, match="more than 2000 subgraphs in subgraphs"):
        to_api({"nodes": [{"id": 1, "type": "s0"}], "definitions": {"subgraphs": subgraphs}}, lambda kind: {})


class Looked(dict):
    """A part of a file that counts how often something of any such part is looked at."""

    count = 0

    def __getitem__(self, name):
        Looked.count += 1
        return super().__getitem__(name)

    def get(self, name, default=None):
        Looked.count += 1
        return super().get(name, default)

    def keys(self):
        Looked.count += len(self)
        return super().keys()

    def __iter__(self):
        Looked.count += len(self)
        return super().__iter__()


def looked(value):
    if isinstance(value, dict):
        return Looked({name: looked(each) for name, each in value.items()})
    return [looked(each) for each in value] if isinstance(value, list) else value


def a_saved(number, kind="T", links=(), **more):
    inputs = [{"name": f"x{i}", "type": "*", "link": link} for i, link in enumerate(links)]
    return {"id": number, "type": kind, "inputs": inputs, "outputs": [{"type": "*"}], **more}


def in_a_subgraph(outer, inside, links, inputs, outer_links=()):
    subgraph = {"id": "s", "nodes": inside, "links": links, "inputs": [{"name": f"x{i}"} for i in range(inputs)]}
    return {"nodes": outer, "links": list(outer_links), "definitions": {"subgraphs": [subgraph]}}


def saved_chain(n, kind="T", mode=0):
    nodes = [a_saved(0), *(a_saved(i, kind, [i], mode=mode) for i in range(1, n)), a_saved(n, "T", [n])]
    return {"nodes": nodes, "links": [[i, i - 1, 0, i, 0, "*"] for i in range(1, n + 1)]}


def many_ends_of_a_chain(n, kind, mode):
    chain = saved_chain(n, kind, mode)
    ends = [a_saved(n + i, "T", [n + i]) for i in range(1, n)]
    return {"nodes": chain["nodes"] + ends, "links": chain["links"] + [[n + i, n - 1, 0, n + i, 0, "*"] for i in range(1, n)]}


def a_fan(n):
    nodes = [*(a_saved(i) for i in range(n)), a_saved(n, "T", range(n))]
    return {"nodes": nodes, "links": [[i, i, 0, n, i, "*"] for i in range(n)]}


def a_bypassed_fan(n):
    wide = a_saved(n, "T", range(n), mode=4) | {"outputs": [{"type": f"t{i}"} for i in range(n)]}
    fan = a_fan(n)["nodes"][:n]
    ends = [a_saved(n + 1 + i, "T", [n + i]) for i in range(n)]
    links = [[i, i, 0, n, i, "*"] for i in range(n)] + [[n + i, n, i, n + 1 + i, 0, "*"] for i in range(n)]
    wide["inputs"] = [each | {"type": f"t{n - 1 - i}"} for i, each in enumerate(wide["inputs"])]
    return {"nodes": [*fan, wide, *ends], "links": links}


def a_fan_into_a_subgraph(n):
    outer = [*(a_saved(i) for i in range(n)), a_saved(n, "s", range(n))]
    inside = [a_saved(i, "T", [i]) for i in range(n)]
    outer_links = [[i, i, 0, n, i, "*"] for i in range(n)]
    return in_a_subgraph(outer, inside, [[i, -10, i, i, 0, "*"] for i in range(n)], n, outer_links)


def promoted_widgets(n):
    wide = a_saved(0, f"W{n}", range(n)) | {"widgets_values": [*range(n)]}
    wide["inputs"] = [each | {"widget": {"name": f"w{i}"}} for i, each in enumerate(wide["inputs"])]
    return in_a_subgraph([a_saved(0, "s")], [wide], [[i, -10, i, 0, i, "*"] for i in range(n)], n)


def a_fan_in_a_group(n):
    nodes = [*(a_saved(i) for i in range(n)), a_saved(n, "T", range(n))]
    group = {"nodes": nodes, "links": [[i, 0, n, i, "*"] for i in range(n)], "external": []}
    return {"nodes": [a_saved(1, "workflow>g")], "links": [], "extra": {"groupNodes": {"g": group}}}


def subgraphs_in_subgraphs(n):
    inside = lambda i: [*(a_saved(k) for k in range(n // 10)), a_saved(n, f"s{i + 1}" if i < 9 else "T", [0])]  # noqa: E731
    links = [[0, -10, 0, n, 0, "*"], [1, n, 0, -20, 0, "*"]]
    subgraphs = [{"id": f"s{i}", "nodes": inside(i), "links": links, "inputs": [{"name": "x0"}]} for i in range(10)]
    ends = [a_saved(2 + i, "T", [2]) for i in range(n)]
    nodes = [a_saved(0), a_saved(1, "s0", [0]), *ends]
    return {"nodes": nodes, "links": [[0, 0, 0, 1, 0, "*"], [2, 1, 0, 2, 0, "*"]], "definitions": {"subgraphs": subgraphs}}


SAVED = {
    "chain": saved_chain,
    "reroutes": lambda n: saved_chain(n, "Reroute"),
    "bypassed": lambda n: saved_chain(n, "T", 4),
    "ends of reroutes": lambda n: many_ends_of_a_chain(n, "Reroute", 0),
    "ends of bypassed": lambda n: many_ends_of_a_chain(n, "T", 4),
    "fan": a_fan,
    "bypassed fan": a_bypassed_fan,
    "fan into a subgraph": a_fan_into_a_subgraph,
    "promoted widgets": promoted_widgets,
    "fan in a group node": a_fan_in_a_group,
    "subgraphs in subgraphs": subgraphs_in_subgraphs,
}


@pytest.mark.parametrize("form", SAVED)
def test_what_is_looked_at_in_a_saved_workflow_grows_as_it_does(form):
    def looks(n):
        wide = looked({"input": {"required": {f"w{i}": ["INT", {}] for i in range(n)}}})
        saved = looked(SAVED[form](n))
        Looked.count = 0
        assert to_api(saved, lambda kind: wide if kind == f"W{n}" else {})
        return Looked.count

    assert looks(400) < 2.2 * looks(200)


def test_nodes_and_values_of_all_instances_together_are_bounded():
    instances = [a_saved(i, "s") for i in range(2_000)]
    notes = [{"id": i, "type": "Note"} for i in range(100)]
    with pytest.raises(FlexiError, match="more than 100000 nodes, those in subgraphs included"):
        to_api(in_a_subgraph(instances, notes, [], 0), lambda kind: {})
    long = [{"id": 1, "type": "T", "widgets_values": ["{a|b}" * 10_000]}]
    with pytest.raises(FlexiError, match="unfold to over 64 MiB"):
        to_api(in_a_subgraph(instances, long, [], 0), lambda kind: {})


@pytest.mark.parametrize("mode", [0, 4])
def test_reroutes_in_a_ring_are_one_error(mode):
    ring = {"id": 1, "type": "Reroute" if mode == 0 else "T", "mode": mode,
            "inputs": [{"name": "", "type": "*", "link": 1}], "outputs": [{"type": "*"}]}  # fmt: skip
    taker = {"id": 2, "type": "Taker", "inputs": [{"name": "x", "link": 2}]}
    with pytest.raises(FlexiError, match="cannot be read"):
        to_api({"nodes": [ring, taker], "links": [[1, 1, 0, 1, 0], [2, 1, 0, 2, 0]]}, lambda kind: {})


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("a /* {x|y} */ {b|c} // d\ne", "a  b \ne"),
        ("{a|{b|c}} {{d}|e}", "a d"),
        (r"\{a|b\} /* open", "{a|b} /* open"),
        ("/*/ x */y", "y"),
        ("//a /* b\nc */", "\nc */"),
    ],
)
def test_prompts_are_sent_as_before(text, sent):
    assert first_of_each(text) == sent


def test_a_prompt_of_half_a_million_open_comments_or_choices_is_read_once():
    assert first_of_each("/* " * 250_000) == "/* " * 250_000
    assert first_of_each("{a|b}" * 100_000) == "a" * 100_000
    assert first_of_each("{" * 300_000) == "{" * 300_000


# Texts of a schedule


@pytest.mark.parametrize("text", ["F" * 99_999, "F" + "X" * 99_000, "|".join(["F" + "X" * 9_998] * 10), "FX" * 40_000])
def test_steps_beyond_the_limit_are_refused_before_they_are_made(text, monkeypatch):
    made = Counter()
    real = grammar.Segment
    monkeypatch.setattr(grammar, "Segment", lambda *args: made.update(steps=len(args[0])) or real(*args))
    with pytest.raises(ScheduleError, match="at most 10000 are supported"):
        Schedule.parse(text)
    assert made["steps"] <= 20_000


# JSON


@pytest.mark.parametrize(
    ("text", "nested"),
    [
        (b"[[1]]", 2), (b'{"a": [{}]}', 3), (b'"[[[["', 0), (rb'["\"[[[["]', 1), (rb'["\\", [[]]]', 3), (rb'["\\\"[["]', 1),
        (b"[], [], []", 1), (b"1", 0),
    ],
)  # fmt: skip
def test_depth_is_counted_outside_of_strings(text, nested):
    wrapped = b"[" + text + b"]"
    parse_json(wrapped, nested + 1)
    if nested:
        with pytest.raises(ValueError, match=f"nested more than {nested} deep"):
            parse_json(wrapped, nested)


def test_depth_is_counted_over_the_edges_of_what_is_looked_at_at_once():
    for shift in range(-3, 4):
        start = b'["' + b"a" * (_CHUNK - 4 + shift)
        for inside in (rb'\\"', rb'\"[[[["', rb'\\\"[[["', rb'\\\\"'):
            text = start + inside + b", [[1]]]"
            assert parse_json(text, 3)
            with pytest.raises(ValueError, match="nested more than 2 deep"):
                parse_json(text, 2)


def test_depth_agrees_with_what_is_parsed():
    rng = random.Random(5)
    for _ in range(300):
        value, depth = rng.choice(["\\", '"', "[{", '\\"', 1, None]), 0
        for _ in range(rng.randrange(6)):
            value, depth = rng.choice([[value, "]"], {"[\\": value}, [value]]), depth + 1
        text = json.dumps(value).encode()
        assert parse_json(text, depth) == value
        if depth:
            with pytest.raises(ValueError, match="nested more"):
                parse_json(text, depth - 1)


def test_a_file_nested_deep_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    file = tmp_path / "s.json"
    file.write_bytes(b'{"a": ' + b"[" * 4_000_000)
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("it was parsed"))
    with pytest.raises(ScheduleError, match="nested more than 32 deep"):
        load_schedule(file)
    with pytest.raises(FlexiError, match="nested more than 100 deep"):
        workflow.read_workflow(file)


def test_half_of_a_character_is_refused(tmp_path):
    assert parse_json(rb'"\ud83d\ude00"', 9) == "\U0001f600"
    with pytest.raises(ValueError, match="lone surrogate"):
        parse_json(rb'{"a": "\udc00"}', 9)


# Files


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in this system's folders")
def test_a_pipe_among_the_schedules_is_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "s.json")
    with pytest.raises(ScheduleError, match="it is no file, but a folder, a pipe or a device"):
        load_schedule(tmp_path / "s.json")


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/stdin"])
def test_a_device_is_no_file(path):
    if not os.path.exists(path):
        pytest.skip(f"no {path} here")
    with pytest.raises(OSError, match=r"it is no file|No such"):
        read_bounded(path, 10)


def test_a_file_at_the_limit_is_read_and_one_beyond_it_is_called_too_large(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 10)
    assert read_bounded(tmp_path / "a", 10) == b"x" * 10
    with pytest.raises(OSError, match="at most"):
        read_bounded(tmp_path / "a", 9)
