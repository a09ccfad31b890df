"""Files and texts that nobody would write: each is read, or refused in one short line; nothing else ever comes of them.

One seed, so that a run finds what the last one found. `FLEXI_FUZZ` is how many of each are tried: 10,000 of each take 330
seconds of one core.
"""

import json
import os

import pytest

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from flexi_core import FlexiError, Schedule  # noqa: E402
from flexi_core.demo.unet_config import unet_arguments  # noqa: E402
from flexi_core.json_text import parse_json  # noqa: E402
from flexi_core.schedule_file import from_dict, made_for, to_dict  # noqa: E402
from flexi_core.words import visible  # noqa: E402
from search_tools import workflow  # noqa: E402
from search_tools.saved_workflow import first_of_each, to_api  # noqa: E402
from search_tools.settings import SearchSettings  # noqa: E402
from search_tools.storage import shown  # noqa: E402

EACH = int(os.environ.get("FLEXI_FUZZ", "1800"))
HEAD = {"format": "flexiffusion-schedule", "version": 1, "schedule": "FX|FXX"}

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def fuzzed(**given_by):
    """Try a test on many drawn values, the same in every run."""

    def decorate(test):
        healthy = [HealthCheck.too_slow, HealthCheck.data_too_large]
        limits = settings(max_examples=EACH, deadline=None, database=None, suppress_health_check=healthy)
        return seed(20240917)(limits(given(**given_by)(test)))

    return decorate


def in_one_line(call, *args):
    """Return what a call returns, None where it refuses in one short line."""
    try:
        return call(*args)
    except FlexiError as error:
        words = str(error)
        assert words and len(words) <= 2_000 and words == visible(words)
        return None


def keyed(*names, other=values):
    return st.dictionaries(st.sampled_from(names), other, max_size=4)


@fuzzed(text=st.text(alphabet="FPNXfp|@~^*();=,./-0123456789 e+ordersigmasbasisdenoised", max_size=60) | st.text(max_size=30))
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


@fuzzed(data=st.binary(max_size=60) | st.text(alphabet='{}[]",:\\\\u0d8cfae1 ', max_size=40).map(str.encode))
def test_bytes_are_json_or_refused(data):
    try:
        parse_json(data, 5)
    except ValueError:
        return
    json.loads(data.decode("utf-8-sig"))


links = st.tuples(st.sampled_from("1234"), st.integers(0, 2) | st.floats()).map(list)
nodes = st.fixed_dictionaries(
    {"class_type": st.sampled_from(["KSampler", "VAEDecode", "CLIPTextEncode", "LoraLoader", "SamplerCustom"]) | values,
     "inputs": keyed("model", "positive", "vae", "samples", "text", "guider", "noise", other=links | values) | values},
    optional={"_meta": values},
)  # fmt: skip


@fuzzed(graph=st.dictionaries(st.sampled_from("1234"), nodes, max_size=4) | values)
def test_a_workflow_is_read_or_refused(graph):
    def read():
        checked = workflow.checked(graph)
        sampler = workflow.find_sampler(checked)
        reduced = workflow.unmarked(workflow.reduced(checked, sampler), sampler)
        workflow.find_value(reduced, sampler, "scheduler")
        workflow.digest(reduced, sampler)
        return workflow.find_texts(reduced, sampler)

    in_one_line(read)


entries = keyed("name", "type", "link", "widget", other=st.integers(0, 3) | values)
saved_nodes = st.fixed_dictionaries(
    {"id": st.integers(0, 3), "type": st.sampled_from(["A", "Reroute", "PrimitiveNode", "s"])},
    optional={"mode": st.sampled_from([0, 2, 4]), "inputs": st.lists(entries, max_size=2), "widgets_values": values,
              "outputs": st.lists(st.fixed_dictionaries({"type": st.just("*")}), max_size=2), "properties": values},
)  # fmt: skip
saved_links = st.lists(st.lists(st.integers(-20, 3), min_size=5, max_size=6) | values, max_size=3)


@fuzzed(nodes=st.lists(saved_nodes, max_size=4), links=saved_links, inside=st.lists(saved_nodes, max_size=2), extra=values)
def test_a_saved_workflow_is_read_or_refused(nodes, links, inside, extra):
    definitions = {"subgraphs": [{"id": "s", "nodes": inside, "links": links, "inputs": [{"name": "x"}]}]}
    define = {"A": {"input": {"required": {"seed": ("INT", {}), "text": ("STRING", {"dynamicPrompts": True})}}}}.get
    in_one_line(to_api, {"nodes": nodes, "links": links, "definitions": definitions, "extra": extra}, define)


@fuzzed(text=st.text(alphabet="{}|/*\\\\a\n", max_size=40))
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
                      "attention_resolutions", other=values | st.lists(st.integers(-2, 9), max_size=4)))  # fmt: skip
def test_a_configuration_is_read_or_refused(changes):
    whole = {"in_channels": 3, "out_channels": 3, "model_channels": 32, "num_res_blocks": [1], "channel_mult": [1],
             "transformer_depth": [0], "transformer_depth_output": [0, 0], "transformer_depth_middle": -1}  # fmt: skip
    in_one_line(unet_arguments, whole | changes)


@fuzzed(text=st.text(max_size=12), password=st.text(alphabet="pqrstuvw", min_size=6, max_size=9))
def test_a_password_is_not_shown_whatever_stands_around_it(text, password):
    kind, rest = text[:6], text[6:]
    hypothesis.assume(password not in text)
    assert password not in shown(f"{kind}://me:{password}@{rest}")
