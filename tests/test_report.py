"""The report of a study as one page, and its schedules at any speed-up."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from html.parser import HTMLParser

import optuna
import pytest
import torch
from optuna.trial import TrialState, create_trial
from PIL import Image
from typer.testing import CliRunner

from flexi_core import FlexiError, Schedule, load_schedule
from flexi_core.schedule.file import from_dict
from search_tools.backends.embedded import EmbeddedBackend
from search_tools.backends.teacher import TeacherSettings
from search_tools.cli import app
from search_tools.report.page import file_name_of, write_report
from search_tools.report.pictures import png_uri, visible
from search_tools.settings import SearchSettings
from search_tools.study.front import as_fast, best_at, best_so_far, evaluated, found_in, front, ranked
from search_tools.study.study import open_study

ODD_NAME = """</script><script>alert(1)</script> <img src="https://x.invalid/a.png"> & 'so' on"""
# Schedule, full steps' worth, paired error (None: a screen ended it), rFID. Of 6 steps.
CANDIDATES = [
    ("3*(FX)", 3.0, 0.004, 0.4),
    ("FXX|FXX", 2.0, 0.010, 0.9),
    ("FPX@2|FXX", 2.25, 0.020, 0.7),
    ("F|FXXXX", 2.0, 0.011, 0.5),
    ("FXXXXX", 1.0, 0.300, 9.0),
    ("FNNNNN", 1.0, None, None),
    ("2*(F)|FX|FX", 4.0, 0.0, 0.0),
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXI_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def settings() -> SearchSettings:
    return SearchSettings.of(EmbeddedBackend(TeacherSettings(steps=6)), 2.0, 16)


@pytest.fixture
def storage(tmp_path) -> str:
    return f"sqlite:///{tmp_path / 'studies.db'}"


@pytest.fixture
def make_study(storage, settings):
    def make(candidates=CANDIDATES, name: str = ODD_NAME, **changes: object) -> optuna.Study:
        changed = replace(settings, **changes)
        study = open_study(storage, name, changed)
        for text, spent, mse, rfid in candidates:
            attributes = {"schedule": text, "spent": spent, "seconds": 2.0, "errors": [mse or 1.0]}
            if mse is None:
                study.add_trial(create_trial(state=TrialState.PRUNED, user_attrs=attributes))
                continue
            psnr = float("inf") if mse == 0 else 30.0 + rfid
            attributes |= {"mse": mse, "evaluation": {"rfid": rfid, "psnr_db": psnr, "mse": mse}}
            values = [rfid, spent][: len(study.directions)]
            study.add_trial(create_trial(state=TrialState.COMPLETE, values=values, user_attrs=attributes))
        return study

    return make


class Page(HTMLParser):
    """A page's elements, what it fetches and links to, and its visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.links: list[str] = []
        self.words = ""
        self._hidden: str | None = None
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append((tag, values))
        self.links += [values[name] for name in ("src", "href", "srcset", "data", "action", "poster") if values.get(name)]
        if tag in ("script", "style"):
            self._hidden = tag
            self.scripts.append("")

    def handle_endtag(self, tag):
        if tag == self._hidden:
            self._hidden = None

    def handle_data(self, data):
        if self._hidden is None:
            self.words += data
        else:
            self.scripts[-1] += data

    def of(self, tag: str) -> list[dict[str, str]]:
        return [values for name, values in self.tags if name == tag]


def charts_of(page: Page) -> dict:
    line = next(line for line in page.scripts[-1].splitlines() if line.startswith("const charts = "))
    return json.loads(line.removeprefix("const charts = ").rstrip(";"))


