"""The pack's own pictures: the registry's icon and banner, the thumbnails of the templates, the pictures of the help pages.

    python benchmarks/pictures.py                     # all of them, a minute on a CPU
    python benchmarks/pictures.py --only thumbnails

Every picture of a scene is sampled here, by the embedded model: on the left with all steps, on the right under the template's
schedule, from the same noise. What presets become there, and what Flexi Tune finds, is as the templates' own reports have it.
Nothing is drawn by another model, and the thumbnails say so.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image, ImageChops, ImageDraw

from flexi_core import Schedule, load_schedule
from flexi_core.demo.model import DemoModel
from flexi_core.demo.scenes import parse_caption
from flexi_core.run.report import RunReport
from flexi_core.run.timeline import EMPTY, FAINT, TEXT, draw_timeline, font
from flexi_core.runtime.sampling import make_noise, sample, sigmas_of, traits_of
from flexi_core.schedule.kinds import StepKind
from flexi_core.schedule.presets import Preset, all_full

PACK = Path(__file__).resolve().parents[1]
BRAND, HELP, TEMPLATES = PACK / "docs" / "pictures", PACK / "web" / "docs" / "pictures", PACK / "example_workflows"
BACKGROUND = "#1d1f24"
BLUE, GREY, ORANGE = (kind.colour for kind in (StepKind.FULL, StepKind.NULL, StepKind.EXTRAPOLATED))
OTHER = "Pictures: the pack's small demo model, same sampler and steps"
OWN = "The pack's small demo model, with this template's settings"


@dataclass(frozen=True)
class Scene:
    """A run of the embedded model, and what a thumbnail says of it.

    Args:
        title: of the thumbnail.
        told: the line under the strip's numbers.
        sampler, scheduler, steps, cfg: of the run.
        schedule: name of a preset, text of a schedule, or a file that comes with the pack.
        model: of the preset.
        caption, seed: what is drawn.
        parts: names of equal stretches of the strip.
    """

    title: str
    told: str
    sampler: str
    scheduler: str
    steps: int
    cfg: float
    schedule: str
    caption: str
    seed: int = 7
    model: str = "any"
    parts: tuple[str, ...] = ()


THUMBNAILS = {
    "demo": Scene("Try it now", OWN, "euler", "normal", 50, 3, "5x", "a large red circle at the center on a navy background",
                  model="demo"),
    "sd15_2x": Scene("SD 1.5, with and without", OTHER, "dpmpp_2m", "karras", 25, 3, "2x",
                     "a large yellow ring at the center on a teal background"),
    "sdxl_2x": Scene("SDXL, with and without", OTHER, "dpmpp_2m", "karras", 30, 3, "2x",
                     "a large purple square at the center on a grey background"),
    "flux_2x": Scene("Flux", OTHER, "euler", "simple", 20, 1, "2x",
                     "a large green triangle at the center on a brown background"),
    "wan22_two_experts": Scene("Wan 2.2, two experts", OTHER, "euler", "simple", 20, 3, "FFFFFXFXXF|FFFFFXFXXF",
                               "a large blue circle at the left on a black background", parts=("high noise", "low noise")),
    "z_image_turbo": Scene("Z-Image Turbo, few steps", OTHER, "res_multistep", "simple", 8, 1, "1.5x",
                           "a large white ring at the center on a navy background"),
    "hires_fix": Scene("Hires fix", OTHER, "dpmpp_2m", "karras", 20, 3, "2x",
                       "a small red square at the top right on a teal background"),
    "img2img": Scene("Image to image", OTHER, "euler", "normal", 30, 3, "2x",
                     "a large yellow triangle at the bottom on a navy background"),
    "controlnet": Scene("ControlNet", OTHER, "euler", "normal", 20, 3, "2x",
                        "a large purple ring at the right on a black background"),
    "my_schedule": Scene("Load my searched schedule", OWN, "dpmpp_2m", "normal", 25, 3, "demo-dpmpp_2m-3x.json",
                         "a small green circle at the left on a brown background"),
    "tune": Scene("Tune in the graph", OTHER, "euler", "normal", 20, 3, "FFFXXFXXFXXXFXXFXFFF",
                  "a large white square at the center on a teal background"),
}  # fmt: skip


@cache
def model() -> DemoModel:
    return DemoModel.load()


def schedule_of(scene: Scene) -> Schedule:
    """Return the schedule of a scene: a file that comes with the pack, a text, or what the preset becomes for the run."""
    if scene.schedule.endswith(".json"):
        return load_schedule(PACK / "flexi_core" / "schedules" / scene.schedule)
    if scene.schedule.startswith("F"):
        return Schedule.parse(scene.schedule)
    sigmas = sigmas_of(model(), scene.sampler, scene.scheduler, scene.steps)
    traits = traits_of(scene.sampler, sigmas)
    resolved = Preset(scene.schedule, 0, scene.model).resolve(traits, sigmas.tolist(), scene.cfg != 1)
    return resolved.schedule or all_full(scene.steps)


def drawn(scene: Scene, schedule: Schedule, size: int) -> Image.Image:
    """Return the scene's picture under a schedule, so many pixels high."""
    sigmas = sigmas_of(model(), scene.sampler, scene.scheduler, scene.steps)
    captions = [parse_caption(scene.caption)]
    noise = make_noise(scene.seed, 1)
    images, _ = sample(model(), schedule, sigmas, noise, captions, sampler=scene.sampler, cfg=scene.cfg)
    rgb = ((images[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(rgb).resize((size, size), Image.Resampling.BICUBIC)


def draw_strip(draw: ImageDraw.ImageDraw, letters: str, box: tuple[float, float, float, float], parts: int = 1) -> None:
    """Draw a cell for each step into a box (left, top, right, bottom), with a gap between equal parts of the run."""
    left, top, right, bottom = box
    apart = 14 * (parts - 1)
    pitch = (right - left - apart) / len(letters)
    for i, letter in enumerate(letters):
        x = left + i * pitch + 14 * (i * parts // len(letters))
        gap = 3 if pitch > 9 else 1
        draw.rectangle((x, top, x + pitch - gap, bottom), fill=EMPTY)
        draw.rectangle(
            (x, bottom - StepKind(letter).height * (bottom - top), x + pitch - gap, bottom), fill=StepKind(letter).colour
        )


def draw_thumbnail(scene: Scene) -> Image.Image:
    """Return a thumbnail [640 x 640]: what it is, before and after, the steps, and what the pictures are."""
    image = Image.new("RGB", (640, 640), BACKGROUND)
    draw = ImageDraw.Draw(image)
    schedule = schedule_of(scene)
    letters = schedule.letters
    computed = sum(letter in "FPfp" for letter in letters)
    draw.text((30, 26), scene.title, fill=TEXT, font=font(42), anchor="lt")
    for x, label, each in ((30, f"all {scene.steps} steps", all_full(scene.steps)), (330, f"{computed} computed", schedule)):
        draw.text((x, 92), label, fill=FAINT, font=font(28), anchor="lt")
        image.paste(drawn(scene, each, 280), (x, 130))
    draw_strip(draw, letters, (30, 436, 610, 506), len(scene.parts) or 1)
    for i, part in enumerate(scene.parts):
        draw.text((30 + i * 297, 512), part, fill=FAINT, font=font(20), anchor="lt")
    saved = f"{scene.steps / computed:.3g}x fewer steps computed"
    draw.text((30, 546), saved, fill=TEXT, font=font(32), anchor="lt")
    draw.text((30, 596), scene.told, fill=FAINT, font=font(20), anchor="lt")
    return image


def draw_icon(size: int = 400) -> Image.Image:
    """Return the pack's sign: five steps, two of them computed."""
    image = Image.new("RGB", (size, size), BACKGROUND)
    draw = ImageDraw.Draw(image)
    unit = size / 20
    for i, letter in enumerate("FXFXX"):
        left, bottom = (2.25 + 3.2 * i) * unit, 16.5 * unit
        colour, height = (BLUE, 13 * unit) if letter == "F" else (ORANGE, 3 * unit)
        draw.rounded_rectangle((left, bottom - height, left + 2.7 * unit, bottom), radius=0.6 * unit, fill=colour)
    return image


def draw_banner() -> Image.Image:
    """Return the registry's banner [1260 x 540]."""
    image = Image.new("RGB", (1260, 540), BACKGROUND)
    draw = ImageDraw.Draw(image)
    image.paste(draw_icon(180), (50, 50))
    draw.text((260, 72), "Flexiffusion", fill=TEXT, font=font(84), anchor="lt")
    draw.text((262, 172), "Compute only the steps that matter.", fill=FAINT, font=font(36), anchor="lt")
    scene = THUMBNAILS["demo"]
    schedule = schedule_of(scene)
    draw_strip(draw, schedule.letters, (60, 290, 840, 400))
    draw.text((60, 424), "50 steps, 10 computed, nearly the same picture", fill=TEXT, font=font(32), anchor="lt")
    draw.text((60, 474), "the pack's small demo model", fill=FAINT, font=font(24), anchor="lt")
    for y, label, each in ((40, "all 50", all_full(50)), (290, "10 of 50", schedule)):
        image.paste(drawn(scene, each, 210), (1010, y))
        draw.text((990, y + 105), label, fill=FAINT, font=font(26), anchor="rm")
    return image


# The help pages

WIDE = 720


def draw_rows(rows: Sequence[tuple[str, str]], left: int = 150) -> Image.Image:
    """Return strips under one another, each with its name before it."""
    image = Image.new("RGB", (WIDE, 24 + 58 * len(rows)), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for i, (name, letters) in enumerate(rows):
        y = 18 + 58 * i
        draw.text((20, y + 20), name, fill=TEXT, font=font(22), anchor="lm")
        draw_strip(draw, letters, (left, y, WIDE - 20, y + 40))
    return image


def draw_kinds() -> Image.Image:
    """Return a strip with every kind of step, and the letters' meanings."""
    image = Image.new("RGB", (WIDE, 250), BACKGROUND)
    draw = ImageDraw.Draw(image)
    letters = Schedule.parse("FPPNN|FXXX|fppXX|F").letters
    draw_strip(draw, letters, (20, 20, WIDE - 20, 90))
    pitch = (WIDE - 40) / len(letters)
    for i, letter in enumerate(letters):
        draw.text((20 + (i + 0.45) * pitch, 96), letter, fill=FAINT, font=font(22), anchor="mt")
    for i, kind in enumerate(StepKind):
        x, y = 20 + 340 * (i % 2), 142 + 34 * (i // 2)
        draw.rectangle((x, y, x + 20, y + 20), fill=kind.colour)
        draw.text((x + 30, y + 10), f"{kind.value}  {kind.label}", fill=TEXT, font=font(20), anchor="lm")
    return image


def draw_wires(chain: Sequence[str], above: dict[int, str] | None = None) -> Image.Image:
    """Return boxes joined in a row, those of this pack in its colour, and boxes above some that lead down into them.

    Args:
        chain: names from left to right; those of the pack begin with Flexi.
        above: names by the place in the chain that they lead to.
    """
    above = above or {}
    image = Image.new("RGB", (WIDE, 190 if above else 110), BACKGROUND)
    draw = ImageDraw.Draw(image)
    pitch = (WIDE - 40 + 30) / len(chain)
    y = image.height - 80

    def box(x: float, top: float, name: str) -> None:
        colour = BLUE if name.startswith("Flexi") else GREY
        draw.rounded_rectangle((x, top, x + pitch - 30, top + 50), radius=8, fill=EMPTY, outline=colour, width=3)
        draw.text((x + (pitch - 30) / 2, top + 25), name, fill=TEXT, font=font(19), anchor="mm")

    for i, name in enumerate(chain):
        x = 20 + i * pitch
        if i:
            draw.line((x - 30, y + 25, x, y + 25), fill=FAINT, width=3)
        if i in above:
            draw.line((x + (pitch - 30) / 2, 70, x + (pitch - 30) / 2, y), fill=ORANGE, width=3)
            box(x, 20, above[i])
        box(x, y, name)
    return image


def draw_scenes(captions: Sequence[str]) -> Image.Image:
    """Return what the embedded model draws for captions, each with its words under it."""
    image = Image.new("RGB", (WIDE, 214), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for i, caption in enumerate(captions):
        x = 20 + 175 * i
        image.paste(drawn(Scene("", "", "euler", "normal", 20, 3, "all-full", caption), all_full(20), 155), (x, 16))
        for j, line in enumerate((" ".join(caption.split()[1:4]), " ".join(caption.split()[-2:]))):
            draw.text((x, 174 + 18 * j), line, fill=FAINT, font=font(15), anchor="lt")
    return image


def draw_report() -> Image.Image:
    """Return what Flexi Report shows of the embedded model's run."""
    scene = THUMBNAILS["demo"]
    sigmas = sigmas_of(model(), scene.sampler, scene.scheduler, scene.steps)
    schedule = schedule_of(scene)
    captions, noise = [parse_caption(scene.caption)], make_noise(scene.seed, 1)
    began = time.perf_counter()
    _, run = sample(model(), schedule, sigmas, noise, captions, sampler=scene.sampler, cfg=scene.cfg)
    seconds = time.perf_counter() - began
    words = Preset(scene.schedule, 0, scene.model).resolve(traits_of("euler", sigmas), sigmas.tolist(), True).words
    shown = draw_timeline(RunReport(run, seconds, (), words))[0]
    image = Image.fromarray((shown * 255).round().to(torch.uint8).numpy())
    return image.resize((WIDE, round(image.height * WIDE / image.width)), Image.Resampling.LANCZOS)


def draw_pair(scene: Scene) -> Image.Image:
    """Return a run's two pictures with its strip, as Flexi Tune shows and says it."""
    image = Image.new("RGB", (WIDE, 250), BACKGROUND)
    draw = ImageDraw.Draw(image)
    schedule = schedule_of(scene)
    for x, label, each in ((20, f"all {scene.steps} steps", all_full(scene.steps)), (230, "the schedule", schedule)):
        image.paste(drawn(scene, each, 190), (x, 16))
        draw.text((x, 214), label, fill=FAINT, font=font(20), anchor="lt")
    draw_strip(draw, schedule.letters, (450, 60, WIDE - 20, 130))
    full = schedule.letters.count("F")
    draw.text((450, 150), f"{full} of {scene.steps} steps computed", fill=TEXT, font=font(22), anchor="lt")
    return image


def draw_compared(scene: Scene) -> Image.Image:
    """Return a run's two pictures and four times their difference, as Flexi Compare gives them."""
    image = Image.new("RGB", (WIDE, 250), BACKGROUND)
    draw = ImageDraw.Draw(image)
    full, schedule = (drawn(scene, each, 190) for each in (all_full(scene.steps), schedule_of(scene)))
    difference = ImageChops.difference(full, schedule).point(lambda value: min(4 * value, 255))
    labels = (f"all {scene.steps} steps", "the schedule", "4 times the difference")
    for i, (label, each) in enumerate(zip(labels, (full, schedule, difference), strict=True)):
        x = 20 + 245 * i
        image.paste(each, (x, 16))
        draw.text((x, 214), label, fill=FAINT, font=font(20), anchor="lt")
    return image


def help_pictures() -> dict[str, Image.Image]:
    """Return the pictures of the help pages by their nodes."""
    captions = {name: scene.caption for name, scene in THUMBNAILS.items()}
    searched = load_schedule(PACK / "flexi_core" / "schedules" / "demo-euler-5x.json").letters
    tuned = THUMBNAILS["tune"]
    learned = [(name, "F" * tuned.steps) for name in ("1st picture", "2nd picture")]
    learned.append(("from then on", schedule_of(tuned).letters))
    presets = [(name, Preset(name, 20).before_run().schedule.letters) for name in ("1.5x", "2x", "3x", "5x", "deepcache")]
    return {
        "FlexiApply": draw_wires(("Load Checkpoint", "Flexi Apply", "KSampler"), {1: "Flexi Preset"}),
        "FlexiSchedule": draw_kinds(),
        "FlexiPreset": draw_rows(presets),
        "FlexiLoadSchedule": draw_rows([("demo-euler-5x", searched)], 190),
        "FlexiSaveSchedule": draw_wires(("Flexi Tune", "Flexi Save Schedule", "my_schedule.json")),
        "FlexiReport": draw_report(),
        "FlexiCompare": draw_compared(THUMBNAILS["z_image_turbo"]),
        "FlexiTune": draw_pair(tuned),
        "FlexiTuneGuider": draw_wires(("BasicGuider", "Flexi Tune (Guider)", "SamplerCustom..."), {1: "noise, sigmas, latent"}),
        "FlexiLearn": draw_rows(learned, 170),
        "FlexiJoinModels": draw_wires(("high noise model", "Flexi Join Models", "KSampler"), {1: "low noise model"}),
        "FlexiStageModel": draw_wires(("Load Checkpoint", "Flexi Stage Model", "KSampler"), {1: "stage file"}),
        "FlexiDemoModel": draw_scenes([captions[name] for name in ("demo", "sd15_2x", "sdxl_2x", "my_schedule")]),
        "FlexiDemoPrompt": draw_scenes([captions[name] for name in ("flux_2x", "img2img", "controlnet", "z_image_turbo")]),
    }


def main(only: Annotated[str, typer.Option(help="brand, help or thumbnails; all of them by default.")] = "") -> None:
    """Draw the pack's pictures into docs/pictures, web/docs/pictures and example_workflows."""
    if only in ("", "brand"):
        BRAND.mkdir(parents=True, exist_ok=True)
        draw_icon().save(BRAND / "icon.png", optimize=True)
        draw_banner().save(BRAND / "banner.png", optimize=True)
    if only in ("", "help"):
        HELP.mkdir(parents=True, exist_ok=True)
        for name, image in help_pictures().items():
            image.save(HELP / f"{name}.png", optimize=True)
    if only in ("", "thumbnails"):
        for name, scene in THUMBNAILS.items():
            draw_thumbnail(scene).save(TEMPLATES / f"flexiffusion_{name}.jpg", quality=85, optimize=True)


if __name__ == "__main__":
    typer.run(main)
