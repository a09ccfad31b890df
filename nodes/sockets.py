"""The pack's own socket types, and what its nodes share."""

from comfy_api.latest import io

FlexiScheduleType = io.Custom("FLEXI_SCHEDULE")  # flexi_core.Schedule, or flexi_core.presets.Preset, which becomes one
FlexiRunType = io.Custom("FLEXI_RUN")  # flexi_core.host.RunHandle

CATEGORY = "Flexiffusion"
PAPER = "Flexiffusion, arXiv 2409.17566"
