"""Run a search with its progress at the terminal."""

from __future__ import annotations

from math import isfinite
from typing import Any

from optuna import Study
from rich.progress import BarColumn, Progress, TextColumn

from flexi_core.replay import PredictionStore

from .. import console
from ..backend import Backend
from ..fitness import Fitness
from ..guesses import measuring_seconds, with_guesses
from ..heartbeat import GRACE, Heartbeat
from ..lock import study_lock
from ..sampler_space import left_out
from ..settings import SearchSettings
from ..space import Space
from ..storage import is_shared
from ..study import SearchResult, SearchState, open_study, run_search

PREDICTION_BYTES = 2**30


def run(
    backend: Backend,
    settings: SearchSettings,
    storage: str,
    name: str | None = None,
    *,
    minutes: float | None = None,
    evaluations: int | None = None,
    grace: float = GRACE,
    finals: bool = True,
) -> tuple[Study, Space, SearchResult]:
    """Open the study of these settings, or go on with it, until a budget of the whole study is spent.

    Args:
        backend: opened; the one that the settings describe.
        settings: of the search.
        storage: Optuna's URL.
        name: of the study; made from the settings by default.
        minutes: of evaluation time.
        evaluations: candidates.
        grace: seconds of silence after which a candidate of this process may be taken for lost, where others search too.
        finals: whether the best are judged on more samples in the end.

    Raises:
        FlexiError: another process searches the same study of an SQLite file, or the storage fails.
    """
    name = name or settings.default_name
    with study_lock(storage, name):
        study = open_study(storage, name, settings)
        heartbeat = Heartbeat(study, grace) if is_shared(storage) else None
        return study, *_run(
            study, backend, settings, minutes=minutes, evaluations=evaluations, heartbeat=heartbeat, finals=finals
        )


def _run(study: Study, backend: Backend, settings: SearchSettings, **how: Any) -> tuple[Space, SearchResult]:
    if words := left_out(backend.traits):
        console.err.print(words, highlight=False, markup=False, soft_wrap=True)
    with console.progress_bar("samples") as bar:
        space = with_guesses(
            study,
            backend,
            settings.space(backend.cost, backend.identity["sigmas"], backend.traits, backend.cuts),
            settings.guesses,
            lambda done, total: bar("sensitivities", done, total),
        )
        fitness = Fitness(
            backend,
            settings.stages,
            lambda done, total: bar("teacher", done, total),
            PredictionStore(PREDICTION_BYTES),
            settings.fit,
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
            progress.update(task, completed=done, left=left, description=f"{what}: {state.finished} candidates, best {best}")

        if how["minutes"] is not None:  # what was measured counts too; one candidate is evaluated in any case
            how["minutes"] = max(how["minutes"] - measuring_seconds(study) / 60, 1e-6)
        result = run_search(study, space, fitness, on_progress=on_progress, **how)
    return space, result
