"""Official templates, as downloaded, with the pack put in: does the run do what the preset plans, and what does it save.

    python benchmarks/templates.py --comfyui ~/comfy/ComfyUI --templates FOLDER    # a few minutes on a CPU, pytest beside it

Every template is turned into its API form, Flexi Preset and Flexi Apply are put between its model and what samples with it,
Flexi Report behind, and the host's own executor runs the part that samples: its guider, sampler, scheduler, steps, windows,
the nodes that patch its model and its conditionings. In place of files stand a tiny network of the same class with random
weights (those of tests/host), random conditionings and a small latent; LoRAs and what needs a picture, a VAE or a control net
are left out. So the sheet is about steps, not about pictures. Written: docs/results/templates.md.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from flexi_core import FlexiError
from flexi_core.files import write_text
from search_tools.backends.comfyui.host import ComfyHost, open_host
from search_tools.backends.comfyui.saved_workflow import to_api
from search_tools.backends.comfyui.workflow import SAMPLING, Graph, find_value, upstream

PACK = Path(__file__).resolve().parents[1]
PAGE = PACK / "docs" / "results" / "templates.md"
ASKED = "2x"
SIZE = 1024  # pixels, where a template takes them from a picture
# Links of these types come from files or pictures; of these, from what stands in for them.
FILES = {"CLIP", "VAE", "IMAGE", "MASK", "AUDIO", "VIDEO", "CONTROL_NET", "CLIP_VISION", "CLIP_VISION_OUTPUT", "STYLE_MODEL"}
FILES |= {"MODEL_PATCH", "AUDIO_ENCODER", "AUDIO_ENCODER_OUTPUT", "LATENT_UPSCALE_MODEL", "UPSCALE_MODEL", "WEBCAM"}
MODEL, WORDS, LATENT = "FlexiTinyModel", "FlexiTinyWords", "FlexiTinyLatent"
_err = Console(stderr=True)

# Template by template: the families of its models, in the order in which its sampling nodes stand; the last holds for the rest.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "default": ("SD1.5",),
    "inpaint_example": ("SD1.5",),
    "lora": ("SD1.5",),
    "hiresfix_latent_workflow": ("SD1.5",),
    "sdxl_simple_example": ("SDXL", "SDXL refiner"),
    "sdxl_revision_text_prompts": ("SDXL",),
    "sdxlturbo_example": ("SDXL",),
    "sd3.5_simple_example": ("SD3",),
    "sd3.5_large_canny_controlnet_example": ("SD3",),
    "flux_dev_full_text_to_image": ("Flux",),
    "flux_dev_checkpoint_example": ("Flux",),
    "flux1_krea_dev": ("Flux",),
    "flux_schnell_full_text_to_image": ("Flux schnell",),
    "flux_kontext_dev_basic": ("Flux Kontext",),
    "flux_fill_inpaint_example": ("Flux Fill",),
    "image_flux2": ("Flux.2",),
    "image_flux2_text_to_image": ("Flux.2",),
    "image_flux2_klein_text_to_image": ("Flux.2",),
    "image_qwen_image": ("Qwen-Image",),
    "image_qwen_Image_2512": ("Qwen-Image",),
    "image_qwen_image_edit": ("Qwen-Image",),
    "image_qwen_image_edit_2509": ("Qwen-Image",),
    "text_to_video_wan": ("Wan 2.1",),
    "image_to_video_wan": ("Wan 2.1 image to video",),
    "video_wan_vace_14B_t2v": ("Wan 2.1 VACE",),
    "video_wan2_2_14B_t2v": ("Wan 2.1",),
    "video_wan2_2_14B_i2v": ("Wan 2.1 image to video",),
    "video_wan2_2_5B_ti2v": ("Wan 2.2 5B",),
    "hunyuan_video_text_to_video": ("HunyuanVideo",),
    "ltxv_text_to_video": ("LTXV",),
    "video_ltx2_t2v": ("LTX-2 (pictures and sound)",),
    "video_ltx2_t2v_distilled": ("LTX-2 (pictures and sound)",),
    "image_z_image_turbo": ("Z-Image",),
    "image_z_image": ("Z-Image",),
    "image_chroma_text_to_image": ("Chroma",),
    "hidream_i1_dev": ("HiDream",),
    "hidream_i1_fast": ("HiDream",),
    "hidream_i1_full": ("HiDream",),
    "image_netayume_lumina_t2i": ("Lumina 2",),
    "image_omnigen2_t2i": ("OmniGen2",),
    "audio_ace_step_1_t2a_song": ("ACE-Step",),
    "audio_stable_audio_example": ("Stable Audio",),
    "3d_hunyuan3d-v2.1": ("Hunyuan3D 2.1",),
    "3d_hunyuan3d_image_to_model": ("Hunyuan3D 2",),
    "3d_hunyuan3d_multiview_to_model_turbo": ("Hunyuan3D 2",),
}


def tests_module(name: str) -> ModuleType:
    """Return a module of the tests by its path in their folder, as `host/conftest`; it is `flexi_conftest` here."""
    spec = importlib.util.spec_from_file_location(f"flexi_{Path(name).name}", PACK / "tests" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def families() -> dict[str, Any]:
    """Return the tiny networks by the name of their family: those of the tests, and what only templates use."""
    nets, unets = tests_module("host/test_transformers"), tests_module("host/conftest")
    known = nets.ALL
    pooled = lambda random: {"pooled_output": random(1, 1280)}  # noqa: E731 (a value)
    flux, lumina = known["Flux"], known["Lumina 2"]
    refiner = {**unets._SDXL, "adm_in_channels": 2560}
    return {
        "SD1.5": nets.Family("SD15", unets._SD15, (4, 8, 8)),
        "SDXL": nets.Family("SDXL", unets._SDXL, (4, 8, 8), conditions=pooled),
        "SDXL refiner": nets.Family("SDXLRefiner", refiner, (4, 8, 8), conditions=pooled),
        "Flux schnell": replace(flux, config="FluxSchnell", network={**flux.network, "guidance_embed": False}),
        "Flux Fill": replace(flux, network={**flux.network, "in_channels": 96}),
        "Flux.2": replace(
            flux,
            config="Flux2",
            latent=(128, 8, 8),
            network={**flux.network, "in_channels": 128, "out_channels": 128, "patch_size": 1, "axes_dim": [8, 8, 8, 8]}
            | {"vec_in_dim": None, "qkv_bias": False, "ops_bias": False, "global_modulation": True, "mlp_silu_act": True}
            | {"txt_ids_dims": [3], "default_ref_method": "index", "ref_index_scale": 10.0},
        ),
        "Z-Image": replace(
            lumina,
            config="ZImage",
            network={**lumina.network, "dim": 256, "axes_dims": [32, 48, 48], "z_image_modulation": True, "time_scale": 1000.0}
            | {"pad_tokens_multiple": 32},
        ),
        "ACE-Step": nets.Family(
            "ACEStep",
            {"in_channels": 8, "out_channels": 8, "inner_dim": 64, "attention_head_dim": 32, "num_attention_heads": 2}
            | {"num_layers": 2, "mlp_ratio": 2.0, "max_height": 16, "max_position": 64, "max_width": 64, "patch_size": [16, 1]}
            | {"text_embedding_dim": 32, "rope_theta": 10000.0},
            (8, 16, 16),
            conditions=lambda random: {"conditioning_lyrics": torch.ones(1, 4, dtype=torch.long)},
        ),
        **known,
    }


class TinyNodes:
    """The nodes that stand in for files, and the models and conditionings that they give.

    Args:
        known: families by name.
    """

    def __init__(self, known: dict[str, Any]) -> None:
        self._known, self._models = known, {}
        self._build, self._tiny = sys.modules["flexi_test_transformers"].build, sys.modules["flexi_test_transformers"].Tiny
        registry = importlib.import_module("nodes").NODE_CLASS_MAPPINGS
        for name, kind, inputs, make in (
            (MODEL, "MODEL", {"family": "STRING"}, self.model),
            (WORDS, "CONDITIONING", {"family": "STRING", "seed": "INT"}, self.words),
            (LATENT, "LATENT", {"family": "STRING"}, self.latent),
        ):
            registry[name] = _node(kind, inputs, make)

    def model(self, family: str) -> Any:
        import comfy
        import comfy.supported_models

        if family not in self._models:
            found = self._known[family]
            config = getattr(comfy.supported_models, found.config, None)
            if config is None:
                raise FlexiError(f"this host has no {found.config}")
            inner = self._build(config, found.network, found.weights())
            tiny = self._tiny(SimpleNamespace(comfy=comfy), inner, found.latent, found.latents, lambda random: ())
            self._models[family] = tiny.model
        return self._models[family]

    def words(self, family: str, seed: int) -> list:
        rng = torch.Generator().manual_seed(seed)
        tokens, conditions = sys.modules["flexi_test_transformers"]._prompt(
            self._known[family], lambda *shape: torch.randn(shape, generator=rng)
        )
        return [[tokens, conditions]]

    def latent(self, family: str) -> dict[str, Any]:
        shape = self._known[family].latent
        if isinstance(shape[0], int):
            return {"samples": torch.zeros(1, *shape)}
        from comfy.nested_tensor import NestedTensor

        return {"samples": NestedTensor([torch.zeros(1, *stream) for stream in shape])}


def _node(kind: str, wanted: dict[str, str], make: Any) -> type:
    """Return a node class of the host's that gives what a function makes."""

    class Node:
        RETURN_TYPES, FUNCTION, CATEGORY = (kind,), "make", "Flexiffusion"

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {name: (type_, {"max": 2**32} if type_ == "INT" else {}) for name, type_ in wanted.items()}}

        def make(self, **inputs: Any) -> tuple:
            return (make(**inputs),)

    return Node


