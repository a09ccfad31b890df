"""A run is seen as it goes on, in every view of the page."""

from __future__ import annotations

RECORD = """(id) => {
  window.seen = [];
  const panel = flexi.panel(id);
  const show = panel.show;
  panel.show = function (said, done) {
    show.call(this, said, done);
    const { width, height } = this.canvas;
    const count = this.shown.letters.length;
    const alpha = (i) => this.canvas.getContext("2d").getImageData(((i + 0.5) * width) / count, height - 2, 1, 1).data[3];
    seen.push([done ?? null, this.words.innerText, Array.from({ length: count }, (_, i) => alpha(i))]);
  };
}"""


def test_steps_are_marked_as_they_run_and_what_came_out_is_told(view):
    ids = view.do("flexi.demo", {"steps": 12, "schedule": ["FlexiSchedule", {"text": "4*(FXN)"}]})
    assert view.words(ids["apply"]) == "The steps are shown here as they run."
    view.do("() => new Promise((done) => setTimeout(done, 500))")
    view.do(RECORD, ids["apply"])
    view.run()
    seen = view.until("() => seen.length > 4 && seen")
    done = [each[0] for each in seen]
    assert done == [0, 1, 3, 4, 6, 7, 9, 10, None]
    assert seen[4][1].startswith("Step 7 of 12: full") and seen[4][1].endswith("left")
    for reached, _, alphas in seen[:-1]:
        assert all((alpha > 200) == (i < reached) for i, alpha in enumerate(alphas)), (reached, alphas)
    assert "4 of 12 steps computed" in view.words(ids["apply"])
    assert view.letters(ids["apply"], "after a live run") == "FXNFXNFXNFXN"
    details = view.do("(id) => flexi.panel(id).details.innerText", ids["apply"])
    assert "4 full" in details and "4 extrapolated" in details


def test_a_preset_shows_the_steps_that_it_became(view):
    ids = view.do("flexi.demo", {"steps": 20, "schedule": ["FlexiPreset", {"preset": "2x", "steps": 0}]})
    view.run()
    view.until("(id) => flexi.words(id).includes('10 of 20 steps computed')", ids["apply"])
    assert view.letters(ids["apply"]).count("F") == 10


def test_a_run_that_the_schedule_was_not_made_for_says_so_first(view):
    file = {"file": "demo-euler-5x.json (bundled)"}
    ids = view.do("flexi.demo", {"steps": 50, "sampler": "dpmpp_2m", "schedule": ["FlexiLoadSchedule", file]})
    view.run()
    view.until("(id) => flexi.report(id).startsWith('Made for another sampler: expect artefacts.')", ids["report"])
    assert "Made for another sampler" in view.do("(id) => flexi.panel(id).details.innerText", ids["apply"])
    view.screen("another sampler")
