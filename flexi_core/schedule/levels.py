"""Noise levels of a run and of a schedule: whether they are one grid, and which part of a longer one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import ScheduleError
from .schedule import SMALLEST_GAP, Schedule, falls

# Samplers that convert sigma to their own time and back return it with rounding noise of this relative size.
SIGMA_TOLERANCE = 1e-4
TOP_TOLERANCE = 1e-3  # of a model's top noise level: a run that begins below it is a window


def window_of(schedule: Schedule, sigmas: Sequence[float], top: float | None) -> int | None:
    """Return the number of the schedule's step that a run begins with which is a window of a longer one; None where it is none.

    With the teacher's sigma grid in the schedule's file, a window is a run on a stretch of that grid. Without it, one that does
    not begin at the model's top begins late, and one that does not end at 0 ends early; where both are so, it is taken from
    the middle.

    Args:
        schedule: with more steps than the run.
        sigmas: the run's noise levels [n + 1].
        top: the model's highest noise level, where it is known.
    """
    n, grid = len(sigmas) - 1, schedule.teacher_sigmas
    left = len(schedule) - n
    if left <= 0:
        return None
    if grid is not None:
        return next((i for i in range(left + 1) if same_grid(grid[i : i + n + 1], sigmas)), None)
    if top is None:
        return None
    begins, ends = sigmas[0] >= top * (1 - TOP_TOLERANCE), sigmas[-1] == 0
    if begins:
        return None if ends else 0
    return left if ends else left // 2


def check_levels(sigmas: Sequence[float]) -> None:
    """Refuse what is no run from noise to a picture.

    Args:
        sigmas: noise levels [n + 1].

    Raises:
        ScheduleError: the run has no step, or its sigmas do not fall.
    """
    if len(sigmas) < 2:
        raise ScheduleError(f"the run has {max(len(sigmas) - 1, 0)} steps; a schedule needs at least one")
    if not all(math.isfinite(s) for s in sigmas) or not falls(sigmas):
        raise ScheduleError("the run's sigmas do not fall from step to step; a schedule fits denoising runs only")


def same_grid(a: Sequence[float], b: Sequence[float]) -> bool:
    """Return whether two sigma grids are one, up to rounding."""
    return len(a) == len(b) and all(map(_same_level, a, b))


def between_ends(levels: Sequence[float], sigmas: Sequence[float]) -> tuple[float, ...] | None:
    """Return a schedule's noise levels with the very ends of a run's; None where they do not begin and end alike."""
    grid = (sigmas[0], *levels[1:-1], sigmas[-1])
    alike = _same_level(levels[0], sigmas[0]) and _same_level(levels[-1], sigmas[-1])
    return grid if alike and falls(grid, SMALLEST_GAP) else None


def _same_level(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-6)
