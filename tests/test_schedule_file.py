"""The schedule file: what survives a round trip, what is refused, and that a refusal changes nothing."""

import copy
import json
from pathlib import Path

import pytest

from flexi_core import FlexiError, Schedule, load_schedule, save_schedule
from flexi_core.schedule.file import MAX_BYTES, from_dict, made_for, teacher_from, to_dict

FILE = {
    "format": "flexiffusion-schedule",
    "version": 1,
    "schedule": "FPN@2|FX; order=2",
    "steps": 5,
    "teacher": {
        "architecture": "sha256:0123",
        "weights": "sha256:4567",
        "sampler": "euler",
        "scheduler": "normal",
        "steps": 5,
        "sigmas": [14.6, 6, 2.5, 1.1, 0.03, 0.0],
        "cfg": 3.5,
        "size": [32, 32],
        "unknown to this release": {"deep": [1, None, "two"]},
    },
    "measured": {"speedup_macs": 5.01, "rfid": 0.25, "psnr_db": 41.2, "samples": 64, "unknown": True},
    "provenance": {"tool": "0.1.0", "seed": 7, "unknown": "Müller ☃"},
    "unknown at the top": [{"a": 1.5}, [], {}],
}


def changed(*path_and_value: object) -> dict:
    """Return FILE with the value at a path of keys replaced."""
    *path, key, value = path_and_value
    data = copy.deepcopy(FILE)
    place = data
    for name in path:
        place = place[name]
    place[key] = value
    return data


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_a_file_is_its_schedule(tmp_path):
    schedule = load_schedule(write(tmp_path / "a.json", FILE))
    assert schedule == Schedule.parse("FPN@2|FX; order=2")
    assert schedule.teacher_sigmas == (14.6, 6, 2.5, 1.1, 0.03, 0.0)


def test_a_byte_order_mark_before_the_text_does_not_matter(tmp_path):
    marked = tmp_path / "a.json"
    marked.write_bytes(b"\xef\xbb\xbf" + json.dumps(FILE).encode())
    assert load_schedule(marked) == load_schedule(write(tmp_path / "b.json", FILE))


def test_everything_survives_a_round_trip_unknown_keys_at_every_level_too(tmp_path):
    save_schedule(load_schedule(write(tmp_path / "a.json", FILE)), tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text(encoding="utf-8")) == FILE