@pytest.mark.parametrize("strategy", ["evolution", "nsga2"])
def test_a_report_holds_everything_and_fetches_nothing(make_study, tmp_path, strategy):
    file = tmp_path / "report.html"
    assert write_report(make_study(strategy=strategy), file, images=False) is not None
    page = Page(file.read_text(encoding="utf-8"))
    assert all(link.startswith("data:") for link in page.links) and page.links
    policy = next(meta["content"] for meta in page.of("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "http" not in policy
    assert ODD_NAME in page.words and len(page.of("script")) == 2 and not page.of("img")
    assert "candidates, 6 fully evaluated" in " ".join(page.words.split())
    for text, _, mse, _ in CANDIDATES:
        assert (str(Schedule.parse(text)) in page.words) == (mse is not None)
    for words in ("teacher.sampler", "models/flexi_schedules", "Flexi Load Schedule", "Flexi Apply", "--no-images"):
        assert words in page.words
    assert "step 2: partial, depth 2 (segment 1)" in page.words and "step 2: extrapolated (segment 1)" in page.words

    charts = charts_of(page)
    candidates, on_front, best = charts["pareto"]["data"]
    hovers = {point[0]: point for trace in (candidates, on_front, best) for point in trace["customdata"]}
    assert set(hovers) == {"0", "1", "2", "3", "4", "6"}
    assert hovers["0"] == ["0", "2.00x", "30.40 dB", "0.4", "0.004", "3*(FX)", "3*(FX)"] == best["customdata"][0]
    assert [point[0] for point in on_front["customdata"]] == ["6", "0", "1", "4"]
    assert charts["candidates"]["data"][1]["x"] == [1, 2, 3, 4, 5, 6, 7]
    assert charts["seconds"]["data"][1]["x"] == [2, 4, 6, 8, 10, 12, 14]


def test_the_schedule_file_in_a_report_is_that_of_its_best_candidate(make_study, tmp_path):
    file = tmp_path / "report.html"
    write_report(make_study(), file, images=False)
    link = next(values for values in Page(file.read_text(encoding="utf-8")).of("a") if "download" in values)
    assert link["download"] == "flexi_euler_6_2x.json"
    schedule = from_dict(json.loads(base64.b64decode(link["href"].split(",")[1])))
    assert str(schedule) == "3*(FX)" and schedule.info["provenance"]["study"] == ODD_NAME


def test_a_report_shows_the_teachers_images_and_the_candidates(make_study, tmp_path):
    file = tmp_path / "report.html"
    assert write_report(make_study(), file, samples=2) is None
    page = Page(file.read_text(encoding="utf-8"))
    assert [image["class"] for image in page.of("img")] == ["small teacher"] * 2 + ["small candidate"] * 8
    pictures = [Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1]))) for image in page.of("img")]
    assert {picture.size for picture in pictures} == {(32, 32)} and {picture.format for picture in pictures} == {"PNG"}
    teacher = EmbeddedBackend(TeacherSettings(steps=6)).teacher(0, 2)
    assert page.of("img")[1]["src"] == png_uri(visible(teacher)[0][1])
    assert len({image["src"] for image in page.of("img")}) > 6
    assert "embedded scene classifier" in page.words


