"""The nodes: each reads its inputs, calls the core, and returns."""

from comfy_api.latest import ComfyExtension, io

from . import folder, learning, page
from .compare import FlexiCompare
from .demo import FlexiDemoModel, FlexiDemoPrompt
from .learning import FlexiLearn
from .sampling import FlexiApply, FlexiReport
from .schedules import FlexiLoadSchedule, FlexiPreset, FlexiSaveSchedule, FlexiSchedule
from .stages import FlexiJoinModels, FlexiStageModel
from .tuning import FlexiTune, FlexiTuneGuider


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
            FlexiCompare,
            FlexiTune,
            FlexiTuneGuider,
            FlexiLearn,
            FlexiJoinModels,
            FlexiStageModel,
            FlexiDemoModel,
            FlexiDemoPrompt,
        ]


async def comfy_entrypoint() -> ComfyExtension:
    """Register the folder of schedule files and the page's questions, and return the nodes; the host calls this once."""
    folder.register()
    page.register()
    learning.register_routes()
    return FlexiffusionExtension()
