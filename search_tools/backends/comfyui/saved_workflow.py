"""A workflow as the page saves it, turned into what the host runs (its API form).

What the page itself exports is the measure: values stand by position over the widgets of the host's own node definitions,
links go through reroutes, bypassed nodes and subgraphs to the node that makes what they carry, values of promoted widgets and
primitives reach the inputs that they stand for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

from flexi_core.errors import FlexiError

Definition = Mapping[str, Any]  # of a node class, as the host's /object_info gives it
Define = Callable[[str], Definition | None]
Node = Mapping[str, Any]  # as it is saved

_MUTED, _BYPASSED = 2, 4
_REROUTE, _PRIMITIVE = "Reroute", "PrimitiveNode"
_NOTES = ("Note", "MarkdownNote")
_GROUPS = ("workflow>", "workflow/")  # what the types of group nodes of old files begin with
_INPUT_SIDE, _OUTPUT_SIDE = -10, -20  # the ids of a subgraph's own two ends
_DYNAMIC = "COMFY_DYNAMICCOMBO_V3"
_WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR", "COLORS", "CURVE", "RANGE", "BOUNDING_BOX", "BOUNDING_BOXES",
            "WEBCAM", "IMAGECOMPARE", "COMPOSITOR", _DYNAMIC}  # fmt: skip
_COMPARED = "IMAGECOMPARE"
_SEEDS = ("seed", "noise_seed")
_UPLOADS = ("image_upload", "animated_image_upload", "video_upload", "audio_upload", "file_upload")
_MOST_NESTED = 32
_MOST_INSTANCES = 2_000  # two of each in the next, 32 deep, would be four thousand million
_MOST_NODES = 100_000
_MOST_UNFOLDED = 64 * 2**20  # characters of what is in all instances together; as much as of a file
_MOST_CHOICES = 100  # of {one|another} in each other
_MISSING = object()


@dataclass(frozen=True)
class _Value:
    """What a widget or a primitive gives."""

    value: Any


@dataclass(frozen=True)
class _Output:
    """What a node of the host makes: its id in the API form and the number of the output."""

    node: str
    slot: int


@dataclass(eq=False)
class _Content:
    """What is in the workflow itself, in a subgraph (the same for all its instances), or in an instance of a group node.

    Args:
        nodes: by id.
        links: (origin's id, its output, target's id, its input) by link id.
        inputs: names of a subgraph's own inputs.
    """

    nodes: dict[str, Node]
    links: dict[Any, tuple[str, int, str, int]]
    inputs: Sequence[str] = ()

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The subgraph's own inputs by name; of those with one name the first."""
        return {name: slot for slot, name in reversed([*enumerate(self.inputs)])}

    @cached_property
    def backed(self) -> list[int]:
        """Those of the subgraph's own inputs that lead to a widget."""
        return [slot for slot in range(len(self.inputs)) if any("widget" in entry for _, entry in self.into(slot))]

    def into(self, slot: int) -> Iterator[tuple[Node, Mapping[str, Any]]]:
        """Yield the nodes in here, with the inputs of theirs, that one of the subgraph's own inputs leads to."""
        for link in self._ends[_INPUT_SIDE].get(slot, ()):
            _, _, target, number = self.links[link]
            if target in self.nodes:
                inputs = self.nodes[target].get("inputs") or []
                if number < len(inputs):
                    yield self.nodes[target], inputs[number]

    def out_of(self, slot: int) -> Any:
        """Return the link that leads to one of the subgraph's own outputs; None where there is none."""
        return next(iter(self._ends[_OUTPUT_SIDE].get(slot, ())), None)

    @cached_property
    def _ends(self) -> dict[int, dict[int, list[Any]]]:
        """The links at each of the subgraph's own two ends, by the number of its input or output there."""
        ends: dict[int, dict[int, list[Any]]] = {_INPUT_SIDE: {}, _OUTPUT_SIDE: {}}
        for link, (origin, output, target, number) in self.links.items():
            if origin == str(_INPUT_SIDE):
                ends[_INPUT_SIDE].setdefault(output, []).append(link)
            if target == str(_OUTPUT_SIDE):
                ends[_OUTPUT_SIDE].setdefault(number, []).append(link)
        return ends

    def passed_by(self, name: str, slot: int) -> Any:
        """Return the link whose content goes through a bypassed node to one of its outputs."""
        if name not in self._bypasses:
            self._bypasses[name] = _Bypass(self.nodes[name])
        return self._bypasses[name].link(slot)

    @cached_property
    def _bypasses(self) -> dict[str, _Bypass]:
        return {}


