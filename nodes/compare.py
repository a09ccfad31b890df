"""The node that samples a run once more with every step computed, and shows how near the schedule's picture is."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..flexi_core.host import RunHandle
from ..flexi_core.host.runs import is_interrupt, progress_bar
from ..flexi_core.metrics import psnr_db
from ..flexi_core.run.timeline import draw_message
from ..flexi_core.schedule.presets import how_near
from .pictures import picture_of
from .sockets import CATEGORY, PAPER, FlexiRunType, found_as

log = logging.getLogger(__name__)

_OFF = "Off: turn full_run on to sample this run once with every step computed."
_GONE = (
    "What this run began from is no longer known. Connect the sampler's own latent; if it is, sample once more (with another "
    "seed), and then compare."
)
_PLAIN = "There is nothing to compare: Flexi Apply, or the node of its schedule, is bypassed or not connected."
_TIMES = 4  # the difference is drawn so many times larger
_SAME = 90.0  # dB: the pictures are equal to the last bit that a file keeps


@dataclass(frozen=True)
class _Compared:
    """Two pictures [1, H, W, 3], 0..1: of all steps, and of the schedule; and what is said of them."""

    full: torch.Tensor
    schedule: torch.Tensor
    words: str

    @property
    def difference(self) -> torch.Tensor:
        return ((self.full - self.schedule).abs() * _TIMES).clamp(0, 1)


class FlexiCompare(io.ComfyNode):
    """A run -> the same run with every step computed, beside it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlexiCompare",
            **found_as("compare", "before after"),
            display_name="Flexi Compare",
            category=CATEGORY,
            description="Before and after: samples the run that made a latent once more, with the same seed and every step "
            "computed, and shows both pictures with a slider, their difference, and in words how near they are. The page "
            f"turns it off again behind each comparison. {PAPER}.",
            inputs=[
                FlexiRunType.Input("run", optional=True, tooltip="The run of Flexi Apply, or of Flexi Tune."),
                io.Latent.Input("latent", tooltip="The sampler's latent: it says which run is sampled once more."),
                io.Boolean.Input(
                    "full_run",
                    default=True,
                    tooltip="Sample the run once with every step computed: that takes as long as without a schedule. Off: "
                    "nothing is sampled.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="Decodes both pictures; without it they are rough."),
            ],
            outputs=[
                io.Image.Output(
                    display_name="comparison", tooltip="All steps, the schedule, and four times their difference, in a row."
                ),
                io.Image.Output(display_name="full", tooltip="The picture of all steps."),
                io.Image.Output(display_name="schedule", tooltip="The picture of the schedule."),
                io.String.Output(display_name="text", tooltip="How near they are, in words and dB."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, run: RunHandle | None = None, latent: dict[str, Any] | None = None, full_run: bool = True, vae=None
    ) -> io.NodeOutput:
        compared: _Compared | str = _OFF
        if full_run:
            try:
                compared = _PLAIN if run is None else _compared(run, latent["samples"], vae)
            except Exception as error:  # the picture is there, and goes on
                if is_interrupt(error):
                    raise
                log.exception("Flexiffusion: a comparison failed")
                compared = f"The comparison failed ({type(error).__name__}: {error}); the picture is as sampled."
        if isinstance(compared, str):
            said = draw_message(compared)
            return io.NodeOutput(said, said, said, compared, ui=ui.PreviewText(compared).as_dict())
        row = torch.cat([compared.full, compared.schedule, compared.difference], dim=2)
        shown = {
            name: ui.PreviewImage(getattr(compared, name), cls=cls).as_dict()["images"][0]
            for name in ("full", "schedule", "difference")
        }
        told = {"flexi_compare": ({**shown, "words": compared.words},)} | ui.PreviewText(compared.words).as_dict()
        return io.NodeOutput(row, compared.full, compared.schedule, compared.words, ui=told)


def _compared(run: RunHandle, samples: Any, vae: Any) -> _Compared | str:
    """Return a run's picture beside that of all its steps; a sentence where it cannot be sampled once more."""
    begun, report = run.begun(samples), run.report_of(samples)
    if begun is None:
        return _GONE
    bar = progress_bar(begun.steps)
    latent, seconds = run.full_run(samples, lambda: bar.update(1))
    full, schedule = (picture_of(begun.guider.model_patcher, each, vae) for each in (latent, samples))
    near = float(psnr_db(schedule, full, 1.0)[0])
    if math.isinf(near) or near > _SAME:
        words = "The pictures are the same, bit for bit." if torch.equal(full, schedule) else "The pictures are the same."
    else:
        words = f"{how_near(near)}: {near:.1f} dB to the picture of all steps."
    return _Compared(full, schedule, f"{words} {report.seconds:.2f} s with the schedule, {seconds:.2f} s with all steps.")
