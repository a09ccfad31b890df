"""A search as an Optuna study: asks, evaluates, tells; interrupted and resumed at any point."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from flexi_core import __version__
from flexi_core.errors import FlexiError
from flexi_core.schedule.schedule import Schedule

from ..backends.teacher import JUDGE_SEEDS
from ..deadline import Deadline
from ..fitness import FINAL, Evaluation, Fitness
from ..measures.judge import Row
from ..settings import SearchSettings
from ..space.space import Space
from ..strategies.evolution import FINISHED
from ..strategies.guesses import measuring_seconds
from ..strategies.moving import SHARE, TRIES, best_moved, move_levels
from ..strategies.strategies import ask_schedule, directions, make_sampler
from .candidate import best_trial, check_candidates, evaluate, finalists, hold_finals, schedule_of
from .heartbeat import Heartbeat
from .storage import open_storage, shown, storage_errors

log = logging.getLogger(__name__)

_SETTINGS = "flexi:settings"
_STAGES = "flexi:stages"  # where the settings' own are too many for the time
_ENDING = "flexi:ending_seconds"  # of finals and moves so far
_MOST_RESERVED = 0.5  # of the time after the teacher: for finals and moves; those that would take longer are left out
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
    """Every candidate in order, the best, and whether the search was interrupted.

    `words` say what was left out for lack of time.
    """

    candidates: list[Candidate]
    best: Candidate | None
    interrupted: bool
    seconds: float
    words: tuple[str, ...] = ()

    def is_near(self, quality: float) -> bool:
        """Whether the best is as near to the teacher as that, PSNR in dB on the search's samples."""
        return _is_near(self.best, quality)


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
    if _STAGES in study.user_attrs and isinstance(known, Mapping):
        known = {**known, "stages": study.user_attrs[_STAGES]}
    return SearchSettings.from_dict(known)


def keep_stages(study: optuna.Study, stages: Sequence[int]) -> None:
    """Let a study have fewer samples than its settings ask for, from its first candidate on."""
    study.set_user_attr(_STAGES, list(stages))


def spent_seconds(study: optuna.Study) -> float:
    """Return the time that a study has taken so far: its guesses, candidates, finals and moves."""
    finished = study.get_trials(deepcopy=False, states=FINISHED)
    return _seconds(finished) + measuring_seconds(study) + study.user_attrs.get(_ENDING, 0.0)


def run_search(
    study: optuna.Study,
    space: Space,
    fitness: Fitness,
    *,
    deadline: Deadline | None = None,
    evaluations: int | None = None,
    on_progress: Callable[[SearchState], None] = lambda state: None,
    heartbeat: Heartbeat | None = None,
    finals: bool = True,
    quality: float | None = None,
) -> SearchResult:
    """Search until a budget is spent; one candidate is evaluated in any case.

    The only one on its study goes on where an earlier run was stopped, killed or not: the candidate that this run was at is
    drawn again, and those that follow are the same as if it had never been stopped. One of several workers leaves the
    candidates of the others alone until they fall silent.

    Args:
        study: from `open_study`; strategy and seed are those of its settings.
        space: what to search.
        fitness: how to judge.
        deadline: by which everything is done: what is left is planned from what was measured so far, and candidates end in
            time for the rest.
        evaluations: of finished candidates of the whole study, screened ones and those of other workers included.
        on_progress: called after each candidate.
        heartbeat: of this worker, where several may work on the study; None where this is the only one.
        finals: whether the best are judged on more samples in the end, and the noise levels of the very best moved.
        quality: PSNR in dB that is near enough: the search ends with the first candidate that is.

    Returns:
        all candidates of the study; after Ctrl-C those so far.

    Raises:
        FlexiError: the storage fails, and the study keeps its finished candidates; or one of these is not whole.
    """
    failed = f"the study {study.study_name!r} cannot go on"
    with storage_errors(failed, "It keeps its finished candidates; the same command goes on with it"):
        return _run(study, space, fitness, deadline or Deadline(), evaluations, on_progress, heartbeat, finals, quality)


def _run(
    study: optuna.Study,
    space: Space,
    fitness: Fitness,
    deadline: Deadline,
    evaluations: int | None,
    on_progress: Callable[[SearchState], None],
    heartbeat: Heartbeat | None,
    finals: bool,
    quality: float | None,
) -> SearchResult:
    settings = settings_of(study)
    moves = finals and settings.moves and space.moves
    interrupted, seconds, words = False, 0.0, ()
    room = _MOST_RESERVED * deadline.to_search

    def spent_share(finished: list[FrozenTrial]) -> float:
        spent = _seconds(finished)
        if heartbeat is not None:  # this worker's own share of them
            spent *= deadline.past / max(seconds, 1e-9)
        return max(spent / deadline.seconds, len(finished) / evaluations if evaluations else 0.0)

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
            left, best = deadline.to_search, best_of(study)
            on_progress(
                SearchState(len(trials), seconds, _seconds_left(len(trials), seconds / (1 + at_work), left, evaluations), best)
            )
            if trials:  # a time that the teacher has taken leaves one candidate all the same
                ending = _Ending(trials, fitness, settings, deadline, space.steps)
                if left < ending.candidate + ending.reserved(room, finals, moves):
                    break
                if evaluations is not None and len(trials) >= evaluations:
                    break
                if quality is not None and _is_near(best, quality):
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
                evaluate(study, trial, schedule, space, fitness, deadline.clock)
        if finals and not (quality is not None and _is_near(best, quality)):
            state = SearchState(len(trials), seconds, 0.0, None, moving=True)
            tries = TRIES * evaluations if evaluations else None
            words = _end(study, fitness, settings, deadline, ending, moves, tries, state, on_progress)
    except KeyboardInterrupt:
        interrupted = True
    if heartbeat is None:
        _forget_unfinished(study)
    return SearchResult(candidates_of(study), best_of(study), interrupted, seconds, words)


