"""The candidates of a study by speed-up and error: the front, and the best one at any wanted speed-up."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from flexi_core import __version__
from flexi_core.errors import FlexiError
from flexi_core.schedule.schedule import Schedule

from ..backends.teacher import SEARCH_SEEDS
from ..fitness import Evaluation
from ..settings import SearchSettings
from ..strategies.evolution import FINISHED, near_best
from ..strategies.moving import best_moved
from .candidate import best_trial, finals_of, schedule_of

_ROUNDING = 1e-9  # speed-ups are quotients of sums of blocks


@dataclass(frozen=True)
class Found:
    """A finished candidate of a study; everything is read from the trial's user attributes, so that it does not matter which
    values the study optimised.

    Args:
        trial: of the study.
        schedule: of the candidate.
        evaluation: None where a screen ended it.
        final: its evaluation in the finals, on more samples; None where it was in none.
        is_best: the study's own choice, by its finals where they were held; with moved noise levels where they gained.
        teacher_sigmas: the noise levels that those of the schedule were moved between.
    """

    trial: FrozenTrial
    schedule: Schedule
    evaluation: Evaluation | None
    final: Evaluation | None = None
    is_best: bool = False
    teacher_sigmas: tuple[float, ...] = ()

    @property
    def number(self) -> int:
        """The trial's, as every tool for Optuna's studies shows it."""
        return self.trial.number

    @property
    def speedup(self) -> float:
        """The teacher's MACs over the candidate's."""
        return len(self.schedule) / self.trial.user_attrs["spent"]

    @property
    def as_searched(self) -> Found:
        """The candidate as it was evaluated in its turn, before any noise level was moved."""
        return _found(self.trial, {}, None)

    @property
    def seconds(self) -> float:
        """Time that its evaluation took."""
        return self.trial.user_attrs.get("seconds", 0.0)


def found_in(study: optuna.Study) -> list[Found]:
    """Return the finished candidates of a study, as they finished.

    Raises:
        FlexiError: what the study keeps of one is missing, or of another type.
    """
    try:
        return _found_in(study)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise FlexiError(
            f"the study {study.study_name!r} cannot be read: its candidates were written or changed by something else "
            f"({type(error).__name__}: {error})"
        ) from error


def _found_in(study: optuna.Study) -> list[Found]:
    best, finals = best_trial(study), finals_of(study)
    moved = None if best is None else best_moved(study, best)
    chosen = None if best is None else (best if moved is None else moved.trial).user_attrs["schedule"]
    trials = study.get_trials(deepcopy=False, states=FINISHED)
    in_order = sorted(trials, key=lambda trial: (trial.datetime_complete, trial.number))
    found = [_found(trial, finals, chosen) for trial in in_order]
    if moved is None:
        return found
    taken = {"schedule": moved.schedule, "evaluation": moved.evaluation, "teacher_sigmas": moved.teacher_sigmas}
    return [replace(one, **taken, final=moved.final if one.final else None) if one.is_best else one for one in found]


def evaluated(found: Sequence[Found]) -> list[Found]:
    """Return those that no screen ended, each schedule once, as it was first found."""
    first: dict[str, Found] = {}
    for one in found:
        if one.evaluation is not None:
            first.setdefault(str(one.schedule), one)
    return list(first.values())


def front(found: Sequence[Found]) -> list[Found]:
    """Return the fully evaluated candidates that no other beats in speed-up and paired error together, the slowest first."""
    least, kept = math.inf, []
    for one in sorted(evaluated(found), key=lambda one: (-one.speedup, one.evaluation.mse, one.number)):
        if one.evaluation.mse < least:
            least = one.evaluation.mse
            kept.append(one)
    return kept[::-1]


def ranked(found: Sequence[Found]) -> list[Found]:
    """Return the fully evaluated candidates, the best first.

    The study's own choice leads where it is among them; then come those near the best paired error by rFID, then the others.
    """
    judged = evaluated(found)
    near = {trial.number for trial in near_best([one.trial for one in judged])}
    return sorted(
        judged,
        key=lambda one: (
            not one.is_best,
            one.number not in near,
            one.evaluation.rfid if one.number in near else one.evaluation.mse,
            one.number,
        ),
    )


def as_fast(found: Sequence[Found], speedup: float) -> list[Found]:
    """Return the fully evaluated candidates that are at least this fast."""
    return [one for one in evaluated(found) if one.speedup >= speedup - _ROUNDING]


def fastest_of(found: Sequence[Found]) -> float:
    """Return the speed-up of the fastest fully evaluated candidate, cut to hundredths: what can be asked for at most."""
    return math.floor(100 * max(one.speedup for one in evaluated(found)) + _ROUNDING) / 100


def best_at(found: Sequence[Found], speedup: float) -> Found:
    """Return the best candidate that is at least this fast.

    Raises:
        FlexiError: there is none; the message says what there is.
    """
    judged = evaluated(found)
    if not judged:
        raise FlexiError(f"the study has no fully evaluated candidate yet (of {len(found)} finished ones); search on with it")
    fast = as_fast(found, speedup)
    if not fast:
        slowest, fastest = min(one.speedup for one in judged), fastest_of(judged)
        raise FlexiError(
            f"the study has nothing {speedup:g}x as fast: its {len(judged)} fully evaluated candidates are {slowest:.2f}x to "
            f"{fastest:.2f}x; ask for at most {fastest:g} or run flexi search --speedup {speedup:g}"
        )
    return ranked(fast)[0]


def best_so_far(found: Sequence[Found], speedup: float) -> Iterator[Found | None]:
    """Yield for each candidate, as they finished, the best one up to it that is at least this fast.

    Its rFID may rise: when a candidate of less paired error is found, others are no longer near the best.
    """
    near: list[Found] = []
    best = None
    for one in found:
        if as_fast([one], speedup):
            # The margin only ever narrows: who falls out of it never comes back.
            numbers = {trial.number for trial in near_best([other.trial for other in (*near, one)])}
            near = [other for other in (*near, one) if other.number in numbers]
            best = min(near, key=lambda other: (other.evaluation.rfid, other.number))
        yield best


def with_search_results(
    found: Found, settings: SearchSettings, study_name: str, teacher: Mapping[str, Any], features: str | None, by: str
) -> Schedule:
    """Return a candidate's schedule with what its file says beside it.

    Args:
        found: fully evaluated.
        settings: of the study.
        study_name: of the study.
        teacher: identity of the teacher.
        features: what Frechet distances were measured on; None where that is not known.
        by: the command that writes it.
    """
    measured = {
        "speedup_macs": found.speedup,
        "psnr_db": found.evaluation.psnr_db,
        "rfid": found.evaluation.rfid,
        "mse": found.evaluation.mse,
        "samples": settings.samples,
        "first_seed": SEARCH_SEEDS,
        **({} if features is None else {"features": features}),
        "by": by,
    }
    provenance = {
        "tool": "flexiffusion",
        "version": __version__,
        "seed": settings.seed,
        "study": study_name,
        "candidate": found.number,
    }
    # Moved noise levels are for this grid alone, and a teacher that cannot be opened does not tell it.
    grid = {"sigmas": list(found.teacher_sigmas)} if found.teacher_sigmas else {}
    return found.schedule.with_info(teacher=grid | dict(teacher), measured=_finite(measured), provenance=provenance)


def _finite(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values; those that JSON cannot hold (the PSNR of equal images is infinite) as None."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in measured.items()}


def _found(trial: FrozenTrial, finals: Mapping[str, Evaluation], best: str | None) -> Found:
    text, measured = trial.user_attrs["schedule"], trial.user_attrs.get("evaluation")
    evaluation = Evaluation(**measured) if measured else None
    spent = trial.user_attrs["spent"]
    figures = [spent, trial.user_attrs.get("seconds", 0.0), *(vars(evaluation).values() if evaluation else ())]
    if not all(isinstance(value, int | float) for value in figures) or not 0 < spent < math.inf:
        raise ValueError(f"candidate {trial.number} has figures that are none")
    return Found(trial, schedule_of(trial), evaluation, finals.get(text), text == best)
