"""Nodes of the embedded model: images in the host with nothing downloaded."""

from __future__ import annotations

from comfy_api.latest import io

from ..flexi_core import FlexiError
from ..flexi_core.demo.scenes import parse_caption
from ..flexi_core.host import demo_conditioning, load_demo_model
from .sockets import CATEGORY, PAPER

_EXAMPLE = "a large red circle at the center on a navy background"


class FlexiDemoModel(io.ComfyNode):
    """The embedded model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlexiDemoModel",
            display_name="Flexi Demo Model",
            category=CATEGORY,
            description="The small trained model that comes with the pack, for trying schedules with nothing downloaded: "
            f"captioned 32x32 pictures of one shape, in pixel space. Sample it at 32x32 with "
            f"EmptyChromaRadianceLatentImage and cfg 3, decode with VAELoader's pixel_space. {PAPER}.",
            inputs=[],
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(load_demo_model())


class FlexiDemoPrompt(io.ComfyNode):
    """A caption -> conditioning of the embedded model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlexiDemoPrompt",
            display_name="Flexi Demo Prompt",
            category=CATEGORY,
            description="A caption for the Flexi Demo Model: size (small, large), colour (red, green, blue, yellow, white, "
            "purple), shape (circle, square, triangle, ring), place (top left to bottom right), background (black, grey, "
            f"navy, brown, teal). A part that is left out is free. {PAPER}.",
            inputs=[
                io.String.Input(
                    "caption",
                    default=_EXAMPLE,
                    multiline=True,
                    tooltip=f"For example: {_EXAMPLE}. Empty is the unconditional prompt, to be used as the negative.",
                )
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning")],
        )

    @classmethod
    def validate_inputs(cls, caption: str | None) -> bool | str:
        try:
            parse_caption(caption or "")
        except FlexiError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, caption: str) -> io.NodeOutput:
        return io.NodeOutput(demo_conditioning(caption))
