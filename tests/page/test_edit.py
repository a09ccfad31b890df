"""A schedule is edited by clicks and by files that fall on a node, in every view of the page."""

from __future__ import annotations

import json

import pytest

WORDS = "([id, words]) => flexi.words(id) === words"
TEXT = "([id, text]) => flexi.widget(id, 'text').value === text"


def clicked(view, node, step, count, text):
    """Click on a step of a node's strip; assert which text the schedule has then."""
    view.click(*view.do("flexi.cell", [node, step, count]))
    view.until(TEXT, [node, text])


def test_a_click_on_a_step_makes_it_the_next_kind_and_undo_takes_it_back(view):
    node = view.do("flexi.add", ["FlexiSchedule", 300, 200, {"text": "FX|F|F"}])
    view.until(WORDS, [node, "4 steps, 3 computed, about 1.3x"])
    view.click(750, 900)  # the page sees what there is to come back to
    for text, letters in (("FX|FP@3", "FXFP"), ("FX|FX", "FXFX"), ("FX|FN", "FXFN")):
        clicked(view, node, 3, 4, "2*(FX)" if text == "FX|FX" else text)
        view.until("([id, letters]) => flexi.panel(id).shown.letters === letters", [node, letters])
        assert view.letters(node, "clicked") == letters
    view.click(*view.do("flexi.cell", [node, 0, 4]))
    view.until("(id) => flexi.words(id).includes('first step stays full')", node)
    view.click(750, 900)
    view.press("Control+z")
    view.until(TEXT, [node, "2*(FX)"])
    view.press("Control+z")
    view.until(TEXT, [node, "FX|FP@3"])
    view.until("([id, letters]) => flexi.panel(id).shown.letters === letters", [node, "FXFP"])
    assert view.letters(node, "undone") == "FXFP"


FILE = {"format": "flexiffusion-schedule", "version": 1, "schedule": "2*(FXX)|F; order=0", "steps": 7}


def dropped(view, node, name, content):
    left, top, right, bottom = view.do("flexi.box", [node])
    view.drop((left + right) / 2, (top + bottom) / 2, name, content, "application/json")


@pytest.mark.parametrize("over", ["FlexiSchedule", "FlexiLoadSchedule"])
def test_a_schedule_that_falls_on_a_node_is_loaded(view, over):
    node = view.do("flexi.add", [over, 300, 200, {}])
    view.do("() => new Promise((done) => setTimeout(done, 600))")
    dropped(view, node, f"from a friend {view.name}.json", json.dumps(FILE).encode())
    view.until(WORDS, [node, "7 steps, 3 computed, about 2.3x"])
    assert view.letters(node, f"dropped on {over}") == "FXXFXXF"
    if over == "FlexiSchedule":
        assert view.do("(id) => flexi.widget(id, 'text').value", node) == "2*(FXX)|F; order=0"
    else:
        assert view.do("(id) => flexi.widget(id, 'file').value", node) == f"from a friend {view.name}.json"
    dropped(view, node, "broken.json", json.dumps({**FILE, "schedule": "FXQ"}).encode())
    view.until("(id) => flexi.words(id).includes(\"unknown step 'Q'\")", node)


def test_a_saved_schedule_says_where_and_can_be_loaded_without_a_reload(view):
    load = view.do("flexi.add", ["FlexiLoadSchedule", 300, 500, {}])
    typed = view.do("flexi.add", ["FlexiSchedule", 300, 130, {"text": "FXX|FX"}])
    name = f"mine {view.name}"
    save = view.do("flexi.add", ["FlexiSaveSchedule", 800, 130, {"file_name": name}])
    view.do("flexi.connect", [typed, 0, save, "schedule"])
    view.run()
    view.until("([id, name]) => flexi.panel(id).details.innerText.includes(name)", [save, f"{name}.json"])
    view.until("([id, name]) => flexi.widget(id, 'file').options.values.includes(name)", [load, f"{name}.json"])
    view.do("flexi.set", [load, "file", f"{name}.json"])
    view.until(WORDS, [load, "5 steps, 2 computed, about 2.5x"])
    assert view.letters(load, "saved and loaded") == "FXXFX"
