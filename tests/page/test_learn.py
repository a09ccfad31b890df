"""Flexi Learn, in every view of the page: what the node says from picture to picture, and its buttons."""

from __future__ import annotations

GRAPH = """() => {
  const ids = flexi.demo({ steps: 8 });
  ids.learn = flexi.add(["FlexiLearn", 1020, 700]);
  flexi.connect([ids.model, 0, ids.learn, "model"]);
  flexi.connect([ids.learn, 0, ids.sampler, "model"]);
  flexi.connect([ids.learn, 1, ids.report, "run"]);
  flexi.set([ids.sampler, "cfg", 2 + Math.round(Math.random() * 1000) / 1000]);  // a run that no other view made
  return ids;
}"""
SAID = "(id) => flexi.panel(id).element.textContent"
FROZEN = "(id) => flexi.widget(id, 'frozen').value"


def press(view, node: int, button: str) -> None:
    view.do("([id, name]) => flexi.widget(id, name).callback()", [node, button])


def test_pictures_are_recorded_then_made_faster_and_what_was_learned_is_kept_or_forgotten(view):
    ids = view.do(GRAPH)
    learn = ids["learn"]
    for number in (1, 2):
        view.do("flexi.set", [ids["sampler"], "seed", number])
        view.run()
        view.until(f"(id) => ({SAID})(id).includes('Recording {number} of 2')", learn)
    view.do("flexi.set", [ids["sampler"], "seed", 3])
    view.run()
    view.until(f"(id) => ({SAID})(id).includes('4 of 8 steps are computed, 2x fewer. Predicted: ')", learn)
    view.screen("learned")
    press(view, learn, "Freeze")
    view.until(f"(id) => ({FROZEN})(id) !== ''", learn)
    frozen = view.do(FROZEN, learn)
    saved = view.do("() => app.graph.serialize().nodes.find(({ type }) => type === 'FlexiLearn').widgets_values")
    assert frozen in saved, "a shared workflow has what was learned"
    view.do("flexi.set", [ids["sampler"], "seed", 4])
    view.run()
    view.until(f"(id) => ({SAID})(id).includes('Frozen: 4 of 8 steps are computed')", learn)
    press(view, learn, "Forget")
    view.until(f"(id) => ({FROZEN})(id) === ''", learn)