class Sampled:
    """The part of a template that samples, with stand-ins for files.

    Args:
        host: with the stand-ins' nodes.
        graph: API form of the template.
        node: its sampling node.
        family: of its model.
    """

    def __init__(self, host: ComfyHost, graph: Graph, node: str, family: str) -> None:
        self._host, self._given, self._family, self.node = host, graph, family, node
        self.left_out: set[str] = set()
        self._graph: Graph = {}
        self.class_name = type(host.call(MODEL, {"family": family})[0].model.model_config).__name__
        self._streams = host.call(LATENT, {"family": family})[0]["samples"].is_nested
        self._keep(node, tiny_latent=graph[node]["inputs"]["latent_image"][0] not in self.samplers())
        for name in [name for name, each in self._graph.items() if each["class_type"] in SAMPLING and name != node]:
            self._graph[name]["inputs"]["latent_image"] = self._stand_in(LATENT, {})  # its own row has it

    def samplers(self) -> list[str]:
        return [name for name, each in self._given.items() if each["class_type"] in SAMPLING]

    def under(self, schedule: dict[str, Any] | None) -> Graph:
        """Return the graph with a schedule's node, Flexi Apply and Flexi Report; None is the template as it is."""
        graph = json.loads(json.dumps(self._graph))
        users = [self.node] if "model" in graph[self.node]["inputs"] else [graph[self.node]["inputs"]["guider"][0]]
        if schedule is not None:
            graph["flexi schedule"] = schedule
            model = {"model": graph[users[0]]["inputs"]["model"], "schedule": ["flexi schedule", 0], "on_mismatch": "map"}
            graph["flexi apply"] = {"class_type": "FlexiApply", "inputs": model}
            for name in users:
                graph[name]["inputs"]["model"] = ["flexi apply", 0]
        run = {"run": ["flexi apply", 1]} if schedule is not None else {}
        graph["flexi report"] = {"class_type": "FlexiReport", "inputs": {**run, "latent": [self.node, 0]}}
        return graph

    def run(self, schedule: dict[str, Any] | None) -> tuple[Any, Any]:
        """Return the latent, and the report of the run (None without a schedule)."""
        only = ("latent",) if schedule is None else ("run", "latent")
        found = self._host.evaluate(self.under(schedule), "flexi report", only)
        latent = found["latent"]["samples"]
        return latent, found["run"].report_of(latent) if schedule is not None else None

    @property
    def sampler_name(self) -> str:
        return str(find_value(self._graph, self.node, "sampler_name") or "")

    # What is kept of the template

    def _keep(self, name: str, tiny_latent: bool = True) -> None:
        """Keep a node; what it is made from is kept too, or stands in."""
        node = self._given[name]
        self._graph[name] = kept = {"class_type": node["class_type"], "inputs": {}}
        for key, value in node["inputs"].items():
            if not _is_link(value):
                kept["inputs"][key] = value
            elif key == "latent_image" and not tiny_latent:
                kept["inputs"][key] = value
                self._keep(value[0]) if value[0] not in self._graph else None
            elif (found := self._source(value, self._type_of(node["class_type"], key))) is not None:
                kept["inputs"][key] = found

    def _source(self, link: list, wanted: str) -> Any:
        """Return what an input gets: a link into what is kept, or a value; None where it goes without."""
        link = self._through_switches(link)
        origin = self._given[link[0]]
        if wanted in FILES:
            return None
        if wanted == "LATENT":
            return self._stand_in(LATENT, {})
        if wanted == "MODEL" and not self._inputs_of(link[0], "MODEL"):
            return self._stand_in(MODEL, {})
        if wanted == "CONDITIONING" and not self._inputs_of(link[0], "CONDITIONING"):
            return self._stand_in(WORDS, {"seed": zlib.crc32(f"{link}".encode())})
        if wanted in ("MODEL", "CONDITIONING") and self._needs_files(link[0]):
            self.left_out.add(origin["class_type"])
            same = self._inputs_of(link[0], wanted)
            names = self._output_names(origin["class_type"])
            named = names[link[1]] if link[1] < len(names) else ""
            return self._source(same.get(named) or next(iter(same.values())), wanted)
        if wanted in ("INT", "FLOAT") and self._needs_pictures(link[0]):
            return SIZE
        if link[0] not in self._graph:
            self._keep(link[0])
        return link

    def _stand_in(self, kind: str, inputs: dict[str, Any]) -> list:
        name = " ".join([kind, *map(str, inputs.values())])
        self._graph[name] = {"class_type": kind, "inputs": {"family": self._family, **inputs}}
        return [name, 0]

    def _through_switches(self, link: list) -> list:
        """Return where a link comes from behind nodes that only choose between two."""
        while self._given[link[0]]["class_type"] == "ComfySwitchNode":
            inputs = self._given[link[0]]["inputs"]
            chosen = inputs.get("switch")
            chosen = find_value(self._given, chosen[0], "value") if _is_link(chosen) else chosen
            found = inputs.get("on_true" if chosen else "on_false")
            if not _is_link(found):
                return link
            link = found
        return link

    def _inputs_of(self, name: str, wanted: str) -> dict[str, list]:
        """Return the links of a node that are of a type, by their inputs' names."""
        node = self._given[name]
        links = {key: value for key, value in node["inputs"].items() if _is_link(value)}
        return {key: value for key, value in links.items() if self._type_of(node["class_type"], key) == wanted}

    def _needs_files(self, name: str) -> bool:
        node = self._given[name]
        kinds = {self._type_of(node["class_type"], key) for key, value in node["inputs"].items() if _is_link(value)}
        return bool(kinds & FILES) or "Lora" in node["class_type"] or (self._streams and "LATENT" in kinds)

    def _needs_pictures(self, name: str) -> bool:
        return any(
            self._needs_files(each) or "Load" in node["class_type"] for each, node in upstream(self._given, name).items()
        )

    def _type_of(self, kind: str, key: str) -> str:
        for part in ((self._host.define(kind) or {}).get("input") or {}).values():
            if key in part:
                return part[key][0] if isinstance(part[key][0], str) else "COMBO"
        return "*"

    def _output_names(self, kind: str) -> list[str]:
        cls = importlib.import_module("nodes").NODE_CLASS_MAPPINGS[kind]
        return list(getattr(cls, "RETURN_NAMES", None) or cls.RETURN_TYPES)


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


