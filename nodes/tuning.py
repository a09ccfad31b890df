"""The nodes that tune a schedule to a run of the user's own, and keep it."""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..flexi_core import FlexiError, Schedule, ScheduleError, __version__, load_schedule, save_schedule
from ..flexi_core.host import apply_schedule
from ..flexi_core.host.runs import GuiderRun, HostRun, HostRuns, KSamplerRun, progress_bar, sampler_names, scheduler_names
from ..flexi_core.networks.fingerprint import identity_digest
from ..flexi_core.run.timeline import draw_message
from ..flexi_core.schedule.presets import PRESETS, Preset
from ..flexi_core.tune import EFFORTS, Planned, Recorded, Tuned, Tuner
from ..flexi_core.tune.picture import draw_front
from . import folder
from .page import live, tell
from .pictures import picture_of
from .schedules import shown
from .sockets import CATEGORY, PAPER, FlexiRunType, FlexiScheduleType, found_as, speed_or_quality

log = logging.getLogger(__name__)

_MOST_RECORDED = 2**28  # bytes of recorded runs that stay in memory, for the next wish or after a Cancel
_TOLD_EVERY = 1.0  # seconds
# By what the run is: its recorded full runs, and their first picture by the text of its schedule.
_recorded: OrderedDict[str, tuple[Recorded, dict[str, Any]]] = OrderedDict()


@dataclass(frozen=True)
class _Wanted:
    """What is asked for: a speed-up, or with a quality above 0 that many dB."""

    speedup: float
    quality: float
    effort: str

    @property
    def text(self) -> str:
        return f"{self.quality:g}dB" if self.quality else f"{self.speedup:g}x"


class FlexiTune(io.ComfyNode):
    """A KSampler's inputs -> a model that samples under a schedule made for just this run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlexiTune",
            **found_as("search schedule", "calibrate"),
            display_name="Flexi Tune",
            category=CATEGORY,
            description="Makes a schedule for your own run: your model with its LoRAs, sampler, steps and guidance. A few of "
            "its full runs are sampled; what every speed-up comes to follows from them, and the one you ask for is tried. "
            "Give it what the KSampler has, and its model to the KSampler. The schedule is kept in "
            f"models/{folder.FOLDER}/{folder.TUNED}: the next time costs nothing, for other prompts and seeds too. {PAPER}.",
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with, LoRAs and all."),
                io.Conditioning.Input("positive", tooltip="As at the KSampler. Any prompt of the kind that you use will do."),
                io.Conditioning.Input("negative", tooltip="As at the KSampler."),
                io.Latent.Input(
                    "latent_image", tooltip="As at the KSampler: its size counts, and its first picture is sampled."
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="As at the KSampler."),
                io.Float.Input("cfg", default=8.0, min=0.0, max=100.0, step=0.1, tooltip="As at the KSampler."),
                io.Combo.Input("sampler_name", options=sampler_names(), tooltip="As at the KSampler."),
                io.Combo.Input("scheduler", options=scheduler_names(), tooltip="As at the KSampler."),
                io.Float.Input("denoise", default=1.0, min=0.01, max=1.0, step=0.01, tooltip="As at the KSampler."),
                *_wishes(),
                io.Vae.Input("vae", optional=True, tooltip="Decodes the two pictures that are shown side by side."),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Model.Output(display_name="model", tooltip="Samples under the schedule: connect it to the KSampler."),
                *_outcomes(),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        latent_image: dict[str, Any],
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float,
        speedup: float,
        quality_db: float,
        effort: str,
        vae=None,
    ) -> io.NodeOutput:
        run = KSamplerRun(model, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise)
        return _tuned(cls, run, _Wanted(speedup, quality_db, effort), vae, lambda patched: patched)


class FlexiTuneGuider(io.ComfyNode):
    """A SamplerCustomAdvanced's inputs -> a guider that samples under a schedule made for just this run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlexiTuneGuider",
            **found_as("search schedule", "calibrate", "flux", "video"),
            display_name="Flexi Tune (Guider)",
            category=CATEGORY,
            description="Flexi Tune for graphs with SamplerCustomAdvanced, as those of Flux and of video models are: makes a "
            "schedule for your own run from a few of its full runs. Give it what the sampler has, and its guider to the "
            f"sampler. {PAPER}.",
            inputs=[
                io.Noise.Input("noise", tooltip="As at the sampler; each sampled run takes a seed of its own."),
                io.Guider.Input("guider", tooltip="As at the sampler, with its model, LoRAs and all."),
                io.Sampler.Input("sampler", tooltip="As at the sampler."),
                io.Sigmas.Input("sigmas", tooltip="As at the sampler: the run's own noise levels."),
                io.Latent.Input(
                    "latent_image", tooltip="As at the sampler: its size counts, and its first picture is sampled."
                ),
                *_wishes(),
                io.Vae.Input("vae", optional=True, tooltip="Decodes the two pictures that are shown side by side."),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Guider.Output(display_name="guider", tooltip="Samples under the schedule: connect it to the sampler."),
                *_outcomes(),
            ],
        )

    @classmethod
    def execute(
        cls,
        noise,
        guider,
        sampler,
        sigmas: torch.Tensor,
        latent_image: dict[str, Any],
        speedup: float,
        quality_db: float,
        effort: str,
        vae=None,
    ) -> io.NodeOutput:
        run = GuiderRun(guider, sampler, sigmas, noise, latent_image)
        wanted = _Wanted(speedup, quality_db, effort)
        return _tuned(cls, run, wanted, vae, lambda patched: run.with_model(patched).guider_object)


