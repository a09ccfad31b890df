"""The page's script under node: what it draws in every frame was parsed before, and every text is bounded."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "web" / "flexiffusion.js"
pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")

# A page of nothing but what the script asks of it; `parsed` counts the texts that are taken apart.
PAGE = """
let parsed = 0;
const replaceAll = String.prototype.replaceAll, split = String.prototype.split;
String.prototype.replaceAll = function (...a) { parsed++; return replaceAll.apply(this, a); };
String.prototype.split = function (...a) { parsed++; return split.apply(this, a); };
const drawn = [];
const get = (_, name) => (name === "fillRect" ? (...a) => drawn.push(a) : () => {});
const context = new Proxy({}, { get, set: () => true });
let extension;
const app = { registerExtension: (each) => { extension = each; } };
function makeNode(name, value) {
  class Node {
    widgets = [{ name: "text", type: "customtext", value }];
    addCustomWidget(widget) { this.widgets.push(widget); }
  }
  extension.beforeRegisterNodeDef(Node, { name });
  const node = new Node();
  node.onNodeCreated();
  return node;
}
"""


def run(script: str):
    """Return what a script prints as JSON, run behind the page's own."""
    own = SCRIPT.read_text(encoding="utf-8").replace('import { app } from "/scripts/app.js";', "")
    done = subprocess.run(["node", "-"], input=PAGE + own + script, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_a_text_is_parsed_when_it_changes_and_not_in_every_frame():
    found = run("""
const node = makeNode("FlexiSchedule", "5000*(FX)");
const draw = () => node.flexiStrip.draw(context, node, 300, 0);
const counts = [];
for (let i = 0; i < 100; i++) draw();
counts.push(parsed);
node.widgets[0].value = "FXX";
for (let i = 0; i < 100; i++) draw();
counts.push(parsed);
console.log(JSON.stringify({ counts, cells: drawn.length }));
""")
    first, second = found["counts"]
    assert first < 20 and second < 2 * first + 1


def test_lines_under_the_strip_are_broken_when_they_change():
    found = run("""
const node = makeNode("FlexiLoadSchedule", "a");
node.onExecuted({ flexi_steps: ["FX"], text: ["made for 2 steps; ".repeat(20)] });
const before = parsed;
for (let i = 0; i < 100; i++) { node.flexiStrip.computeSize(300); node.flexiStrip.draw(context, node, 300, 0); }
console.log(JSON.stringify(parsed - before));
""")
    assert found < 60


HOSTILE = (
    "'F'.repeat(1e6)", "'9999*(F)|'.repeat(11000)", "'9*('.repeat(8) + 'F' + ')'.repeat(8)", "'('.repeat(99999)", "null", "{}",
    "[1]",
)  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_throws_or_draws_more_than_its_bound(text):
    found = run(f"""
const node = makeNode("FlexiSchedule", {text});
node.flexiStrip.draw(context, node, 300, 0);
console.log(JSON.stringify(drawn.length));
""")
    assert found <= 2001


def test_heights_and_texts_from_a_file_are_bounded():
    found = run("""
const node = makeNode("FlexiLoadSchedule", "a");
node.onExecuted({ flexi_steps: ["F".repeat(1e5)], text: ["euler; ".repeat(1e6)] });
const [, height] = node.flexiStrip.computeSize(300);
console.log(JSON.stringify({ height, line: node.flexiStrip.line.length, steps: node.flexiStrip.steps.length }));
""")
    assert found["height"] < 700 and found["line"] <= 2000 and found["steps"] <= 2000


def test_what_was_shown_for_a_setting_is_shown_for_it_alone():
    found = run("""
const node = makeNode("FlexiPreset", "2x");
node.widgets[0].name = "preset";
node.onExecuted({ flexi_steps: ["FXFX"], text: [""] });
const cells = () => { drawn.length = 0; node.flexiStrip.draw(context, node, 300, 0); return drawn.length; };
const counts = [cells()];
node.widgets[0].value = "3x";
counts.push(cells());
console.log(JSON.stringify(counts));
""")
    assert found == [5, 1]
