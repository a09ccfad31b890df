"""A run as it goes on, for people who watch: each step as it begins, the time left, and what came out."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..schedule.strip import MOST_SHOWN, Strip
from ..words import shortened
from .plan import Plan
from .report import RunReport

log = logging.getLogger(__name__)

_LONGEST = 1_500  # characters of what is told under a strip
Send = Callable[[dict[str, Any]], None]


class LiveRun:
    """Tells how one run goes on. Whatever goes wrong with it, the run goes on without it.

    Args:
        send: takes what a page shows: a `Strip` as JSON has it, and `done`, how many steps have run; None at the end.
        plan: of the run; None for plain sampling, of which the end alone is told.
    """

    def __init__(self, send: Send, plan: Plan | None) -> None:
        self._send: Send | None = send
        self._kinds = [] if plan is None else [step.kind for step in plan.steps]
        self._began, self._at = time.perf_counter(), -1
        work = [0.0 if kind.is_null else kind.height for kind in self._kinds]
        self._before = [sum(work[:i]) for i in range(len(work) + 1)]

    def step(self, index: int) -> None:
        """Tell that a step begins, once for each."""
        if index != self._at:
            self._at = index
            self._tell(lambda: {**self._strip(self._words(index)).as_dict(), "done": index})

    def end(self, report: RunReport | None) -> None:
        """Tell what came out; nothing where the run did not come to its end."""
        self._tell(lambda: {**self._ended(report).as_dict(), "done": None})

    def _tell(self, message: Callable[[], dict[str, Any]]) -> None:
        if self._send is None:
            return
        try:
            self._send(message())
        except Exception:  # it is for the eye
            log.exception("Flexiffusion: a run could not be shown as it goes on")
            self._send = None

    def _strip(self, words: str, letters: str | None = None, details: str = "") -> Strip:
        letters = "".join(kind.value for kind in self._kinds) if letters is None else letters
        return Strip(letters[:MOST_SHOWN], words, shortened(details, _LONGEST))

    def _words(self, index: int) -> str:
        """Return where the run is, and how long it will take, from the time of the work that is done."""
        told = f"Step {index + 1} of {len(self._kinds)}: {self._kinds[index].label}"
        done, whole = self._before[index], self._before[-1]
        if not done:
            return told
        left = (time.perf_counter() - self._began) * (whole - done) / done
        return f"{told}, about {left:.0f} s left" if left >= 1 else f"{told}, less than 1 s left"

    def _ended(self, report: RunReport | None) -> Strip:
        if report is None:
            return self._strip("The run was stopped.")
        if not report.steps:
            return replace(self._strip(report.verdict, ""), details=shortened(" ".join(report.reasons), _LONGEST))
        details = [*report.reasons, *_macs(report), *_seconds_by_kind(report)]
        return self._strip(report.verdict, report.letters, "\n".join(details))


def _seconds_by_kind(report: RunReport) -> list[str]:
    seconds, counts = Counter(), Counter()
    for step in report.reached:
        seconds[step.ran] += step.seconds
        counts[step.ran] += 1
    parts = [f"{counts[kind]} {kind.label} {seconds[kind]:.2f} s" for kind in counts]
    other = report.seconds - sum(seconds.values())
    return [f"Seconds by kind: {', '.join(parts)}; all else {max(other, 0.0):.2f} s."]


def _macs(report: RunReport) -> list[str]:
    """Return what was saved of the network's work; counted while the sampler's node still runs, so that no report waits."""
    saved = report.speedup_macs
    return [] if saved is None else [f"{saved:.2f}x fewer MACs than all steps full."]
