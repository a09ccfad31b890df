"""Files and texts that nobody would write: each is read, or refused in one short line; nothing else ever comes of them.

10,000 of each, from one seed, so that a run finds what the last one found. Hypothesis draws the seeds, and a few lines here
make the values of them, some of each seed: its own strategies take ten times as long for as many, and its care of a seed twice
as long as most values. `FLEXI_FUZZ` is another number of each.
"""

import json
import math
import os
import random
from collections.abc import Callable
from typing import Any

import pytest

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from flexi_core import FlexiError, Schedule  # noqa: E402
from flexi_core.json_text import parse_json  # noqa: E402
from flexi_core.runtime.unet_config import unet_arguments  # noqa: E402
from flexi_core.schedule.file import from_dict, made_for, to_dict  # noqa: E402
from flexi_core.words import visible  # noqa: E402
from search_tools.backends.comfyui import workflow  # noqa: E402
from search_tools.backends.comfyui.saved_workflow import first_of_each, to_api  # noqa: E402
from search_tools.settings import SearchSettings  # noqa: E402
from search_tools.study.storage import shown  # noqa: E402

EACH = int(os.environ.get("FLEXI_FUZZ", "10000"))
OF_A_SEED = 20
HEAD = {"format": "flexiffusion-schedule", "version": 1, "schedule": "FX|FXX"}
Make = Callable[[random.Random], Any]

NUMBERS = (0, 1, -1, 2, 3, 50, 1000, 2**31, 2**63, -(2**63), 10**30, 10**400, True, False)
FLOATS = (0.0, -0.0, 0.5, 1.0, 1e-320, 1e308, -1e308, math.inf, -math.inf, math.nan)
TEXTS = ("", " ", "\n", "\x00", "\x1b[31m", "\ud800", "\u202e", "\u2028", "[red]", "{}", "FX", "1e999", "1", "null", "é", "字")


def text_of(alphabet: str, most: int) -> Make:
    """Return what makes texts of some letters."""
    return lambda rnd: "".join(rnd.choices(alphabet, k=rnd.randrange(most + 1)))


def any_text(rnd: random.Random) -> str:
    """Return a text of whatever letters there are."""
    if rnd.random() < 0.4:
        return rnd.choice(TEXTS)
    return "".join(
        chr(rnd.choice((rnd.randrange(128), rnd.randrange(0x3000), rnd.randrange(0x110000)))) for _ in range(rnd.randrange(9))
    )


def scalars(rnd: random.Random) -> Any:
    """Return nothing, a number, or a text."""
    return rnd.choice(
        (
            lambda: None,
            lambda: rnd.choice(NUMBERS),
            lambda: rnd.randrange(-9, 99),
            lambda: rnd.choice(FLOATS),
            lambda: any_text(rnd),
        )
    )()


def values(rnd: random.Random, depth: int = 3) -> Any:
    """Return anything that JSON can hold, and numbers that it cannot."""
    kind = rnd.random()
    if depth == 0 or kind < 0.6:
        return scalars(rnd)
    if kind < 0.8:
        return [values(rnd, depth - 1) for _ in range(rnd.randrange(4))]
    return {any_text(rnd): values(rnd, depth - 1) for _ in range(rnd.randrange(4))}


def either(*makes: Make) -> Make:
    return lambda rnd: rnd.choice(makes)(rnd)


def one_of(*them: Any) -> Make:
    return lambda rnd: rnd.choice(them)


def lists(make: Make, most: int, least: int = 0) -> Make:
    return lambda rnd: [make(rnd) for _ in range(rnd.randint(least, most))]


def keyed(*names: str, other: Make = values) -> Make:
    """Return what makes dictionaries with some of the names."""
    return lambda rnd: {rnd.choice(names): other(rnd) for _ in range(rnd.randrange(5))}


def record(optional: dict[str, Make] | None = None, **makes: Make) -> Make:
    """Return what makes dictionaries with all of the names, and here and there an optional one."""

    def make(rnd: random.Random) -> dict[str, Any]:
        there = {name: inner(rnd) for name, inner in (optional or {}).items() if rnd.random() < 0.5}
        return {name: inner(rnd) for name, inner in makes.items()} | there

    return make


