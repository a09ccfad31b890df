"""The search space: the paper's equal segments, and free placement of full steps, under a hard budget.

A budget is kept by construction and by repair, never by a penalty: every schedule that leaves this module fits it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from flexi_core.cost import NetworkCost, schedule_cost
from flexi_core.errors import FlexiError
from flexi_core.presets import from_kinds, segments_for_speedup, uniform
from flexi_core.schedule import Schedule, Segment, StepKind

FAMILIES = ("paper", "paper-x", "free")
# `paper`: equal segments, per segment branch and interval, null steps removed (Flexiffusion, arXiv 2409.17566).
# `paper-x`: the same with extrapolated null steps.
# `free`: unequal segments of one full step and extrapolated null steps.
_MAX_ORDER = 2  # cubic extrapolation amplified the network's error in every trial


@dataclass(frozen=True)
class Space:
    """All schedules of a run that cost no more than the teacher's MACs over `speedup`.

    Args:
        steps: of the run.
        speedup: the least reduction of MACs.
        cost: of the network, with the partial depths that may be used.
        families: which of `FAMILIES` to search.

    Raises:
        FlexiError: no schedule is that cheap, or a family is not known.
    """

    steps: int
    speedup: float
    cost: NetworkCost
    families: tuple[str, ...] = FAMILIES

    def __post_init__(self) -> None:
        if unknown := set(self.families) - set(FAMILIES):
            raise FlexiError(f"unknown part of the space: {', '.join(sorted(unknown))}; known: {', '.join(FAMILIES)}")
        if not 1 <= self.speedup <= self.steps:
            raise FlexiError(f"a speed-up of {self.speedup} is asked of {self.steps} steps; possible are 1 to {self.steps}")

    @property
    def budget(self) -> float:
        """The cost that a schedule may have, in full steps."""
        return self.steps / self.speedup + 1e-9

    @property
    def full_steps(self) -> int:
        """How many full steps the budget holds."""
        return int(self.budget)

    @property
    def depths(self) -> tuple[int, ...]:
        return tuple(self.cost.partial_macs)

    def spent(self, schedule: Schedule) -> float:
        """Return the cost of a schedule, in full steps."""
        return schedule_cost(schedule, self.cost) / self.cost.full_macs

    def random(self, rng: np.random.Generator) -> Schedule:
        """Return a random schedule of a random family."""
        family = self.families[rng.integers(len(self.families))]
        order = int(rng.integers(_MAX_ORDER + 1))
        if family == "free":
            places = rng.choice(np.arange(1, self.steps), size=self.full_steps - 1, replace=False)
            return self._placed({0, *map(int, places)}, order)
        count = int(rng.integers(1, self.full_steps + 1))
        genes = [(int(rng.integers(1, self.steps + 1)), self._random_depth(rng)) for _ in range(count)]
        return self._equal_segments(genes, _null_of(family), order, rng)

    def mutate(self, schedule: Schedule, rng: np.random.Generator) -> Schedule:
        """Return a neighbour: one to three genes changed, within the family and the budget."""
        for _ in range(1 + rng.binomial(2, 0.3)):
            if self.family(schedule) == "free":
                schedule = self._mutate_free(schedule, rng)
            else:
                schedule = self._mutate_paper(schedule, rng)
        return schedule

    def family(self, schedule: Schedule) -> str:
        """Return which family a schedule of this space belongs to."""
        letters = schedule.letters
        equal = [len(s) for s in schedule.segments] == _lengths(self.steps, len(schedule.segments))
        if "P" in letters or "N" in letters or (equal and "free" not in self.families):
            return "paper" if "N" in letters or "paper-x" not in self.families else "paper-x"
        return "free" if "free" in self.families else self.families[0]

    def seeds(self) -> list[Schedule]:
        """Return known good points, best guesses first: placements denser at either end, and rivals' schedules."""
        found: list[Schedule] = []
        if "free" in self.families:
            for bend in (1.0, 1.25, 0.75, 1.5):
                places = {round((self.steps - 1) * (1 - (1 - u) ** bend)) for u in np.linspace(0, 1, self.full_steps)}
                found.append(self._placed(places, order=1))
            found.append(self._trim(segments_for_speedup(self.steps, self.speedup)))
            found.append(uniform(self.steps, self.full_steps))
        rng = np.random.default_rng(0)
        shallow = self.depths[0]
        share = self.cost.share(shallow)
        for family in ("paper", "paper-x"):
            if family in self.families:
                found.append(self._equal_segments([(1, shallow)] * self.full_steps, _null_of(family), 1, rng))
                pairs = max(1, int(self.budget / (1 + share)))
                found.append(self._equal_segments([(2, shallow)] * pairs, _null_of(family), 1, rng))
        if "paper" in self.families:  # DeepCache's shape: as many full steps as the partial ones leave of the budget
            count = int((self.budget - self.steps * share) / (1 - share))
            if count >= 1:
                found.append(self._equal_segments([(self.steps, shallow)] * count, StepKind.NULL, 1, rng))
        return list({str(s): s for s in found}.values())

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return Optuna's description of every gene; a schedule has those of its family."""
        genes: dict[str, BaseDistribution] = {
            "family": CategoricalDistribution(self.families),
            "order": IntDistribution(0, _MAX_ORDER),
            "segments": IntDistribution(1, self.full_steps),
        }
        for i in range(self.full_steps):
            genes[f"length_{i}"] = IntDistribution(1, self.steps)
            genes[f"interval_{i}"] = IntDistribution(1, self.steps)
            genes[f"branch_{i}"] = IntDistribution(min(self.depths), max(self.depths))
        return genes

    def encode(self, schedule: Schedule) -> dict[str, Any]:
        """Return the genes of a schedule of this space."""
        family = self.family(schedule)
        genes = {"family": family, "order": schedule.order, "segments": len(schedule.segments)}
        for i, segment in enumerate(schedule.segments):
            if family == "free":
                genes[f"length_{i}"] = len(segment)
            else:
                genes[f"interval_{i}"] = segment.interval
                genes[f"branch_{i}"] = segment.depth or min(self.depths)
        return genes

    def decode(self, genes: Mapping[str, Any]) -> Schedule:
        """Return the schedule of genes, repaired to the run's length and the budget."""
        count, family, order = genes["segments"], genes["family"], genes["order"]
        if family == "free":
            places = np.cumsum([0, *(genes[f"length_{i}"] for i in range(count - 1))])
            return self._placed({int(p) for p in places if p < self.steps}, order)
        pairs = [(genes[f"interval_{i}"], genes[f"branch_{i}"]) for i in range(count)]
        return self._equal_segments(pairs, _null_of(family), order, np.random.default_rng(0))

    def _placed(self, places: set[int], order: int) -> Schedule:
        kinds = [StepKind.FULL if i in places else StepKind.EXTRAPOLATED for i in range(self.steps)]
        return self._trim(from_kinds(kinds, order=order))

    def _trim(self, schedule: Schedule) -> Schedule:
        """Drop full steps from the most crowded places until the budget holds."""
        places = [i for i, letter in enumerate(schedule.letters) if letter == "F"]
        while len(places) > self.full_steps:
            gaps = [b - a for a, b in zip(places, [*places[2:], self.steps + 1], strict=False)]
            del places[1 + int(np.argmin(gaps))]
        kinds = [StepKind.FULL if i in places else StepKind.EXTRAPOLATED for i in range(self.steps)]
        return from_kinds(kinds, order=schedule.order)

    def _mutate_free(self, schedule: Schedule, rng: np.random.Generator) -> Schedule:
        places = {i for i, letter in enumerate(schedule.letters) if letter == "F"}
        order, draw = schedule.order, rng.random()
        movable = sorted(places - {0})
        if draw < 0.1 or not movable:
            order = int(rng.integers(_MAX_ORDER + 1))
        elif draw < 0.75:  # a full step moves a little
            place = movable[rng.integers(len(movable))]
            moved = place + int(rng.choice([-1, 1])) * int(rng.geometric(0.6))
            if 0 < moved < self.steps and moved not in places:
                places = places - {place} | {moved}
        else:  # a full step moves anywhere
            free = sorted(set(range(self.steps)) - places)
            if free:
                places = places - {movable[rng.integers(len(movable))]} | {free[rng.integers(len(free))]}
        if len(places) < self.full_steps:
            free = sorted(set(range(self.steps)) - places)
            places |= {free[rng.integers(len(free))]}
        return self._placed(places, order)

    def _mutate_paper(self, schedule: Schedule, rng: np.random.Generator) -> Schedule:
        genes = [(s.interval, s.depth or self._random_depth(rng)) for s in schedule.segments]
        null = _null_of(self.family(schedule))
        order, draw = schedule.order, rng.random()
        i = int(rng.integers(len(genes)))
        interval, depth = genes[i]
        if draw < 0.25:
            count = int(np.clip(len(genes) + rng.choice([-1, 1]), 1, self.full_steps))
            genes = [genes[min(j * len(genes) // count, len(genes) - 1)] for j in range(count)]
        elif draw < 0.65:
            genes[i] = (max(1, interval + int(rng.choice([-1, 1])) * int(rng.geometric(0.6))), depth)
        elif draw < 0.95 or null is StepKind.NULL:
            genes[i] = (interval, self._random_depth(rng))
        else:
            order = int(rng.integers(_MAX_ORDER + 1))
        return self._equal_segments(genes, null, order, rng)

    def _equal_segments(self, genes: list[tuple[int, int]], null: StepKind, order: int, rng: np.random.Generator) -> Schedule:
        """Return N_segment equal segments with (interval, branch) each; intervals shrink at random until the budget holds."""
        lengths = _lengths(self.steps, len(genes))
        genes = [(min(interval, length), depth) for (interval, depth), length in zip(genes, lengths, strict=True)]

        def total() -> float:
            return sum(1 + (interval - 1) * self.cost.share(depth) for interval, depth in genes)

        while total() > self.budget:
            longer = [i for i, (interval, _) in enumerate(genes) if interval > 1]
            i = longer[rng.integers(len(longer))]
            genes[i] = (genes[i][0] - 1, genes[i][1])
        segments = []
        for (interval, depth), length in zip(genes, lengths, strict=True):
            kinds = (StepKind.FULL, *(StepKind.PARTIAL,) * (interval - 1), *(null,) * (length - interval))
            segments.append(Segment(kinds, depth if interval > 1 else None))
        return Schedule(tuple(segments), order if null is StepKind.EXTRAPOLATED else 1)

    def _random_depth(self, rng: np.random.Generator) -> int:
        return int(rng.choice(self.depths))


def _null_of(family: str) -> StepKind:
    return StepKind.NULL if family == "paper" else StepKind.EXTRAPOLATED


def _lengths(steps: int, segments: int) -> list[int]:
    """Return the lengths of `segments` equal parts of a run, as equal as whole steps allow."""
    edges = [round(i * steps / segments) for i in range(segments + 1)]
    return [b - a for a, b in pairwise(edges)]
