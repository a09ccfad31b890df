"""What people see of a schedule before it runs: letters, words, kinds of steps; and a step that is changed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from ..errors import ScheduleError
from .file import made_for
from .kinds import StepKind
from .presets import Preset
from .schedule import Schedule
from .segment import DEFAULT_DEPTH, Segment, Step

MOST_SHOWN = 2_000  # steps of a strip; a screen has fewer columns
_CYCLE = (StepKind.FULL, StepKind.PARTIAL, StepKind.EXTRAPOLATED, StepKind.NULL)


@dataclass(frozen=True)
class Strip:
    """What a node shows.

    Args:
        letters: one for each step, `MOST_SHOWN` at most; empty where the steps are not known yet.
        words: a line.
        details: more of it, in words.
        text: the schedule's own, where it is to be typed anew.
    """

    letters: str
    words: str
    details: str = ""
    text: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON has it, with the colour, the height and the name of each kind of step."""
        kinds = {
            kind.value: {"colour": kind.colour, "height": kind.height, "label": kind.label}
            for kind in StepKind
            if kind.value in self.letters
        }
        found = {"letters": self.letters, "words": self.words, "details": self.details, "kinds": kinds}
        return found if self.text is None else {**found, "text": self.text}


def strip_of(schedule: Schedule | Preset, text: str | None = None) -> Strip:
    """Return what a node shows of a schedule, or of what is known of a preset before it runs.

    Args:
        schedule: of a file, with what the file says of it; or typed.
        text: to be typed anew.
    """
    if isinstance(schedule, Preset):
        known = schedule.before_run()
        first, *others = known.words
        if known.schedule is None:
            return Strip("", first, " ".join(others))
        return Strip(known.schedule.letters[:MOST_SHOWN], in_words(known.schedule), " ".join(others))
    return Strip(schedule.letters[:MOST_SHOWN], in_words(schedule), made_for(schedule), text)


def in_words(schedule: Schedule) -> str:
    """Return how many steps a schedule has and computes, and about what that saves: `20 steps, 10 computed, about 2.0x`."""
    steps, counts = len(schedule), Counter(schedule.letters)
    of = "1 step" if steps == 1 else f"{steps} steps"
    if schedule.is_all_full:
        return f"{of}, all computed: plain sampling"
    partial = counts["P"] + counts["p"]
    computed = counts["F"] + counts["f"]
    # A partial step costs something: with them it is less.
    saved = steps / (counts["F"] + counts["f"] / 2)
    parts = [of, f"{computed} computed"] + ([f"{partial} in part"] if partial else [])
    return f"{', '.join(parts)}, {'up to' if partial else 'about'} {saved:.1f}x"


def cycled(schedule: Schedule, index: int) -> Schedule:
    """Return a schedule whose step is of the next kind that can stand there: full, partial, extrapolated, removed.

    Args:
        schedule: of any steps.
        index: of the step, from 0.

    Raises:
        ScheduleError: there is no such step, or no other kind can stand there.
    """
    steps = list(schedule.steps())
    if not 0 <= index < len(steps):
        raise ScheduleError(f"the schedule has no step {index + 1}; it has {len(steps)}")
    if index == 0:
        raise ScheduleError("the first step stays full: all others live off it")
    kind = steps[index].kind
    at = _CYCLE.index(kind) if kind in _CYCLE else -1
    for other in (*_CYCLE[at + 1 :], *_CYCLE[: max(at, 0)]):
        try:
            segments = _segments([*steps[:index], replace(steps[index], kind=other), *steps[index + 1 :]], schedule)
            return replace(schedule, segments=segments)
        except ScheduleError:
            continue
    raise ScheduleError(f"step {index + 1} stays as it is: partial steps behind it live off it; change those first")


def _segments(steps: list[Step], schedule: Schedule) -> tuple[Segment, ...]:
    """Return steps as segments, each with the depth, the blend and the forecast that its steps had in the schedule.

    Raises:
        ScheduleError: they are in no order that segments have.
    """
    starts, number = [], -1
    for step in steps:
        number += step.kind.is_full
        starts.append(number)
    segments = []
    for _, group in groupby(zip(starts, steps, strict=True), key=lambda item: item[0]):
        own = [step for _, step in group]
        kinds = tuple(step.kind for step in own)
        was = [schedule.segments[step.segment] for step in own]
        depth = next((segment.depth for segment in was if segment.depth), DEFAULT_DEPTH)
        blend = next((segment.blend for segment in was if segment.blend), None)
        partial = any(kind.is_partial for kind in kinds)
        segments.append(
            Segment(
                kinds,
                depth if partial else None,
                blend if StepKind.EXTRAPOLATED in kinds else None,
                max(segment.forecast for segment in was) if partial else 0,
            )
        )
    return tuple(segments)
