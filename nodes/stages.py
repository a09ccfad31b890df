"""Nodes for models that are several networks: two experts joined, and decoders for stages of noise levels."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..flexi_core import FlexiError
from ..flexi_core.host import join_models, stage_model
from ..flexi_core.stages.bounds import UNITS, Boundary
from ..flexi_core.stages.network import load_stages
from . import folder
from .sockets import CATEGORY, PAPER, found_as


class FlexiJoinModels(io.ComfyNode):
    """Two models and a boundary in noise -> one model for one sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlexiJoinModels",
            **found_as("wan 2.2", "refiner", "two experts", "merge models"),
            display_name="Flexi Join Models",
            category=CATEGORY,
            description="Makes one model of two: above a noise level the first answers, below it the second (Wan 2.2's two "
            "experts, a base and its refiner; stages as in arXiv 2312.09181). It goes to one sampler with one schedule, which "
            "carries nothing across the boundary. LoRAs and patches of either stay its own; the noise levels are the first "
            f"one's. {PAPER}.",
            inputs=[
                io.Model.Input("high_noise", tooltip="The model for the beginning of the run, with its own LoRAs and patches."),
                io.Model.Input("low_noise", tooltip="The model for the end of the run, with its own LoRAs and patches."),
                io.Float.Input(
                    "boundary",
                    default=0.875,
                    min=0.0,
                    max=100_000.0,
                    step=0.001,
                    round=False,
                    tooltip="Where the second model takes over, in the unit below; the presets of Wan 2.2 have their own.",
                ),
                io.Combo.Input(
                    "unit",
                    options=list(UNITS),
                    default=UNITS[0],
                    tooltip="timestep: a share of the model's time, 0.875 is 875 of 1000. sigma: a noise level. share of the "
                    "run: 0.5 is after half of the sampler's steps.",
                ),
                io.Boolean.Input(
                    "boundary_in_grid",
                    default=True,
                    tooltip="Where a step would lie across the boundary, put the noise level next to the boundary on it. Off, "
                    "the model in whose stretch a step begins computes it.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def execute(cls, high_noise, low_noise, boundary: float, unit: str, boundary_in_grid: bool) -> io.NodeOutput:
        model, notes = join_models(high_noise, low_noise, Boundary(boundary, unit), boundary_in_grid)
        return io.NodeOutput(model, ui=ui.PreviewText("\n".join(notes)) if notes else None)


class FlexiStageModel(io.ComfyNode):
    """A U-Net and a stage file -> a model with a decoder for each stage."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlexiStageModel",
            **found_as("decoder", "stages"),
            display_name="Flexi Stage Model",
            category=CATEGORY,
            description="Gives a U-Net a decoder of its own for each stretch of noise levels, from a stage file (multi-stage "
            "framework, arXiv 2312.09181): the encoder stays the model's, decoders are as wide as their stage needs. A "
            f"schedule carries nothing from stage to stage. {PAPER}.",
            inputs=[
                io.Model.Input("model", tooltip="The U-Net that the decoders were trained on; another one is refused."),
                io.Combo.Input(
                    "file",
                    options=folder.stage_names(),
                    tooltip=f"A stage file, from models/{folder.STAGES}.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def validate_inputs(cls, file: str) -> bool | str:
        try:
            load_stages(folder.find_stages(file))
        except FlexiError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str, **_) -> str:
        try:
            status = folder.find_stages(file).stat()
        except FlexiError:
            return ""
        return f"{status.st_mtime_ns} {status.st_size}"

    @classmethod
    def execute(cls, model, file: str) -> io.NodeOutput:
        return io.NodeOutput(stage_model(model, folder.find_stages(file)))