def _end(
    study: optuna.Study,
    fitness: Fitness,
    settings: SearchSettings,
    deadline: Deadline,
    ending: _Ending,
    moves: bool,
    tries: int | None,
    state: SearchState,
    on_progress: Callable[[SearchState], None],
) -> tuple[str, ...]:
    """Hold the finals and move noise levels in the time that there is; return what was left out, in words."""
    began, before, words = deadline.clock(), study.user_attrs.get(_ENDING, 0.0), []
    try:
        wanted = len(finalists(study, settings.finalists))
        held = hold_finals(study, fitness, settings.finalists, lambda: deadline.to_search, ending.finalist, ending.teacher)
        if held < wanted and wanted > 1:
            words.append(f"for lack of time {held or 'none'} of the {wanted} finalists met again on more samples")
        if moves:
            after = ending.result + (0.0 if held else ending.teacher)
            limit = SHARE * deadline.seconds
            tried = move_levels(
                study,
                fitness,
                tries,
                limit if math.isfinite(limit) else None,
                lambda left: on_progress(replace(state, seconds_left=left, best=best_of(study))),
                deadline.clock,
                lambda: deadline.to_search - after,
                ending.candidate,
            )
            if not tried:
                words.append("for lack of time no noise levels were moved")
    finally:
        study.set_user_attr(_ENDING, before + deadline.clock() - began)
    return tuple(words)


class _Ending:
    """How long what follows the candidates will take, in seconds, from what was measured so far.

    Args:
        finished: candidates, at least one.
        fitness: that they were evaluated by.
        settings: of the search.
        deadline: that has to be kept.
        steps: of the run.
    """

    def __init__(
        self,
        finished: Sequence[FrozenTrial],
        fitness: Fitness,
        settings: SearchSettings,
        deadline: Deadline,
        steps: int,
    ) -> None:
        judged = [trial for trial in finished if trial.state is TrialState.COMPLETE]
        # The first one's fit samples the teacher, too.
        self.candidate = max((trial.user_attrs["seconds"] for trial in judged[1:] or judged), default=0.0)
        fitted, samples = fitness.stages[0], fitness.stages[-1]
        if not deadline.full_run and judged:
            longest = max(judged, key=lambda trial: trial.user_attrs["seconds"])
            full_runs = (samples + fitted) * longest.user_attrs["spent"] / steps + (fitted if longest is judged[0] else 0)
            deadline.measure(longest.user_attrs["seconds"], full_runs)
        # Of what was evaluated in the search only the other samples are new, but for steps that reuse guidance.
        self.finalist = (2 if settings.reuse_guidance else 1) * self.candidate
        self.teacher = max(FINAL * fitness.teacher_seconds, FINAL * samples * deadline.full_run)
        # What moved noise levels come to is evaluated once more, and meets its start on the samples of the finals.
        self.result = self.candidate + (1 if settings.finalists else 2) * self.finalist
        self._finalists, self._seconds = settings.finalists, deadline.seconds

    def reserved(self, room: float, finals: bool, moves: bool) -> float:
        """Return the time to keep free for finals and moves, for those of them that there is room for."""
        if not math.isfinite(room):
            return 0.0
        counts = range(self._finalists, 1, -1) if finals else ()
        kept = next((took for took in (self.teacher + n * self.finalist for n in counts) if took <= room), 0.0)
        moving = min(SHARE * self._seconds, room - kept) if moves else 0.0
        return kept + (moving if moving > self.result + self.candidate + (0.0 if kept else self.teacher) else 0.0)


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
    return sum(trial.user_attrs.get("seconds", 0.0) for trial in finished)  # one without is refused in words


def _is_near(best: Candidate | None, quality: float) -> bool:
    return best is not None and best.evaluation.psnr_db >= quality


def _seconds_left(finished: int, seconds: float, left: float, evaluations: int | None) -> float:
    """Return the time to the first budget's end, from the mean time of a candidate so far."""
    if evaluations is not None:
        left = min(left, (evaluations - finished) * (seconds / finished if finished else 60.0))
    return left