def test_saving_twice_gives_the_same_bytes(tmp_path):
    save_schedule(from_dict(FILE), tmp_path / "a.json")
    save_schedule(load_schedule(tmp_path / "a.json"), tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_every_schedule_round_trips_through_its_file_object(random_schedules):
    for schedule in random_schedules:
        assert from_dict(json.loads(json.dumps(to_dict(schedule)))) == schedule


def test_the_least_file_is_format_version_and_text():
    schedule = from_dict({"format": "flexiffusion-schedule", "version": 1, "schedule": "FX"})
    assert schedule == Schedule.parse("FX")
    assert schedule.teacher_sigmas is None


def test_info_cannot_pose_as_the_schedule():
    schedule = Schedule.parse("FX").with_info(version=2, format="other", schedule="FFFF", steps=4, sigmas=[3, 2, 0])
    assert to_dict(schedule) == {"format": "flexiffusion-schedule", "version": 1, "schedule": "FX", "steps": 2}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "holds a JSON object, this one a list"),
        (None, "holds a JSON object, this one a NoneType"),
        ({}, "not a schedule file: its format is None"),
        (changed("format", "workflow"), "its format is 'workflow', expected 'flexiffusion-schedule'"),
        (changed("format", ["flexiffusion-schedule"]), "its format is"),
        (changed("version", 2), "the file has version 2, this release reads up to 1; update the node pack"),
        (changed("version", 0), "the version is 0; expected a whole number from 1"),
        (changed("version", "1"), "the version is '1'"),
        (changed("version", 1.0), "the version is 1.0"),
        (changed("version", True), "the version is True"),
        (changed("version", None), "the version is None"),
        (changed("schedule", None), "the schedule is None; expected its text"),
        (changed("schedule", ["FX"]), r"the schedule is \['FX'\]; expected its text"),
        (changed("schedule", ""), "the schedule text is empty"),
        (changed("schedule", "NFFFF"), "a segment starts with a full step, this one is 'NFFFF'"),
        (changed("schedule", "__import__('os').getcwd()"), "unexpected|expected|unknown step"),
        (changed("steps", 6), "the file says 6 steps, its schedule text has 5"),
        (changed("steps", "5"), "the file says '5' steps"),
        (changed("steps", None), "the file says None steps"),
        (changed("teacher", None), "teacher is a NoneType; expected an object"),
        (changed("teacher", "euler"), "teacher is a str; expected an object"),
        (changed("measured", []), "measured is a list; expected an object"),
        (changed("provenance", 1), "provenance is a int; expected an object"),
        (changed("teacher", "architecture", 1), "teacher.architecture is 1; expected text"),
        (changed("teacher", "weights", None), "teacher.weights is None; expected text"),
        (changed("teacher", "sampler", ["euler"]), r"teacher.sampler is \['euler'\]; expected text"),
        (changed("teacher", "scheduler", {}), "teacher.scheduler is {}; expected text"),
        (changed("teacher", "cfg", "7"), "teacher.cfg is '7'; expected a number"),
        (changed("teacher", "stages", 2), "teacher.stages is not a list of objects"),
        (changed("teacher", "stages", [{"steps": 2}]), r"teacher.stages have steps \[2\]; expected .* 5 together"),
        (changed("teacher", "stages", [{"steps": 2}, {"steps": 3, "weights": 1}]), r"teacher.stages\[1\].weights is 1"),
        (changed("teacher", "cfg", True), "teacher.cfg is True; expected a number"),
        (changed("teacher", "cfg", 10**400), "teacher.cfg is 1.*; expected a number"),
        (changed("teacher", "steps", 5.5), "teacher.steps is 5.5; expected a whole number"),
        (changed("teacher", "size", 32), "teacher.size is 32; expected a list of whole numbers"),
        (changed("teacher", "size", [32, -1]), "teacher.size is"),
        (changed("teacher", "size", [32, "32"]), "teacher.size is"),
        (changed("teacher", "sigmas", "14.6"), "teacher.sigmas is not a list of numbers from 0 up"),
        (changed("teacher", "sigmas", [5, 4, 3, None, 1, 0]), "teacher.sigmas is not a list of numbers"),
        (changed("teacher", "sigmas", [5, 4, 3, 2, 1, -1]), "teacher.sigmas is not a list of numbers from 0 up"),
        (changed("teacher", "sigmas", [10**40, 4, 3, 2, 1, 0]), "teacher.sigmas is not a list of numbers"),
        (changed("teacher", "sigmas", [5, 4, 3, 2, 0]), "teacher.sigmas has 5 values; a schedule of 5 steps has 6"),
        (changed("teacher", "sigmas", [5, 4, 3, 3, 1, 0]), "teacher.sigmas does not fall from step to step"),
        (changed("teacher", "sigmas", [0, 1, 2, 3, 4, 5]), "teacher.sigmas does not fall from step to step"),
        (changed("sigmas", "14.6"), "sigmas is not a list of numbers"),
        (changed("sigmas", [14.0, 4, 3, 2, 1, 0]), "sigmas do not begin and end where teacher.sigmas do"),
        (changed("sigmas", [5, 4, 3, True, 1, 0]), "sigmas is not a list of numbers"),
        (changed("sigmas", [5, 4, 3, 2, 0]), "the schedule of 5 steps has 5 noise levels; it is 6"),
        (changed("sigmas", [5, 4, 3, 3, 1, 0]), "the schedule's noise levels do not fall from step to step"),
        (changed("sigmas", [5, 4, 3, 2, 1, -1]), "a noise level of the schedule is not a number from 0 up"),
    ],
)
def test_every_wrong_value_is_refused_by_name_of_file_and_key(tmp_path, data, message):
    path = write(tmp_path / "wrong.json", data)
    before = path.read_bytes()
    with pytest.raises(FlexiError, match=message) as refused:
        load_schedule(path)
    assert str(path) in str(refused.value)
    assert path.read_bytes() == before


def test_noise_levels_are_a_list_of_their_own(tmp_path):
    levels = [14.6, 6.5, 2.5, 1.1, 0.05, 0.0]
    schedule = load_schedule(write(tmp_path / "a.json", changed("sigmas", levels)))
    assert schedule.sigmas == tuple(levels) and schedule != from_dict(FILE)
    save_schedule(schedule, tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text()) == changed("sigmas", levels)
    assert from_dict(changed("schedule", str(schedule))) == schedule, "or a part of the text"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"not valid JSON .*it may be cut off, copy it again"),
        ("hello", "not valid JSON"),
        (json.dumps(FILE) + "}", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a":' * 100_000, "not valid JSON"),
        (json.dumps(changed("measured", "rfid", float("nan"))), "NaN is not a number that a schedule file can hold"),
        (json.dumps(changed("unknown at the top", float("inf"))), "Infinity is not a number"),
        (json.dumps(changed("measured", "psnr_db", float("-inf"))), "-Infinity is not a number"),
        (json.dumps(FILE).replace("41.2", "1e999"), "1e999 is not a number"),
        (json.dumps(FILE).replace(": 64", ": " + "9" * 5000), "not valid JSON"),
    ],
)
def test_what_is_not_json_is_refused(tmp_path, content, message):
    path = write(tmp_path / "wrong.json", content)
    with pytest.raises(FlexiError, match=message) as refused:
        load_schedule(path)
    assert str(path) in str(refused.value)
    assert len(str(refused.value)) < 1000


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    whole = json.dumps(FILE)
    for length in range(len(whole)):
        with pytest.raises(FlexiError):
            load_schedule(write(tmp_path / "cut.json", whole[:length]))