def _wishes() -> list[Any]:
    """Return the inputs that say what is asked for."""
    return [
        *speed_or_quality(),
        io.Combo.Input(
            "effort",
            options=list(EFFORTS),
            default="good",
            tooltip="instant looks at one full run, and takes as long as about three; good looks at four, fits the "
            "schedule in runs of its own, and takes as long as about sixteen; thorough looks at eight and changes the "
            "schedule step by step, for as long as a hundred. Once for each run.",
        ),
    ]


def _outcomes() -> list[Any]:
    """Return the outputs behind the one that is sampled with."""
    return [
        FlexiScheduleType.Output(display_name="schedule"),
        FlexiRunType.Output(display_name="run", tooltip="For Flexi Report."),
        io.String.Output(display_name="text", tooltip="What was found, in words."),
        io.Image.Output(display_name="front", tooltip="How near each speed-up comes."),
        io.Image.Output(display_name="pictures", tooltip="All steps on the left, the schedule on the right."),
    ]


def _tuned(cls: type[io.ComfyNode], run: HostRun, wanted: _Wanted, vae: Any, sampled: Any) -> io.NodeOutput:
    """Return a tuning node's outputs; `sampled` makes the first one of the patched model."""
    pair = draw_message("Two pictures are shown where a schedule is made; this one was kept from before.")
    node = str(getattr(cls.hidden, "unique_id", ""))
    try:
        schedule, words, pair = _found(run, wanted, vae, pair, node)
    except FlexiError as error:  # the run is sampled all the same
        preset = _nearest_preset(wanted.speedup)
        schedule = Preset(preset, 0)
        words = f"Not tuned: {error}. Flexi Preset {preset} is taken in its place."
        front = draw_message(words)
    else:
        front = _front_of(schedule, words)
    patched, handle = apply_schedule(run.model, schedule, live=live(node or None))
    letters = schedule.letters if isinstance(schedule, Schedule) else ""
    told = shown(schedule, letters, words) | ui.PreviewText(words).as_dict()
    return io.NodeOutput(sampled(patched), schedule, handle, words, front, pair, ui=told)


def _found(run: HostRun, wanted: _Wanted, vae: Any, pair: torch.Tensor, node: str) -> tuple[Schedule, str, torch.Tensor]:
    """Return the schedule that was kept for a run, or one made now, with words and the two pictures."""
    runs = HostRuns(run)
    identity = runs.identity
    path = folder.tuned_path(identity, wanted.text, wanted.effort)
    kept = _kept(path)
    if kept is not None:
        return kept, f"{_words(kept)} Kept from before, in {folder.TUNED}/{path.name}.", pair
    effort = EFFORTS[wanted.effort]
    samples, n = effort.samples, len(runs.sigmas) - 1
    recorded, runs.first = _recorded_of(identity)
    # Full runs, the one that the answer is measured in, fits, one to three schedules, plain steps.
    work = n * (1 + samples * (4 if effort.fit else 2) + effort.local) + samples * math.ceil(n / wanted.speedup)
    progress = _Progress(round(work) - n * min(samples, len(recorded.watched)), node)
    runs.on_step = progress.step
    tuner = Tuner(runs, effort, progress=progress.at, recorded=recorded)
    try:
        front = tuner.front()
        tuned = tuner.chosen(front, wanted.speedup, wanted.quality or None)
    finally:  # a Cancel leaves what was recorded
        _keep_recorded(identity, recorded, runs.first)
    schedule = _made(runs, front, tuned, wanted, samples)
    if tuned is not None:
        pair = _side_by_side(run, runs, tuned, vae)
    note = f"Made from {samples} full run{'s' * (samples > 1)} in the time of {tuner.full_runs:.0f}."
    try:
        folder.make_room(path.parent)
        save_schedule(schedule, path)
        note += f" Kept in {folder.TUNED}/{path.name}."
    except (ScheduleError, OSError) as error:
        log.warning("Flexiffusion: the tuned schedule could not be kept: %s", error)
        note += f" It could not be kept ({error}): the next session makes it again."
    return schedule, f"{_words(schedule)} {note}", pair