class _Bypass:
    """Which of a bypassed node's inputs goes on at which of its outputs: of the same place, type, or a fitting type."""

    def __init__(self, node: Node) -> None:
        self._inputs, self._outputs = node.get("inputs") or [], node["outputs"]
        self._exact: dict[str, int] = {}
        self._fitting: dict[str | None, int] = {}
        for number, entry in enumerate(self._inputs):
            self._exact.setdefault(repr(entry["type"]), number)
            for part in _parts(entry["type"]):
                self._fitting.setdefault(part, number)

    def link(self, slot: int) -> Any:
        """Return the link of the input that goes on at an output; None where there is none."""
        wanted, inputs = self._outputs[slot]["type"], self._inputs
        parts = _parts(wanted)
        here = _parts(inputs[slot]["type"]) if slot < len(inputs) else set()
        if here and (None in parts | here or parts & here):
            return inputs[slot].get("link")
        found = self._exact.get(repr(wanted))
        if found is None and inputs:
            fitting = range(1) if None in parts else (self._fitting[part] for part in {None, *parts} & self._fitting.keys())
            found = min(fitting, default=None)
        return None if found is None else inputs[found].get("link")


@dataclass(eq=False)
class _Level:
    """The workflow itself, or what is inside one instance of a subgraph.

    Args:
        content: its nodes and links.
        prefix: of its nodes' ids in the API form.
        parent: the level that the instance is in.
        instance: the node that it is the inside of.
        promoted: values that the instance has for the subgraph's inputs, by their number.
        told: values that stand outside for widgets of nodes in here, by node id and widget.
        found: what outputs of nodes carry, by node id and number, as far as it was asked for.
        outside: what the subgraph's own inputs carry, by number, likewise.
        values: of the nodes in here, by id, likewise.
    """

    content: _Content
    prefix: str = ""
    parent: _Level | None = None
    instance: Node | None = None
    promoted: dict[int, Any] = field(default_factory=dict)
    told: dict[str, dict[str, Any]] = field(default_factory=dict)
    found: dict[tuple[str, int], _Output | _Value | None] = field(default_factory=dict)
    outside: dict[int, _Output | _Value | None] = field(default_factory=dict)
    values: dict[str, dict[str, Any]] = field(default_factory=dict)

    @cached_property
    def entries(self) -> dict[str, Mapping[str, Any]]:
        """The instance's inputs by name; of those with one name the first."""
        return {each["name"]: each for each in reversed(self.instance.get("inputs") or [])}


def is_saved(data: Any) -> bool:
    """Return whether data is a workflow as the page saves it."""
    return isinstance(data, dict) and isinstance(data.get("nodes"), list)


def to_api(workflow: Mapping[str, Any], define: Define) -> dict[str, dict[str, Any]]:
    """Return the API form of a saved workflow: nodes by id, those in subgraphs as 57:3.

    Nodes that the host does not know stay in it by their type, so that a branch which needs one can say its name.

    Args:
        workflow: parsed from its file.
        define: the host's definition of a node class; None where it has none.

    Raises:
        FlexiError: it is not put together as the page puts workflows together.
    """
    try:
        return _Converter(workflow, define).graph()
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError, OverflowError) as error:
        raise FlexiError(
            f"the saved workflow cannot be read ({type(error).__name__}: {error}): load it in the page and export it with "
            "Workflow, Export (API)"
        ) from error


