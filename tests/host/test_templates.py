"""The registry's archive, unpacked in a real server: its nodes, its pages, and every template sampled from end to end.

Where a template wants a file, a tiny network of the same class with generated weights stands in (`tiny_pack`), and pictures are
small; all else runs as it is saved.
"""

import json
import re
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "example_workflows"
SIZE = 64  # pixels
PAGE_ONLY = {"MarkdownNote", "Note", "Reroute", "PrimitiveNode"}
LOADERS = {
    "CheckpointLoaderSimple": (0, 1, 2),
    "UNETLoader": (0,),
    "CLIPLoader": (1,),
    "DualCLIPLoader": (1,),
    "VAELoader": (2,),
}
MODEL_OF = {
    "sd15_2x": "SD1.5", "sdxl_2x": "SDXL", "flux_2x": "Flux", "wan22_two_experts": "Wan 2.1", "z_image_turbo": "Z-Image",
    "hires_fix": "SD1.5", "img2img": "SD1.5", "controlnet": "SD1.5",
}  # fmt: skip
# Steps of each report, and how many of them are computed.
COMPUTED = {
    "demo": [(50, 10)], "sd15_2x": [(25, 13)], "sdxl_2x": [(30, 15)], "flux_2x": [(20, 10)], "z_image_turbo": [(8, 5)],
    "wan22_two_experts": [(10, 7), (10, 7)], "hires_fix": [(20, 10), (20, 10)], "img2img": [(30, 15)], "controlnet": [(20, 10)],
    "my_schedule": [(25, 8)], "tune": [(20, 10)],
}  # fmt: skip


@pytest.fixture(scope="module")
def unpacked(archive, serve, tmp_path_factory):
    """A server whose pack is the archive's content, with the stand-ins beside it."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(archive) as made:
        made.extractall(folder)
    packs = {"flexiffusion": folder, "tiny_pack": Path(__file__).parent / "tiny_pack"}
    with serve(tmp_path_factory.mktemp("archived"), "--disable-api-nodes", packs=packs) as running:
        Image.radial_gradient("L").resize((SIZE, SIZE)).convert("RGB").save(running.base / "input" / "example.png")
        yield running


@pytest.fixture(scope="module")
def known(unpacked):
    return unpacked.get("/object_info")


def saved(name):
    return json.loads((FOLDER / f"flexiffusion_{name}.json").read_text(encoding="utf-8"))


def names():
    return sorted(path.stem.removeprefix("flexiffusion_") for path in FOLDER.glob("*.json"))


def test_all_nodes_of_the_archive_are_there(known):
    nodes = {name for name, node in known.items() if node["python_module"] == "custom_nodes.flexiffusion"}
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "nodes").glob("*.py"))
    assert nodes == set(re.findall(r'node_id="(\w+)"', source))


def test_all_templates_of_the_archive_are_offered_with_their_thumbnails(unpacked):
    offered = unpacked.get("/workflow_templates")["flexiffusion"]
    assert sorted(offered) == [f"flexiffusion_{name}" for name in names()]
    for name in offered:
        assert unpacked.get(f"/api/workflow_templates/flexiffusion/{name}.jpg")[:2] == b"\xff\xd8"


def test_the_archive_gives_names_help_and_pictures_in_every_language(unpacked, known):
    translated = unpacked.get("/i18n")
    nodes = {name for name, node in known.items() if node["python_module"] == "custom_nodes.flexiffusion"}
    for language in ("en", "zh", "ja", "es"):
        assert nodes <= set(translated[language]["nodeDefs"])
    for node in nodes:
        pages = [f"{node}.md", *(f"{node}/{language}.md" for language in ("zh", "ja", "es"))]
        for page in pages:
            text = unpacked.get(f"/extensions/flexiffusion/docs/{page}").decode()
            (picture,) = re.findall(r"!\[.+?\]\((.+?)\)", text)
            assert unpacked.get(f"/extensions/flexiffusion/docs/{picture}")[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("name", names())
def test_a_template_opens_without_missing_nodes(known, name):
    assert {node["type"] for node in saved(name)["nodes"]} <= set(known) | PAGE_ONLY


@pytest.mark.parametrize("name", names())
def test_a_template_samples_what_it_promises(unpacked, checkout, name):
    if name == "z_image_turbo" and "class ZImage" not in (checkout / "comfy" / "supported_models.py").read_text("utf-8"):
        pytest.skip("this host has no Z-Image")
    graph = small(unpacked.api_form(saved(name)), MODEL_OF.get(name))
    entry = unpacked.run(graph)
    files = saved_files(unpacked, graph, entry)
    assert files and all(files)
    assert len(set(files)) == len(files), "with and without is no difference"
    reports = [entry["outputs"][key]["text"][0] for key, node in graph.items() if node["class_type"] == "FlexiReport"]
    letters = [re.search(r"^[FPNXfp]{2,}$", text, re.MULTILINE)[0] for text in reports]
    assert [(len(each), each.count("F")) for each in letters] == COMPUTED[name]
    assert not any("ran in full" in text for text in reports)


def saved_files(server, graph, entry):
    """Return the content of every picture or video that a run saved."""
    outputs = [entry["outputs"][key] for key, node in graph.items() if node["class_type"] in ("SaveImage", "SaveVideo")]
    paths = [server.base / "output" / file["subfolder"] / file["filename"] for output in outputs for file in output["images"]]
    return [path.read_bytes() for path in paths]


def small(graph, family):
    """Return a template's graph with stand-ins for its files, and with small pictures."""
    for node in graph.values():
        for key in ("width", "height"):
            if node["inputs"].get(key, 0) > SIZE:
                node["inputs"][key] = SIZE
        if "length" in node["inputs"]:
            node["inputs"]["length"] = 5
        for key, value in node["inputs"].items():
            if isinstance(value, list) and stands_in(graph[value[0]]):
                node["inputs"][key] = [value[0], LOADERS[graph[value[0]]["class_type"]][value[1]]]
    for node in graph.values():
        if stands_in(node):
            node |= {"class_type": "FlexiTinyLoader", "inputs": {"family": family}}
        elif node["class_type"] == "ControlNetLoader":
            node |= {"class_type": "FlexiTinyControlLoader", "inputs": {"family": family}}
    return graph


def stands_in(node):
    return node["class_type"] in LOADERS and node["inputs"].get("vae_name") != "pixel_space"