@pytest.mark.parametrize("depth", [33, 400, 900, 960, 985])
@pytest.mark.parametrize("brackets", ["[]", ('{"a":', "}")])
def test_values_nested_too_deep_are_refused(tmp_path, depth, brackets):
    nested = brackets[0] * depth + ("" if brackets == "[]" else "1") + brackets[1] * depth
    path = write(tmp_path / "deep.json", json.dumps(FILE)[:-1] + f', "deep": {nested}}}')
    with pytest.raises(FlexiError, match=r"nested more than 32 deep|not valid JSON"):
        load_schedule(path)


def test_values_nested_thirty_deep_are_kept():
    nested: list = []
    for _ in range(30):
        nested = [nested]
    data = {**FILE, "deep": nested}
    assert to_dict(from_dict(data)) == data


def test_a_file_of_100_mb_is_refused_without_being_read(tmp_path, monkeypatch):
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(100 * 1024 * 1024)
    monkeypatch.setattr("flexi_core.schedule.file.parse_json", lambda *_, **__: pytest.fail("the file was read"))
    with pytest.raises(FlexiError, match=r"huge.json: cannot be read \(100.0 MiB; at most 4 MiB are read\)"):
        load_schedule(path)


def test_a_file_of_exactly_the_greatest_size_is_read(tmp_path):
    text = json.dumps(FILE)
    assert load_schedule(write(tmp_path / "big.json", text + " " * (MAX_BYTES - len(text)))) == from_dict(FILE)
    with pytest.raises(FlexiError, match="at most 4 MiB"):
        load_schedule(write(tmp_path / "big.json", text + " " * (MAX_BYTES - len(text) + 1)))


def test_a_binary_file_is_refused(tmp_path):
    path = tmp_path / "picture.json"
    path.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe" * 10)
    with pytest.raises(FlexiError, match=r"picture.json: not a text file; a schedule file is JSON"):
        load_schedule(path)


@pytest.mark.parametrize(
    ("name", "message"), [("none.json", "cannot be read"), ("", "cannot be read"), ("a\0b", "not a file name")]
)
def test_a_path_without_a_file_is_refused(tmp_path, name, message):
    with pytest.raises(FlexiError, match=message):
        load_schedule(f"{tmp_path}/{name}")


def test_a_missing_folder_is_refused_and_not_made(tmp_path):
    with pytest.raises(FlexiError, match=r"none/a.json: cannot be written \(No such file"):
        save_schedule(from_dict(FILE), tmp_path / "none" / "a.json")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_takes_no_file_is_refused_and_left_as_it_was(tmp_path):
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "folder.json", tmp_path / "file" / "a.json"):
        with pytest.raises(FlexiError, match="cannot be written"):
            save_schedule(from_dict(FILE), path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.json"]
    assert list((tmp_path / "folder.json").iterdir()) == []
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), "\ud800"])
def test_info_that_no_file_can_hold_is_refused_and_the_old_file_stays(tmp_path, value):
    path = tmp_path / "a.json"
    save_schedule(from_dict(FILE), path)
    before = path.read_bytes()
    with pytest.raises(FlexiError, match=r"a.json: the schedule's info cannot be written as JSON"):
        save_schedule(from_dict(FILE).with_info(measured={"psnr_db": value}), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_saving_replaces_an_old_file(tmp_path):
    path = write(tmp_path / "a.json", "old")
    save_schedule(Schedule.parse("FX"), path)
    assert load_schedule(path) == Schedule.parse("FX")
    assert list(tmp_path.iterdir()) == [path]


def test_a_teacher_of_several_models_says_of_each_stretch_what_it_was():
    data = changed("teacher", "stages", [{"steps": 2, "weights": "a", "cfg": 3.5}, {"steps": 3, "weights": "b", "cfg": 1}])
    del data["teacher"]["cfg"], data["teacher"]["weights"]
    schedule = from_dict(data)
    assert [teacher_from(schedule, step)["weights"] for step in range(5)] == ["a", "a", "b", "b", "b"]
    assert teacher_from(schedule, 2)["cfg"] == 1 and teacher_from(schedule, 2)["sampler"] == "euler"
    assert made_for(schedule).startswith("made for 5 euler steps, normal, cfg 3.5 then 1, 32x32")
    assert to_dict(schedule) == data
    assert teacher_from(from_dict(FILE), 4) == FILE["teacher"] and teacher_from(Schedule.parse("FX"), 1) == {}
