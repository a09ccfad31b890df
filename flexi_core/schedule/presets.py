"""Ready schedules for any run.

Those of a speed-up are chosen by measurement (`benchmarks/presets.py`) for each kind of sampler at some step counts, 4 to 50,
and scaled to others. One is offered only where it was ahead of as many plain steps in every run that it was judged on.
The embedded model has its own for Euler, each found by a search (`benchmarks/family.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ScheduleError
from ..run.sampler import PLAIN, SamplerTraits
from .file import from_dict
from .kinds import StepKind
from .levels import same_grid
from .schedule import Schedule
from .segment import MAX_STEPS, Segment

FAMILY = Path(__file__).parent / "data" / "presets.json"
DEMO_FAMILY = Path(__file__).parent / "data" / "presets-demo.json"
PRESETS = ("1.25x", "1.5x", "2x", "3x", "5x", "deepcache", "all-full")
MODELS = ("any", "demo")
FEWEST_STEPS = 4  # of a run with a speed-up; fewer were not measured
MOST_SHRUNK = 1.3  # times as many steps a placement may have been measured at
LOW_END = 0.04  # noise level at which the last step of `normal` and `karras` grids starts, of `simple` ones never
JUMP = 3.0  # from one noise level to the next: the last but one of `normal` grids, no one of `karras`
_USUAL_END = [0.02, 0.0]  # of a grid where none is given
_SHALLOW = "the three shallowest blocks"
_AS_WELL = 0.5  # dB: another scheduler's fewer steps are called as near
_SHARES = {"1.25x": "four fifths", "1.5x": "two thirds", "2x": "half", "3x": "a third", "5x": "a fifth"}
# Largest speed-up ahead of as many plain steps over two networks, by kind of sampler (docs/results/stages.md).
_OVER_NETWORKS = {
    "no noise, memory 0, 1 a step": 3.0,
    "no noise, memory 0, 2 a step": 3.0,
    "no noise, memory 1, 1 a step": 2.0,
    "no noise, memory 2, 1 a step": 3.0,
}
_LIKE_EULER = "That is for samplers like euler; when sampling starts, the run's own sampler and levels decide."
_NEARNESS = (  # PSNR in dB to the run of all steps
    (50.0, "No difference can be seen"),
    (40.0, "Hardly a difference can be seen"),
    (32.0, "The same picture, small details differ"),
    (25.0, "The same scene, details differ"),
    (-math.inf, "Roughly the same scene"),
)


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


@dataclass(frozen=True)
class Resolved:
    """What a preset is for one run.

    Args:
        schedule: None where plain sampling is the best there is.
        words: sentences for the user: what it does, and how near it comes; or why there is none.
    """

    schedule: Schedule | None
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Preset:
    """A ready schedule by its name, which becomes one when sampling starts: by the run's own steps, levels and sampler.

    Args:
        name: of `PRESETS`.
        steps: of the runs that it is for; 0 takes the run's own.
        model: of `MODELS`; "demo" takes what was searched for the embedded model where the run is one that a search was for.

    Raises:
        ScheduleError: the name, the model or the number of steps is not one that there is.
    """

    name: str
    steps: int = 0
    model: str = MODELS[0]

    def __post_init__(self) -> None:
        if self.name not in PRESETS:
            raise ScheduleError(f"unknown preset {self.name!r}; known: {', '.join(PRESETS)}")
        if self.model not in MODELS:
            raise ScheduleError(f"unknown model {self.model!r} of a preset; known: {', '.join(MODELS)}")
        if self.steps:
            _check_steps(self.steps)

    @property
    def speedup(self) -> float | None:
        """How much less it computes; None for presets that are no speed-up."""
        return float(self.name.removesuffix("x")) if self.name.endswith("x") else None

    def before_run(self) -> Resolved:
        """Return what can be known before sampling starts: for a preset with steps, what it is under a sampler like Euler's."""
        if self.steps:
            searched = self._searched(self.steps)
            levels = searched.teacher_sigmas if searched else [1.0] * (self.steps - 1) + _USUAL_END
            resolved = self.resolve(PLAIN, levels, guided=True)
            return resolved if self.speedup is None else replace(resolved, words=(*resolved.words, _LIKE_EULER))
        if self.name == "all-full":
            return Resolved(None, ("Every step is computed: plain sampling.",))
        if self.name == "deepcache":
            return Resolved(None, (f"Every third step is computed in full, the others with {_SHALLOW}.",))
        return Resolved(
            None,
            (
                f"{self.name}: computes about {_SHARES[self.name]} of the run's steps.",
                "Which ones is decided when sampling starts, from your sampler and steps: see Flexi Report.",
            ),
        )

    def resolve(self, sampler: SamplerTraits | None, sigmas: Sequence[float], guided: bool, changes: bool = False) -> Resolved:
        """Return the schedule for a run.

        Args:
            sampler: what the run's sampler does; None where that is not known.
            sigmas: the run's noise levels [n + 1].
            guided: whether it runs with and without the prompt.
            changes: whether its network changes on the way.
        """
        if changes and self.speedup is not None and sampler is not None:
            return self._over_networks(sampler, sigmas, guided)
        run = len(sigmas) - 1
        if not 1 <= run <= MAX_STEPS:
            return Resolved(None, (f"The run has {max(run, 0)} steps; presets are for 1 to {MAX_STEPS}.",))
        if self.steps in (0, run):
            return self._for(run, sampler, sigmas, guided)
        resolved = self._for(self.steps, sampler, sigmas, guided)
        # What it comes to is said of runs of its own number of steps.
        said = () if resolved.schedule else resolved.words
        told = f"Flexi Preset is set to {self.steps} steps, the run has {run}: set its steps to 0, and it takes the run's own."
        return Resolved(resolved.schedule, (told, *said))

    def _over_networks(self, sampler: SamplerTraits, sigmas: Sequence[float], guided: bool) -> Resolved:
        """Return the schedule for a run whose network changes: of the largest speed-up that is known to be ahead there.

        For a kind of sampler that was not measured over two networks it is the next smaller one.
        """
        speedups = {Preset(name).speedup: name for name in _SHARES}
        most = _OVER_NETWORKS.get(sampler.kind, max((each for each in speedups if each < self.speedup), default=0.0))
        fitting = [each for each in speedups if each <= min(most, self.speedup)]
        if not fitting:
            return Resolved(None, (f"{self.name} is not known to be ahead where the network changes within the run.",))
        taken = speedups[max(fitting)]
        resolved = replace(self, name=taken, model=MODELS[0]).resolve(sampler, sigmas, guided)
        if taken == self.name or resolved.schedule is None:
            return resolved
        said = f"{taken} in place of {self.name}, which is not known to be ahead where the network changes within the run."
        return replace(resolved, words=(said, *resolved.words))

    def _for(self, steps: int, sampler: SamplerTraits | None, sigmas: Sequence[float], guided: bool) -> Resolved:
        """Return the schedule for a number of steps; see `resolve`."""
        if self.name == "all-full":
            return Resolved(all_full(steps), ("Every step is computed: plain sampling.",))
        if self.name == "deepcache":
            schedule = deepcache(steps)
            full = schedule.letters.count("F")
            return Resolved(schedule, (f"{full} of {steps} steps are computed in full, the others with {_SHALLOW}.",))
        if sampler is None:
            return Resolved(None, ("This sampler could not be tried, so what its skipped steps need is unknown.",))
        if not sampler.keeps_levels:
            return Resolved(None, ("This sampler chooses its own noise levels, so that no step of it can be skipped.",))
        if sampler.reads_guidance:
            return Resolved(
                None, ("This sampler (CFG++) reads the prediction without the prompt, which a skipped step lacks.",)
            )
        searched = self._searched(steps) if sampler.kind == PLAIN.kind else None
        if searched and same_grid(searched.teacher_sigmas, sigmas):
            return Resolved(searched, _searched_words(searched))
        found = _measured(sampler.kind, setting(sigmas, guided), steps, self.speedup)
        if found is None:
            return Resolved(None, (_nothing(sampler, steps),))
        schedule, entry = found
        return Resolved(schedule.with_info(preset=entry), preset_words(self.speedup, schedule, entry))

    def _searched(self, steps: int) -> Schedule | None:
        """Return the schedule that a search found for the embedded model, where there is one."""
        found = _family(DEMO_FAMILY).get(self.name, {}).get(str(steps)) if self.model == "demo" else None
        return from_dict(found) if found else None


