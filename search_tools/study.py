"""A search as an Optuna study: asks, evaluates, tells; interrupted and resumed at any point."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from flexi_core import __version__
from flexi_core.errors import FlexiError
from flexi_core.schedule import Schedule

from .candidate import best_trial, check_candidates, evaluate, hold_finals, schedule_of
from .evolution import FINISHED
from .fitness import Evaluation, Fitness
from .heartbeat import Heartbeat
from .judge import Row
from .moving import SHARE, TRIES, best_moved, move_levels
from .settings import SearchSettings
from .space import Space
from .storage import open_storage, shown, storage_errors
from .strategies import ask_schedule, directions, make_sampler
from .teacher import JUDGE_SEEDS

log = logging.getLogger(__name__)

_SETTINGS = "flexi:settings"
_MOST_RESERVED = 0.5  # of the minutes: finals that take longer than that go beyond them
_POLL = 0.5  # seconds between two looks at the last candidates of the other workers


@dataclass(frozen=True)
class Candidate:
    """A schedule with its result; `evaluation` is None where a screen ended it."""

    schedule: Schedule
    spent: float
    evaluation: Evaluation | None


@dataclass(frozen=True)
class SearchState:
    """How far a search is; handed to the progress callback after each candidate, and each try of moving noise levels."""

    finished: int
    seconds: float
    seconds_left: float
    best: Candidate | None
    moving: bool = False


@dataclass(frozen=True)
class SearchResult:
    """Every candidate in order, the best, and whether the search was interrupted."""

    candidates: list[Candidate]
    best: Candidate | None
    interrupted: bool
    seconds: float


def open_study(storage: str, name: str, settings: SearchSettings) -> optuna.Study:
    """Return the study of a name, made where there is none.

    Raises:
        FlexiError: the storage cannot be opened, or the study was made with other settings.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    opened = open_storage(storage)
    with storage_errors(f"the study storage {shown(storage)!r} cannot be used", anything=True):
        study = optuna.create_study(
            storage=opened, study_name=name, directions=directions(settings.strategy), load_if_exists=True
        )
        known = study.user_attrs.get(_SETTINGS)
        wanted = settings.as_dict()
        if known is None:
            study.set_user_attr(_SETTINGS, wanted)
    if known is not None and known != wanted:
        changed = ", ".join(sorted(k for k in known.keys() | wanted.keys() if known.get(k) != wanted.get(k)))
        raise FlexiError(f"the study {name!r} was made with other settings ({changed}); give another --study name")
    return study


def settings_of(study: optuna.Study) -> SearchSettings:
    """Return what a study was made with.

    Raises:
        FlexiError: it is not a study of this project, or of another version of it.
    """
    known = study.user_attrs.get(_SETTINGS)
    if known is None:
        raise FlexiError(f"the study {study.study_name!r} is not one of flexi search")
    return SearchSettings.from_dict(known)


def run_search(
    study: optuna.Study,
    space: Space,
    fitness: Fitness,
    *,
    minutes: float | None = None,
    evaluations: int | None = None,
    on_progress: Callable[[SearchState], None] = lambda state: None,
    heartbeat: Heartbeat | None = None,
    finals: bool = True,
) -> SearchResult:
    """Search until a budget is spent.

    The only one on its study goes on where an earlier run was stopped, killed or not: the candidate that this run was at is
    drawn again, and those that follow are the same as if it had never been stopped. One of several workers leaves the
    candidates of the others alone until they fall silent.

    Args:
        study: from `open_study`; strategy and seed are those of its settings.
        space: what to search.
        fitness: how to judge.
        minutes: of evaluation time over the whole study, earlier runs included, and of this run's sampling of the teacher; of
            several workers, each one's own wall time.
        evaluations: of finished candidates of the whole study, screened ones and those of other workers included.
        on_progress: called after each candidate.
        heartbeat: of this worker, where several may work on the study; None where this is the only one.
        finals: whether the best are judged on more samples in the end, and the noise levels of the very best moved.

    Returns:
        all candidates of the study; after Ctrl-C those so far.

    Raises:
        FlexiError: the storage fails, and the study keeps its finished candidates; or one of these is not whole.
    """
    failed = f"the study {study.study_name!r} cannot go on"
    with storage_errors(failed, "It keeps its finished candidates; the same command goes on with it"):
        return _run(study, space, fitness, minutes, evaluations, on_progress, heartbeat, finals)