@dataclass(frozen=True)
class Row:
    """What a sampling node of a template did under the preset."""

    template: str
    class_name: str = ""
    sampler: str = ""
    steps: str = ""
    planned: str = ""
    computed: str = ""
    speedup: str = ""
    left_out: str = ""
    words: str = ""
    held: bool = False

    def __str__(self) -> str:
        cells = (self.template, self.class_name, self.sampler, self.steps, self.planned, self.computed, self.speedup)
        return f"| {' | '.join(each.replace('|', '/') for each in (*cells, self.left_out, self.words))} |"


def rows(host: ComfyHost, name: str, workflow: dict[str, Any], names: tuple[str, ...], asked: str) -> Iterator[Row]:
    """Yield a row for each sampling node of a template."""
    graph = to_api(workflow, host.define)
    samplers = [each for each, node in graph.items() if node["class_type"] in SAMPLING]
    for i, node in enumerate(samplers):
        title = name if len(samplers) == 1 else f"{name} ({i + 1} of {len(samplers)})"
        try:
            yield measured(Sampled(host, graph, node, names[min(i, len(names) - 1)]), title, asked)
        except FlexiError as error:
            yield Row(title, words=f"not run: {error}")


def measured(sampled: Sampled, title: str, asked: str) -> Row:
    """Return what a sampling node does under the preset; the law of all full steps is held on the way."""
    plain, _ = sampled.run(None)
    full, whole = sampled.run({"class_type": "FlexiPreset", "inputs": {"preset": "all-full", "steps": 0}})
    if not _equal(plain, full):
        raise FlexiError("all steps in full do not give the latent of the template without the pack")
    latent, report = sampled.run({"class_type": "FlexiPreset", "inputs": {"preset": asked, "steps": 0}})
    steps, words = len(whole.steps), " ".join((report.words or report.notes)[:1])
    run = report.run
    if run is None:
        if not _equal(plain, latent):
            raise FlexiError("the preset stood down and changed the latent")
        row = {"planned": "plain sampling", "computed": "all", "speedup": "1.0x", "held": True}
    else:
        planned, ran = run.plan.letters, report.letters
        called = sum(step.network_calls > 0 for step in report.steps)
        speedup = report.speedup_macs
        row = {"planned": planned, "computed": str(called), "held": planned == ran and bool(_finite(latent))}
        row |= {"speedup": "" if speedup is None else f"{speedup:.2f}x"}
    row |= {"class_name": sampled.class_name, "sampler": sampled.sampler_name, "steps": str(steps)}
    return Row(title, words=words, left_out=", ".join(sorted(sampled.left_out)), **row)