def fuzzed(**makes: Make):
    """Try a test on many made values, the same in every run."""

    def decorate(test):
        def drawn(rnd):
            for _ in range(OF_A_SEED):
                made = {name: make(rnd) for name, make in makes.items()}
                try:
                    test(**made)
                except BaseException:
                    hypothesis.note(repr(made))
                    raise

        drawn.__name__ = test.__name__
        # Nothing is shrunk: the values follow from the seed alone.
        limits = settings(
            max_examples=-(-EACH // OF_A_SEED),
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        return seed(20240917)(limits(given(rnd=st.integers(0, 2**64).map(random.Random))(drawn)))

    return decorate


def in_one_line(call, *args):
    """Return what a call returns, None where it refuses in one short line."""
    try:
        return call(*args)
    except FlexiError as error:
        words = str(error)
        assert words and len(words) <= 2_000 and words == visible(words)
        return None


@fuzzed(
    text=either(text_of("FPNXfp|@~^*();=,./-0123456789 e+ordersigmasbasisdenoised", 60), text_of("FX|PN@1~.,", 30), any_text)
)
def test_a_schedules_text_is_read_or_refused(text):
    schedule = in_one_line(Schedule.parse, text)
    if schedule is not None:
        assert Schedule.parse(str(schedule)) == schedule


teachers = keyed("architecture", "weights", "sampler", "scheduler", "steps", "sigmas", "cfg", "size", "patches")


@fuzzed(changes=keyed("format", "version", "schedule", "steps", "sigmas", "teacher", "measured", "provenance", "preset"),
        teacher=teachers, measured=keyed("psnr_db", "plain_db", "speedup_macs"))  # fmt: skip
def test_a_schedules_file_is_read_or_refused(changes, teacher, measured):
    data = HEAD | {"teacher": teacher, "measured": measured, "preset": {"measured": measured}} | changes
    schedule = in_one_line(from_dict, data)
    if schedule is not None:
        words = made_for(schedule)
        assert len(words) <= 500 and words == visible(words, "")
        assert from_dict(to_dict(schedule)) == schedule


@fuzzed(
    data=either(lambda rnd: rnd.randbytes(rnd.randrange(61)), lambda rnd: text_of('{}[]",:\\\\u0d8cfae1 ', 40)(rnd).encode())
)
def test_bytes_are_json_or_refused(data):
    try:
        parse_json(data, 5)
    except ValueError:
        return
    json.loads(data.decode("utf-8-sig"))


links = lists(either(one_of(*"1234"), one_of(0, 1, 2), one_of(*FLOATS)), 2, 2)
nodes = record(
    {"_meta": values},
    class_type=either(one_of("KSampler", "VAEDecode", "CLIPTextEncode", "LoraLoader", "SamplerCustom"), values),
    inputs=either(keyed("model", "positive", "vae", "samples", "text", "guider", "noise", other=either(links, values)), values),
)


@fuzzed(graph=either(keyed(*"1234", other=nodes), keyed(*"1234", other=nodes), values))
def test_a_workflow_is_read_or_refused(graph):
    def read():
        checked = workflow.checked(graph)
        sampler = workflow.find_sampler(checked)
        reduced = workflow.unmarked(workflow.reduced(checked, sampler), sampler)
        workflow.find_value(reduced, sampler, "scheduler")
        workflow.digest(reduced, sampler)
        return workflow.find_texts(reduced, sampler)

    in_one_line(read)


entries = keyed("name", "type", "link", "widget", other=either(one_of(0, 1, 2, 3), values))
saved_nodes = record(
    {
        "mode": one_of(0, 2, 4),
        "inputs": lists(entries, 2),
        "widgets_values": values,
        "outputs": lists(record(type=one_of("*")), 2),
        "properties": values,
    },
    id=one_of(0, 1, 2, 3),
    type=one_of("A", "Reroute", "PrimitiveNode", "s"),
)
saved_links = lists(either(lists(lambda rnd: rnd.randint(-20, 3), 6, 5), values), 3)


@fuzzed(nodes=lists(saved_nodes, 4), links=saved_links, inside=lists(saved_nodes, 2), extra=values)
def test_a_saved_workflow_is_read_or_refused(nodes, links, inside, extra):
    definitions = {"subgraphs": [{"id": "s", "nodes": inside, "links": links, "inputs": [{"name": "x"}]}]}
    define = {"A": {"input": {"required": {"seed": ("INT", {}), "text": ("STRING", {"dynamicPrompts": True})}}}}.get
    in_one_line(to_api, {"nodes": nodes, "links": links, "definitions": definitions, "extra": extra}, define)


@fuzzed(text=text_of("{}|/*\\\\a\n", 40))
def test_a_prompt_is_sent_on(text):
    assert len(first_of_each(text)) <= len(text)


@fuzzed(
    changes=keyed("backend", "teacher", "identity", "speedup", "families", "strategy", "seed", "stages", "finalists", "guesses")
)
def test_a_studys_settings_are_read_or_refused(changes):
    whole = {"backend": {"kind": "embedded"}, "teacher": {}, "identity": {}, "speedup": 2.0}
    in_one_line(SearchSettings.from_dict, SearchSettings(**whole).as_dict() | changes)


@fuzzed(changes=keyed("in_channels", "out_channels", "model_channels", "num_res_blocks", "channel_mult", "transformer_depth",
                      "transformer_depth_output", "transformer_depth_middle", "num_heads", "num_head_channels", "context_dim",
                      "attention_resolutions", other=either(values, lists(lambda rnd: rnd.randint(-2, 9), 4))))  # fmt: skip
def test_a_configuration_is_read_or_refused(changes):
    whole = {"in_channels": 3, "out_channels": 3, "model_channels": 32, "num_res_blocks": [1], "channel_mult": [1],
             "transformer_depth": [0], "transformer_depth_output": [0, 0], "transformer_depth_middle": -1}  # fmt: skip
    in_one_line(unet_arguments, whole | changes)


@fuzzed(text=any_text, password=lambda rnd: "".join(rnd.choices("pqrstuvw", k=rnd.randint(6, 9))))
def test_a_password_is_not_shown_whatever_stands_around_it(text, password):
    kind, rest = text[:6], text[6:]
    assert password in text or password not in shown(f"{kind}://me:{password}@{rest}")
