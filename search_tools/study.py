"""A search as an Optuna study: asks, evaluates, tells; interrupted and resumed at any point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import optuna
from optuna.trial import FrozenTrial, TrialState

from flexi_core import __version__
from flexi_core.errors import FlexiError
from flexi_core.schedule import Schedule

from .candidate import evaluate_next
from .evolution import FINISHED, near_best
from .fitness import Evaluation, Fitness
from .judge import Row
from .settings import SearchSettings
from .space import Space
from .strategies import directions, make_sampler
from .teacher import JUDGE_SEEDS

_SETTINGS = "flexi:settings"


@dataclass(frozen=True)
class Candidate:
    """A schedule with its result; `evaluation` is None where a screen ended it."""

    schedule: Schedule
    spent: float
    evaluation: Evaluation | None


@dataclass(frozen=True)
class SearchState:
    """How far a search is; handed to the progress callback after each candidate."""

    finished: int
    seconds: float
    seconds_left: float
    best: Candidate | None


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
    try:
        study = optuna.create_study(
            storage=storage, study_name=name, directions=directions(settings.strategy), load_if_exists=True
        )
        known = study.user_attrs.get(_SETTINGS)
        wanted = settings.as_dict()
        if known is None:
            study.set_user_attr(_SETTINGS, wanted)
    except Exception as error:  # Optuna's storages raise their drivers' own errors
        raise FlexiError(f"the study storage {storage!r} cannot be used: {error}") from error
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
) -> SearchResult:
    """Search until a budget of the whole study is spent; what earlier runs of it spent counts.

    Args:
        study: from `open_study`; strategy and seed are those of its settings.
        space: what to search.
        fitness: how to judge.
        minutes: of evaluation time.
        evaluations: of finished candidates, screened ones included.
        on_progress: called after each candidate.

    Returns:
        all candidates of the study; after Ctrl-C those so far.
    """
    settings = settings_of(study)

    def spent_share(finished: list[FrozenTrial]) -> float:
        seconds = sum(trial.user_attrs["seconds"] for trial in finished)
        return max(seconds / (60 * minutes) if minutes else 0.0, len(finished) / evaluations if evaluations else 0.0)

    study.sampler = make_sampler(settings.strategy, space, settings.seed, spent_share)
    _forget_unfinished(study)
    interrupted, seconds = False, 0.0
    try:
        while True:
            trials = study.get_trials(deepcopy=False, states=FINISHED)
            seconds = sum(t.user_attrs["seconds"] for t in trials)
            left = _seconds_left(len(trials), seconds, minutes, evaluations)
            on_progress(SearchState(len(trials), seconds, left, best_of(study)))
            if left <= 0:
                break
            evaluate_next(study, space, fitness)
    except KeyboardInterrupt:
        interrupted = True
    _forget_unfinished(study)
    return SearchResult(candidates_of(study), best_of(study), interrupted, seconds)


def candidates_of(study: optuna.Study) -> list[Candidate]:
    """Return the finished candidates of a study, in order."""
    return [_candidate(trial) for trial in study.get_trials(deepcopy=False, states=FINISHED)]


def best_of(study: optuna.Study) -> Candidate | None:
    """Return the candidate of lowest rFID among those near the best paired error, the earlier of equals."""
    judged = near_best(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
    best = min(judged, key=lambda trial: (trial.user_attrs["evaluation"]["rfid"], trial.number), default=None)
    return None if best is None else _candidate(best)


def with_results(schedule: Schedule, teacher: dict, row: Row, samples: int, study: optuna.Study, seed: int) -> Schedule:
    """Return a schedule with what its file says beside it: the teacher, what was measured on fresh seeds, provenance."""
    measured = {key: value for key, value in row.as_dict().items() if key not in ("name", "schedule", "features")}
    measured |= {"samples": samples, "first_seed": JUDGE_SEEDS, "features": row.features, "by": "flexi search"}
    provenance = {"tool": "flexiffusion", "version": __version__, "seed": seed, "study": study.study_name}
    return schedule.with_info(teacher=teacher, measured=measured, provenance=provenance)


def _candidate(trial: FrozenTrial) -> Candidate:
    measured = trial.user_attrs.get("evaluation")
    return Candidate(
        Schedule.parse(trial.user_attrs["schedule"]),
        trial.user_attrs["spent"],
        Evaluation(**measured) if measured else None,
    )


def _forget_unfinished(study: optuna.Study) -> None:
    """Fail the candidates of a run that was interrupted or killed; they are drawn again."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)


def _seconds_left(finished: int, seconds: float, minutes: float | None, evaluations: int | None) -> float:
    """Return the time to the first budget's end, from the mean time of a candidate so far."""
    left = float("inf")
    if minutes is not None:
        left = minutes * 60 - seconds
    if evaluations is not None:
        left = min(left, (evaluations - finished) * (seconds / finished if finished else 60.0))
    return left
