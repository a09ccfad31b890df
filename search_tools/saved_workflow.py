"""A workflow as the page saves it, turned into what the host runs (its API form).

What the page itself exports is the measure: values stand by position over the widgets of the host's own node definitions,
links go through reroutes, bypassed nodes and subgraphs to the node that makes what they carry, values of promoted widgets and
primitives reach the inputs that they stand for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
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
class _Level:
    """The workflow itself, or what is inside one instance of a subgraph.

    Args:
        nodes: by id.
        links: (origin's id, its output, target's id, its input) by link id.
        prefix: of its nodes' ids in the API form.
        inputs: names of a subgraph's own inputs.
        parent: the level that the instance is in.
        instance: the node that it is the inside of.
        promoted: values that the instance has for the subgraph's inputs, by their number.
        told: values that stand outside for widgets of nodes in here, by node id and widget.
    """

    nodes: dict[str, Node]
    links: dict[Any, tuple[str, int, str, int]]
    prefix: str = ""
    inputs: Sequence[str] = ()
    parent: _Level | None = None
    instance: Node | None = None
    promoted: dict[int, Any] = field(default_factory=dict)
    told: dict[str, dict[str, Any]] = field(default_factory=dict)
    _ends: dict[int, dict[int, list[Any]]] = field(default_factory=dict)

    def into(self, slot: int) -> Iterator[tuple[Node, Mapping[str, Any]]]:
        """Yield the nodes in here, with the inputs of theirs, that one of the subgraph's own inputs leads to."""
        for link in self._at_end(_INPUT_SIDE).get(slot, ()):
            _, _, target, number = self.links[link]
            if target in self.nodes:
                inputs = self.nodes[target].get("inputs") or []
                if number < len(inputs):
                    yield self.nodes[target], inputs[number]

    def out_of(self, slot: int) -> Any:
        """Return the link that leads to one of the subgraph's own outputs; None where there is none."""
        return next(iter(self._at_end(_OUTPUT_SIDE).get(slot, ())), None)

    def _at_end(self, side: int) -> dict[int, list[Any]]:
        """Return the links at one of the subgraph's own two ends, by the number of its input or output there."""
        if side not in self._ends:
            found = self._ends.setdefault(side, {})
            for link, (origin, output, target, number) in self.links.items():
                if str(side) == (origin if side == _INPUT_SIDE else target):
                    found.setdefault(output if side == _INPUT_SIDE else number, []).append(link)
        return self._ends[side]


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
        self._root = _Level(_by_id(workflow["nodes"]), _links(workflow.get("links") or []))

    def graph(self) -> dict[str, dict[str, Any]]:
        graph: dict[str, dict[str, Any]] = {}
        self._add(self._root, graph)
        return graph

    def _add(self, level: _Level, graph: dict[str, dict[str, Any]]) -> None:
        """Add the nodes of a level, and of the levels inside of it, to the graph."""
        for name, node in level.nodes.items():
            kind = node["type"]
            if node.get("mode") in (_MUTED, _BYPASSED) or kind in (_REROUTE, _PRIMITIVE, *_NOTES):
                continue
            if self._is_instance(node):
                self._add(self._inside(level, node), graph)
            else:
                if len(graph) == _MOST_NODES:
                    raise FlexiError(f"the workflow has more than {_MOST_NODES} nodes, those in subgraphs included")
                inputs = self._values(level, node)
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
        if link is None or link not in level.links:
            return None
        origin, slot, _, _ = level.links[link]
        if origin == str(_INPUT_SIDE):
            return self._outside(level, slot)
        node = level.nodes.get(origin)
        return None if node is None else self._made(level, node, slot)

    def _made(self, level: _Level, node: Node, slot: int) -> _Output | _Value | None:
        """Return what an output of a node carries."""
        if node.get("mode") == _MUTED:
            return None
        if node.get("mode") == _BYPASSED:
            return self._source(level, _passed_by(node, slot))
        if node["type"] == _REROUTE:
            return self._source(level, node["inputs"][0].get("link"))
        if node["type"] == _PRIMITIVE:
            values = node.get("widgets_values") or []
            return _Value(values[0]) if values else None
        if self._is_instance(node):
            inside = self._inside(level, node)
            return self._source(inside, inside.out_of(slot))
        return _Output(f"{level.prefix}{node['id']}", slot)

    def _outside(self, level: _Level, slot: int) -> _Output | _Value | None:
        """Return what a subgraph's own input carries: a link from outside, else the instance's value, else the widget's own."""
        entry = next((each for each in level.instance.get("inputs") or [] if each["name"] == level.inputs[slot]), {})
        found = self._source(level.parent, entry.get("link"))
        return found if found is not None else self._promoted(level, slot)

    def _promoted(self, level: _Level, slot: int) -> _Value | None:
        """Return the value of a subgraph's own input; None where no widget is behind it."""
        if slot in level.promoted:
            return _Value(level.promoted[slot])
        for node, entry in level.into(slot):
            if "widget" not in entry:
                continue
            widget = entry["widget"]["name"]
            if not self._is_instance(node):
                return _Value(self._values(level, node).get(widget))
            inside = self._inside(level, node)
            return self._promoted(inside, inside.inputs.index(entry["name"]))
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
            subgraph = self._subgraphs.get(node["type"])
            make = self._inside_group if subgraph is None else self._inside_subgraph
            self._levels[prefix] = make(level, node, prefix)
        return self._levels[prefix]

    def _inside_subgraph(self, level: _Level, node: Node, prefix: str) -> _Level:
        subgraph = self._subgraphs[node["type"]]
        inputs = [each["name"] for each in subgraph.get("inputs") or []]
        inside = _Level(_by_id(subgraph["nodes"]), _links(subgraph.get("links") or []), prefix, inputs, level, node)
        values = _sequence(node.get("widgets_values"))
        proxies = (node.get("properties") or {}).get("proxyWidgets")
        if proxies is None:
            backed = [slot for slot in range(len(inputs)) if any("widget" in entry for _, entry in inside.into(slot))]
            inside.promoted.update(zip(backed, values, strict=False))
        else:
            for (inner, widget, *_), value in zip(proxies, values, strict=False):
                if str(inner) == "-1":  # one of the subgraph's own inputs
                    inside.promoted[inputs.index(widget)] = value
                else:
                    inside.told.setdefault(str(inner), {})[widget] = value
        for widget, value in level.told.get(str(node["id"]), {}).items():
            if widget in inputs:
                inside.promoted[inputs.index(widget)] = value
            for inner, own, *_ in proxies or ():
                if own == widget and str(inner) != "-1":
                    inside.told.setdefault(str(inner), {})[own] = value
        return inside

    def _inside_group(self, level: _Level, node: Node, prefix: str) -> _Level:
        """Return the inside of a group node of old files, as if it were a subgraph's."""
        group = self._groups[node["type"].removeprefix(_prefix_of(node["type"]))]
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
        for link, (_, _, target, slot) in links.items():
            if target in nodes:
                inputs = [dict(entry) for entry in nodes[target]["inputs"]]
                inputs[slot]["link"] = link
                nodes[target]["inputs"] = inputs
        return _Level(nodes, links, prefix, names, level, node)

    # Values

    def _values(self, level: _Level, node: Node) -> dict[str, Any]:
        """Return a node's own values, by the names of its inputs."""
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


def _passed_by(node: Node, slot: int) -> Any:
    """Return the link whose content goes through a bypassed node to one of its outputs."""
    wanted = node["outputs"][slot]["type"]
    inputs = node.get("inputs") or []
    same_place = [inputs[slot]] if slot < len(inputs) and _fits(inputs[slot]["type"], wanted) else []
    exact = [each for each in inputs if each["type"] == wanted]
    fitting = [each for each in inputs if _fits(each["type"], wanted)]
    chosen = next(iter([*same_place, *exact, *fitting]), {})
    return chosen.get("link")


def _fits(a: Any, b: Any) -> bool:
    """Return whether a link of one type may go where the other is; types may be several, separated by commas."""
    return "*" in (a, b) or bool({*str(a).upper().split(",")} & {*str(b).upper().split(",")})


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
