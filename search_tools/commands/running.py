"""Run a search with its progress at the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any

from optuna import Study
from rich.progress import BarColumn, Progress, TextColumn

from flexi_core.run.replay import PredictionStore
from flexi_core.tune import SampleProgress

from .. import console
from ..backends.protocol import Backend
from ..deadline import FEWEST, Deadline, TooSlow
from ..fitness import Fitness, stages_to
from ..settings import SearchSettings
from ..space.sampler_space import left_out
from ..space.space import Space
from ..strategies.evolution import FINISHED
from ..strategies.guesses import TunedFront, with_guesses
from ..study.heartbeat import GRACE, Heartbeat
from ..study.lock import study_lock
from ..study.storage import is_shared
from ..study.study import SearchResult, SearchState, keep_stages, open_study, run_search, settings_of, spent_seconds

PREDICTION_BYTES = 2**30
_TEACHER = 0.4  # of the time that is left for the search its teacher's samples may take; else there are fewer of them


def run(
    backend: Backend,
    settings: SearchSettings,
    storage: str,
    name: str | None = None,
    *,
    deadline: Deadline | None = None,
    evaluations: int | None = None,
    grace: float = GRACE,
    finals: bool = True,
    quality: float | None = None,
    tuned: TunedFront | None = None,
) -> tuple[Study, Space, SearchResult]:
    """Open the study of these settings, or go on with it, until a budget of the whole study is spent.

    Args:
        backend: opened; the one that the settings describe.
        settings: of the search.
        storage: Optuna's URL.
        name: of the study; made from the settings by default.
        deadline: by which everything is done; what earlier commands spent on the study counts, where no others search it.
        evaluations: candidates.
        grace: seconds of silence after which a candidate of this process may be taken for lost, where others search too.
        finals: whether the best are judged on more samples in the end.
        quality: PSNR in dB that is near enough: the search ends with the first candidate that is.
        tuned: the front of the teacher's runs, where it is known.

    Raises:
        FlexiError: another process searches the same study of an SQLite file, or the storage fails.
    """
    name = name or settings.default_name
    with study_lock(storage, name):
        study = open_study(storage, name, settings)
        heartbeat = Heartbeat(study, grace) if is_shared(storage) else None
        deadline = deadline or Deadline()
        if heartbeat is None:
            deadline.earlier += spent_seconds(study)
        how = {"evaluations": evaluations, "heartbeat": heartbeat, "finals": finals, "quality": quality}
        return study, *_run(study, backend, settings_of(study), deadline, tuned, **how)


def say(words: str) -> None:
    """Tell the user something on stderr."""
    console.err.print(words, highlight=False, markup=False, soft_wrap=True)


def _run(
    study: Study, backend: Backend, settings: SearchSettings, deadline: Deadline, tuned: TunedFront | None, **how: Any
) -> tuple[Space, SearchResult]:
    if words := left_out(backend.traits):
        say(words)
    lines = console.ProgressLines(deadline.clock)
    with console.progress_bar("samples", lines) as bar:
        fitness = _fitness(study, backend, settings, deadline, bar, alone=how["heartbeat"] is None)
        space = with_guesses(
            study,
            backend,
            settings.space(backend.cost, backend.identity["sigmas"], backend.traits, sorted({*backend.cuts, *backend.starts})),
            settings.guesses,
            bar,
            samples=fitness.stages[0],
            deadline=deadline,
            tuned=tuned,
        )
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]} left"))
    with Progress(*columns, console=console.err, transient=True) as progress:
        task = progress.add_task("search", total=1.0, left="?")

        def on_progress(state: SearchState) -> None:
            best = (
                f"rFID {state.best.evaluation.rfid:.3g}, {state.best.evaluation.psnr_db:.1f} dB" if state.best else "none yet"
            )
            what = "moving noise levels" if state.moving else "search"
            done = state.seconds / max(state.seconds + state.seconds_left, 1e-9)
            left = f"{max(state.seconds_left, 0):.0f} s" if isfinite(state.seconds_left) else "?"
            described = f"{what}: {state.finished} candidates, best {best}"
            progress.update(task, completed=done, left=left, description=described)
            if not console.err.is_terminal:
                lines.say(lambda: f"{described}, {left} left")

        result = run_search(study, space, fitness, deadline=deadline, on_progress=on_progress, **how)
    if result.words:
        say("; ".join(result.words) + ": more --minutes give it more")
    return space, result


def _fitness(
    study: Study,
    backend: Backend,
    settings: SearchSettings,
    deadline: Deadline,
    bar: Callable[[str, int, int], None],
    alone: bool,
) -> Fitness:
    """Return what candidates are judged by: on fewer samples where the teacher's own would take too long."""

    def made(stages: Sequence[int], progress: SampleProgress) -> Fitness:
        told = {"fit": settings.fit, "clock": deadline.clock}
        return Fitness(backend, stages, progress, PredictionStore(PREDICTION_BYTES), **told)

    def progress(done: int, total: int) -> None:
        nonlocal sampled
        sampled = True
        bar("teacher", done, total)

    stages, wanted, sampled = settings.stages, settings.samples, False
    room = _TEACHER * deadline.to_search
    try:
        begun = not alone or study.get_trials(deepcopy=False, states=FINISHED)
        fitness = made(stages, progress if begun else deadline.watched(progress, room))
    except TooSlow as slow:
        deadline.measure(slow.seconds, slow.done * wanted)
        count = min(wanted, _fewer(settings, deadline, int(wanted * slow.share)))
        say(f"for lack of time candidates are compared on {count} samples, not on {wanted}: give more --minutes")
        keep_stages(study, stages_to(count))
        fitness = made(stages_to(count), progress)
    if sampled:
        deadline.measure(fitness.teacher_seconds, fitness.stages[-1])
    return fitness


def _fewer(settings: SearchSettings, deadline: Deadline, most: int) -> int:
    """Return how many samples a candidate can be compared on, so that one is evaluated and judged in time.

    Args:
        settings: of the search.
        deadline: that has to be kept.
        most: samples that the teacher can make in the time that there is for it.
    """
    for count in (most, settings.stages[0]):
        fitted = stages_to(count)[0] if count >= FEWEST else 0
        if FEWEST <= count <= most and deadline.leaves((count + fitted) * (1 + 1 / settings.speedup)):
            return count
    return FEWEST
