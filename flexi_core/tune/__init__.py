"""Schedules from a teacher's own runs: a few full runs are recorded, and say what every schedule would come to."""

from .answer import Answer, AnswerMeter
from .placement import Planned, plan_front
from .trajectories import GramRecorder, Recording

__all__ = ["Answer", "AnswerMeter", "GramRecorder", "Planned", "Recording", "plan_front"]