def _streams(latent: Any) -> list[torch.Tensor]:
    return list(latent.unbind()) if getattr(latent, "is_nested", False) else [latent]


def _equal(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(_streams(a), _streams(b), strict=True))


def _finite(latent: Any) -> bool:
    return all(bool(stream.isfinite().all()) for stream in _streams(latent))


def main(
    templates: Annotated[list[Path], typer.Option(help="A folder of official templates; may be given again.")],
    comfyui: Annotated[str, typer.Option(help="A ComfyUI checkout.")] = "~/comfy/ComfyUI",
    preset: Annotated[str, typer.Option(help="What Flexi Preset is set to.")] = ASKED,
    only: Annotated[str, typer.Option(help="Templates whose names have this.")] = "",
) -> None:
    """Run the templates, print and write the sheet."""
    with tempfile.TemporaryDirectory() as base:
        pack = Path(base) / "custom_nodes" / "flexiffusion"
        pack.parent.mkdir()
        pack.symlink_to(PACK, target_is_directory=True)
        known = families()
        if not sys.modules["flexi_conftest"].imports_torchvision():
            sys.path.append(str(sys.modules["flexi_conftest"].STANDIN))
        host = open_host(comfyui, base)
        TinyNodes(known)
        found: list[Row] = []
        for name, names in TEMPLATES.items():
            file = next((folder / f"{name}.json" for folder in templates if (folder / f"{name}.json").is_file()), None)
            if only not in name:
                continue
            if file is None:
                _err.print(f"{name}: not in {', '.join(map(str, templates))}", highlight=False)
                continue
            for row in rows(host, name, json.loads(file.read_text(encoding="utf-8")), names, preset):
                found.append(row)
                _err.print(str(row), highlight=False, soft_wrap=True)
    page = "\n".join(_page(found, comfyui, preset)) + "\n"
    if not only:
        write_text(PAGE, page)
    print(page)


