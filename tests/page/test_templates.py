"""The templates as the page opens them, in every view: every node is known, and none lies over another."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

TEMPLATES = sorted((Path(__file__).resolve().parents[2] / "example_workflows").glob("*.json"))
OPEN = """async (text) => {
  flexi.clear();
  await app.loadGraphData(JSON.parse(text));
  // All of it is in sight: Nodes 2.0 makes elements of no others.
  app.canvas.ds.scale = 0.22;
  app.canvas.ds.offset = [900, 500];
  app.canvas.setDirty(true, true);
  await new Promise((done) => setTimeout(done, 800));
}"""
# Of classic nodes the page knows the sizes; those of Nodes 2.0 are elements.
BOXES = """() => {
  const elements = [...document.querySelectorAll("[data-node-id]")];
  return app.graph.nodes.map((node) => {
    const element = elements.find(({ dataset }) => dataset.nodeId === String(node.id));
    const [width, height] = element ? [element.offsetWidth, element.offsetHeight] : [node.size[0], node.size[1] + 30];
    return [node.title, node.pos[0], node.pos[1] - 30, width, height, !!LiteGraph.registered_node_types[node.type]];
  });
}"""


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_opens_with_no_node_over_another(view, template):
    view.do(OPEN, template.read_text(encoding="utf-8"))
    boxes = view.do(BOXES)
    view.screen(template.stem)
    assert len(boxes) == len(json.loads(template.read_text(encoding="utf-8"))["nodes"])
    for (a, left, top, width, height, _), (b, x, y, wide, high, _) in itertools.combinations(boxes, 2):
        apart = left + width <= x or x + wide <= left or top + height <= y or y + high <= top
        assert apart, f"{a} {(left, top, width, height)} lies over {b} {(x, y, wide, high)}"