def _run(
    study: optuna.Study,
    space: Space,
    fitness: Fitness,
    minutes: float | None,
    evaluations: int | None,
    on_progress: Callable[[SearchState], None],
    heartbeat: Heartbeat | None,
    finals: bool,
) -> SearchResult:
    settings, began = settings_of(study), time.monotonic()
    moves = settings.moves and space.moves
    interrupted, seconds = False, 0.0

    def spent_seconds() -> float:
        return seconds if heartbeat is None else time.monotonic() - began

    def spent_share(finished: list[FrozenTrial]) -> float:
        of_minutes = _seconds(finished) / max(seconds, 1e-9) * spent_seconds() / (60 * minutes) if minutes else 0.0
        return max(of_minutes, len(finished) / evaluations if evaluations else 0.0)

    check_candidates(study, space)
    study.sampler = make_sampler(settings.strategy, space, settings.seed, spent_share)
    if heartbeat is None:
        _forget_unfinished(study)
    try:
        while True:
            known = study.get_trials(deepcopy=False)  # once: many workers' unfinished trials are dear to read
            at_work = 0 if heartbeat is None else heartbeat.watch(known)
            trials = [trial for trial in known if trial.state in FINISHED]
            seconds = _seconds(trials)
            minutes_left, reserved = minutes, 0.0
            if minutes is not None:
                if finals:
                    reserved = _finals_minutes(trials, fitness, settings, moves) + (SHARE * minutes if moves else 0.0)
                    reserved = min(reserved, _MOST_RESERVED * minutes)
                minutes_left -= (fitness.teacher_seconds + spent_seconds()) / 60 + reserved
            left = _seconds_left(len(trials), seconds / (1 + at_work), minutes_left, evaluations)
            on_progress(SearchState(len(trials), seconds, left + 60 * reserved, best_of(study)))
            if left <= 0 and trials:  # a budget that the teacher has spent leaves one candidate all the same
                break
            if evaluations is not None and len(trials) + at_work >= evaluations:
                time.sleep(_POLL)  # the others are at the last candidates, and one that is lost comes back
                continue
            try:
                trial, schedule = ask_schedule(study, space)
            except UpdateFinishedTrialError:  # it has no schedule yet that another worker could try again
                log.warning("drawing a candidate took too long; another worker took it for lost, and this one draws anew")
                continue
            with heartbeat.beating(trial) if heartbeat else nullcontext():
                evaluate(study, trial, schedule, space, fitness)
        if finals:
            hold_finals(study, fitness, settings.finalists)
            if moves:
                move_levels(
                    study,
                    fitness,
                    TRIES * evaluations if evaluations else None,
                    60 * SHARE * minutes if minutes else None,
                    lambda left: on_progress(SearchState(len(trials), seconds, left, best_of(study), moving=True)),
                )
    except KeyboardInterrupt:
        interrupted = True
    if heartbeat is None:
        _forget_unfinished(study)
    return SearchResult(candidates_of(study), best_of(study), interrupted, seconds)


def candidates_of(study: optuna.Study) -> list[Candidate]:
    """Return the finished candidates of a study, in order."""
    return [_candidate(trial) for trial in study.get_trials(deepcopy=False, states=FINISHED)]


def best_of(study: optuna.Study) -> Candidate | None:
    """Return the candidate of lowest rFID among those near the best paired error; where finals were held, by these.

    With moved noise levels, where that gained something.
    """
    best = best_trial(study)
    if best is None:
        return None
    moved = best_moved(study, best)
    return _candidate(best) if moved is None else Candidate(moved.schedule, moved.trial.user_attrs["spent"], moved.evaluation)


def with_results(schedule: Schedule, teacher: dict, row: Row, samples: int, study: optuna.Study, seed: int) -> Schedule:
    """Return a schedule with what its file says beside it: the teacher, what was measured on fresh seeds, provenance."""
    measured = {key: value for key, value in row.as_dict().items() if key not in ("name", "schedule", "features")}
    measured |= {"samples": samples, "first_seed": JUDGE_SEEDS, "features": row.features, "by": "flexi search"}
    provenance = {"tool": "flexiffusion", "version": __version__, "seed": seed, "study": study.study_name}
    return schedule.with_info(teacher=teacher, measured=measured, provenance=provenance)


def _candidate(trial: FrozenTrial) -> Candidate:
    measured = trial.user_attrs.get("evaluation")
    return Candidate(
        schedule_of(trial),
        trial.user_attrs["spent"],
        Evaluation(**measured) if measured else None,
    )


def _forget_unfinished(study: optuna.Study) -> None:
    """Fail the candidates of a run that was interrupted or killed; they are drawn again."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)


def _seconds(finished: list[FrozenTrial]) -> float:
    return sum(trial.user_attrs["seconds"] for trial in finished)


def _finals_minutes(finished: list[FrozenTrial], fitness: Fitness, settings: SearchSettings, moves: bool) -> float:
    """Return the time that the finals will take: their samples are twice as many, and so are the teacher's.

    What noise levels moved come to is evaluated once more, and meets its start there. Of what was evaluated in the search
    only the other half of the samples is new, but for steps that reuse guidance.
    """
    judged = [trial.user_attrs["seconds"] for trial in finished if trial.state is TrialState.COMPLETE]
    longest = max(judged, default=0.0)  # without predictions to take over
    new = 2 if settings.reuse_guidance else 1
    evaluated = new * settings.finalists + moves * (2 * new if settings.finalists else 3 * new)
    return (evaluated * longest + fitness.teacher_seconds * (evaluated > 0)) / 60


def _seconds_left(finished: int, seconds: float, minutes_left: float | None, evaluations: int | None) -> float:
    """Return the time to the first budget's end, from the mean time of a candidate so far."""
    left = float("inf")
    if minutes_left is not None:
        left = minutes_left * 60
    if evaluations is not None:
        left = min(left, (evaluations - finished) * (seconds / finished if finished else 60.0))
    return left
