"""The pack in a real server, by HTTP."""

import copy
import io
import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "flexi_core" / "schedules"
NODES = (
    "FlexiSchedule",
    "FlexiPreset",
    "FlexiLoadSchedule",
    "FlexiSaveSchedule",
    "FlexiApply",
    "FlexiReport",
    "FlexiCompare",
    "FlexiDemoModel",
    "FlexiDemoPrompt",
    "FlexiTune",
    "FlexiTuneGuider",
    "FlexiLearn",
    "FlexiJoinModels",
    "FlexiStageModel",
)


@pytest.fixture(scope="module")
def example(server):
    """The example workflow in API form."""
    return server.api_form(json.loads((ROOT / "example_workflows" / "flexiffusion_demo.json").read_text(encoding="utf-8")))


@pytest.fixture
def graph(example):
    """The example with few steps and pictures, and a function that finds its node of a class."""
    short = copy.deepcopy(example)

    def only(class_type):
        (found,) = [key for key, node in short.items() if node["class_type"] == class_type]
        return found

    short[only("KSampler")]["inputs"]["steps"] = 6
    short[only("EmptyChromaRadianceLatentImage")]["inputs"]["batch_size"] = 1
    return short, only


def report_text(entry, graph):
    (key,) = [key for key, node in graph.items() if node["class_type"] == "FlexiReport"]
    return entry["outputs"][key]["text"][0]


def put_in(graph, only, schedule):
    """Put another node in the place of the example's preset."""
    graph[only("FlexiPreset")] = schedule


def test_every_node_is_in_object_info(server):
    known = server.get("/object_info")
    for name in NODES:
        assert known[name]["category"] == "Flexiffusion", name
        assert known[name]["python_module"] == "custom_nodes.flexiffusion"


