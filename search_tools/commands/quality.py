"""A search for a quality in place of a speed-up: from as many full steps as it is predicted to take, up where it is missed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from optuna import Study

from flexi_core import FlexiError
from flexi_core.tune import cheapest

from .. import console
from ..backends.protocol import Backend
from ..deadline import Deadline
from ..settings import SearchSettings
from ..strategies.guesses import TunedFront, tuned_front
from ..study.study import SearchResult
from .running import run

_SHARE = 0.5  # of the time that is left, for one number of full steps


@dataclass(frozen=True)
class Tried:
    """The search with one number of full steps.

    Args:
        full: that number.
        study: of the search.
        result: of it.
        reached: whether its best is near enough.
    """

    full: int
    study: Study
    result: SearchResult
    reached: bool

    @property
    def psnr_db(self) -> float:
        """How near its best is, on the search's samples."""
        return self.result.best.evaluation.psnr_db if self.result.best else 0.0


def run_for_quality(
    backend: Backend,
    wanted: SearchSettings,
    storage: str,
    name: str | None,
    quality: float,
    *,
    deadline: Deadline,
    **how: Any,
) -> Tried | None:
    """Search for the cheapest schedule that is so near to the teacher, with one more full step or one less at a time.

    Each number of full steps is a study of its own, that ends with the first candidate that is near enough.

    Args:
        backend: opened.
        wanted: settings of the search, but for the speed-up.
        storage: Optuna's URL.
        name: of the studies, to which the number of full steps is added; made from the settings by default.
        quality: PSNR in dB, the mean of the search's samples.
        deadline: by which everything is done.
        how: the rest is `run`'s.

    Returns:
        the cheapest that is near enough, else the nearest; None where only all steps are predicted to come so near.

    Raises:
        FlexiError: the run's sampler does not tell how many steps a quality takes, or there is no time to ask it.
    """
    with console.progress_bar("samples") as bar:
        tuned = tuned_front(backend, wanted.stages[0], bar, deadline)
    if tuned is None:
        raise FlexiError(
            f"how many steps a quality takes is not known for {backend.sampler}: that is for runs of one sampling node whose "
            "sampler asks the network once a step and is linear in its answers; give --speedup"
        )
    if not tuned.planned:
        raise FlexiError("there is no time for the full runs that tell how many steps a quality takes; give more --minutes")
    steps, first = backend.settings.steps, cheapest(tuned.planned, quality)
    if first is None:
        return None
    tried: dict[int, Tried] = {}
    full = first.full
    while full not in tried and tuned.planned[0].full <= full < steps:
        if tried and not _has_time(wanted, deadline, full / steps):
            break
        tried[full] = _try(backend, wanted, storage, name, quality, tuned, full, deadline, how)
        if tried[full].result.interrupted:
            break
        full += -1 if tried[full].reached else 1
    near = [one for one in tried.values() if one.reached]
    return min(near, key=lambda one: one.full) if near else max(tried.values(), key=lambda one: one.psnr_db)


def _try(
    backend: Backend,
    wanted: SearchSettings,
    storage: str,
    name: str | None,
    quality: float,
    tuned: TunedFront,
    full: int,
    deadline: Deadline,
    how: dict[str, Any],
) -> Tried:
    settings = replace(wanted, speedup=backend.settings.steps / full)
    part = deadline.part(_SHARE)
    own = {"deadline": part, "quality": quality, "tuned": tuned}
    study, _, result = run(backend, settings, storage, name and f"{name}, {full} full", **own, **how)
    deadline.earlier += part.earlier
    return Tried(full, study, result, result.is_near(quality))


def _has_time(wanted: SearchSettings, deadline: Deadline, cost: float) -> bool:
    """Whether a candidate of a cost, in full runs, can be evaluated in what is left."""
    return deadline.full_run * (wanted.samples + wanted.stages[0]) * cost < deadline.to_search
