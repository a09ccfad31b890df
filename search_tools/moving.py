"""The last stage of a search: the noise levels of the best schedule's full steps, moved between those of the teacher.

Coordinate descent in the paired error (AutoDiffusion, 2023, and BudCache, 2026, move the steps that run too): each full step's
noise level is tried a half, then a quarter of the way to the level before and after it, from the end of the run, where a move
leaves most of the run as it was. A move is kept that is better on the samples of the first stage and on all of them; what came
of it is kept if it is better on the samples of the finals, which no move was chosen on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import optuna

from flexi_core.errors import ScheduleError
from flexi_core.schedule import Schedule

from .candidate import best_trial, final_of, keep_final
from .fitness import Evaluation, Fitness

FRACTIONS = (0.5, 0.25)  # of the way to the next noise level
SHARE = 0.25  # of a search's minutes
_MOVES = "flexi:moves"  # of the study


@dataclass(frozen=True)
class Moved:
    """The best schedule with moved noise levels.

    Args:
        schedule: with blends fitted anew.
        evaluation: on the search's samples.
        final: on those of the finals.
    """

    schedule: Schedule
    evaluation: Evaluation
    final: Evaluation


def move_levels(
    study: optuna.Study,
    fitness: Fitness,
    tries: int | None = None,
    seconds: float | None = None,
    progress: Callable[[float], None] = lambda left: None,
) -> None:
    """Move the noise levels of the best candidate's full steps; what is known of an earlier run of this stage counts.

    Args:
        study: its candidates are found; it keeps the errors of the tries, and the result.
        fitness: how to judge.
        tries: at most; None for a whole descent.
        seconds: at most, over all runs; None for no limit.
        progress: called after each try with an estimate of the seconds left.
    """
    best = best_trial(study)
    if best is None:
        return
    text = best.user_attrs["schedule"]
    known = study.user_attrs.get(_MOVES, {})
    if known.get("schedule") != text:
        known = {"schedule": text, "errors": [], "seconds": 0.0}
    descent = _Descent(Schedule.parse(text), fitness.sigmas, best.user_attrs["errors"])
    for number, schedule in enumerate(descent):
        if tries is not None and number >= tries:
            break
        if number < len(known["errors"]):
            descent.tell(known["errors"][number])
            continue
        if seconds is not None and known["seconds"] >= seconds:
            break
        began = time.monotonic()
        errors = _errors(fitness, schedule, descent.errors)
        descent.tell(errors)
        spent = known["seconds"] + time.monotonic() - began
        known = {"schedule": text, "errors": [*known["errors"], errors], "seconds": spent}
        study.set_user_attr(_MOVES, known)
        left = known["seconds"] / (number + 1) * (min(tries or descent.most, descent.most) - number - 1)
        progress(left if seconds is None else min(left, seconds - known["seconds"]))
    if "moved" not in known:
        study.set_user_attr(_MOVES, {**known, "moved": _result(study, fitness, text, descent)})


def moved_of(study: optuna.Study, text: str) -> Moved | None:
    """Return what moving the noise levels of a candidate gained, by the candidate's text; None where it gained nothing."""
    known = study.user_attrs.get(_MOVES, {})
    if known.get("schedule") != text or not known.get("moved"):
        return None
    moved = known["moved"]
    return Moved(Schedule.parse(moved["schedule"]), Evaluation(**moved["evaluation"]), Evaluation(**moved["final"]))


class _Descent:
    """The tries of a coordinate descent, each to be answered with `tell` before the next.

    Args:
        schedule: whose full steps are moved.
        sigmas: the teacher's noise levels [n + 1].
        errors: of the schedule at its own places, by stage.
    """

    def __init__(self, schedule: Schedule, sigmas: list[float], errors: list[float]) -> None:
        self.schedule, self.errors = replace(schedule, sigmas=tuple(map(_shortest, sigmas))), errors
        self.has_moved = False
        self._movable = [i for i, step in enumerate(schedule.steps()) if i and step.kind.is_full][::-1]
        self._tried: Schedule | None = None

    @property
    def most(self) -> int:
        """How many tries there are at most."""
        return 2 * len(FRACTIONS) * len(self._movable)

    def __iter__(self) -> Iterator[Schedule]:
        for fraction in FRACTIONS:
            for at in self._movable:
                for neighbour in (at + 1, at - 1):
                    levels, before = list(self.schedule.sigmas), self.schedule
                    levels[at] = _shortest(levels[at] + fraction * (levels[neighbour] - levels[at]))
                    try:
                        self._tried = replace(self.schedule, sigmas=tuple(levels))
                    except ScheduleError:  # neighbours that no float lies between
                        continue
                    yield self._tried
                    if self.schedule is not before:
                        break

    def tell(self, errors: list[float]) -> None:
        """Take the errors of the last try; one that is better at every stage is gone on from."""
        if len(errors) == len(self.errors) and all(a < b for a, b in zip(errors, self.errors, strict=True)):
            self.schedule, self.errors, self.has_moved = self._tried, errors, True


def _errors(fitness: Fitness, schedule: Schedule, limits: list[float]) -> list[float]:
    """Return the paired errors of a schedule stage by stage, up to the first that is not below its limit."""
    found = []
    for (_, error), limit in zip(fitness.staged(fitness.fitted(schedule)), limits, strict=True):
        found.append(error)
        if error >= limit:
            break
    return found


def _result(study: optuna.Study, fitness: Fitness, text: str, descent: _Descent) -> dict[str, Any] | None:
    if not descent.has_moved:
        return None
    best = final_of(study, text)
    if best is None:
        best = keep_final(study, fitness, best_trial(study))
    schedule = fitness.fitted(descent.schedule)
    final = fitness.final(schedule)
    if final.mse >= best.mse:
        return None
    *_, (latents, _) = fitness.staged(schedule)
    return {"schedule": str(schedule), "evaluation": vars(fitness.evaluate(latents)), "final": vars(final)}


def _shortest(level: float) -> float:
    """Return a noise level as the shortest number that a run's 32 bits hold alike."""
    return float(str(np.float32(level)))