def _page(found: list[Row], comfyui: str, preset: str) -> list[str]:
    """Return the lines of the sheet."""
    stated = (Path(comfyui).expanduser() / "comfyui_version.py").read_text(encoding="utf-8")
    version = re.search(r'__version__ = "(.+)"', stated)
    run = {row.template.split(" (")[0] for row in found if row.held}
    return [
        f"# Official templates with Flexi Preset {preset}",
        "",
        f"Made by `python benchmarks/templates.py` on ComfyUI {version[1] if version else ''}, from its official templates as",
        "downloaded. The pack's nodes are put between the model and what samples; sampler, steps, scheduler, window and",
        "guider, the nodes that patch the model and the conditionings are the template's own. In place of files stand a tiny",
        "network of the same class with random weights, random conditionings and a small latent; LoRAs, control nets and what",
        "needs a picture or a VAE are left out. It is about steps and compute, not about pictures. Speed-up: MACs of all steps",
        "in full against those that were computed, of the tiny network. With all steps in full every row gives the latent of",
        "the template without the pack, bit for bit.",
        "",
        f"{len(run)} templates, {sum(row.held for row in found)} of {len(found)} rows run as planned.",
        "",
        "| template | class | sampler | steps | planned | computed | speed-up | left out | the report says |",
        "|-|-|-|-|-|-|-|-|-|",
        *map(str, found),
    ]


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    try:
        typer.run(main)
    except FlexiError as error:
        sys.exit(str(error))
