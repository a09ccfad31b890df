"""Nodes around the sampler: put a schedule into a model, report what its run did."""

from __future__ import annotations

import logging

import torch
from comfy_api.latest import io, ui

from ..flexi_core import Schedule
from ..flexi_core.host import ON_MISMATCH, RunHandle, apply_schedule
from ..flexi_core.run.cache import PLACES
from ..flexi_core.run.timeline import CLEAR, DARK, draw_message, draw_timeline
from ..flexi_core.schedule.presets import Preset
from .page import live
from .sockets import CATEGORY, PAPER, FlexiRunType, FlexiScheduleType, found_as

log = logging.getLogger(__name__)

_NO_RUN = (
    "No run to report: nothing was sampled with the model of this Flexi Apply node since it last ran. Connect its model to the "
    "sampler, and the sampler's latent to this node; if they are, this run's report is gone, and sampling once more (with "
    "another seed) makes one."
)
_GONE = (
    "This run's report is gone, or the latent is not as a sampler made it. Connect the sampler's own latent to this node; "
    "if it is, sampling once more (with another seed) makes a report."
)


_BYPASSED = "Plain sampling, every step computed: Flexi Apply, or the node of its schedule, is bypassed or not connected."


class FlexiApply(io.ComfyNode):
    """Model and schedule -> a model that samples under the schedule."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlexiApply",
            **found_as(),
            display_name="Flexi Apply (Faster, Cache)",
            category=CATEGORY,
            description="Faster sampling: puts a schedule, which speeds it up, into every sampling with this model: the "
            "schedule's full steps run the whole network, its partial steps the shallow blocks of a U-Net or the first ones of "
            f"a transformer (DeepCache, Ma et al., 2023), its null steps none of it ({PAPER}). Works with any sampler and "
            "scheduler; bypassed, it changes nothing. Use it in place of TeaCache, EasyCache or another step cache, not "
            "together with one.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model to sample with: null steps work with any, partial steps with U-Nets and most DiTs.",
                ),
                FlexiScheduleType.Input(
                    "schedule",
                    optional=True,
                    tooltip="Which steps are computed. A later Flexi Apply replaces it. Without one, sampling is plain.",
                ),
                io.Combo.Input(
                    "on_mismatch",
                    options=list(ON_MISMATCH),
                    default="map",
                    tooltip="When the run has other steps, noise levels, sampler, guidance scale, size or model than the "
                    "schedule was made for: map lays the schedule over the run, refuse stops with an error, off samples every "
                    "step in full.",
                ),
                io.Combo.Input(
                    "cache",
                    options=list(PLACES),
                    default="auto",
                    optional=True,
                    tooltip="Where partial steps keep the deep feature of their full step: gpu is fastest, ram leaves the "
                    "GPU's memory alone, auto takes the GPU's memory while that leaves room.",
                ),
                io.Int.Input(
                    "cache_limit_mib",
                    default=0,
                    min=0,
                    max=1_000_000,
                    optional=True,
                    tooltip="The most memory for deep features, in MiB; 0 is no limit. Partial steps whose feature does not "
                    "fit run in full, and the report says so.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model"), FlexiRunType.Output(display_name="run")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        schedule: Schedule | Preset | None = None,
        on_mismatch: str = ON_MISMATCH[0],
        cache: str = "auto",
        cache_limit_mib: int = 0,
    ) -> io.NodeOutput:
        if schedule is None:
            return io.NodeOutput(model, None)
        seen = live(getattr(cls.hidden, "unique_id", None))
        return io.NodeOutput(*apply_schedule(model, schedule, on_mismatch, cache, cache_limit_mib, live=seen))


class FlexiReport(io.ComfyNode):
    """What the run that made a latent did."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlexiReport",
            display_name="Flexi Report",
            category=CATEGORY,
            description="Shows what sampling under a schedule did: in words what was saved and how near the picture is, the "
            "kind of every step, network calls, steps that had to run in full with the reason, multiply-accumulates (MACs) "
            f"and seconds against all steps in full. {PAPER}.",
            inputs=[
                FlexiRunType.Input("run", optional=True, tooltip="The run of Flexi Apply, or of Flexi Tune."),
                io.Latent.Input(
                    "latent",
                    tooltip="The sampler's latent: the report waits for it, and tells the runs of several samplers apart.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The same latent."),
                io.String.Output(display_name="text", tooltip="The report in words and numbers."),
                io.Image.Output(display_name="timeline", tooltip="The run's steps as a picture."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, run: RunHandle | None = None, latent: dict[str, torch.Tensor] | None = None) -> io.NodeOutput:
        try:
            report = None if run is None else run.report_of(latent["samples"])
            missing = _BYPASSED if run is None else _NO_RUN if run.report is None else _GONE
            text = missing if report is None else str(report)
        except Exception as error:  # the latent is there, and goes on
            log.exception("Flexiffusion: the report of a run failed")
            report = None
            text = f"The report failed ({type(error).__name__}: {error}); the latent is as sampled, the log has more."
        shown = ui.PreviewText(text).as_dict()
        picture = torch.zeros(1, 64, 64, 3)
        try:
            picture, seen = ((draw_message(text, on) if report is None else draw_timeline(report, on)) for on in (DARK, CLEAR))
            shown |= ui.PreviewImage(seen, cls=cls).as_dict()
        except Exception:  # the words are there, and are shown
            log.exception("Flexiffusion: the picture of a run failed")
        return io.NodeOutput(latent, text, picture, ui=shown)