class _Converter:
    def __init__(self, workflow: Mapping[str, Any], define: Define) -> None:
        self._define = cache(define)  # a host makes a definition anew each time, with its lists of files
        definitions = workflow.get("definitions") or {}
        self._subgraphs = {each["id"]: each for each in definitions.get("subgraphs") or []}
        self._groups = (workflow.get("extra") or {}).get("groupNodes") or {}
        self._levels: dict[str, _Level] = {}  # by prefix
        self._contents: dict[str, _Content] = {}  # by the subgraph's id
        self._sizes: dict[str, int] = {}  # of subgraphs and group nodes, in characters
        self._unfolded = self._node_count = 0
        self._root = self._counted(_Level(_Content(_by_id(workflow["nodes"]), _links(workflow.get("links") or []))))

    def graph(self) -> dict[str, dict[str, Any]]:
        graph: dict[str, dict[str, Any]] = {}
        self._add(self._root, graph)
        return graph

    def _add(self, level: _Level, graph: dict[str, dict[str, Any]]) -> None:
        """Add the nodes of a level, and of the levels inside of it, to the graph."""
        for name, node in level.content.nodes.items():
            kind = node["type"]
            if node.get("mode") in (_MUTED, _BYPASSED) or kind in (_REROUTE, _PRIMITIVE, *_NOTES):
                continue
            if self._is_instance(node):
                self._add(self._inside(level, node), graph)
            else:
                inputs = dict(self._values(level, node))
                for widget in self._prompts(node):
                    if widget not in level.told.get(name, {}) and isinstance(inputs.get(widget), str):
                        inputs[widget] = first_of_each(inputs[widget])
                for entry in node.get("inputs") or []:
                    source = self._source(level, entry.get("link"))
                    if isinstance(source, _Output):
                        inputs[entry["name"]] = [source.node, source.slot]
                    elif source is not None:
                        inputs[entry["name"]] = _as_input(source.value)
                graph[level.prefix + name] = {"class_type": kind, "inputs": inputs}
                if node.get("title"):
                    graph[level.prefix + name]["_meta"] = {"title": node["title"]}

    # Where a link comes from

    def _source(self, level: _Level, link: Any) -> _Output | _Value | None:
        """Return what a link carries; None where nothing comes through."""
        content, passed, found = level.content, {}, None
        while link is not None and link in content.links:
            origin, slot, _, _ = content.links[link]
            if origin == str(_INPUT_SIDE):
                found = self._outside(level, slot)
                break
            output = origin, slot
            if output in passed:
                raise ValueError(f"its links go round in a ring, at node {origin}")
            if output in level.found or origin not in content.nodes:
                found = level.found.get(output)
                break
            passed[output] = True
            node = content.nodes[origin]
            if node.get("mode") == _BYPASSED:
                link = content.passed_by(origin, slot)
            elif node.get("mode") != _MUTED and node["type"] == _REROUTE:
                link = node["inputs"][0].get("link")
            else:
                found = self._made(level, node, slot)
                break
        level.found.update(dict.fromkeys(passed, found))
        return found

    def _made(self, level: _Level, node: Node, slot: int) -> _Output | _Value | None:
        """Return what an output of a node carries that passes nothing on."""
        if node.get("mode") == _MUTED:
            return None
        if node["type"] == _PRIMITIVE:
            values = node.get("widgets_values") or []
            return _Value(values[0]) if values else None
        if self._is_instance(node):
            inside = self._inside(level, node)
            return self._source(inside, inside.content.out_of(slot))
        return _Output(f"{level.prefix}{node['id']}", slot)

    def _outside(self, level: _Level, slot: int) -> _Output | _Value | None:
        """Return what a subgraph's own input carries: a link from outside, else the instance's value, else the widget's own."""
        if slot not in level.outside:
            entry = level.entries.get(level.content.inputs[slot], {})
            found = self._source(level.parent, entry.get("link"))
            level.outside[slot] = found if found is not None else self._promoted(level, slot)
        return level.outside[slot]

    def _promoted(self, level: _Level, slot: int) -> _Value | None:
        """Return the value of a subgraph's own input; None where no widget is behind it."""
        if slot in level.promoted:
            return _Value(level.promoted[slot])
        for node, entry in level.content.into(slot):
            if "widget" not in entry:
                continue
            widget = entry["widget"]["name"]
            if not self._is_instance(node):
                return _Value(self._values(level, node).get(widget))
            inside = self._inside(level, node)
            return self._promoted(inside, inside.content.numbers[entry["name"]])
        return None

    # Subgraphs and group nodes

    def _is_instance(self, node: Node) -> bool:
        return node["type"] in self._subgraphs or node["type"].removeprefix(_prefix_of(node["type"])) in self._groups

    def _inside(self, level: _Level, node: Node) -> _Level:
        prefix = f"{level.prefix}{node['id']}:"
        if prefix.count(":") > _MOST_NESTED:
            raise FlexiError(f"the workflow's subgraph {node['type']} contains itself")
        if prefix not in self._levels:
            if len(self._levels) == _MOST_INSTANCES:
                raise FlexiError(f"the workflow has more than {_MOST_INSTANCES} subgraphs in subgraphs; export its API form")
            make = self._inside_subgraph if node["type"] in self._subgraphs else self._inside_group
            self._unfolded += self._size(node["type"])
            if self._unfolded > _MOST_UNFOLDED:
                raise FlexiError(f"the workflow's subgraphs unfold to over {_MOST_UNFOLDED >> 20} MiB; export its API form")
            self._levels[prefix] = self._counted(make(level, node, prefix))
        return self._levels[prefix]

    def _counted(self, level: _Level) -> _Level:
        """Return a level if its nodes, notes and muted ones too, are not more than are looked at."""
        self._node_count += len(level.content.nodes)
        if self._node_count > _MOST_NODES:
            raise FlexiError(f"the workflow has more than {_MOST_NODES} nodes, those in subgraphs included")
        return level

    def _size(self, kind: str) -> int:
        """Return how much a subgraph or a group node holds, in characters."""
        if kind not in self._sizes:
            held = self._subgraphs[kind] if kind in self._subgraphs else self._group(kind)
            self._sizes[kind] = len(json.dumps(held, default=str))
        return self._sizes[kind]

    def _group(self, kind: str) -> Mapping[str, Any]:
        return self._groups[kind.removeprefix(_prefix_of(kind))]

    def _content(self, kind: str) -> _Content:
        """Return what is in a subgraph."""
        if kind not in self._contents:
            subgraph = self._subgraphs[kind]
            inputs = [each["name"] for each in subgraph.get("inputs") or []]
            self._contents[kind] = _Content(_by_id(subgraph["nodes"]), _links(subgraph.get("links") or []), inputs)
        return self._contents[kind]

    def _inside_subgraph(self, level: _Level, node: Node, prefix: str) -> _Level:
        inside = _Level(content := self._content(node["type"]), prefix, level, node)
        values = _sequence(node.get("widgets_values"))
        proxies = (node.get("properties") or {}).get("proxyWidgets")
        shown: dict[str, list[str]] = {}  # ids of the nodes in here, by the widget of theirs
        if proxies is None:
            inside.promoted.update(zip(content.backed, values, strict=False))
        else:
            for (inner, widget, *_), value in zip(proxies, values, strict=False):
                if str(inner) == "-1":  # one of the subgraph's own inputs
                    inside.promoted[content.numbers[widget]] = value
                else:
                    inside.told.setdefault(str(inner), {})[widget] = value
            for inner, widget, *_ in proxies:
                if str(inner) != "-1":
                    shown.setdefault(widget, []).append(str(inner))
        for widget, value in level.told.get(str(node["id"]), {}).items():
            if widget in content.numbers:
                inside.promoted[content.numbers[widget]] = value
            for inner in shown.get(widget, ()):
                inside.told.setdefault(inner, {})[widget] = value
        return inside

    def _inside_group(self, level: _Level, node: Node, prefix: str) -> _Level:
        """Return the inside of a group node of old files, as if it were a subgraph's."""
        group = self._group(node["type"])
        # All its widgets' values stand in one row, those of the first node first.
        waiting = iter(_sequence(node.get("widgets_values")))
        nodes = {}
        for i, each in enumerate(group["nodes"]):
            taken: list[Any] = []
            self._read({}, self._define(each["type"]) or {}, waiting, taken)
            nodes[str(i)] = {**each, "id": i, "widgets_values": taken or each.get("widgets_values")}
        links = {}
        for number, (origin, output, target, slot, *_) in enumerate(group["links"]):
            links[number] = str(origin), output, str(target), slot
        linked = {(target, slot) for _, _, target, slot in links.values()}
        used = {(origin, output) for origin, output, _, _ in links.values()}
        shown = {(str(origin), output) for origin, output, *_ in group.get("external") or []}
        names = [each["name"] for each in node.get("inputs") or [] if "widget" not in each]
        free = [
            (name, slot)
            for name, each in nodes.items()
            for slot, entry in enumerate(each.get("inputs") or [])
            if (name, slot) not in linked and "widget" not in entry
        ]
        for i, (name, slot) in enumerate(free[: len(names)]):
            links["in", i] = str(_INPUT_SIDE), i, name, slot
        outputs = [(name, slot) for name, each in nodes.items() for slot in range(len(each.get("outputs") or []))]
        outputs = [each for each in outputs if each not in used or each in shown]
        for i, (name, slot) in enumerate(outputs):
            links["out", i] = name, slot, str(_OUTPUT_SIDE), i
        for target in {target for _, _, target, _ in links.values()} & nodes.keys():
            nodes[target]["inputs"] = [dict(entry) for entry in nodes[target]["inputs"]]
        for link, (_, _, target, slot) in links.items():
            if target in nodes:
                nodes[target]["inputs"][slot]["link"] = link
        return _Level(_Content(nodes, links, names), prefix, level, node)

    # Values

    def _values(self, level: _Level, node: Node) -> dict[str, Any]:
        """Return a node's own values, by the names of its inputs; they are not to be written to."""
        name = str(node["id"])
        if name not in level.values:
            level.values[name] = self._own_values(level, node)
        return level.values[name]

    def _own_values(self, level: _Level, node: Node) -> dict[str, Any]:
        definition = self._define(node["type"]) or {}
        saved = node.get("widgets_values")
        values: dict[str, Any] = {}
        if isinstance(saved, Mapping):  # some packs save them by name
            self._read(values, definition, iter(()), [])
            values |= {name: value for name, value in saved.items() if name in values}
        else:
            rest = iter(saved or ())
            self._read(values, definition, rest, [])
            if node["type"] == "CustomCombo":  # the page's own: which option it is, and all of them
                values |= {f"option{i}" if i else "index": value for i, value in enumerate(rest)}
        told = level.told.get(str(node["id"]), {})
        values |= {name: value for name, value in told.items() if name in values}
        return {name: _as_input(value) for name, value in values.items() if value is not None}

    def _prompts(self, node: Node) -> list[str]:
        """Return a node's widgets in whose text the page takes one of {one|another}; a value from outside it leaves alone."""
        definition = self._define(node["type"]) or {}
        widgets = _widgets(definition.get("input") or {}, definition.get("input_order"))
        return [name for name, _, options in widgets if options.get("dynamicPrompts")]

    def _read(
        self,
        values: dict[str, Any],
        definition: Definition,
        waiting: Iterator[Any],
        taken: list[Any],
        prefix: str = "",
    ) -> None:
        """Read the values of a node's widgets, or of those of an option of one, from what is left of a row of them.

        Args:
            values: to add to, by name.
            definition: of the node, or the inputs of the option.
            waiting: the rest of the row.
            taken: the values that were taken, page-only ones too.
            prefix: of the names.
        """
        for name, kind, options in _widgets(definition.get("input", definition), definition.get("input_order")):
            value = next(waiting, _MISSING)
            taken += [] if value is _MISSING else [value]
            if value is _MISSING or kind == _COMPARED:  # the page keeps two pictures there, and sends none
                value = _default(kind, options)
            values[prefix + name] = value
            if kind == _DYNAMIC:
                chosen = next((each for each in options.get("options") or [] if each["key"] == value), None)
                if chosen:
                    self._read(values, chosen["inputs"], waiting, taken, f"{prefix}{name}.")
                continue
            rolled = kind == "INT" and name in _SEEDS and not prefix
            uploads = kind == "COMBO" and any(options.get(each) for each in _UPLOADS)
            page_only = [rolled or options.get("control_after_generate"), uploads]
            for _ in range(sum(map(bool, page_only))):
                value = next(waiting, _MISSING)
                taken += [] if value is _MISSING else [value]


