"""Makes the templates in example_workflows: the graphs below, laid out, as the page saves them.

    python benchmarks/workflows.py http://127.0.0.1:8188/object_info    # of a running ComfyUI with this pack

What nodes have for inputs, and in which order their values are saved, is the running host's own; take the oldest host that is
supported. Nodes stand in columns, with room for the taller nodes of Nodes 2.0. tests/host/test_templates.py runs each template.
"""

from __future__ import annotations

import json
import re
import urllib.request
import uuid
from pathlib import Path
from typing import Annotated, Any

import typer

from flexi_core.files import write_text

FOLDER = Path(__file__).resolve().parents[1] / "example_workflows"
NOTES = Path(__file__).with_name("workflow_notes.md")
COLUMN, GAP = 420, 90  # pixels: from a column to the next, and between two nodes of one
WIDTH = 330
HEAD, ROW, WIDGET, TEXT, IMAGE = 50, 22, 30, 130, 300  # pixels of height; those of the larger nodes, in Nodes 2.0
TALL = {
    "FlexiApply": 170,
    "FlexiPreset": 180,
    "FlexiSchedule": 130,
    "FlexiLoadSchedule": 150,
    "FlexiTune": 180,
    "FlexiReport": 320,
    "PreviewAny": 130,
}
WIDE = {"FlexiReport": 520, "SaveImage": 420, "PreviewImage": 420, "MarkdownNote": 420, "SaveVideo": 420, "PreviewAny": 420}
SHOWN = {"SaveImage", "PreviewImage", "LoadImage", "SaveVideo"}
CONTROLLED = {"seed", "noise_seed"}
SD15 = "v1-5-pruned-emaonly-fp16.safetensors"
HUB = "https://huggingface.co"
WAN = f"{HUB}/Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files"
WAN21 = f"{HUB}/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
CONTROL = f"{HUB}/comfyanonymous/ControlNet-v1-1_fp16_safetensors/resolve/main"
Z = f"{HUB}/Comfy-Org/z_image_turbo/resolve/main/split_files"
FLUX_TEXT = f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main"
# From where the page offers to fetch a missing file, and into which folder, as core's own templates have it.
FILES = {
    SD15: (f"{HUB}/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main", "checkpoints"),
    "sd_xl_base_1.0.safetensors": (f"{HUB}/stabilityai/stable-diffusion-xl-base-1.0/resolve/main", "checkpoints"),
    "flux1-dev.safetensors": (f"{HUB}/Comfy-Org/flux1-dev/resolve/main", "diffusion_models"),
    "clip_l.safetensors": (FLUX_TEXT, "text_encoders"),
    "t5xxl_fp16.safetensors": (FLUX_TEXT, "text_encoders"),
    "ae.safetensors": (f"{Z}/vae", "vae"),
    "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors": (f"{WAN}/diffusion_models", "diffusion_models"),
    "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors": (f"{WAN}/diffusion_models", "diffusion_models"),
    "wan_2.1_vae.safetensors": (f"{WAN}/vae", "vae"),
    "umt5_xxl_fp8_e4m3fn_scaled.safetensors": (f"{WAN21}/text_encoders", "text_encoders"),
    "z_image_turbo_bf16.safetensors": (f"{Z}/diffusion_models", "diffusion_models"),
    "qwen_3_4b.safetensors": (f"{Z}/text_encoders", "text_encoders"),
    "control_v11p_sd15_canny_fp16.safetensors": (CONTROL, "controlnet"),
}  # fmt: skip
Link = tuple[int, int]


