"""Schedules for diffusion sampling: each step full, partial or null (Flexiffusion, arXiv 2409.17566)."""

from .errors import FlexiError, ScheduleError
from .schedule import Schedule, Segment, Step, StepKind
from .schedule_file import load_schedule, save_schedule

__version__ = "0.1.0"
__all__ = ["FlexiError", "Schedule", "ScheduleError", "Segment", "Step", "StepKind", "load_schedule", "save_schedule"]