class _Progress:
    """Shows on the node how far tuning has come, and the time left.

    Args:
        work: steps of the network, about.
        node: its id on the page.
    """

    def __init__(self, work: int, node: str) -> None:
        self._work, self._node, self._bar = max(work, 1), node, progress_bar(max(work, 1))
        self._done, self._began, self._told, self._name = 0, time.monotonic(), 0.0, "full runs"

    def at(self, name: str, done: int, total: int) -> None:
        """Take note of what is done."""
        self._name = f"{name}, {done} of {total}"

    def step(self) -> None:
        """Take note of a step."""
        self._done += 1
        self._bar.update(1)
        now = time.monotonic()
        if now - self._told >= _TOLD_EVERY:
            self._told = now
            left = (now - self._began) / self._done * max(self._work - self._done, 0)
            tell(f"Tuning: {self._name}; about {left:.0f} s left.", self._node)


def _recorded_of(identity: dict[str, Any]) -> tuple[Recorded, dict[str, Any]]:
    """Return the full runs of a run that are in memory, and the first one's picture."""
    recorded, first = _recorded.get(identity_digest(identity), (Recorded(), {}))
    return recorded, dict(first)


def _keep_recorded(identity: dict[str, Any], recorded: Recorded, first: dict[str, Any]) -> None:
    """Keep full runs in memory, the latest ones within `_MOST_RECORDED`."""
    key = identity_digest(identity)
    _recorded[key] = recorded, dict(list(first.items())[:1])
    _recorded.move_to_end(key)
    while sum(kept.bytes for kept, _ in _recorded.values()) > _MOST_RECORDED:
        _recorded.popitem(last=False)


def _kept(path: Path) -> Schedule | None:
    """Return a tuned schedule's file; None where there is none, or it is broken and so made again."""
    if not path.is_file():
        return None
    try:
        schedule = load_schedule(path)
        _words(schedule)
        return schedule
    except (ScheduleError, KeyError, TypeError, ValueError) as error:
        log.warning("Flexiffusion: %s is broken and is made again: %s", path.name, error)
        return None


def _made(runs: HostRuns, front: list[Planned], tuned: Tuned | None, wanted: _Wanted, samples: int) -> Schedule:
    """Return the schedule with what a file says of it; one of full steps where plain steps do as well."""
    n = len(runs.sigmas) - 1
    measured: dict[str, Any] = {"by": "Flexi Tune", "samples": samples, "wanted": wanted.text, "speedup_macs": 1.0}
    measured["front"] = [[planned.full, planned.predicted_db] for planned in front]
    if tuned is not None:
        measured |= {
            "full": tuned.full,
            "psnr_db": tuned.made_db,
            "predicted_db": tuned.predicted_db,
            "plain_db": tuned.plain_db,
        }
    ahead = tuned is not None and tuned.is_ahead
    if ahead:
        measured["speedup_macs"] = n / tuned.full
    schedule = tuned.schedule if ahead else Schedule.parse(f"{n}*(F)")
    return schedule.with_info(
        teacher=runs.identity, measured=measured, provenance={"tool": "flexiffusion", "version": __version__}
    )


def _words(schedule: Schedule) -> str:
    """Return what a tuned schedule's file says of it, in words.

    Raises:
        KeyError, TypeError, ValueError: it is no such file.
    """
    measured, n = schedule.info["measured"], len(schedule)
    if "full" not in measured:
        return f"No schedule comes within {measured['wanted']} of the pictures of all {n} steps: all are computed."
    full, made, plain = int(measured["full"]), float(measured["psnr_db"]), float(measured["plain_db"])
    if "X" not in schedule.letters:
        return f"{full} plain steps come as near ({plain:.1f} dB, a schedule {made:.1f} dB): set the sampler to {full} steps."
    return (
        f"{full} of {n} steps are computed, {n / full:.3g}x fewer: {made:.1f} dB to the pictures of all steps "
        f"(predicted {float(measured['predicted_db']):.1f}); {full} plain steps have {plain:.1f} dB."
    )


def _front_of(schedule: Schedule, words: str) -> torch.Tensor:
    measured = schedule.info["measured"]
    try:
        front = [(int(full), float(db)) for full, db in measured["front"]]
        chosen = (int(measured["full"]), float(measured["psnr_db"])) if "full" in measured else None
        return draw_front(front, len(schedule), chosen, measured.get("plain_db"))
    except Exception:  # the schedule is there, and goes on
        log.exception("Flexiffusion: the picture of a front failed")
        return draw_message(words)


def _side_by_side(run: HostRun, runs: HostRuns, tuned: Tuned, vae: Any) -> torch.Tensor:
    """Return two pictures beside one another [1, H, 2 W, 3]: all steps, and the schedule."""
    try:
        teacher = next(iter(runs.first.values()))  # the full run was the first
        both = (teacher, runs.first[str(tuned.schedule)])
        return torch.cat([picture_of(run.model, samples, vae) for samples in both], dim=2)
    except Exception as error:  # the schedule is there, and goes on
        log.exception("Flexiffusion: the pictures of a tuned run failed")
        return draw_message(f"The pictures could not be made ({type(error).__name__}: {error}); the schedule is as found.")


def _nearest_preset(speedup: float) -> str:
    speeds = {name: float(name[:-1]) for name in PRESETS if name[:-1].replace(".", "").isdigit()}
    return min(speeds, key=lambda name: abs(math.log(speeds[name] / speedup)))
