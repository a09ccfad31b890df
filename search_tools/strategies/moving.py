"""The last stage of a search: the noise levels of the best schedule's full steps, moved.

Coordinate ascent in the mean PSNR to the teacher (AutoDiffusion, 2023, and BudCache, 2026, move the steps that run too): each
full step's noise level is tried nearer to that of the full step after it or before it, from the end of the run, where a move
leaves most of the run as it was; the steps between them go along. A move is kept that is better on the samples of the first
stage and on all of them; what came of it is kept if it is better on those samples of the finals that no move was chosen on,
and no sample is so far off that the mean paired error is above the search's margin.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from flexi_core.schedule.schedule import Schedule
from flexi_core.tune import LevelAscent

from ..deadline import Clock
from ..fitness import Evaluation, Fitness
from ..study.candidate import best_trial, final_of, keep_final, schedule_of
from .evolution import PAIRED_MARGIN

SHARE = 0.25  # of a search's minutes
TRIES = 2  # times its evaluations
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
        """The mean PSNR, dB, on samples that no move was chosen on."""
        return _unseen(self.evaluation, self.final)


def move_levels(
    study: optuna.Study,
    fitness: Fitness,
    tries: int | None = None,
    seconds: float | None = None,
    progress: Callable[[float], None] = lambda left: None,
    clock: Clock = time.monotonic,
    room: Callable[[], float] = lambda: math.inf,
    each: float = 0.0,
) -> int:
    """Move the noise levels of the best candidate's full steps; what is known of an earlier run of this stage counts.

    Args:
        study: its candidates are found; it keeps the PSNR of the tries, and the result.
        fitness: how to judge.
        tries: at most; None for a whole ascent.
        seconds: at most, of all the study's runs of this stage; None for no limit.
        progress: called after each try with an estimate of the seconds left.
        clock: that tries are timed by.
        room: seconds that are left for tries; none is begun that may take longer.
        each: seconds that a try may take; the slowest so far where that took longer.

    Returns:
        how many tries there were, earlier ones included.
    """
    best = best_trial(study)
    if best is None:
        return 0
    text = best.user_attrs["schedule"]
    records = study.user_attrs.get(_MOVES, {})
    known = records.get(text, {"tries": [], "seconds": 0.0})

    def keep(**entries: Any) -> None:
        known.update(entries)
        study.set_user_attr(_MOVES, {**study.user_attrs.get(_MOVES, {}), text: known})

    elsewhere = sum(record["seconds"] for candidate, record in records.items() if candidate != text)
    if "start" not in known:
        if room() <= 2 * each:
            return 0
        keep(start=_psnr_db(fitness, schedule_of(best)))
    ascent = LevelAscent(Schedule.parse(text), fitness.sigmas, known["start"])
    most, slowest = ascent.most if tries is None else tries, each
    for number, schedule in enumerate(ascent, 1):
        if number <= len(known["tries"]):
            ascent.tell(known["tries"][number - 1])
            continue
        if (tries is not None and number > tries) or (seconds is not None and elsewhere + known["seconds"] >= seconds):
            break
        if room() <= slowest:
            break
        began = clock()
        reached = _psnr_db(fitness, fitness.fitted(schedule), ascent.psnr_db)
        ascent.tell(reached)
        took = clock() - began
        slowest = max(slowest, took)
        keep(tries=[*known["tries"], reached], seconds=known["seconds"] + took)
        left = known["seconds"] / number * max(most - number, 0)
        progress(left if seconds is None else min(left, seconds - elsewhere - known["seconds"]))
    if known.get("judged") != len(known["tries"]):
        keep(judged=len(known["tries"]), moved=_result(study, fitness, best, ascent, known.get("moved")))
    return len(known["tries"])


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
    nearest = max(found, key=lambda moved: (moved.unseen, -moved.trial.number), default=None)
    if nearest is None or nearest.trial.user_attrs["schedule"] == best.user_attrs["schedule"]:
        return nearest
    seen = Evaluation(**best.user_attrs["evaluation"])
    return nearest if nearest.unseen > _unseen(seen, final_of(study, best.user_attrs["schedule"]) or seen) else None


def _unseen(seen: Evaluation, final: Evaluation) -> float:
    """Return the mean PSNR of the finals' second half; the first are the search's own samples."""
    return 2 * final.psnr_db - seen.psnr_db


def _psnr_db(fitness: Fitness, schedule: Schedule, limits: list[float] | None = None) -> list[float]:
    """Return the mean PSNR of a schedule stage by stage, up to the first that is not above its limit."""
    found: list[float] = []
    for latents, _ in fitness.staged(schedule):
        found.append(fitness.psnr_db(latents))
        if limits is not None and found[-1] <= limits[len(found) - 1]:
            break
    return found


def _result(
    study: optuna.Study, fitness: Fitness, best: FrozenTrial, ascent: LevelAscent, earlier: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Return what an ascent came to, where that is better on unseen samples than its start and than an earlier result."""
    if not ascent.has_moved:
        return None
    start = final_of(study, best.user_attrs["schedule"]) or keep_final(study, fitness, best)
    limit = _unseen(Evaluation(**best.user_attrs["evaluation"]), start)
    if earlier:
        limit = max(limit, _unseen(Evaluation(**earlier["evaluation"]), Evaluation(**earlier["final"])))
    schedule = fitness.fitted(ascent.schedule)
    *_, (latents, _) = fitness.staged(schedule)
    evaluation, final = fitness.evaluate(latents), fitness.final(schedule)
    if not (_unseen(evaluation, final) > limit and final.mse <= PAIRED_MARGIN * start.mse):
        return earlier
    measured = {"evaluation": vars(evaluation), "final": vars(final)}
    return {"schedule": str(schedule), "teacher_sigmas": list(fitness.sigmas), **measured}
