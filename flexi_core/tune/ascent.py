"""The noise levels of a schedule's full steps, moved one after the other towards less error.

Coordinate ascent (AutoDiffusion, 2023, and BudCache, 2026, move the steps that run too): each full step's noise level is tried
nearer to that of the full step after it or before it, from the end of the run, where a move leaves most of the run as it was;
the steps between them go along.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..errors import ScheduleError
from ..schedule.schedule import Schedule
from .levels import shortest, with_level

FIRST_STRIDE, LEAST_STRIDE = 0.25, 0.03  # of the way to the next full step


class LevelAscent:
    """The tries of a coordinate ascent, each to be answered with `tell` before the next.

    Each full step has a stride of its own, a share of the way to the full step beside it in log sigma: half as long after
    both directions failed, and the direction that succeeded is tried first the next time.

    Args:
        schedule: whose full steps are moved.
        sigmas: the teacher's noise levels [n + 1], where it runs if the schedule has none of its own.
        psnr_db: of the schedule at its own places, by stage.
    """

    def __init__(self, schedule: Schedule, sigmas: list[float], psnr_db: list[float]) -> None:
        self.schedule, self.psnr_db = schedule, psnr_db
        if schedule.sigmas is None:
            self.schedule = replace(schedule, sigmas=tuple(map(shortest, sigmas)))
        self.has_moved = False
        self._full = [i for i, step in enumerate(schedule.steps()) if step.kind.is_full]
        self._strides = {at: FIRST_STRIDE for at in self._full[:0:-1]}
        self._directions = dict.fromkeys(self._strides, 1)
        self._tried: Schedule | None = None

    @property
    def most(self) -> int:
        """How many tries there are where none succeeds, and where as many do: an estimate."""
        halvings = math.ceil(math.log2(FIRST_STRIDE / LEAST_STRIDE))
        return 2 * (halvings + 1) * len(self._strides)

    def __iter__(self) -> Iterator[Schedule]:
        while any(stride >= LEAST_STRIDE for stride in self._strides.values()):
            for at in [at for at, stride in self._strides.items() if stride >= LEAST_STRIDE]:
                for direction in (self._directions[at], -self._directions[at]):
                    before = self.schedule
                    try:
                        self._tried = with_level(before, at, self._level(at, direction))
                    except ScheduleError:  # no float lies between it and the next
                        continue
                    yield self._tried
                    if self.schedule is not before:
                        self._directions[at] = direction
                        break
                else:
                    self._strides[at] /= 2

    def _level(self, at: int, direction: int) -> float:
        """Return a full step's noise level one stride on: down the run, or up."""
        levels, i = self.schedule.sigmas, self._full.index(at)
        beside = i + direction
        other = levels[self._full[beside]] if beside < len(self._full) else max(levels[-1], levels[at] / 4)
        return shortest(levels[at] * (other / levels[at]) ** self._strides[at])

    def tell(self, psnr_db: list[float]) -> None:
        """Take what the last try reached; one that is better at every stage is gone on from."""
        if len(psnr_db) == len(self.psnr_db) and all(a > b for a, b in zip(psnr_db, self.psnr_db, strict=True)):
            self.schedule, self.psnr_db, self.has_moved = self._tried, psnr_db, True


class PlaceAscent:
    """The tries of an ascent in the places of the full steps, each to be answered with `tell` before the next.

    Each full step but the first is tried one step later and one earlier, from the end of the run, over and over until none of
    them is better elsewhere.

    Args:
        schedule: full and extrapolated steps.
        psnr_db: of it, by stage.
        fixed: steps that stay full.
    """

    def __init__(self, schedule: Schedule, psnr_db: list[float], fixed: Sequence[int] = ()) -> None:
        self.schedule, self.psnr_db, self._fixed = schedule, psnr_db, tuple(fixed)
        self._tried = schedule
        self._known = {schedule.letters}

    def __iter__(self) -> Iterator[Schedule]:
        before = None
        while before is not self.schedule:
            before = self.schedule
            for number in range(1, before.letters.count("F")):
                for by in (1, -1):
                    moved = self._moved(number, by)
                    if moved is not None:
                        self._tried = moved
                        yield moved

    def _moved(self, number: int, by: int) -> Schedule | None:
        """Return the schedule with a full step, counted from the end, elsewhere; None for no room, or one that was tried."""
        letters = list(self.schedule.letters)
        at = [i for i, letter in enumerate(letters) if letter == "F"][-number]
        if not 0 < at + by < len(letters) or letters[at + by] == "F" or at in self._fixed:
            return None
        letters[at], letters[at + by] = letters[at + by], letters[at]
        text = "".join(letters)
        if text in self._known:
            return None
        self._known.add(text)
        return replace(Schedule.parse(text.replace("F", "|F").lstrip("|")), basis=self.schedule.basis)

    def tell(self, psnr_db: list[float]) -> None:
        """Take what the last try reached; one that is better at every stage is gone on from."""
        if len(psnr_db) == len(self.psnr_db) and all(a > b for a, b in zip(psnr_db, self.psnr_db, strict=True)):
            self.schedule, self.psnr_db = self._tried, psnr_db
