"""The templates as they are saved: whole, readable, with room between nodes, and a thumbnail beside each."""

import itertools
import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "example_workflows"
WORKFLOWS = sorted(FOLDER.glob("*.json"))
TITLE, APART = 30, 50  # pixels above a node's place, and between two: a node of Nodes 2.0 is a little larger than it was saved
LARGEST_THUMBNAIL = 80_000  # bytes


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def workflow(request):
    return json.loads(request.param.read_text(encoding="utf-8"))


def test_there_is_a_template_for_every_use():
    uses = {"demo", "sd15_2x", "sdxl_2x", "flux_2x", "wan22_two_experts", "z_image_turbo", "hires_fix", "img2img", "controlnet"}
    assert {path.stem.removeprefix("flexiffusion_") for path in WORKFLOWS} == uses | {"my_schedule", "tune"}


def test_every_template_has_a_small_thumbnail():
    thumbnails = {path.stem: path for path in FOLDER.glob("*.jpg")}
    assert set(thumbnails) == {path.stem for path in WORKFLOWS}
    for path in thumbnails.values():
        assert path.read_bytes()[:2] == b"\xff\xd8" and path.stat().st_size < LARGEST_THUMBNAIL


def test_no_two_nodes_overlap(workflow):
    boxes = [(node["pos"], node["size"], node["type"]) for node in workflow["nodes"]]
    for ((left, top), (width, height), a), ((x, y), (wide, high), b) in itertools.combinations(boxes, 2):
        beside = left + width + APART <= x or x + wide + APART <= left
        under = top + height + TITLE + APART <= y or y + high + TITLE + APART <= top
        assert beside or under, (a, b)


def test_every_link_joins_what_both_its_ends_say(workflow):
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for number, origin, output, target, slot, kind in workflow["links"]:
        assert number in nodes[origin]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == number
        assert nodes[origin]["outputs"][output]["type"] == kind
        assert nodes[target]["inputs"][slot]["type"] in (kind, "*")
    assert len({node["id"] for node in workflow["nodes"]}) == len(workflow["nodes"])


def test_every_template_has_a_note_and_a_report(workflow):
    (note,) = [node for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    words = note["widgets_values"][0]
    assert len(words) > 200 and "arXiv 2409.17566" in words
    assert any(node["type"] == "FlexiReport" for node in workflow["nodes"])


def test_every_file_that_a_template_wants_can_be_fetched_by_the_page(workflow):
    for node in workflow["nodes"]:
        wanted = {value for value in node["widgets_values"] if str(value).endswith(".safetensors")}
        offered = {model["name"]: model for model in node["properties"].get("models", [])}
        assert set(offered) == wanted
        for name, model in offered.items():
            assert re.fullmatch(rf"https://huggingface\.co/.+/{re.escape(name)}", model["url"]) and model["directory"]
