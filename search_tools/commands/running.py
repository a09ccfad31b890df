"""Run a search with its progress at the terminal."""

from __future__ import annotations

from optuna import Study
from rich.progress import BarColumn, Progress, TextColumn

from flexi_core.replay import PredictionStore

from .. import console
from ..backend import Backend
from ..fitness import Fitness
from ..settings import SearchSettings
from ..space import Space
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
) -> tuple[Study, Space, SearchResult]:
    """Open the study of these settings, or go on with it, until a budget of the whole study is spent.

    Args:
        backend: opened; the one that the settings describe.
        settings: of the search.
        storage: Optuna's URL.
        name: of the study; made from the settings by default.
        minutes: of evaluation time.
        evaluations: candidates.
    """
    study = open_study(storage, name or settings.default_name, settings)
    space = settings.space(backend.cost)
    with console.progress_bar("samples") as bar:
        fitness = Fitness(
            backend, settings.stages, lambda done, total: bar("teacher", done, total), PredictionStore(PREDICTION_BYTES)
        )
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]} left"))
    with Progress(*columns, console=console.err, transient=True) as progress:
        task = progress.add_task("search", total=1.0, left="?")

        def on_progress(state: SearchState) -> None:
            best = (
                f"rFID {state.best.evaluation.rfid:.3g}, {state.best.evaluation.psnr_db:.1f} dB" if state.best else "none yet"
            )
            done = state.seconds / max(state.seconds + state.seconds_left, 1e-9)
            left = f"{max(state.seconds_left, 0):.0f} s"
            progress.update(task, completed=done, left=left, description=f"search: {state.finished} candidates, best {best}")

        result = run_search(study, space, fitness, minutes=minutes, evaluations=evaluations, on_progress=on_progress)
    return study, space, result
