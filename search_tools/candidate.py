"""One candidate of a search: asked for, evaluated in stages, told."""

from __future__ import annotations

import time

import optuna
from optuna.trial import FrozenTrial, TrialState

from .evolution import FINISHED, PAIRED_MARGIN
from .fitness import Fitness
from .space import Space
from .strategies import ask_schedule

_COPIED = ("errors", "evaluation", "mse")  # what a repeat takes over


def evaluate_next(study: optuna.Study, space: Space, fitness: Fitness) -> None:
    """Ask a study for a candidate, evaluate it, and tell the study.

    A candidate is evaluated on more and more samples, and dropped where its paired error is clearly above that of the best
    as cheap as it (successive halving over samples); one that the study has seen before takes over what was found then.
    The trial remembers the schedule's text, its cost, the errors of its stages, the evaluation, seconds, and MACs spent.
    """
    began, before = time.monotonic(), fitness.macs
    trial, schedule = ask_schedule(study, space)
    spent = space.spent(schedule)
    trial.set_user_attr("spent", spent)

    def finish(state: TrialState, rfid: float | None = None) -> None:
        trial.set_user_attr("macs", fitness.macs - before)
        trial.set_user_attr("seconds", time.monotonic() - began)
        values = None if rfid is None else [rfid, spent][: len(study.directions)]
        study.tell(trial, values, state=state)

    if known := _same(study, str(schedule)):
        for key in known.user_attrs.keys() & set(_COPIED):
            trial.set_user_attr(key, known.user_attrs[key])
        return finish(known.state, known.values and known.values[0])
    latents, errors = None, []
    for stage, count in enumerate(fitness.stages):
        latents = fitness.sample(schedule, count, latents)
        errors.append(fitness.error(latents))
        trial.set_user_attr("errors", errors)
        if errors[-1] > _limit(study, stage, spent):
            return finish(TrialState.PRUNED)
    evaluation = fitness.evaluate(latents)
    trial.set_user_attr("evaluation", vars(evaluation))
    trial.set_user_attr("mse", evaluation.mse)
    return finish(TrialState.COMPLETE, evaluation.rfid)


def _same(study: optuna.Study, text: str) -> FrozenTrial | None:
    finished = study.get_trials(deepcopy=False, states=FINISHED)
    return next((trial for trial in finished if trial.user_attrs["schedule"] == text), None)


def _limit(study: optuna.Study, stage: int, spent: float) -> float:
    """Return the paired error beyond which a schedule is dropped at a stage: of the best that costs no more, and a margin."""
    judged = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(study.directions) > 1:  # on a front the cheap are not measured by the dear
        judged = [trial for trial in judged if trial.user_attrs["spent"] <= spent]
    return PAIRED_MARGIN * min((trial.user_attrs["errors"][stage] for trial in judged), default=float("inf"))