@pytest.mark.parametrize("change", ["back end", "weights"])
def test_a_report_without_its_back_end_says_why_it_has_no_images(make_study, settings, tmp_path, change):
    if change == "back end":
        study = make_study(backend={"kind": "<i>gone</i>"})
    else:
        study = make_study(identity={**settings.identity, "weights": "<i>gone</i>"})
    reason = write_report(study, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert ("unknown back end" if change == "back end" else "another weights") in reason
    assert reason in page.words and not page.of("img") and not page.of("i")
    assert len(charts_of(page)) == 3


@pytest.mark.parametrize("candidates", [[], [c for c in CANDIDATES if c[2] is None]], ids=["none", "all screened"])
def test_a_study_with_nothing_evaluated_has_a_report_that_says_so(make_study, tmp_path, candidates):
    write_report(make_study(candidates), tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert f"{len(candidates)} candidates are finished and none of them is fully evaluated" in page.words
    assert "teacher.sampler" in page.words and charts_of(page) == {}
    assert (tmp_path / "report.html").stat().st_size < 50_000, "nothing to draw needs no drawing library"


def test_a_report_that_fails_leaves_the_one_before_it(make_study, tmp_path):
    file = tmp_path / "report.html"
    file.write_text("before")
    study = make_study([*CANDIDATES, ("not a schedule", 2.0, 0.1, 0.1)])
    with pytest.raises(FlexiError, match=r"candidate 7 .* unknown step"):
        write_report(study, file, images=False)
    assert file.read_text() == "before"
    with pytest.raises(FlexiError, match="cannot be written"):
        write_report(make_study(name="another"), tmp_path / "nowhere" / "report.html", images=False)
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".part"]


def test_a_file_name_can_be_made_of_any_study_name():
    assert file_name_of(ODD_NAME).isascii() and not set(file_name_of("../../a b\0<")) & set("/ \0<")
    assert len(file_name_of("x" * 500)) < 130


def test_the_front_is_beaten_by_none_and_beats_every_other(make_study):
    found = found_in(make_study(strategy="nsga2"))
    on_front = front(found)
    assert [one.number for one in on_front] == [6, 0, 1, 4]
    for one in evaluated(found):
        beaten = [
            other
            for other in on_front
            if other is not one and other.speedup >= one.speedup and other.evaluation.mse <= one.evaluation.mse
        ]
        assert bool(beaten) == (one not in on_front)


def test_the_best_at_a_speedup_has_the_lowest_rfid_near_the_least_error(make_study):
    found = found_in(make_study())
    assert [best_at(found, speedup).number for speedup in (2, 2.5, 3, 6)] == [0, 3, 3, 4]
    assert [one.number for one in ranked(as_fast(found, 2.5))] == [3, 1, 2, 4]
    with pytest.raises(FlexiError, match=r"nothing 7x as fast.* 1\.50x to 6\.00x; ask for at most 6 "):
        best_at(found, 7)
    with pytest.raises(FlexiError, match="no fully evaluated candidate yet"):
        best_at([], 2)


def test_the_studys_own_choice_by_its_finals_leads(make_study):
    near = [("3*(FX)", 3.0, 0.010, 0.4), ("2*(FXX)", 2.0, 0.011, 0.5), ("F|FXXXX", 2.0, 0.5, 0.1)]
    study = make_study(near)
    assert [one.number for one in ranked(found_in(study))] == [0, 1, 2]
    finals = {"3*(FX)": (0.6, 0.012), "2*(FXX)": (0.3, 0.011)}
    study.set_user_attr(
        "flexi:finals", {text: {"rfid": rfid, "psnr_db": 30.0, "mse": mse} for text, (rfid, mse) in finals.items()}
    )
    found = found_in(study)
    assert [one.number for one in ranked(found)] == [1, 0, 2] and best_at(found, 2).number == 1


def test_a_repeated_schedule_counts_once(make_study):
    assert [one.number for one in evaluated(found_in(make_study([*CANDIDATES, CANDIDATES[1]])))] == [0, 1, 2, 3, 4, 6]


def test_the_best_so_far_follows_the_paired_error_before_rfid(make_study):
    study = make_study([*(CANDIDATES[i] for i in (5, 1, 3, 2)), ("3*(FX)", 3.0, 0.004, 0.7), CANDIDATES[6]])
    found = found_in(study)
    best = list(best_so_far(found, 2.0))
    assert [one and one.number for one in best] == [None, 1, 2, 2, 4, 4]
    anew = [ranked([replace(other, is_best=False) for other in as_fast(found[:count], 2.0)]) for count in range(2, 7)]
    assert [one.number for one in best[1:]] == [one[0].number for one in anew]


def test_colours_are_shown_as_they_are_and_latents_by_their_principal_components():
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(2, 3, 4, 4, generator=generator) * 2 - 1
    assert torch.allclose(visible(colours)[0], (colours + 1) / 2)

    strengths = torch.tensor([0.1, 5.0, 1.0, 2.0, 0.0]).view(1, 5, 1, 1)
    latents = torch.randn(3, 5, 8, 8, generator=generator) * strengths
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=generator)).Q
    turned = torch.einsum("ij,njhw->nihw", rotation, latents)
    shown, again = visible(latents, latents)
    assert shown.shape == (3, 3, 8, 8) and torch.equal(shown, again)
    for component, strongest in enumerate((1, 3, 2)):
        both = torch.stack([shown[:, component].flatten(), latents[:, strongest].flatten()])
        assert torch.corrcoef(both)[0, 1].abs() > 0.9
    for one, other in zip(shown.unbind(1), visible(turned)[0].unbind(1), strict=True):
        assert torch.allclose(one, other, atol=1e-3) or torch.allclose(one, 1 - other, atol=1e-3)


