"""Ready schedules for any step count.

Those of a speed-up are chosen by measurement (`benchmarks/presets.py`) for 20, 25, 30 and 50 steps, and scaled to other counts.
The embedded model has its own at these counts, each found by a search (`benchmarks/family.py`).
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import numpy as np

from .errors import ScheduleError
from .schedule import MAX_STEPS, Schedule, Segment, StepKind
from .schedule_file import from_dict

FAMILY = Path(__file__).parent / "presets.json"
DEMO_FAMILY = Path(__file__).parent / "presets-demo.json"
PRESETS = ("1.5x", "2x", "3x", "5x", "deepcache", "all-full")
MODELS = ("any", "demo")


def all_full(steps: int) -> Schedule:
    """Return the teacher's own schedule: every step full."""
    _check_steps(steps)
    return Schedule((Segment((StepKind.FULL,)),) * steps)


def deepcache(steps: int, interval: int = 3, depth: int = 3, forecast: int = 0) -> Schedule:
    """Return the uniform schedule of DeepCache (Ma et al., 2023): one full step, then interval - 1 partial ones.

    With a forecast order the deep feature is extrapolated, as TaylorSeer (Liu et al., 2025) does.
    """
    _check_steps(steps)
    if interval < 1:
        raise ScheduleError(f"the interval is {interval}; a full step comes every 1 or more steps")
    kinds = [StepKind.FULL if i % interval == 0 else StepKind.PARTIAL for i in range(steps)]
    return from_kinds(kinds, depth=depth, forecast=forecast)


def uniform(steps: int, full: int, null: StepKind = StepKind.EXTRAPOLATED) -> Schedule:
    """Return `full` full steps spread evenly over the run, the rest null: with N the same solver at fewer steps."""
    _check_steps(steps)
    _check_full(steps, full)
    places = {i * steps // full for i in range(full)}
    return from_kinds([StepKind.FULL if i in places else null for i in range(steps)])


def even(steps: int, full: int) -> Schedule:
    """Return `full` full steps at even distances from the first step to the last, the rest extrapolated."""
    _check_steps(steps)
    _check_full(steps, full)
    places = {round(i * (steps - 1) / max(full - 1, 1)) for i in range(full)}
    return from_kinds([StepKind.FULL if i in places else StepKind.EXTRAPOLATED for i in range(steps)])


def segments_for_speedup(steps: int, speedup: float) -> Schedule:
    """Return a schedule of about steps / speedup full steps: the first ones together, the rest evenly spaced, X between."""
    _check_steps(steps)
    if speedup < 1:
        raise ScheduleError(f"the speed-up is {speedup}; 1 means every step full")
    full = max(1, min(steps, round(steps / speedup)))
    head = min(full, max(1, round(0.3 * full)))
    rest, places = full - head, set(range(head))
    # The last full step stays near the end of the run, where a step changes the fine detail most.
    places |= {head - 1 + round((j + 1) * (steps - head) / rest) for j in range(rest)}
    return from_kinds([StepKind.FULL if i in places else StepKind.EXTRAPOLATED for i in range(steps)])


def preset(name: str, steps: int, model: str = "any") -> Schedule:
    """Return a preset of `PRESETS` for a run of `steps` steps.

    Args:
        name: of `PRESETS`.
        steps: of the run.
        model: of `MODELS`. "demo" gives what was searched for the embedded model under Euler, at speed-ups and step counts that
            a search was made for; at others it gives what "any" does.

    Raises:
        ScheduleError: the name or the model is not known.
    """
    if model not in MODELS:
        raise ScheduleError(f"unknown model {model!r} of a preset; known: {', '.join(MODELS)}")
    searched = _family(DEMO_FAMILY).get(name, {}).get(str(steps)) if model == "demo" else None
    if searched is not None:
        return from_dict(searched)
    if name == "all-full":
        return all_full(steps)
    if name == "deepcache":
        return deepcache(steps)
    if name in PRESETS:
        _check_steps(steps)
        counts = _family(FAMILY)[name]
        nearest = min(counts, key=lambda count: abs(math.log(int(count) / steps)))
        entry = counts[nearest]
        schedule = Schedule.parse(entry["schedule"])
        return _scaled(schedule, steps, float(name.removesuffix("x"))).with_info(
            preset={"name": name, "steps": int(nearest), "measured": entry["measured"]}
        )
    raise ScheduleError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")


@cache
def _family(path: Path) -> dict[str, dict[str, dict]]:
    """Return the schedules of a file by speed-up and step count."""
    return json.loads(path.read_text(encoding="utf-8"))


def _scaled(schedule: Schedule, steps: int, speedup: float) -> Schedule:
    """Return a schedule of full and extrapolated steps with its full steps at the same places of a run of another length."""
    if steps == len(schedule):
        return schedule
    places = [i for i, letter in enumerate(schedule.letters) if letter == "F"]
    full = max(1, min(steps, round(steps / speedup)))
    wanted = (
        np.interp(np.linspace(0, 1, full), np.linspace(0, 1, len(places)), places) / max(len(schedule) - 1, 1) * (steps - 1)
    )
    chosen = sorted({round(float(place)) for place in wanted} | {0})
    free = [i for i in reversed(range(steps)) if i not in chosen]
    chosen = sorted([*chosen, *free[: full - len(chosen)]])
    kinds = [StepKind.FULL if i in chosen else StepKind.EXTRAPOLATED for i in range(steps)]
    blend = next((segment.blend for segment in schedule.segments if segment.blend), None)
    segments = from_kinds(kinds).segments
    return Schedule(tuple(Segment(s.kinds, None, blend if "X" in s.letters else None) for s in segments), schedule.order)


def from_kinds(kinds: list[StepKind], depth: int | None = None, order: int = 1, forecast: int = 0) -> Schedule:
    """Return the schedule with these kinds of step, a segment starting at every full one; all partial steps are alike."""
    starts = [i for i, kind in enumerate(kinds) if kind is StepKind.FULL]
    if not starts or starts[0] != 0:
        raise ScheduleError("the first step of a schedule is full; put an F first")
    segments = []
    for start, stop in zip(starts, [*starts[1:], len(kinds)], strict=True):
        part = tuple(kinds[start:stop])
        partial = StepKind.PARTIAL in part
        segments.append(Segment(part, depth if partial else None, forecast=forecast if partial else 0))
    return Schedule(tuple(segments), order)


def _check_steps(steps: int) -> None:
    if not 1 <= steps <= MAX_STEPS:
        raise ScheduleError(f"a run has {steps} steps; presets are for 1 to {MAX_STEPS}")


def _check_full(steps: int, full: int) -> None:
    if not 1 <= full <= steps:
        raise ScheduleError(f"{full} full steps do not fit a run of {steps}; ask for 1 to {steps}")