def preset(name: str, steps: int, model: str = "any") -> Schedule:
    """Return a preset of `PRESETS` for `steps` steps of a sampler like Euler's; every step full where nothing is ahead of that.

    Raises:
        ScheduleError: the name, the model or the number of steps is not one that there is.
    """
    _check_steps(steps)
    if model == "demo" and (searched := _family(DEMO_FAMILY).get(name, {}).get(str(steps))) is not None:
        return from_dict(searched)
    return Preset(name, steps, model).before_run().schedule or all_full(steps)


def is_served(sampler: SamplerTraits) -> bool:
    """Return whether there is any run of a sampler of this kind for which a preset is ahead of fewer plain steps."""
    return not sampler.reads_guidance and bool(_family(FAMILY).get(sampler.kind))


def preset_words(speedup: float, schedule: Schedule, entry: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what a resolved preset does, and how near to all steps it comes, in words and then in numbers.

    Args:
        speedup: that was asked for.
        schedule: that it became.
        entry: of the presets' file: `steps` that were measured, and what was.
    """
    steps, full = len(schedule), schedule.letters.count("F")
    first = f"{full} of {steps} steps are computed, {steps / full:.3g}x fewer."
    if full > full_steps(steps, speedup):
        first = f"{steps / full:.3g}x is the most for {steps} steps with this kind of sampler: {first}"
    measured = entry["measured"]
    near, plain = measured["psnr_db"], measured["plain_db"]
    where = "" if entry["steps"] == steps else f" of {entry['steps']} steps"
    second = (
        f"{how_near(near)}: {near:.0f} dB to the picture of all steps on test models{where}, "
        f"where as few plain steps of the sampler have {plain:.0f} dB."
    )
    if measured["other_db"] >= near - _AS_WELL:
        return (
            first,
            second,
            f"As few plain steps with the scheduler {measured['other']} come as near ({measured['other_db']:.0f} dB).",
        )
    return first, second


def _searched_words(schedule: Schedule) -> tuple[str, ...]:
    steps, full, near = len(schedule), schedule.letters.count("F"), schedule.info["measured"]["psnr_db"]
    return (
        f"{full} of {steps} steps are computed, {steps / full:.3g}x fewer.",
        f"{how_near(near)}: {near:.0f} dB to the picture of all steps, found by a search for the Flexi Demo Model.",
    )


def how_near(psnr_db: float) -> str:
    """Return in words how near a picture of this PSNR, in dB, is to the one of all steps."""
    return next(words for least, words in _NEARNESS if psnr_db >= least)


def _nothing(sampler: SamplerTraits, steps: int) -> str:
    if not is_served(sampler):
        return f"For a sampler that {sampler.words}, no schedule is known that beats as many plain steps."
    count = "1 step" if steps == 1 else f"{steps} steps"
    return f"For {count} of this kind of sampler and scheduler, no schedule is known that beats as many plain steps."


@cache
def _family(path: Path) -> dict[str, dict[str, dict]]:
    """Return the schedules of a file: by speed-up and steps, or by kind of sampler, steps and full steps."""
    return json.loads(path.read_text(encoding="utf-8"))


def setting(sigmas: Sequence[float], guided: bool) -> str:
    """Return the setting of a run that presets are measured for, beside its sampler and steps.

    With guidance the prediction changes faster. The last step must be computed where it starts far from clean (`high end`);
    where it starts near clean, much depends on whether the step before it jumps there or the levels fall evenly.

    Args:
        sigmas: of the run [n + 1].
        guided: whether it runs with and without the prompt.
    """
    if sigmas[-1] > 0 or len(sigmas) < 3 or sigmas[-2] > LOW_END:
        end = "high end"
    else:
        end = "jump to a low end" if sigmas[-3] > JUMP * sigmas[-2] else "even low end"
    return f"{'guided' if guided else 'unguided'}, {end}"


def _measured(kind: str, setting: str, steps: int, speedup: float) -> tuple[Schedule, dict[str, Any]] | None:
    """Return the schedule of a speed-up for a kind of sampler and its entry, or of the largest speed-up below that there is.

    Step counts that were not measured take the placement of the nearest one that was, but not of a much longer run: with
    larger steps it would not hold.
    """
    of_setting = _family(FAMILY).get(kind, {}).get(setting, {})
    counts = [int(count) for count in of_setting if int(count) <= MOST_SHRUNK * steps]
    if not counts or steps < FEWEST_STEPS:
        return None
    near = min(counts, key=lambda count: abs(math.log(count / steps)))
    least = full_steps(near, speedup)
    found = next((full for full in sorted(map(int, of_setting[str(near)])) if full >= least), None)
    if found is None:
        return None
    full = found if near == steps else full_steps(steps, speedup)
    if near != steps and found > least:  # a smaller speed-up than was asked for
        full = max(full, math.ceil(steps * found / near - 0.5))
    if full >= steps:
        return None
    entry = of_setting[str(near)][str(found)]
    return _scaled(Schedule.parse(entry["schedule"]), steps, full), {"steps": near, "measured": entry["measured"]}


def full_steps(steps: int, speedup: float) -> int:
    """Return how many of a run's steps a speed-up computes: to the nearest, the more of two that are as near."""
    return max(1, math.floor(steps / speedup + 0.5))


def _scaled(schedule: Schedule, steps: int, full: int) -> Schedule:
    """Return a schedule of full and extrapolated steps with its full steps at the same places of a run of another length."""
    if steps == len(schedule):
        return schedule
    places = [i for i, letter in enumerate(schedule.letters) if letter == "F"]
    wanted = (
        np.interp(np.linspace(0, 1, full), np.linspace(0, 1, len(places)), places) / max(len(schedule) - 1, 1) * (steps - 1)
    )
    chosen = sorted({round(float(place)) for place in wanted} | {0})
    free = [i for i in reversed(range(steps)) if i not in chosen]
    chosen = sorted([*chosen, *free[: full - len(chosen)]])
    blend = next((segment.blend for segment in schedule.segments if segment.blend), None)
    return replace(at_places(steps, chosen, blend), order=schedule.order, basis=schedule.basis)


def at_places(steps: int, places: Iterable[int], blend: tuple[float, ...] | None = None) -> Schedule:
    """Return full steps at places of a run and extrapolated ones between them, all with one blend."""
    taken = set(places)
    kinds = [StepKind.FULL if i in taken else StepKind.EXTRAPOLATED for i in range(steps)]
    segments = (Segment(s.kinds, None, blend if "X" in s.letters else None) for s in from_kinds(kinds).segments)
    return Schedule(tuple(segments))


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
