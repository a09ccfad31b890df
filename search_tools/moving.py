"""The last stage of a search: the noise levels of the best schedule's full steps, moved between those of the teacher.

Coordinate descent in the paired error (AutoDiffusion, 2023, and BudCache, 2026, move the steps that run too): each full step's
noise level is tried a half, then a quarter of the way to the level before and after it, from the end of the run, where a move
leaves most of the run as it was. A move is kept that is better on the samples of the first stage and on all of them; what came
of it is kept if it is better on those samples of the finals that no move was chosen on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from flexi_core.errors import ScheduleError
from flexi_core.schedule import Schedule

from .candidate import best_trial, final_of, keep_final
from .fitness import Evaluation, Fitness

FRACTIONS = (0.5, 0.25)  # of the way to the next noise level
SHARE = 0.25  # of a search's minutes
_MOVES = "flexi:moves"  # of the study: by schedule


@dataclass(frozen=True)
class Moved:
    """A candidate with moved noise levels.

    Args:
        trial: of the candidate.
        schedule: with blends fitted anew.
        evaluation: on the search's samples.
        final: on those of the finals.
        teacher_sigmas: the noise levels [n + 1] between which they were moved.
    """

    trial: FrozenTrial
    schedule: Schedule
    evaluation: Evaluation
    final: Evaluation
    teacher_sigmas: tuple[float, ...]

    @property
    def unseen(self) -> float:
        """The paired error on samples that no move was chosen on."""
        return _unseen(self.evaluation.mse, self.final.mse)


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
        seconds: at most, of all the study's runs of this stage; None for no limit.
        progress: called after each try with an estimate of the seconds left.
    """
    best = best_trial(study)
    if best is None:
        return
    text = best.user_attrs["schedule"]
    records = study.user_attrs.get(_MOVES, {})
    known = records.get(text, {"errors": [], "seconds": 0.0})

    def keep(**entries: Any) -> None:
        known.update(entries)
        study.set_user_attr(_MOVES, {**study.user_attrs.get(_MOVES, {}), text: known})

    elsewhere = sum(record["seconds"] for candidate, record in records.items() if candidate != text)
    descent = _Descent(Schedule.parse(text), fitness.sigmas, best.user_attrs["errors"])
    most = descent.most if tries is None else min(tries, descent.most)
    for number, schedule in enumerate(descent, 1):
        if number <= len(known["errors"]):
            descent.tell(known["errors"][number - 1])
            continue
        if number > most or (seconds is not None and elsewhere + known["seconds"] >= seconds):
            break
        began = time.monotonic()
        errors = _errors(fitness, schedule, descent.errors)
        descent.tell(errors)
        keep(errors=[*known["errors"], errors], seconds=known["seconds"] + time.monotonic() - began)
        left = known["seconds"] / number * (most - number)
        progress(left if seconds is None else min(left, seconds - elsewhere - known["seconds"]))
    if known.get("judged") != len(known["errors"]):
        keep(judged=len(known["errors"]), moved=_result(study, fitness, best, descent, known.get("moved")))


def best_moved(study: optuna.Study, best: FrozenTrial) -> Moved | None:
    """Return the schedule with moved noise levels that is to be taken in place of the best candidate; None to take that.

    It may be an earlier best candidate's, where that was moved nearer to the teacher than the new one is.
    """
    records = study.user_attrs.get(_MOVES, {})
    found = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if records else ():
        if moved := records.get(trial.user_attrs["schedule"], {}).get("moved"):
            evaluations = (Evaluation(**moved[key]) for key in ("evaluation", "final"))
            found.append(Moved(trial, Schedule.parse(moved["schedule"]), *evaluations, tuple(moved["teacher_sigmas"])))
    nearest = min(found, key=lambda moved: (moved.unseen, moved.trial.number), default=None)
    text, mse = best.user_attrs["schedule"], best.user_attrs["mse"]
    if nearest is None or nearest.trial.user_attrs["schedule"] == text:
        return nearest
    final = final_of(study, text)
    return nearest if nearest.unseen < (mse if final is None else _unseen(mse, final.mse)) else None


def _unseen(seen: float, final: float) -> float:
    """Return the mean error of the finals' second half; the first are the search's own samples."""
    return 2 * final - seen


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


def _result(
    study: optuna.Study, fitness: Fitness, best: FrozenTrial, descent: _Descent, earlier: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Return what a descent came to, where that is better on unseen samples than its start and than an earlier result."""
    if not descent.has_moved:
        return None
    final = final_of(study, best.user_attrs["schedule"]) or keep_final(study, fitness, best)
    limit = _unseen(best.user_attrs["mse"], final.mse)
    if earlier:
        limit = min(limit, _unseen(earlier["evaluation"]["mse"], earlier["final"]["mse"]))
    schedule = fitness.fitted(descent.schedule)
    *_, (latents, _) = fitness.staged(schedule)
    evaluation, final = fitness.evaluate(latents), fitness.final(schedule)
    if not _unseen(evaluation.mse, final.mse) < limit:
        return earlier
    measured = {"evaluation": vars(evaluation), "final": vars(final)}
    return {"schedule": str(schedule), "teacher_sigmas": list(fitness.sigmas), **measured}


def _shortest(level: float) -> float:
    """Return a noise level as the shortest number that a run's 32 bits hold alike."""
    return float(str(np.float32(level)))
