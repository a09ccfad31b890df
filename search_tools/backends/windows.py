"""Schedules of a run in windows: cut into one for each, put together again, and fitted window by window."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

from flexi_core.run.null_steps.extrapolation import Observer
from flexi_core.run.plan import Plan
from flexi_core.run.replay import PredictionStore
from flexi_core.run.sampler import SamplerTraits, Solver
from flexi_core.schedule.kinds import StepKind
from flexi_core.schedule.presets import all_full
from flexi_core.schedule.schedule import Schedule
from flexi_core.tune import BlendFitter, Observed


def shares(edges: Sequence[int], steps: int) -> list[int]:
    """Return how many of another step count each window takes: in proportion, and one at least.

    Args:
        edges: where the windows begin, and the run's end.
        steps: of the other run.
    """
    windows, n = len(edges) - 1, edges[-1]
    places = [min(max(round(edge * steps / n), i), max(steps, windows) - windows + i) for i, edge in enumerate(edges)]
    return [b - a for a, b in pairwise(places)]


def cut(schedule: Schedule, edges: Sequence[int]) -> list[Schedule]:
    """Return the schedule of each window; each begins with a full step.

    Args:
        schedule: of the whole run.
        edges: where the windows begin, and the run's end.
    """
    parts: list[list] = [[] for _ in edges[1:]]
    start = 0
    for segment in schedule.segments:
        for part, low, high in zip(parts, edges[:-1], edges[1:], strict=True):
            if kinds := segment.kinds[max(low - start, 0) : max(high - start, 0)]:
                kinds = kinds if part else (StepKind.FULL, *kinds[1:])
                shallow = any(kind.is_partial for kind in kinds)
                extrapolates = StepKind.EXTRAPOLATED in kinds
                part.append(
                    replace(
                        segment,
                        kinds=kinds,
                        depth=segment.depth if shallow else None,
                        forecast=segment.forecast if shallow else 0,
                        blend=segment.blend if extrapolates else None,
                    )
                )
        start += len(segment)
    return [replace(schedule, segments=tuple(part)) for part in parts]


def joined(parts: Sequence[Schedule]) -> Schedule:
    """Return the schedule of a run from those of its windows; its basis is that of the windows which have one."""
    segments = tuple(segment for part in parts for segment in part.segments)
    basis = next((part.basis for part in parts if part.basis is not None), None)
    return replace(parts[0], segments=segments, basis=basis)


@dataclass(frozen=True)
class InWindow:
    """What follows one window of a run; the run ends with it."""

    number: int
    observe: Callable[[Plan, Solver], Observer | None]


class WindowFitter:
    """Fits the windows of a run one after the other, each from where those before it end.

    Args:
        observed: samples one batch under a schedule of the whole run, up to a window that is followed.
        sampler: what the teacher's sampler does.
        edges: where the windows begin, and the run's end.
    """

    def __init__(self, observed: Observed, sampler: SamplerTraits, edges: Sequence[int]) -> None:
        self._observed, self._edges = observed, tuple(edges)
        self._parts: list[Schedule] = []  # of the schedule that is fitted
        self._fitters = [BlendFitter(partial(self._follow, number), sampler) for number in range(len(edges) - 1)]

    def fit(
        self, schedule: Schedule, batches: Sequence[Hashable], predictions: PredictionStore | None = None
    ) -> tuple[Schedule, float]:
        """Return a schedule with fitted blends, and the MACs that its runs took; see `BlendFitter.fit`."""
        self._parts, macs = cut(schedule, self._edges), 0.0
        for number, fitter in enumerate(self._fitters):
            self._parts[number], spent = fitter.fit(self._parts[number], batches, predictions)
            macs += spent
        return joined(self._parts), macs

    def _follow(
        self,
        number: int,
        part: Schedule,
        batch: Hashable,
        observe: Callable[[Plan, Solver], Observer | None],
        predictions: PredictionStore | None,
    ) -> float:
        full = [replace(all_full(b - a), basis=part.basis) for a, b in pairwise(self._edges)]
        # A part that is all full is the teacher's; one that is fitted extrapolates.
        before = full[:number] if part.is_all_full else self._parts[:number]
        whole = joined([*before, part, *full[number + 1 :]])
        return self._observed(replace(whole, order=part.order), batch, InWindow(number, observe), predictions)
