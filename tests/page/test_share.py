"""Pictures carry their schedule and open as the graph that made them; the page finds the nodes by what they are for."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

# The picture of the steps is saved: any picture of the prompt carries the same.
GRAPH = """() => {
  const ids = flexi.demo({ steps: 6, schedule: ["FlexiSchedule", { text: "FXX|FX|F" }] });
  ids.save = flexi.add(["SaveImage", 1020, 820]);
  flexi.connect([ids.report, 2, ids.save, "images"]);
  return ids;
}"""
SAVED = """async () => {
  const history = Object.values(await (await fetch("/api/history?max_items=1")).json());
  const images = Object.values(history.at(-1).outputs).flatMap((out) => out.images ?? []);
  const { filename, subfolder } = images.find((image) => image.type === "output");
  return `/view?type=output&filename=${filename}&subfolder=${subfolder}`;
}"""
NODES = """() => app.graph._nodes.map((node) => {
  const own = node.widgets?.filter((widget) => !widget.name.startsWith("flexi_"));
  return [node.type, (own ?? []).map((widget) => widget.value)];
})"""
OPEN = """async (address) => {
  const blob = await (await fetch(address)).blob();
  await app.handleFile(new File([blob], "picture.png", { type: "image/png" }));
}"""


def test_a_saved_picture_carries_its_schedule_and_opens_as_its_graph(view):
    ids = view.do(GRAPH)
    nodes = [each for each in view.do(NODES)]
    view.run()
    address = view.do(SAVED)
    text = Image.open(io.BytesIO(view.server.get(address))).text
    assert json.loads(text["flexiffusion"]) == {str(ids["apply"]): "FXX|FX|F"}
    view.do("() => flexi.clear()")
    view.do(OPEN, address)
    view.until("() => app.graph._nodes.length === 9")
    again = view.do(NODES)
    assert sorted(map(json.dumps, again)) == sorted(map(json.dumps, nodes))
    (schedule,) = view.do("() => app.graph._nodes.filter((node) => node.type === 'FlexiSchedule').map((node) => node.id)")
    view.until("([id, words]) => flexi.words(id) === words", [schedule, "6 steps, 3 computed, about 2.0x"])


WORDS = ("speed", "accelerate", "faster", "cache", "deepcache", "teacache")
IN_NAMES = WORDS[:-1]  # a page that knows no aliases looks at names alone
FOUND = "() => ['Flexi Apply', 'Flexi Preset', 'Flexi Learn'].some((name) => document.body.innerText.includes(name))"


def test_nodes_are_found_by_what_they_are_for(view):
    aliases = view.name != "old" and "search_aliases" in view.server.get("/object_info/FlexiApply")["FlexiApply"]
    words = WORDS if aliases else IN_NAMES
    view.do("() => flexi.clear()")
    view.do("() => app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    view.do("() => new Promise((done) => setTimeout(done, 700))")
    try:
        for word in words:
            view.press("Control+a")
            view.type("no such node")
            view.until(f"() => !({FOUND})()")
            view.press("Control+a")
            view.type(word)
            view.until(FOUND)
            view.screen(f"search {word}")
    finally:
        view.press("Escape")
        view.press("Escape")


def test_nothing_deprecated_is_touched_and_nothing_of_ours_fails(view):
    view.do("flexi.demo", {})
    view.run()
    view.reload()
    said = [line for line in view.loaded + view.said() if "flexi" in line.lower()]
    assert not [line for line in said if "deprecat" in line.lower() or "Flexiffusion:" in line or line.startswith("pageerror")]


CONTRAST = """([words, background]) => {
  const light = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number)
    .map((v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const [a, b] = [light(words), light(background)].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
}"""


@pytest.mark.parametrize("palette", ["light", "dark"])
def test_words_are_readable_in_the_light_theme_too(view, palette):
    node = view.do("flexi.add", ["FlexiPreset", 300, 200, {"steps": 20}])
    view.until("(id) => flexi.words(id).length > 0", node)
    view.do("(name) => app.extensionManager.setting.set('Comfy.ColorPalette', name)", palette)
    try:
        view.do("() => new Promise((done) => setTimeout(done, 800))")
        image = view.screen(f"{palette} theme")
        left, top, *_ = view.do("flexi.box", [node])
        background = f"rgb{image.getpixel((int(left) - 3, int(top) + 40))}"
        for part in ("words", "details", "legend"):
            colour = view.do("([id, part]) => getComputedStyle(flexi.panel(id)[part]).color", [node, part])
            assert view.do(CONTRAST, [colour, background]) >= 4.5, (part, colour, background)
    finally:
        view.do("() => app.extensionManager.setting.set('Comfy.ColorPalette', 'dark')")
