"""Schedules from a teacher's own runs: a few full runs are recorded, and say what every schedule would come to."""

from .answer import Answer, AnswerMeter
from .blends import BlendFitter, Observe, Observed
from .placement import Planned, plan_front
from .runs import Runs, SampleProgress, Samples
from .trajectories import GramRecorder, Recording
from .tuner import Tuned, Tuner, cheapest, nearest

__all__ = [
    "Answer",
    "AnswerMeter",
    "BlendFitter",
    "GramRecorder",
    "Observe",
    "Observed",
    "Planned",
    "Recording",
    "Runs",
    "SampleProgress",
    "Samples",
    "Tuned",
    "Tuner",
    "cheapest",
    "nearest",
    "plan_front",
]
