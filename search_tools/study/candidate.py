"""The candidates of a search: evaluated in stages, told; and which of them is the best."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import optuna
from optuna.trial import FrozenTrial, TrialState

from flexi_core.errors import FlexiError, ScheduleError
from flexi_core.schedule.schedule import Schedule

from ..deadline import Clock
from ..fitness import Evaluation, Fitness
from ..space.space import Space
from ..strategies.evolution import FINISHED, PAIRED_MARGIN, near_best

_FINALS = "flexi:finals"  # of the study: by schedule
_FITTED = "fitted"  # of a trial: the schedule with fitted blends
_JUDGED = ("schedule", "spent", "seconds", "errors")  # what every finished candidate has
_EVALUATED = ("evaluation", "mse")  # and what one has that no screen ended
_COPIED = ("errors", "evaluation", "mse", _FITTED)  # what a repeat takes over


def evaluate(
    study: optuna.Study,
    trial: optuna.Trial,
    schedule: Schedule,
    space: Space,
    fitness: Fitness,
    clock: Clock = time.monotonic,
) -> None:
    """Evaluate a candidate that was asked for, and tell the study.

    A candidate is evaluated on more and more samples, and dropped where its paired error is clearly above that of the best
    as cheap as it (successive halving over samples); one that the study has seen before takes over what was found then.
    What is evaluated is the schedule with its blends fitted. The trial remembers both texts, the cost, the errors of its
    stages, the evaluation, seconds, and MACs spent.
    """
    began, before = clock(), fitness.macs
    spent = space.spent(schedule)
    trial.set_user_attr("spent", spent)

    def finish(state: TrialState, rfid: float | None = None) -> None:
        trial.set_user_attr("macs", fitness.macs - before)
        trial.set_user_attr("seconds", clock() - began)
        values = None if rfid is None else [rfid, spent][: len(study.directions)]
        study.tell(trial, values, state=state)

    if known := _same(study, str(schedule)):
        for key in known.user_attrs.keys() & set(_COPIED):
            trial.set_user_attr(key, known.user_attrs[key])
        return finish(known.state, known.values and known.values[0])
    fitted = fitness.fitted(schedule)
    trial.set_user_attr(_FITTED, str(fitted))
    errors = []
    for stage, staged in enumerate(fitness.staged(fitted)):
        latents, error = staged
        errors.append(error)
        trial.set_user_attr("errors", errors)
        if errors[-1] > _limit(study, stage, spent):
            return finish(TrialState.PRUNED)
    evaluation = fitness.evaluate(latents)
    trial.set_user_attr("evaluation", vars(evaluation))
    trial.set_user_attr("mse", evaluation.mse)
    return finish(TrialState.COMPLETE, evaluation.rfid)


def check_candidates(study: optuna.Study, space: Space) -> None:
    """Check that the finished candidates of a study have what a search goes on from.

    Raises:
        FlexiError: one lacks some of it, as in a journal or a database that was damaged.
    """
    for trial in study.get_trials(deepcopy=False, states=FINISHED):
        wanted = (*_JUDGED, *(_EVALUATED if trial.state is TrialState.COMPLETE else ()))
        missing = [key for key in wanted if key not in trial.user_attrs]
        try:
            space.decode(trial.params)
        except (KeyError, TypeError, ValueError):
            missing.append("genes")
        if missing:
            raise FlexiError(
                f"candidate {trial.number} of the study {study.study_name!r} lacks its {', '.join(missing)}: the storage was "
                "damaged or changed by something else; take a copy of it, or give another --study"
            )


def schedule_of(trial: FrozenTrial) -> Schedule:
    """Return the schedule of a candidate as it was evaluated, with its blends.

    Raises:
        FlexiError: its text is not one.
    """
    try:
        return Schedule.parse(trial.user_attrs.get(_FITTED, trial.user_attrs["schedule"]))
    except ScheduleError as error:
        raise FlexiError(f"candidate {trial.number} of the study has a schedule that cannot be read: {error}") from error


def finalists(study: optuna.Study, count: int) -> list[FrozenTrial]:
    """Return the trials of lowest rFID among those near the best paired error, one of each schedule, best first."""
    judged = near_best(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
    ranked = sorted(judged, key=lambda trial: (trial.user_attrs["evaluation"]["rfid"], trial.number))
    return list({trial.user_attrs["schedule"]: trial for trial in reversed(ranked)}.values())[::-1][:count]


def hold_finals(
    study: optuna.Study,
    fitness: Fitness,
    count: int,
    room: Callable[[], float] = lambda: math.inf,
    each: float = 0.0,
    teacher: float = 0.0,
) -> int:
    """Evaluate the finalists of a search on more samples, as many of the best as there is time for.

    What is known of an earlier final counts. One alone meets nobody: there are two or none.

    Args:
        study: its candidates are found.
        fitness: how to judge.
        count: of finalists.
        room: seconds that are left for it.
        each: seconds that a finalist takes.
        teacher: seconds that the teacher's samples take.

    Returns:
        how many were evaluated, now or earlier.
    """
    chosen = finalists(study, count)
    missing = [trial for trial in chosen if final_of(study, trial.user_attrs["schedule"]) is None]
    known = len(chosen) - len(missing)
    if not known and room() < teacher + min(2, len(missing)) * each:
        return 0
    for held, trial in enumerate(missing):
        if room() < each + (0.0 if held else teacher):
            return known + held
        keep_final(study, fitness, trial)
    return len(chosen)


def keep_final(study: optuna.Study, fitness: Fitness, trial: FrozenTrial) -> Evaluation:
    """Evaluate a candidate on the samples of the finals; the study keeps what was found."""
    evaluation = fitness.final(schedule_of(trial))
    known = study.user_attrs.get(_FINALS, {})
    study.set_user_attr(_FINALS, {**known, trial.user_attrs["schedule"]: vars(evaluation)})
    return evaluation


def final_of(study: optuna.Study, text: str) -> Evaluation | None:
    """Return the evaluation of a schedule in the finals, by its own text; None where it was in none."""
    return finals_of(study).get(text)


def finals_of(study: optuna.Study) -> dict[str, Evaluation]:
    """Return the evaluations of the finals so far, by the schedule's own text."""
    return {text: Evaluation(**measured) for text, measured in study.user_attrs.get(_FINALS, {}).items()}


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """Return the best finalist: by the finals where all of them were in one, else by the evaluations of the search."""
    known = study.user_attrs.get(_FINALS, {})
    best = finalists(study, max(len(known), 1))
    if not best:
        return None
    if not all(trial.user_attrs["schedule"] in known for trial in best):
        return best[0]
    finals = [known[trial.user_attrs["schedule"]] for trial in best]
    limit = PAIRED_MARGIN * min(final["mse"] for final in finals)
    judged = [(final["rfid"], i) for i, final in enumerate(finals) if final["mse"] <= limit]
    return best[min(judged)[1]]


def _same(study: optuna.Study, text: str) -> FrozenTrial | None:
    finished = study.get_trials(deepcopy=False, states=FINISHED)
    return next((trial for trial in finished if trial.user_attrs["schedule"] == text), None)


def _limit(study: optuna.Study, stage: int, spent: float) -> float:
    """Return the paired error beyond which a schedule is dropped at a stage: of the best that costs no more, and a margin."""
    judged = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(study.directions) > 1:  # on a front the cheap are not measured by the dear
        judged = [trial for trial in judged if trial.user_attrs["spent"] <= spent]
    return PAIRED_MARGIN * min((trial.user_attrs["errors"][stage] for trial in judged), default=float("inf"))