def first_of_each(text: str) -> str:
    r"""Return a prompt as the page sends it on: without comments, of each {one|another} the first, \{ as a brace."""
    text, choice = _without_comments(text), re.compile(r"(?<!\\)\{([^{}]*)(?<!\\)\}")
    for _ in range(_MOST_CHOICES):
        text, count = choice.subn(lambda found: found[1].split("|")[0], text)
        if not count:
            break
    return text.replace(r"\{", "{").replace(r"\}", "}")


def _without_comments(text: str) -> str:
    kept, at, closes = [], 0, True
    for found in re.finditer(r"/\*|//[^\n]*", text):
        if found.start() < at or (found[0] == "/*" and not closes):
            continue
        end = found.end()
        if found[0] == "/*":
            closes = (stop := text.find("*/", end)) >= 0
            if not closes:
                continue
            end = stop + 2
        kept.append(text[at : found.start()])
        at = end
    return "".join([*kept, text[at:]])


def _widgets(
    inputs: Mapping[str, Any], order: Mapping[str, Sequence[str]] | None
) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield the name, the kind and the options of each input that has a widget, in the page's order."""
    for part in ("required", "optional"):
        specs = inputs.get(part) or {}
        for name in (order or {}).get(part) or specs:
            kind, options = specs[name][0], specs[name][1] if len(specs[name]) > 1 else {}
            if isinstance(kind, list | tuple):  # the older form of a combo
                kind, options = "COMBO", {"options": kind, **options}
            if (kind in _WIDGETS or options.get("widgetType")) and not options.get("forceInput"):
                yield name, kind, options