class Sheet:
    """A workflow that is being laid out.

    Args:
        definitions: of the host's nodes, as /object_info gives them.
    """

    def __init__(self, definitions: dict[str, Any]) -> None:
        self._definitions, self._nodes, self._links = definitions, [], []
        self._down: dict[float, float] = {}

    def add(self, column: float, kind: str, title: str = "", **given: Any) -> Link:
        """Put a node under the others of its column; return its first output.

        Args:
            column: from 0; a wide node may need two.
            kind: class of the node.
            title: its own where it is empty.
            given: values of widgets, and what `add` or `out` returned for links; left out, a widget has its default.
        """
        definition, number = self._definitions[kind], len(self._nodes) + 1
        inputs = _inputs(definition)
        widgets = [(name, spec) for name, spec in inputs if _is_widget(spec)]
        sockets = [
            {**_named(name), "type": spec[0], "link": self._link(given.get(name), number, slot)}
            for slot, (name, spec) in enumerate(each for each in inputs if each not in widgets)
        ]
        made = zip(definition["output_name"], definition["output"], strict=True)
        outputs = [{**_named(name), "type": type_, "links": []} for name, type_ in made]
        height = HEAD + ROW * max(len(sockets), len(outputs)) + TALL.get(kind, 0) + IMAGE * (kind in SHOWN)
        height += sum(TEXT if _options(spec).get("multiline") else WIDGET for _, spec in widgets)
        node = self._place(column, kind, title, height)
        values = [value for name, spec in widgets for value in _values(name, spec, given)]
        files = [value for value in values if value in FILES]
        models = [{"name": file, "url": f"{FILES[file][0]}/{file}", "directory": FILES[file][1]} for file in files]
        node["inputs"] = [*sockets, *({**_named(name), **_as_widget(name, spec)} for name, spec in widgets)]
        node |= {"outputs": outputs, "properties": {"Node name for S&R": kind}, "widgets_values": values}
        node["properties"] |= {"models": models} if models else {}
        return number, 0

    def note(self, name: str) -> None:
        """Put the note of a name beside the graph, before all else."""
        known = dict(re.findall(r"^## ([^\n]+)\n\n(.+?)(?=\n\n## |\n*\Z)", NOTES.read_text(encoding="utf-8"), re.M | re.S))
        node = self._place(-1.25, "MarkdownNote", "What this shows", 440)
        node |= {"inputs": [], "outputs": [], "properties": {}, "widgets_values": [f"{known[name]}\n\n{known['(all)']}"]}
        node |= {"color": "#432", "bgcolor": "#653"}

    def out(self, link: Link, name: str) -> Link:
        """Return another output of a node by its name."""
        outputs = self._nodes[link[0] - 1]["outputs"]
        return link[0], [each["name"] for each in outputs].index(name)

    def text(self, name: str) -> str:
        """Return the workflow as the page saves it."""
        saved = {"id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"flexiffusion/{name}")), "revision": 0}
        saved |= {
            "last_node_id": len(self._nodes),
            "last_link_id": len(self._links),
            "nodes": self._nodes,
            "links": self._links,
        }
        return (
            json.dumps({**saved, "groups": [], "config": {}, "extra": {}, "version": 0.4}, indent=1, ensure_ascii=False) + "\n"
        )

    def _place(self, column: float, kind: str, title: str, height: int) -> dict[str, Any]:
        x, y = round(column * COLUMN), self._down.get(column, 0)
        self._down[column] = y + height + GAP
        number = len(self._nodes) + 1
        node = {"id": number, "type": kind, "pos": [x, y], "size": [WIDE.get(kind, WIDTH), height], "flags": {}}
        node |= {"order": number - 1, "mode": 0, **({"title": title} if title else {})}
        self._nodes.append(node)
        return node

    def _link(self, source: Link | None, target: int, slot: int) -> int | None:
        if source is None:
            return None
        made = self._nodes[source[0] - 1]["outputs"][source[1]]
        self._links.append([len(self._links) + 1, *source, target, slot, made["type"]])
        made["links"].append(len(self._links))
        return len(self._links)


def _inputs(definition: dict[str, Any]) -> list[tuple[str, list]]:
    parts = definition["input"]
    return [each for part in ("required", "optional") for each in (parts.get(part) or {}).items()]


def _is_widget(spec: list) -> bool:
    return isinstance(spec[0], list) or spec[0] in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def _options(spec: list) -> dict[str, Any]:
    return spec[1] if len(spec) > 1 else {}


def _named(name: str) -> dict[str, str]:
    return {"localized_name": name, "name": name}


def _as_widget(name: str, spec: list) -> dict[str, Any]:
    return {"type": "COMBO" if isinstance(spec[0], list) else spec[0], "widget": {"name": name}, "link": None}


def _values(name: str, spec: list, given: dict[str, Any]) -> list[Any]:
    """Return what the page saves for a widget: its value, and those of the widgets that it puts beside it."""
    options = _options(spec)
    choices = spec[0] if isinstance(spec[0], list) else options.get("options")
    value = given.get(name, options.get("default", choices[0] if choices else ""))
    return [value, *(["fixed"] if name in CONTROLLED else []), *(["image"] if options.get("image_upload") else [])]


# What the templates share


def preset_and_apply(sheet: Sheet, column: float, source: Link, preset: str, **given: Any) -> Link:
    """Put Flexi Preset and Flexi Apply behind a model."""
    schedule = sheet.add(column, "FlexiPreset", preset=preset, steps=0, **given)
    return sheet.add(column, "FlexiApply", model=source, schedule=schedule)


def report(sheet: Sheet, column: float, applied: Link, latent: Link, title: str = "") -> Link:
    """Put Flexi Report behind a sampler; its latent goes on."""
    return sheet.add(column, "FlexiReport", title, run=sheet.out(applied, "run"), latent=latent)


def picture(sheet: Sheet, column: float, latent: Link, vae: Link, name: str, title: str = "") -> Link:
    """Decode a latent and save its picture."""
    decoded = sheet.add(column, "VAEDecode", samples=latent, vae=vae)
    return sheet.add(column, "SaveImage", title, images=decoded, filename_prefix=f"flexiffusion/{name}")


def checkpoint(sheet: Sheet, file: str, positive: str, negative: str = "text, watermark") -> tuple[Link, Link, Link, Link]:
    """Put a checkpoint with its prompts into the first column; return model, positive, negative and VAE."""
    loaded = sheet.add(0, "CheckpointLoaderSimple", ckpt_name=file)
    clip = sheet.out(loaded, "CLIP")
    prompts = [
        sheet.add(0, "CLIPTextEncode", title, text=text, clip=clip)
        for title, text in (("Prompt", positive), ("Negative", negative))
    ]
    return loaded, *prompts, sheet.out(loaded, "VAE")


def demo_prompts(sheet: Sheet, caption: str) -> tuple[Link, Link]:
    words = (("Prompt", caption), ("Negative: empty, no condition", ""))
    return tuple(sheet.add(0, "FlexiDemoPrompt", title, caption=text) for title, text in words)


def demo_picture(sheet: Sheet, column: float, latent: Link, vae: Link, name: str) -> None:
    """Decode a latent of the embedded model, and save its pictures large enough to be seen."""
    decoded = sheet.add(column, "VAEDecode", samples=latent, vae=vae)
    large = sheet.add(column, "ImageScaleBy", image=decoded, upscale_method="nearest-exact", scale_by=8)
    sheet.add(column, "SaveImage", images=large, filename_prefix=f"flexiffusion/{name}")


# The templates


def demo(sheet: Sheet) -> None:
    model = sheet.add(0, "FlexiDemoModel")
    positive, negative = demo_prompts(sheet, "a large red circle at the center on a navy background")
    latent = sheet.add(0, "EmptyChromaRadianceLatentImage", width=32, height=32, batch_size=4)
    applied = preset_and_apply(sheet, 1, model, "5x", model="demo")
    sampled = sheet.add(2, "KSampler", model=applied, positive=positive, negative=negative, latent_image=latent,
                        seed=7, steps=50, cfg=3.0, sampler_name="euler", scheduler="normal")  # fmt: skip
    vae = sheet.add(2, "VAELoader", vae_name="pixel_space")
    reported = report(sheet, 3, applied, sampled)
    demo_picture(sheet, 4.5, reported, vae, "demo")
    sheet.note("demo")


def with_and_without(sheet: Sheet, file: str, size: int, steps: int, cfg: float, name: str, prompt: str, note: str) -> None:
    """A checkpoint sampled twice from the same seed: under the preset 2x, and plainly."""
    model, positive, negative, vae = checkpoint(sheet, file, prompt)
    latent = sheet.add(0, "EmptyLatentImage", width=size, height=size)
    applied = preset_and_apply(sheet, 1, model, "2x")
    settings = {"positive": positive, "negative": negative, "latent_image": latent, "seed": 7, "steps": steps, "cfg": cfg}
    settings |= {"sampler_name": "dpmpp_2m", "scheduler": "karras"}
    fast = sheet.add(2, "KSampler", "A: with Flexiffusion", model=applied, **settings)
    plain = sheet.add(2, "KSampler", "B: plain, every step computed", model=model, **settings)
    reported = report(sheet, 3, applied, fast)
    picture(sheet, 4.5, reported, vae, f"{name}_a", "A: with Flexiffusion")
    picture(sheet, 4.5, plain, vae, f"{name}_b", "B: plain")
    sheet.note(note)


def sd15_2x(sheet: Sheet) -> None:
    prompt = "a lighthouse on a cliff at sunset, oil painting"
    with_and_without(sheet, SD15, 512, 25, 7.0, "sd15", prompt, "sd15_2x")


def sdxl_2x(sheet: Sheet) -> None:
    prompt = "a red fox in a snowy forest, morning light, photograph"
    with_and_without(sheet, "sd_xl_base_1.0.safetensors", 1024, 30, 7.0, "sdxl", prompt, "sdxl_2x")


def flux_2x(sheet: Sheet) -> None:
    model = sheet.add(0, "UNETLoader", unet_name="flux1-dev.safetensors")
    clip = sheet.add(
        0, "DualCLIPLoader", clip_name1="clip_l.safetensors", clip_name2="t5xxl_fp16.safetensors", type="flux"
    )  # fmt: skip
    vae = sheet.add(0, "VAELoader", vae_name="ae.safetensors")
    words = "a wooden sign in a garden that says HELLO, soft daylight"
    positive = sheet.add(1, "CLIPTextEncode", "Prompt", text=words, clip=clip)
    guided = sheet.add(1, "FluxGuidance", conditioning=positive, guidance=3.5)
    negative = sheet.add(1, "ConditioningZeroOut", "Negative: not used at cfg 1", conditioning=positive)
    latent = sheet.add(1, "EmptySD3LatentImage", width=1024, height=1024)
    applied = preset_and_apply(sheet, 2, model, "2x")
    sampled = sheet.add(3, "KSampler", model=applied, positive=guided, negative=negative, latent_image=latent,
                        seed=7, steps=20, cfg=1.0, sampler_name="euler", scheduler="simple")  # fmt: skip
    reported = report(sheet, 4, applied, sampled)
    picture(sheet, 5.5, reported, vae, "flux")
    sheet.note("flux_2x")


def wan22_two_experts(sheet: Sheet) -> None:
    high, low = (
        sheet.add(0, "UNETLoader", title, unet_name=f"wan2.2_t2v_{which}_noise_14B_fp8_scaled.safetensors")
        for title, which in (("High noise expert", "high"), ("Low noise expert", "low"))
    )
    clip = sheet.add(0, "CLIPLoader", clip_name="umt5_xxl_fp8_e4m3fn_scaled.safetensors", type="wan")
    vae = sheet.add(0, "VAELoader", vae_name="wan_2.1_vae.safetensors")
    words = (("Prompt", "a sailing boat on a calm lake, mist, slow camera"), ("Negative", "static, blurry, low quality"))
    positive, negative = (sheet.add(1, "CLIPTextEncode", title, text=text, clip=clip) for title, text in words)
    latent = sheet.add(1, "EmptyHunyuanLatentVideo", width=640, height=640, length=81)
    schedule = sheet.add(2, "FlexiPreset", "One preset for both", preset="1.5x", steps=0)
    experts = []
    for title, model in (("High noise", high), ("Low noise", low)):
        shifted = sheet.add(2, "ModelSamplingSD3", f"{title}: shift", model=model, shift=8.0)
        experts.append(sheet.add(2, "FlexiApply", f"{title}: Flexi Apply", model=shifted, schedule=schedule))
    settings = {
        "steps": 20,
        "cfg": 3.5,
        "sampler_name": "euler",
        "scheduler": "simple",
        "positive": positive,
        "negative": negative,
    }
    first = sheet.add(3, "KSamplerAdvanced", "High noise: steps 0 to 10", model=experts[0], latent_image=latent, **settings,
                      noise_seed=7, start_at_step=0, end_at_step=10, return_with_leftover_noise="enable")  # fmt: skip
    second = sheet.add(3, "KSamplerAdvanced", "Low noise: steps 10 to 20", model=experts[1], latent_image=first, **settings,
                       add_noise="disable", start_at_step=10, end_at_step=10000)  # fmt: skip
    report(sheet, 4, experts[0], first, "High noise: Flexi Report")
    reported = report(sheet, 4, experts[1], second, "Low noise: Flexi Report")
    decoded = sheet.add(5.5, "VAEDecode", samples=reported, vae=vae)
    video = sheet.add(5.5, "CreateVideo", images=decoded, fps=16.0)
    sheet.add(5.5, "SaveVideo", video=video, filename_prefix="flexiffusion/wan")
    sheet.note("wan22_two_experts")


def z_image_turbo(sheet: Sheet) -> None:
    model = sheet.add(0, "UNETLoader", unet_name="z_image_turbo_bf16.safetensors")
    clip = sheet.add(0, "CLIPLoader", clip_name="qwen_3_4b.safetensors", type="lumina2")
    vae = sheet.add(0, "VAELoader", vae_name="ae.safetensors")
    positive = sheet.add(1, "CLIPTextEncode", "Prompt", text="a market street in the rain, umbrellas, evening", clip=clip)
    negative = sheet.add(1, "ConditioningZeroOut", "Negative: not used at cfg 1", conditioning=positive)
    latent = sheet.add(1, "EmptySD3LatentImage", width=1024, height=1024)
    shifted = sheet.add(2, "ModelSamplingAuraFlow", model=model, shift=3.0)
    applied = preset_and_apply(sheet, 2, shifted, "1.5x")
    sampled = sheet.add(3, "KSampler", model=applied, positive=positive, negative=negative, latent_image=latent,
                        seed=7, steps=8, cfg=1.0, sampler_name="res_multistep", scheduler="simple")  # fmt: skip
    reported = report(sheet, 4, applied, sampled)
    picture(sheet, 5.5, reported, vae, "z_image")
    sheet.note("z_image_turbo")


def hires_fix(sheet: Sheet) -> None:
    prompt = "a castle on a hill, spring meadow, detailed illustration"
    model, positive, negative, vae = checkpoint(sheet, SD15, prompt)
    latent = sheet.add(0, "EmptyLatentImage", width=512, height=512)
    applied = preset_and_apply(sheet, 1, model, "2x")
    settings = {"model": applied, "positive": positive, "negative": negative, "seed": 7, "steps": 20, "cfg": 7.0}
    settings |= {"sampler_name": "dpmpp_2m", "scheduler": "karras"}
    first = sheet.add(2, "KSampler", "First pass", latent_image=latent, **settings)
    larger = sheet.add(2, "LatentUpscaleBy", samples=first, upscale_method="bislerp", scale_by=1.5)
    second = sheet.add(2, "KSampler", "Second pass, larger", latent_image=larger, denoise=0.55, **settings)
    report(sheet, 3, applied, first, "First pass: Flexi Report")
    reported = report(sheet, 3, applied, second, "Second pass: Flexi Report")
    picture(sheet, 4.5, reported, vae, "hires_fix")
    sheet.note("hires_fix")


def img2img(sheet: Sheet) -> None:
    model, positive, negative, vae = checkpoint(sheet, SD15, "a watercolour painting")
    image = sheet.add(1, "LoadImage", image="example.png")
    scaled = sheet.add(1, "ImageScale", image=image, upscale_method="lanczos", width=512, height=512, crop="center")
    latent = sheet.add(1, "VAEEncode", pixels=scaled, vae=vae)
    applied = preset_and_apply(sheet, 2, model, "2x")
    sampled = sheet.add(3, "KSampler", model=applied, positive=positive, negative=negative, latent_image=latent,
                        seed=7, steps=30, cfg=7.0, sampler_name="euler", scheduler="normal", denoise=0.6)  # fmt: skip
    reported = report(sheet, 4, applied, sampled)
    picture(sheet, 5.5, reported, vae, "img2img")
    sheet.note("img2img")


def controlnet(sheet: Sheet) -> None:
    model, positive, negative, vae = checkpoint(sheet, SD15, "a house in a garden, summer, photograph")
    latent = sheet.add(0, "EmptyLatentImage", width=512, height=512)
    image = sheet.add(1, "LoadImage", image="example.png")
    edges = sheet.add(1, "Canny", image=image, low_threshold=0.4, high_threshold=0.8)
    net = sheet.add(1, "ControlNetLoader", control_net_name="control_v11p_sd15_canny_fp16.safetensors")
    control = sheet.add(
        2, "ControlNetApplyAdvanced", positive=positive, negative=negative, control_net=net, image=edges, strength=0.8
    )
    applied = preset_and_apply(sheet, 2, model, "2x")
    sampled = sheet.add(3, "KSampler", model=applied, positive=control, negative=sheet.out(control, "negative"),
                        latent_image=latent, seed=7, steps=20, cfg=7.0, sampler_name="euler", scheduler="normal")  # fmt: skip
    reported = report(sheet, 4, applied, sampled)
    picture(sheet, 5.5, reported, vae, "controlnet")
    sheet.note("controlnet")


def my_schedule(sheet: Sheet) -> None:
    model = sheet.add(0, "FlexiDemoModel")
    positive, negative = demo_prompts(sheet, "a small green circle at the left on a brown background")
    latent = sheet.add(0, "EmptyChromaRadianceLatentImage", width=32, height=32, batch_size=4)
    schedule = sheet.add(1, "FlexiLoadSchedule", file="demo-dpmpp_2m-3x.json (bundled)")
    applied = sheet.add(1, "FlexiApply", model=model, schedule=schedule)
    sampled = sheet.add(2, "KSampler", model=applied, positive=positive, negative=negative, latent_image=latent,
                        seed=7, steps=25, cfg=3.0, sampler_name="dpmpp_2m", scheduler="normal")  # fmt: skip
    vae = sheet.add(2, "VAELoader", vae_name="pixel_space")
    reported = report(sheet, 3, applied, sampled)
    demo_picture(sheet, 4.5, reported, vae, "my_schedule")
    sheet.note("my_schedule")


def tune(sheet: Sheet) -> None:
    model = sheet.add(0, "FlexiDemoModel")
    positive, negative = demo_prompts(sheet, "a large white square at the center on a teal background")
    latent = sheet.add(0, "EmptyChromaRadianceLatentImage", width=32, height=32)
    vae = sheet.add(0, "VAELoader", vae_name="pixel_space")
    run = {"positive": positive, "negative": negative, "latent_image": latent, "steps": 20, "cfg": 3.0}
    run |= {"sampler_name": "euler", "scheduler": "normal"}
    tuned = sheet.add(1, "FlexiTune", model=model, **run, speedup=2.0, effort="instant", vae=vae)
    sheet.add(1, "PreviewAny", "What was found", source=sheet.out(tuned, "text"))
    sampled = sheet.add(2, "KSampler", model=tuned, seed=7, **run)
    reported = report(sheet, 3, tuned, sampled)
    sheet.add(3, "PreviewImage", "How near each speed-up comes", images=sheet.out(tuned, "front"))
    sheet.add(4.5, "PreviewImage", "All steps, and the schedule", images=sheet.out(tuned, "pictures"))
    demo_picture(sheet, 4.5, reported, vae, "tune")
    sheet.note("tune")


TEMPLATES = (
    demo, sd15_2x, sdxl_2x, flux_2x, wan22_two_experts, z_image_turbo, hires_fix, img2img, controlnet, my_schedule, tune,
)  # fmt: skip


def main(definitions: Annotated[str, typer.Argument(help="Address of a running host's /object_info.")]) -> None:
    """Write every template."""
    with urllib.request.urlopen(definitions) as answer:
        known = json.load(answer)
    for make in TEMPLATES:
        sheet = Sheet(known)
        make(sheet)
        write_text(FOLDER / f"flexiffusion_{make.__name__}.json", sheet.text(make.__name__))


if __name__ == "__main__":
    typer.run(main)
