"""What came of one round of a trial under load, and of several together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Outcome:
    """What one round tried and found; it is filled while the round goes on.

    Args:
        counts: how often what was done.
        broken: laws that did not hold, each in a sentence.
        figures: measured values by name, with their unit in it; of several rounds the largest is told.
    """

    counts: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def check(self, holds: bool, broken: str) -> None:
        """Note a law that does not hold."""
        if not holds:
            self.broken.append(broken)

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"counts": dict(self.counts), "broken": self.broken, "figures": self.figures}


def together(rounds: Iterable[dict[str, Any]]) -> Outcome:
    """Return the outcome of several rounds, which are given as plain values."""
    whole = Outcome()
    for found in rounds:
        whole.counts.update(found["counts"])
        whole.broken += found["broken"]
        for name, value in found["figures"].items():
            whole.figures[name] = max(value, whole.figures.get(name, value))
    return whole
