"""Schedules for diffusion sampling: each step full, partial or null (Flexiffusion, arXiv 2409.17566)."""

from .errors import FlexiError, ScheduleError
from .schedule.file import load_schedule, save_schedule
from .schedule.kinds import StepKind
from .schedule.schedule import Schedule
from .schedule.segment import Segment, Step

__version__ = "0.1.0"
__all__ = ["FlexiError", "Schedule", "ScheduleError", "Segment", "Step", "StepKind", "load_schedule", "save_schedule"]
