"""Schedules whose full steps run at noise levels of their own, not at those of the teacher's steps.

The full steps are spread evenly over the run's steps, so that every stretch between two of them has extrapolated steps whose
blend can be fitted, and run at any noise levels between the teacher's first and its last: with a fitted blend in every
stretch this is a linear multistep solver with coefficients and a grid of its own. Where to begin: the grid of Karras et al.
(2022), Eq. 5, for several rho.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch

from ..schedule.kinds import StepKind
from ..schedule.schedule import Schedule
from ..schedule.segment import Segment


def karras_levels(sigmas: Sequence[float], count: int, rho: float) -> list[float]:
    """Return `count` noise levels from a run's first to that of its last step.

    Args:
        sigmas: of the run [n + 1].
        count: of levels, at least 1.
        rho: 1 spaces them evenly; the larger, the denser at the low end.
    """
    high, low = (sigma ** (1 / rho) for sigma in (sigmas[0], sigmas[-2]))
    return [float((high + u * (low - high)) ** rho) for u in np.linspace(0, 1, count)]


def even_edges(steps: int, parts: int) -> list[int]:
    """Return where each of the parts of a run begins, and the end: as equal as whole steps allow."""
    return [round(i * steps / parts) for i in range(parts + 1)]


def at_levels(levels: Sequence[float], sigmas: Sequence[float]) -> Schedule:
    """Return full steps at noise levels, spread evenly over a run's steps, with extrapolated steps between them.

    These lie evenly in log sigma between two full steps, and evenly in sigma behind the last one.

    Args:
        levels: of the full steps, falling; the first is the run's.
        sigmas: of the run [n + 1].
    """
    steps, count, levels = len(sigmas) - 1, len(levels), [*map(shortest, levels)]
    edges = even_edges(steps, count)
    grid: list[float] = []
    for (start, stop), high, low in zip(pairwise(edges), levels, [*levels[1:], None], strict=True):
        shares = [i / (stop - start) for i in range(stop - start)]
        grid += [high * (low / high) ** u if low else high + u * (sigmas[-1] - high) for u in shares]
    segments = (Segment((StepKind.FULL, *(StepKind.EXTRAPOLATED,) * (stop - start - 1))) for start, stop in pairwise(edges))
    return Schedule(tuple(segments), sigmas=(*map(shortest, grid), shortest(sigmas[-1])))


def full_levels(schedule: Schedule) -> list[float]:
    """Return the noise levels of the full steps of a schedule that has its own."""
    return [sigma for sigma, step in zip(schedule.sigmas, schedule.steps(), strict=False) if step.kind.is_full]


def with_level(schedule: Schedule, at: int, level: float) -> Schedule:
    """Return a schedule with a full step at another noise level, and the steps on both sides spread as they were.

    Args:
        schedule: with its own noise levels.
        at: number of the step; not the first.
        level: between those of the full steps beside it.

    Raises:
        ScheduleError: no float lies between two of its steps any more.
    """
    levels, full = list(schedule.sigmas), [i for i, step in enumerate(schedule.steps()) if step.kind.is_full]
    before, after = max(i for i in full if i < at), min((i for i in full if i > at), default=None)
    old = levels[at]
    for i in range(before + 1, at):
        levels[i] = _between(levels[before], level, _share(levels[before], old, levels[i]))
    for i in range(at + 1, len(schedule) if after is None else after):
        if after is None:  # down to the run's end
            levels[i] = levels[-1] + (levels[i] - levels[-1]) * (level - levels[-1]) / (old - levels[-1])
        else:
            levels[i] = _between(level, levels[after], _share(old, levels[after], levels[i]))
    levels[at] = level
    return replace(schedule, sigmas=tuple(map(shortest, levels)))


def shortest(level: float) -> float:
    """Return a noise level as the shortest number that a run's 32 bits hold alike."""
    return float(str(np.float32(level)))


def resampled(sigmas: torch.Tensor, steps: int) -> torch.Tensor:
    """Return a grid [steps + 1] with the ends of another [n + 1] and its shape: evenly spread places on it, in log sigma.

    A last 0 stays beside the levels, as in the host's own grids.
    """
    levels = sigmas[:-1] if sigmas[-1] == 0 else sigmas
    count = steps if sigmas[-1] == 0 else steps + 1
    places = torch.linspace(0, len(levels) - 1, count, dtype=torch.float64)
    logs, low = levels.double().log(), places.floor().long()
    high = (low + 1).clamp(max=len(levels) - 1)
    grid = torch.lerp(logs[low], logs[high], places - low).exp().float()
    return torch.cat([grid, torch.zeros(1)]) if sigmas[-1] == 0 else grid


def _share(high: float, low: float, level: float) -> float:
    return float(np.log(level / high) / np.log(low / high))


def _between(high: float, low: float, share: float) -> float:
    return high * (low / high) ** share
