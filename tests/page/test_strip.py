"""What a person sees in nodes that give a schedule, in every view of the page."""

from __future__ import annotations

import itertools

WORDS = "(wanted) => flexi.words(wanted[0]) === wanted[1]"


def shows(view, node, words, letters):
    """Assert that a node says these words, and that the cells of its strip have the colours of these steps."""
    view.until(WORDS, [node, words], limit_s=10)
    assert view.letters(node) == letters


def typed(view, node, text):
    """Type another text into a Flexi Schedule, as a person does."""
    view.click(*view.do("flexi.typing", node))
    view.press("Control+a")
    view.type(text)


def test_a_text_is_shown_as_it_is_typed_and_a_wrong_one_says_why(view):
    node = view.do("flexi.add", ["FlexiSchedule", 300, 200, {}])
    shows(view, node, "20 steps, 10 computed, about 2.0x", "FX" * 10)
    typed(view, node, "FXX|FPP@2")
    shows(view, node, "6 steps, 2 computed, 2 in part, up to 3.0x", "FXXFPP")
    typed(view, node, "FX | FX\nFNN")
    shows(view, node, "7 steps, 3 computed, about 2.3x", "FXFXFNN")
    view.screen("typed")
    typed(view, node, "FXQ")
    view.until("(id) => flexi.words(id).includes(\"unknown step 'Q'\")", node, limit_s=10)
    view.screen("wrong text")
    legend = view.do("(id) => flexi.panel(id).legend.innerText", node)
    assert "full" in legend and "extrapolated" in legend and "removed" in legend


def test_a_preset_and_a_file_are_shown_as_they_are_chosen(view):
    preset = view.do("flexi.add", ["FlexiPreset", 300, 200, {"steps": 20}])
    file = view.do("flexi.add", ["FlexiLoadSchedule", 800, 200, {"file": "demo-euler-5x.json (bundled)"}])
    view.until(WORDS, [preset, "20 steps, 10 computed, about 2.0x"], limit_s=10)
    assert view.letters(preset, "chosen").count("F") == 10
    view.do("flexi.set", [preset, "preset", "5x"])
    view.until("(id) => flexi.words(id).endsWith('about 5.0x')", preset, limit_s=10)
    assert view.letters(preset, "chosen other").count("F") == 4
    assert view.letters(file).count("F") == 10
    view.do("flexi.set", [preset, "steps", 0])
    view.until(WORDS, [preset, "5x: computes about a fifth of the run's steps."], limit_s=10)
    assert "made for 50 euler steps" in view.do("(id) => flexi.panel(id).details.innerText", file)


def test_what_was_shown_comes_back_after_a_reload_another_tab_and_an_undo(view):
    ids = view.do("flexi.demo", {})
    view.run()
    shows(view, ids["schedule"], "6 steps, 3 computed, about 2.0x", "FXFXFX")
    text = view.do("flexi.report", ids["report"])
    assert "6 steps: 3 full, 3 null (extrapolated)" in text
    view.screen("after a run")
    view.click(620, 420)  # beside all nodes: the page sees what changed
    title, top = view.do("flexi.title", ids["model"]), view.do("(id) => flexi.node(id).pos[1]", ids["model"])
    view.drag(title, [title[0], title[1] + 40])
    assert view.do("(id) => flexi.node(id).pos[1]", ids["model"]) > top + 20
    view.do("() => new Promise((done) => setTimeout(done, 700))")
    view.press("Control+z")
    view.until("([id, top]) => Math.abs(flexi.node(id)?.pos[1] - top) < 1", [ids["model"], top])
    back(view, ids, text)
    view.do("() => app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    view.until("() => app.graph._nodes.length !== 8")
    view.do("() => app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")
    view.until("() => app.graph._nodes.length === 8")
    back(view, ids, text)
    view.reload()
    back(view, ids, text)
    view.screen("after a reload")


def back(view, ids, text):
    view.until("([id, text]) => flexi.report(id) === text", [ids["report"], text], limit_s=20)
    shows(view, ids["schedule"], "6 steps, 3 computed, about 2.0x", "FXFXFX")


def test_nodes_have_room_for_what_they_show_and_keep_their_size_when_they_run(view):
    ids = view.do("flexi.demo", {"steps": 20, "schedule": ["FlexiPreset", {"preset": "2x", "steps": 0}]})
    view.do("() => new Promise((done) => setTimeout(done, 500))")
    before = {name: view.do("flexi.outline", each) for name, each in ids.items()}
    view.run()
    after = {name: view.do("flexi.outline", each) for name, each in ids.items()}
    view.screen("sizes")
    for name in ("schedule", "apply"):
        assert after[name] == before[name]
    for one, other in itertools.combinations(after.values(), 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1], (one, other)
    left, top, right, bottom = view.do("flexi.box", [ids["report"]])
    assert right - left >= 400 and bottom - top >= 150