def test_few_channels_are_grey_and_other_shapes_refused():
    grey = visible(torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)))[0]
    assert grey.shape == (2, 3, 4, 4) and torch.equal(grey[:, 0], grey[:, 2])
    with pytest.raises(FlexiError, match=r"shape \[1, 4, 9\]"):
        visible(torch.zeros(1, 4, 9))


def test_a_large_picture_is_made_smaller_and_a_small_one_kept():
    def size(side: int) -> tuple[int, int]:
        uri = png_uri(torch.rand(3, side, 2 * side, generator=torch.Generator().manual_seed(0)))
        return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).size

    assert size(16) == (32, 16) and size(400) == (384, 192)


@pytest.fixture
def flexi(tmp_path, monkeypatch, storage):
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    return lambda command, *args: runner.invoke(app, [command, *map(str, args), "--storage", storage])


def test_pareto_writes_the_schedule_at_a_wanted_speedup(flexi, make_study, settings, tmp_path):
    make_study(strategy="nsga2")
    table = flexi("pareto")
    assert table.exit_code == 0 and "F|FXXXX" not in table.stdout and "2*(FXX)" in table.stdout
    assert [row["candidate"] for row in json.loads(flexi("pareto", "--json").stdout)] == [6, 0, 1, 4]

    written = flexi("pareto", "--speedup", 2.5, "--out", "fast.json", "--json")
    assert written.exit_code == 0, written.output
    schedule = load_schedule(tmp_path / "fast.json")
    assert str(schedule) == "F|FXXXX" and json.loads(written.stdout)["candidate"] == 3
    assert schedule.info["measured"]["speedup_macs"] == 3 and schedule.info["measured"]["samples"] == settings.samples
    assert schedule.info["teacher"] == EmbeddedBackend(TeacherSettings(steps=6)).identity
    assert schedule.info["provenance"]["candidate"] == 3 and schedule.info["provenance"]["study"] == ODD_NAME

    equal = flexi("pareto", "--speedup", 1)
    assert equal.exit_code == 0, equal.output
    assert load_schedule(tmp_path / "flexi_euler_6_1x.json").info["measured"]["psnr_db"] is None


def test_pareto_without_the_back_end_writes_what_the_study_knows(flexi, make_study, settings, tmp_path):
    make_study(backend={"kind": "gone"})
    result = flexi("pareto", "--speedup", 2, "--out", "fast.json")
    assert result.exit_code == 0 and "no noise levels" in result.stderr
    assert load_schedule(tmp_path / "fast.json").info["teacher"] == settings.identity


def test_report_writes_its_file_and_says_where(flexi, make_study, tmp_path):
    make_study()
    result = flexi("report", "--no-images", "--json")
    assert result.exit_code == 0, result.output
    assert (tmp_path / json.loads(result.stdout)["file"]).is_file()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["report", "missing"], "has no study 'missing'; it has a, b"),
        (["report"], "has 2 studies; name one of them: a, b"),
        (["pareto", "a", "--speedup", "9"], "nothing 9x as fast"),
        (["pareto", "b", "--speedup", "2"], "no fully evaluated candidate yet (of 0 finished ones)"),
        (["pareto", "b"], "no fully evaluated candidate yet"),
        (["pareto", "a", "--out", "x.json"], "give --speedup too"),
        (["pareto", "a", "--speedup", "2", "--out", "nowhere/x.json"], "cannot be written"),
    ],
)
def test_what_a_study_does_not_have_is_one_line_and_exit_code_2(flexi, make_study, args, message):
    make_study(name="a")
    make_study([], name="b")
    result = flexi(*args)
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ") and "Traceback" not in result.output


def test_reading_makes_no_storage(flexi, tmp_path):
    result = flexi("report")
    assert result.exit_code == 2 and "no such file of studies" in result.stderr
    assert not (tmp_path / "studies.db").exists()
