"""The host adapter: the one part that knows ComfyUI. Public hooks only; nothing of the host is assigned to."""

from .demo_model import demo_conditioning, load_demo_model
from .handle import RunHandle, packed
from .joining import join_models, levels_of, stages_of
from .keys import KEY
from .mismatch import teacher_of
from .solver import HostSolver
from .staged import stage_model
from .wrappers import ON_MISMATCH, apply_schedule

__all__ = [
    "KEY",
    "ON_MISMATCH",
    "HostSolver",
    "RunHandle",
    "apply_schedule",
    "demo_conditioning",
    "join_models",
    "levels_of",
    "load_demo_model",
    "packed",
    "stage_model",
    "stages_of",
    "teacher_of",
]