@pytest.mark.smoke
@pytest.mark.matrix("Doors", "nodes, in the server")
def test_a_graph_of_what_every_host_has_runs_its_schedule(server, record_property):
    pixels = "EmptyChromaRadianceLatentImage" in server.get("/object_info")  # since 0.3.60
    kind, size = ("EmptyChromaRadianceLatentImage", 32) if pixels else ("EmptyLatentImage", 256)
    latent = {"width": size, "height": size, "batch_size": 1}
    settings = {"seed": 0, "steps": 20, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    graph = {
        "1": {"class_type": "FlexiDemoModel", "inputs": {}},
        "2": {"class_type": "FlexiPreset", "inputs": {"preset": "2x", "steps": 0}},
        "3": {"class_type": "FlexiApply", "inputs": {"model": ["1", 0], "schedule": ["2", 0], "on_mismatch": "map"}},
        "4": {"class_type": "FlexiDemoPrompt", "inputs": {"caption": "a large red circle at the center on a navy background"}},
        "5": {"class_type": "FlexiDemoPrompt", "inputs": {"caption": ""}},
        "6": {"class_type": kind, "inputs": latent},
        "7": {
            "class_type": "KSampler",
            "inputs": {"model": ["3", 0], "positive": ["4", 0], "negative": ["5", 0], "latent_image": ["6", 0], **settings},
        },
        "8": {"class_type": "SaveLatent", "inputs": {"samples": ["7", 0], "filename_prefix": "door"}},
        "9": {"class_type": "FlexiReport", "inputs": {"run": ["3", 1], "latent": ["7", 0]}},
    }
    entry = server.run(graph)
    (saved,) = entry["outputs"]["8"]["latents"]
    assert (server.base / "output" / saved["subfolder"] / saved["filename"]).stat().st_size > 3 * 32 * 32 * 4
    text = report_text(entry, graph)
    assert text.startswith("10 of 20 steps are computed, 2x fewer.\n"), text
    record_property("does", "a preset, sampling and the report")


def test_example_workflow_ends_with_pictures_on_disk_and_a_report(server, example):
    from PIL import Image

    entry = server.run(example)
    (saved,) = [out["images"] for key, out in entry["outputs"].items() if example[key]["class_type"] == "SaveImage"]
    assert len(saved) == 4
    for picture in saved:
        with Image.open(server.base / "output" / picture["subfolder"] / picture["filename"]) as image:
            assert image.getextrema() != ((0, 0),) * 3
    text = report_text(entry, example)
    assert text.startswith("10 of 50 steps are computed, 5x fewer.\n") and "found by a search for the Flexi Demo Model" in text
    assert "\nFlexiffusion: 50 steps: 10 full" in text
    assert "fewer MACs than all steps full" in text
    (shown,) = [out for key, out in entry["outputs"].items() if example[key]["class_type"] == "FlexiReport"]
    body = server.get(f"/view?filename={shown['images'][0]['filename']}&type=temp")
    assert Image.open(io.BytesIO(body)).size[0] == 1024


def test_example_workflow_saves_the_promised_compute(server, example):
    text = report_text(server.run(example), example)
    speedup = float(text.split("x fewer MACs")[0].split()[-1])
    assert speedup >= 4.5


def test_bad_schedule_text_is_refused_before_anything_runs(server, graph):
    short, only = graph
    put_in(short, only, {"class_type": "FlexiSchedule", "inputs": {"text": "FXQ"}})
    status, answer = server.post(short)
    assert status == 400
    assert "unknown step 'Q'" in json.dumps(answer)


@pytest.mark.matrix("Runs", "schedule edited between runs (server)")
def test_schedule_file_is_read_again_when_it_was_edited(server, graph, record_property):
    short, only = graph
    path = server.base / "models" / "flexi_schedules" / "mine.json"
    put_in(short, only, {"class_type": "FlexiLoadSchedule", "inputs": {"file": "mine.json"}})
    for text in ("F|FXXXX", "3*(FX)"):
        path.write_text(json.dumps({"format": "flexiffusion-schedule", "version": 1, "schedule": text}))
        letters = text if "*" not in text else "FXFXFX"
        assert letters.replace("|", "") in report_text(server.run(short), short)
    record_property("does", "the next run has the edited schedule")


@pytest.mark.parametrize("path", sorted(BUNDLED.glob("*.json")), ids=lambda path: path.stem)
def test_searched_schedule_does_in_the_server_what_its_file_says(server, graph, path):
    node = {"class_type": "FlexiLoadSchedule", "inputs": {"file": f"{path.name} (bundled)"}}
    does_in_the_server_what_it_says(server, *graph, node, json.loads(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(("preset", "steps"), [("1.5x", 25), ("2x", 50), ("3x", 20), ("5x", 30)])
def test_preset_of_the_demo_model_does_in_the_server_what_it_says(server, graph, preset, steps):
    known = json.loads((ROOT / "flexi_core" / "schedule" / "data" / "presets-demo.json").read_text(encoding="utf-8"))
    node = {"class_type": "FlexiPreset", "inputs": {"preset": preset, "steps": steps, "model": "demo"}}
    does_in_the_server_what_it_says(server, *graph, node, known[preset][str(steps)])


def test_preset_of_an_older_graph_runs_without_the_input_that_it_lacks(server, graph):
    short, only = graph
    put_in(short, only, {"class_type": "FlexiPreset", "inputs": {"preset": "2x", "steps": 20}})
    short[only("KSampler")]["inputs"]["steps"] = 20
    assert "20 steps: 10 full, 10 null (extrapolated)" in report_text(server.run(short), short)


def test_preset_of_other_steps_than_the_samplers_says_so_first(server, graph):
    short, only = graph
    put_in(short, only, {"class_type": "FlexiPreset", "inputs": {"preset": "2x", "steps": 20}})
    told = "Flexi Preset is set to 20 steps, the run has {}: set its steps to 0, and it takes the run's own."
    assert report_text(server.run(short), short).splitlines()[:2] == [
        "This schedule saves nothing here: made for 20 steps, laid over 6, every step is computed.",
        told.format(6),
    ]
    short[only("KSampler")]["inputs"]["steps"] = 14
    assert report_text(server.run(short), short).splitlines()[0] == told.format(14)


@pytest.mark.parametrize(("sampler", "steps"), [("euler", 20), ("dpmpp_2m", 24), ("euler_ancestral", 28)])
def test_preset_takes_the_samplers_own_steps(server, graph, sampler, steps):
    short, only = graph
    put_in(short, only, {"class_type": "FlexiPreset", "inputs": {"preset": "2x", "steps": 0}})
    short[only("KSampler")]["inputs"] |= {"steps": steps, "sampler_name": sampler, "scheduler": "simple"}
    entry = server.run(short)
    # Newer hosts say again nothing that they did not compute again.
    shown = entry["outputs"].get(only("FlexiPreset"))
    assert shown or sampler != "euler"
    assert shown is None or (shown["flexi_steps"] == [""] and "about half of the run's steps" in shown["text"][0])
    assert report_text(entry, short).startswith(f"{steps // 2} of {steps} steps are computed, 2x fewer.\n")


def test_preset_that_is_not_yet_a_schedule_is_not_saved_and_says_what_to_do(server, graph):
    short, only = graph
    save = {"schedule": [only("FlexiPreset"), 0], "file_name": "too early", "overwrite": False}
    short["save"] = {"class_type": "FlexiSaveSchedule", "inputs": save}
    with pytest.raises(AssertionError):
        server.run(short)
    assert "becomes a schedule when sampling starts" in json.dumps(
        list(server.get("/history?max_items=1").values())[-1]["status"]
    )
    assert not (server.base / "models" / "flexi_schedules" / "too early.json").exists()


def does_in_the_server_what_it_says(server, graph, only, node, schedule):
    teacher, measured = schedule["teacher"], schedule["measured"]
    put_in(graph, only, node)
    settings = {"sampler_name": teacher["sampler"], "scheduler": teacher["scheduler"]}
    graph[only("KSampler")]["inputs"] |= settings | {"steps": teacher["steps"], "cfg": teacher["cfg"]}
    text = report_text(server.run(graph), graph)
    assert "Note" not in text and "mapped" not in text, "a run like the teacher's is no other run"
    assert float(text.split("x fewer MACs")[0].split()[-1]) == pytest.approx(measured["speedup_macs"], rel=0.01)


def test_broken_schedule_file_is_refused_by_its_name(server, graph):
    short, only = graph
    (server.base / "models" / "flexi_schedules" / "broken.json").write_text('{"format": "flexiffusion-sch')
    put_in(short, only, {"class_type": "FlexiLoadSchedule", "inputs": {"file": "broken.json"}})
    status, answer = server.post(short)
    assert status == 400
    assert "broken.json" in json.dumps(answer) and "not valid JSON" in json.dumps(answer)


def test_saved_schedule_is_offered_for_loading(server, graph):
    short, only = graph
    short[only("FlexiPreset")]["inputs"]["steps"] = 50
    schedule = [only("FlexiPreset"), 0]
    short["save"] = {
        "class_type": "FlexiSaveSchedule",
        "inputs": {"schedule": schedule, "file_name": "from the graph", "overwrite": False},
    }
    server.run(short)
    options = server.get("/object_info/FlexiLoadSchedule")["FlexiLoadSchedule"]["input"]["required"]["file"]
    assert "from the graph.json" in json.dumps(options)


@pytest.mark.matrix("Runs", "Flexi Apply bypassed or removed (server)")
def test_bypassed_apply_gives_the_pictures_of_an_all_full_schedule(server, graph, record_property):
    short, only = graph
    put_in(short, only, {"class_type": "FlexiSchedule", "inputs": {"text": "6*(F)"}})
    full = picture_bytes(server, server.run(short), short)
    sampler, decode = short[only("KSampler")]["inputs"], short[only("VAEDecode")]["inputs"]
    sampler["model"], decode["samples"] = [only("FlexiDemoModel"), 0], [only("KSampler"), 0]
    for key in [key for key, node in short.items() if node["class_type"] in ("FlexiReport", "PreviewImage", "FlexiApply")]:
        del short[key]
    assert picture_bytes(server, server.run(short), short) == full
    record_property("does", "the pictures of plain sampling, bit for bit")


@pytest.mark.parametrize("gone", ["FlexiApply", "FlexiPreset"])
def test_a_bypassed_node_of_the_pack_samples_plainly_and_the_report_says_so(server, graph, gone):
    short, only = graph
    key, source = only(gone), [only("FlexiDemoModel"), 0]
    plain = copy.deepcopy(short)
    put_in(plain, only, {"class_type": "FlexiSchedule", "inputs": {"text": "6*(F)"}})
    full = picture_bytes(server, server.run(plain), plain)
    del short[key]
    # As the page sends it: the model goes on past a bypassed node, its other links are gone.
    for node in short.values():
        for name, value in list(node["inputs"].items()):
            if isinstance(value, list) and value[0] == key:
                del node["inputs"][name]
                if name == "model":
                    node["inputs"][name] = source
    entry = server.run(short)
    assert report_text(entry, short).startswith("Plain sampling, every step computed")
    assert picture_bytes(server, entry, short) == full


def picture_bytes(server, entry, graph):
    from PIL import Image

    (saved,) = [out["images"] for key, out in entry["outputs"].items() if graph[key]["class_type"] == "SaveImage"]
    with Image.open(server.base / "output" / saved[0]["subfolder"] / saved[0]["filename"]) as image:
        return image.tobytes()


def asked(server, question):
    """Return the status and the answer of the pack's route for the strip."""
    body = question if isinstance(question, bytes) else json.dumps(question).encode()
    request = urllib.request.Request(server.url + "/flexiffusion/strip", body)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_the_server_tells_what_a_node_shows_of_its_widgets(server):
    status, shown = asked(server, {"node": "FlexiSchedule", "values": {"text": "FX FX\nFNN"}})
    assert (status, shown["letters"], shown["words"]) == (200, "FXFXFNN", "7 steps, 3 computed, about 2.3x")
    assert shown["kinds"]["X"]["label"] == "extrapolated" and shown["kinds"]["X"]["colour"].startswith("#")
    _, wrong = asked(server, {"node": "FlexiSchedule", "values": {"text": "FXQ"}})
    assert "unknown step 'Q'" in wrong["error"] and "letters" not in wrong
    _, preset = asked(server, {"node": "FlexiPreset", "values": {"preset": "5x", "steps": 20, "model": "any"}})
    assert preset["letters"].count("F") == 4
    _, file = asked(server, {"node": "FlexiLoadSchedule", "values": {"file": "demo-euler-5x.json (bundled)"}})
    assert len(file["letters"]) == 50 and "made for 50 euler steps" in file["details"]


def test_the_server_changes_a_step_of_a_text(server):
    question = {"node": "FlexiSchedule", "values": {"text": "3*(FX); order=2"}}
    assert asked(server, {**question, "step": 1})[1]["text"] == "FN|2*(FX); order=2"
    assert "first step stays full" in asked(server, {**question, "step": 0})[1]["error"]


@pytest.mark.parametrize(
    "question",
    [b"", b"[1]", b"{}", b"[" * 100_000, b'{"node": "FlexiSchedule"}', b'{"node": ["F"], "values": {}}', b"\xff",
     {"node": "FlexiSchedule", "values": {"text": 7}}, {"node": "FlexiSchedule", "values": {"text": "9999*(" * 20}},
     {"node": "FlexiSchedule", "values": {"text": "FX"}, "step": "x"}, {"node": "FlexiPreset", "values": {"preset": []}},
     {"node": "FlexiLoadSchedule", "values": {"file": "../../x.json"}}, {"node": "KSampler", "values": {}}],
)  # fmt: skip
def test_what_is_no_question_is_answered_in_words(server, question):
    status, answer = asked(server, question)
    assert status == 200 and answer["error"]


def test_a_question_without_end_is_not_read_to_its_end(server):
    status, answer = asked(server, b" " * (9 * 2**20))
    assert status == 413 and "longer than" in answer["error"]


def words_in_picture(server, graph, entry):
    """Return the texts that the first saved picture of a prompt carries, by name."""
    from PIL import Image

    (saved,) = [out["images"] for key, out in entry["outputs"].items() if graph[key]["class_type"] == "SaveImage"]
    with Image.open(server.base / "output" / saved[0]["subfolder"] / saved[0]["filename"]) as image:
        return image.text


@pytest.mark.parametrize("text", ["3*(FX)", None])
def test_a_saved_picture_carries_the_schedule_that_ran(server, graph, text):
    short, only = graph
    if text:
        put_in(short, only, {"class_type": "FlexiSchedule", "inputs": {"text": text}})
    else:
        put_in(short, only, {"class_type": "FlexiPreset", "inputs": {"preset": "2x", "steps": 0}})
        short[only("KSampler")]["inputs"]["steps"] = 20
    apply = only("FlexiApply")
    for seed in (1000, 1001):  # the second time, the schedule's own nodes are not run again
        short[only("KSampler")]["inputs"]["seed"] = seed
        entry = server.run(short)
        carried = json.loads(words_in_picture(server, short, entry)["flexiffusion"])
        report = entry["outputs"][only("FlexiReport")]["text"][0].splitlines()[-1]
        assert carried == {apply: text or report.removeprefix("As text for Flexi Schedule: ")}


def test_a_picture_carries_nothing_where_the_host_was_told_so(serve, graph, tmp_path):
    short, only = graph
    put_in(short, only, {"class_type": "FlexiSchedule", "inputs": {"text": "3*(FX)"}})
    with serve(tmp_path / "base", "--disable-metadata", "--disable-api-nodes") as silent:
        assert not words_in_picture(silent, short, silent.run(short))


def compared(server, graph, text, **inputs):
    """Run the example's graph under a schedule with a comparison; return what it says and shows."""
    short, only = graph
    put_in(short, only, {"class_type": "FlexiSchedule", "inputs": {"text": text}})
    links = {"run": [only("FlexiApply"), 1], "latent": [only("KSampler"), 0], "vae": short[only("VAEDecode")]["inputs"]["vae"]}
    short["compare"] = {"class_type": "FlexiCompare", "inputs": {**links, "full_run": True, **inputs}}
    return server.run(short)["outputs"]["compare"]


def test_a_comparison_samples_the_same_run_in_full(server, graph):
    short, only = graph
    shown = compared(server, graph, "3*(FX)")
    assert "dB to the picture of all steps" in shown["text"][0]
    short[only("FlexiSchedule")]["inputs"]["text"] = "6*(F)"
    of_full = server.run(short)["outputs"]["compare"]["flexi_compare"][0]["schedule"]
    full, schedule = (decoded(server, shown["flexi_compare"][0][name]) for name in ("full", "schedule"))
    assert full == decoded(server, of_full) != schedule


def decoded(server, shown):
    from PIL import Image

    body = server.get(f"/view?filename={shown['filename']}&subfolder={shown['subfolder']}&type=temp")
    return Image.open(io.BytesIO(body)).convert("RGB").tobytes()


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m_sde", "ddpm"])
def test_a_comparison_of_full_steps_finds_no_difference(server, graph, sampler):
    short, only = graph
    short[only("KSampler")]["inputs"]["sampler_name"] = sampler
    shown = compared(server, graph, "6*(F)")
    assert shown["text"][0].startswith("The pictures are the same, bit for bit.")


def test_a_comparison_that_is_off_samples_nothing_and_one_without_a_run_says_why(server, graph):
    shown = compared(server, graph, "3*(FX)", full_run=False)
    assert shown["text"][0].startswith("Off: ") and "flexi_compare" not in shown
    short, _ = graph
    del short["compare"]["inputs"]["run"]
    short["compare"]["inputs"]["full_run"] = True
    assert "nothing to compare" in server.run(short)["outputs"]["compare"]["text"][0]


def test_page_gets_the_strip_the_help_and_the_names(server):
    assert "/extensions/flexiffusion/flexiffusion.js" in server.get("/extensions")
    assert b"registerExtension" in server.get("/extensions/flexiffusion/flexiffusion.js")
    for name in NODES:
        assert server.get(f"/extensions/flexiffusion/docs/{name}.md").startswith(b"# Flexi ")
    assert set(NODES) <= set(server.get("/i18n")["en"]["nodeDefs"])


def test_example_workflow_is_among_the_templates_with_its_thumbnail(server):
    assert "flexiffusion_demo" in server.get("/workflow_templates")["flexiffusion"]
    assert server.get("/api/workflow_templates/flexiffusion/flexiffusion_demo.jpg")[:2] == b"\xff\xd8"
