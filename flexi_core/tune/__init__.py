"""Schedules from a teacher's own runs: a few full runs are recorded, and say what every schedule would come to."""

from .answer import Answer, AnswerMeter
from .ascent import LevelAscent
from .blends import BlendFitter, Observe, Observed
from .learning import Facts, Learner, Lesson
from .moves import LevelMoves
from .placement import Planned, plan_front
from .runs import Runs, SampleProgress, Samples
from .shelf import Shelf
from .trajectories import GramRecorder, Recording
from .tuner import EFFORTS, Effort, Recorded, Tuned, Tuner, cheapest, nearest

__all__ = [
    "EFFORTS",
    "Answer",
    "AnswerMeter",
    "BlendFitter",
    "Effort",
    "Facts",
    "GramRecorder",
    "Learner",
    "Lesson",
    "LevelAscent",
    "LevelMoves",
    "Observe",
    "Observed",
    "Planned",
    "Recorded",
    "Recording",
    "Runs",
    "SampleProgress",
    "Samples",
    "Shelf",
    "Tuned",
    "Tuner",
    "cheapest",
    "nearest",
    "plan_front",
]
