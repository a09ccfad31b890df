"""Before and after, in every view of the page."""

from __future__ import annotations

GRAPH = """() => {
  const ids = flexi.demo({ steps: 6 });
  flexi.node(ids.report).pos = [1020, 900];
  ids.compare = flexi.add(["FlexiCompare", 1020, 280]);
  flexi.connect([ids.apply, 1, ids.compare, "run"]);
  flexi.connect([ids.sampler, 0, ids.compare, "latent"]);
  return ids;
}"""
SLIDER = "flexi.node(id).flexi.slider"
LOADED = f"(id) => [{SLIDER}.full, {SLIDER}.schedule].every((image) => image.complete && image.naturalWidth === 32)"


def test_a_comparison_shows_both_pictures_under_a_slider_and_is_off_again(view):
    ids = view.do(GRAPH)
    view.run()
    view.until(f"(id) => {SLIDER}.words.innerText.includes('dB to the picture of all steps')", ids["compare"])
    view.until(LOADED, ids["compare"])
    assert view.do("(id) => flexi.widget(id, 'full_run').value", ids["compare"]) is False
    left, top, right, bottom = view.do(
        f"(id) => {{ const b = {SLIDER}.frame.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; }}",
        ids["compare"],
    )
    assert right - left > 200 and bottom - top > 150
    pictures = []
    for share in (0.02, 0.98):
        view.move(left + share * (right - left), top + 20)
        view.do("() => new Promise((done) => setTimeout(done, 200))")
        image = view.screen(f"compared {share}")
        pictures.append(image.crop(tuple(int(value) for value in (left + 40, top + 40, right - 40, bottom - 40))).tobytes())
    assert pictures[0] != pictures[1], "the slider uncovers another picture"
    words = view.do(f"(id) => {SLIDER}.words.innerText", ids["compare"])
    view.run()  # with it off: what was shown stays
    assert view.do(f"(id) => {SLIDER}.words.innerText", ids["compare"]) == words
    assert view.do(LOADED, ids["compare"])
