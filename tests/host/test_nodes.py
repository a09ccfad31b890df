"""The nodes, from the pack as the host imports it."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

# Ids and names in released workflows: they stay. Inputs in order, output types, output names.
RELEASED = {
    "FlexiSchedule": (["text"], ["FLEXI_SCHEDULE"], ["schedule"]),
    "FlexiPreset": (["preset", "steps", "model"], ["FLEXI_SCHEDULE"], ["schedule"]),
    "FlexiLoadSchedule": (["file"], ["FLEXI_SCHEDULE"], ["schedule"]),
    "FlexiSaveSchedule": (["schedule", "file_name", "overwrite"], ["FLEXI_SCHEDULE"], ["schedule"]),
    "FlexiApply": (["model", "schedule", "on_mismatch", "cache", "cache_limit_mib"], ["MODEL", "FLEXI_RUN"], ["model", "run"]),
    "FlexiReport": (["run", "latent"], ["LATENT", "STRING", "IMAGE"], ["latent", "text", "timeline"]),
    "FlexiTuneGuider": (
        ["noise", "guider", "sampler", "sigmas", "latent_image", "speedup", "quality_db", "effort", "vae"],
        ["GUIDER", "FLEXI_SCHEDULE", "FLEXI_RUN", "STRING", "IMAGE", "IMAGE"],
        ["guider", "schedule", "run", "text", "front", "pictures"],
    ),
    "FlexiLearn": (["model", "speedup", "quality_db", "frozen"], ["MODEL", "FLEXI_RUN"], ["model", "run"]),
    "FlexiCompare": (
        ["run", "latent", "full_run", "vae"],
        ["IMAGE", "IMAGE", "IMAGE", "STRING"],
        ["comparison", "full", "schedule", "text"],
    ),
    "FlexiTune": (
        [
            "model",
            "positive",
            "negative",
            "latent_image",
            "steps",
            "cfg",
            "sampler_name",
            "scheduler",
            "denoise",
            "speedup",
            "quality_db",
            "effort",
            "vae",
        ],
        ["MODEL", "FLEXI_SCHEDULE", "FLEXI_RUN", "STRING", "IMAGE", "IMAGE"],
        ["model", "schedule", "run", "text", "front", "pictures"],
    ),
    "FlexiJoinModels": (["high_noise", "low_noise", "boundary", "unit", "boundary_in_grid"], ["MODEL"], ["model"]),
    "FlexiStageModel": (["model", "file"], ["MODEL"], ["model"]),
    "FlexiDemoModel": ([], ["MODEL"], ["model"]),
    "FlexiDemoPrompt": (["caption"], ["CONDITIONING"], ["conditioning"]),
}


@pytest.fixture(scope="module")
def core(pack):
    """flexi_core as the pack imports it."""
    return sys.modules[f"{pack.__name__}.flexi_core"]


@pytest.fixture
def write(schedule_folder):
    """A function that writes a file into models/flexi_schedules; they are removed again."""
    written = []

    def put(name, text):
        path = schedule_folder / name
        path.write_text(text if isinstance(text, str) else json.dumps(text))
        written.append(path)
        return path

    yield put
    for path in written:
        path.unlink(missing_ok=True)


def a_file(text="2*(FX)", **entries):
    return {"format": "flexiffusion-schedule", "version": 1, "schedule": text, **entries}


@pytest.mark.parametrize("name", RELEASED)
def test_released_ids_inputs_and_outputs_stay(node, name):
    schema = node(name).GET_SCHEMA()
    inputs, types, names = RELEASED[name]
    assert schema.category == "Flexiffusion"
    assert [i.id for i in schema.inputs] == inputs
    assert [o.io_type for o in schema.outputs] == types
    assert [o.display_name for o in schema.outputs] == names


@pytest.mark.parametrize("name", RELEASED)
def test_every_node_names_the_paper_and_every_input_has_a_tooltip(node, name):
    schema = node(name).GET_SCHEMA()
    assert "2409.17566" in schema.description
    assert all(i.tooltip for i in schema.inputs)


@pytest.mark.parametrize("name", RELEASED)
def test_every_node_has_help_and_translatable_names(node, name):
    schema = node(name).GET_SCHEMA()
    assert (ROOT / "web" / "docs" / f"{name}.md").read_text().startswith(f"# {schema.display_name}\n")
    # The page's message format reads @ | { } as its own signs; in quotes and braces they stand for themselves.
    text = (ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8")
    assert not re.search(r"[^'][@|][^']", text)
    entry = json.loads(re.sub(r"\{'(.)'\}", r"\1", text))[name]
    assert entry["display_name"] == schema.display_name
    assert entry["description"] == schema.description
    tooltips = {name: value["tooltip"] for name, value in entry.get("inputs", {}).items()}
    assert tooltips == {i.id: i.tooltip for i in schema.inputs}


def test_entry_does_nothing_outside_the_host():
    names = runpy.run_path(str(ROOT / "__init__.py"))
    assert "comfy_entrypoint" not in names
    assert "WEB_DIRECTORY" not in names


def test_default_schedule_is_valid_for_the_default_sampler_steps(node):
    text = node("FlexiSchedule").GET_SCHEMA().inputs[0].default
    assert node("FlexiSchedule").validate_inputs(text) is True
    assert len(node("FlexiSchedule").execute(text).args[0]) == 20


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("NNF", "full step"),
        ("FQ", "unknown step 'Q'"),
        ("FP@2|3*(FX", "expected '\\)'"),
        ("FX; speed=2", "unknown"),
    ],
)
def test_bad_schedule_text_is_a_validation_error_in_words(node, text, words):
    with pytest.raises(AssertionError, match=words):  # validate_inputs returns the message
        answer = node("FlexiSchedule").validate_inputs(text)
        assert answer is True, answer


def test_schedule_text_from_a_link_is_checked_when_it_runs(node, core):
    assert node("FlexiSchedule").validate_inputs(None) is True
    with pytest.raises(core.FlexiError, match="unknown step"):
        node("FlexiSchedule").execute("FQ")


@pytest.mark.parametrize("preset", ["1.25x", "1.5x", "2x", "3x", "5x", "deepcache", "all-full"])
def test_every_preset_goes_on_to_the_run_and_shows_what_is_known_of_it(node, preset):
    options, steps, _ = node("FlexiPreset").GET_SCHEMA().inputs
    assert preset in options.options
    assert (steps.default, steps.min) == (0, 0)
    of_the_sampler, of_thirty = (node("FlexiPreset").execute(preset, count) for count in (0, 30))
    assert [out.args[0].steps for out in (of_the_sampler, of_thirty)] == [0, 30]
    assert of_the_sampler.ui["flexi_steps"] == ("",) and len(of_thirty.ui["flexi_steps"][0]) == 30
    assert ("decided when sampling starts" in of_the_sampler.ui["text"][0]) is preset.endswith("x")
    assert "30 steps" in of_thirty.ui["text"][0] or preset == "all-full"


def test_a_preset_that_saves_nothing_says_so_before_the_run(node):
    shown = node("FlexiPreset").execute("2x", 3)
    assert shown.ui["flexi_steps"] == ("",) and "no schedule is known" in shown.ui["text"][0]


def test_a_preset_with_steps_is_saved_as_its_schedule_and_one_without_is_refused(node, core, schedule_folder):
    given = node("FlexiPreset").execute("2x", 20).args[0]
    assert node("FlexiSaveSchedule").execute(given, "preset", True).args[0] is given
    saved = core.load_schedule(schedule_folder / "preset.json")
    assert str(saved) == str(given.before_run().schedule) and "on test models of 20 steps" in core_words(node, "preset.json")
    node("FlexiSaveSchedule").execute(given, "preset", False)
    before = sorted(schedule_folder.iterdir())
    with pytest.raises(core.FlexiError, match="set its steps to the sampler's, or copy the last line of Flexi Report"):
        node("FlexiSaveSchedule").execute(node("FlexiPreset").execute("2x", 0).args[0], "other", True)
    assert sorted(schedule_folder.iterdir()) == before


def core_words(node, file):
    return node("FlexiLoadSchedule").execute(file).ui["text"][0]


def test_file_in_the_folder_is_offered_and_loaded(node, write):
    write("mine.json", a_file("F|FXXX", measured={"psnr": 30.5}))
    assert "mine.json" in node("FlexiLoadSchedule").define_schema().inputs[0].options
    assert node("FlexiLoadSchedule").validate_inputs("mine.json") is True
    schedule = node("FlexiLoadSchedule").execute("mine.json").args[0]
    assert str(schedule) == "F|FXXX"
    assert schedule.info["measured"]["psnr"] == 30.5


def test_other_suffixes_are_not_offered(node, write):
    write("notes.txt", "no schedule")
    assert "notes.txt" not in node("FlexiLoadSchedule").define_schema().inputs[0].options


def test_every_bundled_file_loads(node):
    bundled = [name for name in node("FlexiLoadSchedule").define_schema().inputs[0].options if name.endswith(" (bundled)")]
    assert len(bundled) == len(list((ROOT / "flexi_core" / "schedules").glob("*.json"))) > 0
    for name in bundled:
        assert node("FlexiLoadSchedule").validate_inputs(name) is True


def test_edited_file_has_another_fingerprint(node, write):
    write("mine.json", a_file("F|FXXX"))
    first = node("FlexiLoadSchedule").fingerprint_inputs("mine.json")
    assert node("FlexiLoadSchedule").fingerprint_inputs("mine.json") == first
    write("mine.json", a_file("FF|FXX"))
    assert node("FlexiLoadSchedule").fingerprint_inputs("mine.json") != first


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"format": "flexiffu', "not valid JSON"),
        ({"format": "other"}, "its format is 'other'"),
        (a_file(version=2), "update the node pack"),
        (a_file("NF"), "full step"),
        (a_file(steps=9), "says 9 steps"),
        ([], "JSON object"),
    ],
)
def test_wrong_file_is_a_validation_error_that_names_it(node, write, content, words):
    write("wrong.json", content if isinstance(content, (str, dict)) else json.dumps(content))
    answer = node("FlexiLoadSchedule").validate_inputs("wrong.json")
    assert "wrong.json" in answer and words in answer


@pytest.mark.parametrize("name", ["gone.json", "../../pyproject.toml", "../__init__.py (bundled)", "", "/etc/passwd"])
def test_file_outside_the_folder_is_not_found(node, name):
    assert "there is no schedule file" in node("FlexiLoadSchedule").validate_inputs(name)


def test_saved_file_loads_as_the_same_schedule_with_its_information(node, core, schedule_folder):
    schedule = core.Schedule.parse("F|FPX@2").with_info(measured={"psnr": 31.0}, colour="mine")
    assert node("FlexiSaveSchedule").execute(schedule, "saved one.json", False).args[0] is schedule
    assert (schedule_folder / "saved one.json").is_file()
    loaded = node("FlexiLoadSchedule").execute("saved one.json").args[0]
    assert loaded == schedule
    assert dict(loaded.info) == dict(schedule.info)


def test_saving_twice_is_fine_and_another_schedule_needs_overwrite(node, core, schedule_folder):
    one, other = core.Schedule.parse("F|FX"), core.Schedule.parse("F|FXX")
    save = node("FlexiSaveSchedule").execute
    save(one, "kept", False)
    save(one, "kept", False)
    with pytest.raises(core.FlexiError, match="turn overwrite on"):
        save(other, "kept", False)
    assert core.load_schedule(schedule_folder / "kept.json") == one
    save(other, "kept", True)
    assert core.load_schedule(schedule_folder / "kept.json") == other


@pytest.mark.parametrize(
    "name", ["", "../up", "a/b", "a\\b", "/abs", ".hidden", "..", "con", "NUL.json", "x" * 101, "a\0b", "a:b"]
)
def test_file_name_that_is_more_than_a_name_is_refused(node, core, schedule_folder, name):
    before = sorted(schedule_folder.iterdir())
    assert "not a plain file name" in node("FlexiSaveSchedule").validate_inputs(name)
    with pytest.raises(core.FlexiError, match="not a plain file name"):
        node("FlexiSaveSchedule").execute(core.Schedule.parse("F"), name, True)
    assert sorted(schedule_folder.iterdir()) == before


def test_unknown_word_of_a_caption_is_a_validation_error_that_lists_the_known_ones(node):
    assert "navy" in node("FlexiDemoPrompt").validate_inputs("a large pink circle")
    assert node("FlexiDemoPrompt").validate_inputs("") is True


@pytest.mark.smoke
@pytest.mark.matrix("Doors", "the nodes, in a process of their own")
def test_nodes_sample_and_report(host, node):
    (schedule,) = node("FlexiPreset").execute("2x", 0).args
    (model,) = node("FlexiDemoModel").execute().args
    (positive,), (negative,) = (node("FlexiDemoPrompt").execute(caption).args for caption in ("a red circle", ""))
    patched, run = node("FlexiApply").execute(model, schedule, "map").args
    latent = {"samples": host.sample(patched, steps=20, scheduler="simple", positive=positive, negative=negative)}
    shown = node("FlexiReport").execute(run, latent)
    passed, text, picture = shown.args
    assert passed is latent
    assert text.startswith("10 of 20 steps are computed, 2x fewer.\n")
    assert "20 steps: 10 full, 10 null (extrapolated)" in text and "2.00x fewer MACs" in text
    assert picture.dtype == torch.float32 and picture.shape[0] == 1 and picture.shape[3] == 3
    assert 0 <= picture.min() < picture.max() <= 1
    assert shown.ui["text"] == (text,) and len(shown.ui["images"]) == 1


def test_two_models_are_one_for_the_sampler(host, node):
    high, low = (node("FlexiDemoModel").execute().args[0] for _ in range(2))
    joined = node("FlexiJoinModels").execute(high, low, 0.5, "share of the run", True)
    assert joined.ui is None
    assert torch.equal(host.sample(joined.args[0], steps=4), host.sample(high, steps=4)), "both have the same weights"
    flows = [host.model_of_type("FLOW") for _ in range(2)]
    flows[1].get_model_object("model_sampling").set_parameters(shift=3.0)
    said = node("FlexiJoinModels").execute(*flows, 9.0, "Wan 2.2 text to video (0.875)", True)
    assert "shift 1, not 3" in str(said.ui.as_dict())


@pytest.mark.parametrize(
    ("name", "words"), [("gone.safetensors", "there is no stage file"), ("bad.safetensors", "cannot be read")]
)
def test_a_stage_file_that_is_none_is_a_validation_error(host, node, pack, name, words):
    folder = host.base / "models" / "flexi_stages"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bad.safetensors").write_bytes(b"nothing")
    assert "bad.safetensors" in node("FlexiStageModel").define_schema().inputs[1].options
    assert words in node("FlexiStageModel").validate_inputs(name)


def test_report_before_any_run_says_so(node, core):
    _, run = node("FlexiApply").execute(node("FlexiDemoModel").execute().args[0], core.Schedule.parse("F"), "map").args
    _, text, picture = node("FlexiReport").execute(run, {"samples": torch.zeros(1, 3, 32, 32)}).args
    assert text.startswith("No run to report")
    assert picture.std() > 0


@pytest.mark.parametrize("text", ["FPPNN@2|3*(FPXXX@1)", "50*(F)", "17*(FXXXX)", "4*(F)|FPPPP@5"])
def test_timeline_is_a_picture_for_any_number_of_steps(host, demo_model, apply, text):
    from flexi_core import Schedule
    from flexi_core.run.timeline import WIDTH, draw_timeline

    model, handle = apply(demo_model, text)
    host.sample(model, steps=len(Schedule.parse(text)), noise=host.noise(1), cfg=1.0)
    picture = draw_timeline(handle.report)
    assert picture.shape[2] == WIDTH and picture.dtype == torch.float32
    assert picture.min() >= 0 and picture.max() <= 1


def test_pictures_carry_the_schedule_of_every_node_that_samples_with_one(node):
    package = node("FlexiApply").__module__.rpartition(".")[0]
    with_a_run = {name for name, (_, outputs, _) in RELEASED.items() if "FLEXI_RUN" in outputs}
    assert set(sys.modules[f"{package}.metadata"]._SAMPLED_WITH) == with_a_run
