"""The nodes: each reads its inputs, calls the core, and returns."""

from comfy_api.latest import ComfyExtension, io

from . import folder
from .demo import FlexiDemoModel, FlexiDemoPrompt
from .sampling import FlexiApply, FlexiReport
from .schedules import FlexiLoadSchedule, FlexiPreset, FlexiSaveSchedule, FlexiSchedule
from .stages import FlexiJoinModels, FlexiStageModel
from .tuning import FlexiTune


class FlexiffusionExtension(ComfyExtension):
    """What this pack gives to the host."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            FlexiSchedule,
            FlexiPreset,
            FlexiLoadSchedule,
            FlexiSaveSchedule,
            FlexiApply,
            FlexiReport,
            FlexiTune,
            FlexiJoinModels,
            FlexiStageModel,
            FlexiDemoModel,
            FlexiDemoPrompt,
        ]


async def comfy_entrypoint() -> ComfyExtension:
    """Register the folder of schedule files and return the nodes; the host calls this once, when it loads the pack."""
    folder.register()
    return FlexiffusionExtension()
