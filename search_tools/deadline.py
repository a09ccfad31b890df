"""The time that a command may take, one value that is handed to all that it does; and how long what is left of it will take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from flexi_core.tune import SampleProgress

Clock = Callable[[], float]  # seconds, from any moment on

FEWEST = 4  # samples that anything is compared on
_CLEARLY = 0.1  # of what a piece of work may take: as much is seen of it before it is broken off
_SLACK = 1.25  # times what was measured is planned for: what comes later may be slower
_MOST_JUDGING = 0.4  # of the time is kept free for more than the fewest samples


class TooSlow(Exception):
    """Work that was begun would take longer than the time that there is for it.

    Args:
        share: of the work that would have been done in that time.
        done: share of it that was timed.
        seconds: that this took.
    """

    def __init__(self, share: float, done: float, seconds: float) -> None:
        super().__init__(f"{share:.0%} of the work could be done in time")
        self.share, self.done, self.seconds = share, done, seconds


class Deadline:
    """When a command has to be done, from its beginning on.

    Args:
        minutes: for everything that the command does; None for no end.
        judging: what follows the search: full runs of one sample, of as many samples as are to be judged.
        samples: to be judged.
        clock: in seconds.
    """

    def __init__(
        self,
        minutes: float | None = None,
        judging: Callable[[int], float] = lambda samples: 0.0,
        samples: int = 0,
        clock: Clock = time.monotonic,
    ) -> None:
        self.seconds = math.inf if minutes is None else 60 * minutes
        self.clock = clock
        self.earlier = 0.0  # seconds that earlier commands spent on the same study
        self._judging, self._samples, self._began = judging, samples, clock()
        self._least = min(samples, FEWEST)
        self._measured, self._full_runs, self._slowest = 0.0, 0.0, 0.0

    @property
    def past(self) -> float:
        """Seconds since the command began."""
        return self.clock() - self._began

    @property
    def full_run(self) -> float:
        """Seconds of a full run of one sample, as measured, and some slack; 0 where nothing was measured."""
        return _SLACK * max(self._measured / self._full_runs, self._slowest) if self._full_runs else 0.0

    def measure(self, seconds: float, full_runs: float) -> None:
        """Take note of how long sampling took.

        Args:
            seconds: that it took.
            full_runs: of one sample, that it was worth.
        """
        if full_runs > 0:
            self._measured, self._full_runs = self._measured + seconds, self._full_runs + full_runs
            self._slowest = seconds / full_runs  # of late: a machine may get other work

    @property
    def to_search(self) -> float:
        """Seconds left for the search: the study's earlier ones count, and the judging's are kept free."""
        judging = 0.0
        if self.full_run and math.isfinite(self.seconds):
            whole, least = (self._judging(samples) * self.full_run for samples in (self._samples, self._least))
            judging = max(min(whole, _MOST_JUDGING * self.seconds), least)
        return self.seconds - self.earlier - self.past - judging

    def leaves(self, full_runs: float) -> bool:
        """Whether there is time for so much sampling, in full runs of one sample, and the least judging after it."""
        judging = self._judging(self._least)
        return (full_runs + judging) * self.full_run <= self.seconds - self.earlier - self.past

    def judged_samples(self) -> int:
        """Return how many samples can be judged in what is left of the command's time: at least `FEWEST`."""
        room, count = self.seconds - self.past, self._samples
        while count > FEWEST and self._judging(count) * self.full_run > room:
            count -= 1
        return count

    def watched(self, progress: SampleProgress, seconds: float) -> SampleProgress:
        """Return a progress that breaks work off as soon as it is clear that it will take longer than so many seconds.

        Raises:
            TooSlow: from the progress, out of the work.
        """
        began, first = self.clock(), None

        def watch(done: int, total: int) -> None:
            nonlocal first
            progress(done, total)
            past = self.clock() - began
            if not 0 < done < total:
                return
            # What comes before the first word of it, a model that is loaded, comes once.
            before, had = first or (0.0, 0)
            if (first or past > seconds) and done > had and past > _CLEARLY * seconds:
                each = (past - before) / (done - had)
                if past + (total - done) * each > seconds:
                    raise TooSlow(max(done + (seconds - past) / each, 0.0) / total, (done - had) / total, past - before)
            first = first or (past, done)

        return watch

    def part(self, share: float) -> Deadline:
        """Return a deadline within this one: a share of the time that is left for the search, and nothing judged."""
        inner = Deadline(None, clock=self.clock)
        inner.seconds = self.to_search * share
        inner._measured, inner._full_runs, inner._slowest = self._measured, self._full_runs, self._slowest
        return inner