def _default(kind: str, options: Mapping[str, Any]) -> Any:
    """Return what a widget is without a value."""
    if "default" in options:
        return options["default"]
    if kind in ("COMBO", _DYNAMIC):
        first = next(iter(options.get("options") or ()), None)
        return first["key"] if isinstance(first, Mapping) else first
    return {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False, _COMPARED: ["", ""]}.get(kind)


def _as_input(value: Any) -> Any:
    """Return a value as an input of the API form, where a list would be a link."""
    return {"__value__": value} if isinstance(value, list) else value


def _parts(kind: Any) -> set[str | None]:
    """Return the types that a link's type stands for, as it may be several, separated by commas; None for any."""
    return {None} if kind == "*" else {*str(kind).upper().split(",")}


def _by_id(nodes: Sequence[Node]) -> dict[str, Node]:
    return {str(node["id"]): node for node in nodes}


def _links(links: Sequence[Any]) -> dict[Any, tuple[str, int, str, int]]:
    found = {}
    for link in links:
        if isinstance(link, Mapping):
            link = [link[name] for name in ("id", "origin_id", "origin_slot", "target_id", "target_slot")]
        if link is not None:
            number, origin, output, target, slot = link[:5]
            found[number] = str(origin), int(output), str(target), int(slot)
    return found


def _sequence(values: Any) -> list[Any]:
    """Return a row of values; some packs save them by name."""
    return list(values.values()) if isinstance(values, Mapping) else list(values or ())


def _prefix_of(kind: str) -> str:
    return next((prefix for prefix in _GROUPS if kind.startswith(prefix)), "")
