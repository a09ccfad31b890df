"""The first population: what full runs of the teacher, or sensitivities, say is best; found once for a study, kept in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import optuna

from flexi_core.errors import FlexiError, ScheduleError
from flexi_core.schedule.schedule import Schedule
from flexi_core.tune import Planned, Tuner, nearest

from ..backends.protocol import Backend
from ..backends.teacher import SEARCH_SEEDS
from ..deadline import Deadline, TooSlow
from ..space.space import Space
from ..study.storage import storage_errors
from .sensitivity import Sensitivities, measure_sensitivities

Said = Callable[[str, int, int], None]  # what is done, the work done and the work in all

_TUNED = "flexi:tuned"  # of the study
_SENSITIVITIES = "flexi:sensitivities"
_SECONDS = "flexi:sensitivity_seconds"  # of either
_FRONT = (1.0, 0.75, 0.55, 0.4, 0.3, 0.2)  # shares of the budget for which a front is given guesses
_LEAST_STEPS = 8  # in shorter runs there is nothing between the places that are measured
_MOST = 0.25  # of the time that is left
_FULL_RUNS = "full runs"  # as a tuner calls them
_EACH_RUN = 1.5  # full runs for each that tuning is on: there is an accelerated run, too
_BESIDE = (0, 1, -1, -2)  # full steps more than the budget's, of the schedules that guesses are made of


@dataclass(frozen=True)
class TunedFront:
    """The best schedules by number of full steps, as some of the teacher's runs tell.

    Args:
        planned: from few full steps to many; none where there was no time.
        full_runs: that it took.
    """

    planned: tuple[Planned, ...]
    full_runs: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        planned = [{"schedule": str(p.schedule), "full": p.full, "predicted_db": p.predicted_db} for p in self.planned]
        return {"front": planned, "full_runs": self.full_runs}

    @classmethod
    def from_dict(cls, values: Any, steps: int) -> TunedFront:
        """Return what `as_dict` gave.

        Args:
            values: of the study.
            steps: of the run.

        Raises:
            FlexiError: they are not that.
        """
        try:
            planned = [Planned(Schedule.parse(p["schedule"]), p["full"], float(p["predicted_db"])) for p in values["front"]]
            front = cls(tuple(planned), float(values["full_runs"]))
        except (TypeError, KeyError, ValueError, AttributeError, ScheduleError) as error:
            raise FlexiError(f"the study's tuned schedules cannot be read ({error}); give another --study") from error
        for p in planned:
            if len(p.schedule) != steps or p.schedule.letters.count("F") != p.full:
                raise FlexiError(f"the study's tuned schedules are not of a run of {steps} steps; give another --study")
        return front


def with_guesses(
    study: optuna.Study,
    backend: Backend,
    space: Space,
    count: int,
    progress: Said = lambda name, done, total: None,
    *,
    samples: int = 8,
    deadline: Deadline | None = None,
    tuned: TunedFront | None = None,
) -> Space:
    """Return a space whose seeds begin with the schedules of least predicted error.

    They come from full runs of the teacher (`flexi_core.tune`), or from sensitivities: of samplers that ask the network several
    times a step, of windows, and where guidance is reused.

    Args:
        study: keeps what was measured, so that a resumed search and other workers start from the same guesses.
        backend: samples.
        space: of the search; one without segments of any length has no guesses.
        count: of guesses; 0 measures nothing.
        progress: called with what is done, the work done and the work in all.
        samples: full runs that guesses come from.
        deadline: of what it leaves for the search a quarter is spent at most; where that is not enough there are no guesses.
        tuned: the front of the teacher's runs, where it is known.
    """
    if not count or "free" not in space.families or space.steps < _LEAST_STEPS:
        return space
    if not study.user_attrs.keys() & {_TUNED, _SENSITIVITIES}:
        _measure(study, backend, space, progress, samples, deadline or Deadline(), tuned)
    known = study.user_attrs  # the same for all workers
    if _SENSITIVITIES not in known:
        planned = TunedFront.from_dict(known[_TUNED], space.steps).planned
        return replace(space, guesses=_at_costs(space, count, lambda each, most: _near(each, most, planned)))
    sensitivities = Sensitivities.from_dict(known[_SENSITIVITIES])
    if not all(math.isfinite(stretch.error) for stretch in sensitivities.stretches):
        return space  # a run that diverges tells nothing of its neighbours
    return replace(space, guesses=_at_costs(space, count, sensitivities.plan))


def tuned_front(
    backend: Backend, samples: int, progress: Said = lambda name, done, total: None, deadline: Deadline | None = None
) -> TunedFront | None:
    """Return the best schedules by number of full steps, as some of the teacher's runs tell; None where they tell nothing.

    Args:
        backend: samples.
        samples: full runs.
        progress: called with what is done, the work done and the work in all.
        deadline: of what it leaves for the search a quarter is spent at most: else on one full run, or on none.
    """
    deadline = deadline or Deadline()
    for count in dict.fromkeys((min(samples, backend.most_fitted or samples), 1)):
        room = _MOST * deadline.to_search
        if _EACH_RUN * count * deadline.full_run > room:
            continue
        try:
            tuner = Tuner(backend, count, SEARCH_SEEDS, _measuring(progress, deadline, room))
            return TunedFront(tuple(tuner.front()), tuner.full_runs)
        except TooSlow:
            continue
        except FlexiError:
            return None
    return TunedFront(())


def measuring_seconds(study: optuna.Study) -> float:
    """Return the time that measuring took."""
    return study.user_attrs.get(_SECONDS, 0.0)


def measuring_macs(study: optuna.Study, full_run: float) -> float:
    """Return the MACs that measuring took.

    Args:
        study: of the search.
        full_run: MACs of a full run of one sample.
    """
    known = study.user_attrs
    if _SENSITIVITIES in known:
        return Sensitivities.from_dict(known[_SENSITIVITIES]).macs
    return known[_TUNED]["full_runs"] * full_run if _TUNED in known else 0.0


def _measure(
    study: optuna.Study,
    backend: Backend,
    space: Space,
    progress: Said,
    samples: int,
    deadline: Deadline,
    tuned: TunedFront | None,
) -> None:
    """Measure what guesses come from; the study keeps it."""
    began, sensitivities = deadline.clock(), None
    if tuned is None and not space.reuse_guidance:
        tuned = tuned_front(backend, samples, progress, deadline)
    if tuned is None:
        watched = deadline.watched(lambda done, total: progress("sensitivities", done, total), _MOST * deadline.to_search)
        try:
            sensitivities = measure_sensitivities(backend, ("X", "f") if space.reuse_guidance else ("X",), progress=watched)
        except TooSlow:
            tuned = TunedFront(())
    with storage_errors(f"the study {study.study_name!r} cannot keep what its guesses come from"):
        study.set_user_attr(_SECONDS, deadline.clock() - began)
        if sensitivities is None:
            study.set_user_attr(_TUNED, tuned.as_dict())
        else:
            study.set_user_attr(_SENSITIVITIES, sensitivities.as_dict())


def _measuring(progress: Said, deadline: Deadline, room: float) -> Said:
    """Return a tuner's progress that times its full runs, and breaks off those that will take more than `room` seconds."""
    watched = deadline.watched(lambda done, total: progress(_FULL_RUNS, done, total), room)
    at, before = deadline.clock(), 0

    def said(name: str, done: int, total: int) -> None:
        nonlocal at, before
        if name != _FULL_RUNS:
            return progress(name, done, total)
        now = deadline.clock()
        deadline.measure(now - at, done - before)
        at, before = now, done
        return watched(done, total)

    return said


def _near(space: Space, count: int, front: Sequence[Planned]) -> list[Schedule]:
    """Return the front's schedule for a space's budget, and those beside it with as many full steps as the budget holds."""
    if not front:
        return []
    full = nearest(front, space.full_steps).full
    by_full = {planned.full: planned.schedule for planned in front}
    beside = [by_full[full + more] for more in _BESIDE if full + more in by_full]
    return list(dict.fromkeys(space.filled(space.repaired(schedule)) for schedule in beside))[:count]


def _at_costs(space: Space, count: int, plan: Callable[[Space, int], Sequence[Schedule]]) -> tuple[Schedule, ...]:
    """Return a plan's schedules for a space; for a front, some at several costs."""
    if not space.front:
        return tuple(plan(space, count))
    shares = [share for share in _FRONT if space.budget * share >= 2 + len(space.cuts)]
    cheaper = [replace(space, speedup=space.speedup / share, front=False) for share in shares]
    return tuple(guess for each in cheaper for guess in plan(each, max(1, count // 3)))
