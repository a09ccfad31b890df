"""The search space: the paper's equal segments, and segments of any length, under a hard budget.

A budget is kept by construction and by repair, never by a penalty: every schedule that leaves this module fits it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise, zip_longest
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from flexi_core.errors import FlexiError
from flexi_core.run.cost import NetworkCost, schedule_cost
from flexi_core.run.null_steps.basis import DERIVATIVE
from flexi_core.schedule.kinds import StepKind
from flexi_core.schedule.presets import deepcache, segments_for_speedup, uniform
from flexi_core.schedule.schedule import SMALLEST_GAP, Schedule
from flexi_core.schedule.segment import Segment
from flexi_core.tune.levels import at_levels, even_edges, full_levels, karras_levels

FAMILIES = ("paper", "paper-x", "free", "levels")
# `paper`: equal segments, per segment branch and interval, null steps removed (Flexiffusion, arXiv 2409.17566).
# `paper-x`: the same with extrapolated null steps.
# `free`: segments of any length, per segment depth, partial steps, and removed or extrapolated null steps; it holds the others.
# `levels`: full steps at noise levels of their own, extrapolated steps between them; see `levels.py`.
_MAX_ORDER = 2  # cubic extrapolation amplified the network's error in every trial
_GUESSES_AT_A_COST = 3
_OTHER_BASIS = 0.1  # chance that a mutation changes the basis
_APART = 0.999  # of a full step's noise level the next one is at most
_RHOS = (4.0, 5.0, 3.0, 7.0)  # of the grids to start from
_NULLS = (StepKind.EXTRAPOLATED, StepKind.NULL)
_BOTH = (StepKind.FULL, StepKind.PARTIAL)
_CONDITIONAL = (StepKind.FULL_CONDITIONAL, StepKind.PARTIAL_CONDITIONAL)


@dataclass(frozen=True)
class Space:
    """All schedules of a run that cost no more than the teacher's MACs over `speedup`.

    Args:
        steps: of the run.
        speedup: the least reduction of MACs.
        cost: of the network, with the partial depths that may be used.
        families: which of `FAMILIES` to search.
        front: search cheaper schedules too, for a whole Pareto front; else what the budget leaves is spent on full steps.
        reuse_guidance: let full steps of the free family run the conditional half alone; of use for a guided run.
        guesses: schedules that a model of the errors found, to start from before all others.
        sigmas: of the teacher's run [n + 1]; without them there is no family `levels`.
        bases: that extrapolated steps may be in, the default first. Schedules have theirs written, but for those of a space of
            the derivative alone.
        removes: whether null steps may be removed; without it there is no family `paper`.
        moves: whether schedules may have noise levels of their own; without it there is no family `levels`.
        cuts: steps at which one window or network of the run ends and the next begins. That begins with a full step, and its
            noise levels are its own: there is the family `free` alone.

    Raises:
        FlexiError: no schedule is that cheap, a family is not known, or none is left.
    """

    steps: int
    speedup: float
    cost: NetworkCost
    families: tuple[str, ...] = FAMILIES
    front: bool = False
    reuse_guidance: bool = False
    guesses: tuple[Schedule, ...] = ()
    sigmas: tuple[float, ...] | None = None
    bases: tuple[str, ...] = (DERIVATIVE,)
    removes: bool = True
    moves: bool = True
    cuts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if unknown := set(self.families) - set(FAMILIES):
            raise FlexiError(f"unknown part of the space: {', '.join(sorted(unknown))}; known: {', '.join(FAMILIES)}")
        if not 1 <= self.speedup <= self.steps:
            raise FlexiError(f"a speed-up of {self.speedup} is asked of {self.steps} steps; possible are 1 to {self.steps}")
        gone = {"levels"} if self.sigmas is None or not self.moves else set()
        gone |= set() if self.removes else {"paper"}
        gone |= set(FAMILIES) - {"free"} if self.cuts else set()
        left = tuple(family for family in self.families if family not in gone)
        if not left and self.cuts:
            raise FlexiError(
                f"nothing is left of the space {', '.join(self.families)}: each of the run's {len(self.cuts) + 1} windows "
                "begins with a full step at its own noise level; choose the space free"
            )
        if not left:
            raise FlexiError(
                f"nothing is left of the space {', '.join(self.families)}: this sampler's noise would be another with "
                f"{'moved noise levels' if self.families == ('levels',) else 'removed steps'}; choose another part of it"
            )
        if self.full_steps <= len(self.cuts):
            windows = len(self.cuts) + 1
            raise FlexiError(
                f"a speed-up of {self.speedup} leaves {self.full_steps} of {self.steps} steps, and each of the run's {windows} "
                f"windows begins with a full one; possible are 1 to {self.steps / windows:g}"
            )
        object.__setattr__(self, "families", left)
        object.__setattr__(self, "moves", self.moves and not self.cuts)

    @property
    def budget(self) -> float:
        """The cost that a schedule may have, in full steps."""
        return self.steps / self.speedup + 1e-9

    @cached_property
    def full_steps(self) -> int:
        """How many full steps the budget holds: beside those that begin a stretch the cheapest, where networks differ."""
        first = {0, *self.cuts}
        rest = sorted(self._price(i) for i in range(self.steps) if i not in first)
        return sum(total <= self.budget for total in accumulate([*map(self._price, sorted(first)), *rest]))

    def _price(self, step: int) -> float:
        """Return what a full step costs, as a share of an average one."""
        return self.cost.at(step).full_macs / self.cost.full_macs

    @property
    def _most_segments(self) -> int:
        """How many segments the budget holds: the first one starts with a whole full step."""
        return min(self.steps, 1 + int(2 * (self.budget - 1))) if self.reuse_guidance else self.full_steps

    @property
    def depths(self) -> tuple[int, ...]:
        """The depths of partial steps; one, of no use, for a network that cannot be partial."""
        return tuple(self.cost.partial_macs) or (1,)

    def spent(self, schedule: Schedule) -> float:
        """Return the cost of a schedule, in full steps."""
        return schedule_cost(schedule, self.cost) / self.cost.full_macs

    def random(self, rng: np.random.Generator) -> Schedule:
        """Return a random schedule of a random family, in a random basis."""
        schedule = self._random(rng)
        return self._in(self.bases[rng.integers(len(self.bases))] if len(self.bases) > 1 else self.bases[0], schedule)

    def _random(self, rng: np.random.Generator) -> Schedule:
        family = self.families[rng.integers(len(self.families))]
        order = int(rng.integers(_MAX_ORDER + 1))
        most = int(rng.integers(1, self.full_steps + 1)) if self.front else self.full_steps
        if family == "levels":
            return at_levels(karras_levels(self.sigmas, most, rng.uniform(2, 9)), self.sigmas)
        if family == "free":
            starts = [0, *sorted(map(int, rng.choice(np.arange(1, self.steps), size=most - 1, replace=False)))]
            kinds = rng.choice(2, size=most, p=(0.75, 0.25)) if rng.random() < 0.5 else np.zeros(most, int)
            chance = float(rng.choice([0.0, 0.0, 0.3]))
            genes = [
                _Gene(
                    start,
                    int(rng.geometric(0.5)) if rng.random() < chance else 0,
                    self._random_depth(rng),
                    _NULLS[kind],
                    forecast=int(rng.integers(2)),
                )
                for start, kind in zip(starts, kinds, strict=True)
            ]
            if self.reuse_guidance and rng.random() < 0.5:
                genes = [replace(gene, reuses=bool(rng.random() < 0.3)) for gene in genes]
            return self._build(self._fill(self._make_room(genes, rng), rng), order)
        count = int(rng.integers(1, most + 1))
        pairs = [(int(rng.integers(1, self.steps + 1)), self._random_depth(rng)) for _ in range(count)]
        return self._equal_segments(pairs, _null_of(family), order, rng)

    def mutate(self, schedule: Schedule, rng: np.random.Generator) -> Schedule:
        """Return a neighbour: one to three genes changed, within the family and the budget; rarely, the basis too."""
        basis = self._basis(schedule)
        for _ in range(1 + rng.binomial(2, 0.3)):
            family = self.family(schedule)
            if family == "levels":
                schedule = self._mutate_levels(schedule, rng)
            elif family == "free":
                schedule = self._mutate_free(schedule, rng)
            else:
                schedule = self._mutate_paper(schedule, rng)
        if len(self.bases) > 1 and rng.random() < _OTHER_BASIS:
            basis = str(rng.choice([other for other in self.bases if other != basis]))
        return self._in(basis, schedule)

    def family(self, schedule: Schedule) -> str:
        """Return the narrowest family of this space that a schedule belongs to; one of full and X steps is `free`."""
        if schedule.sigmas is not None:
            return "levels"
        letters = set(schedule.letters)
        if letters & set("fp") or any(segment.forecast for segment in schedule.segments):
            return "free"
        equal = [len(s) for s in schedule.segments] == _lengths(self.steps, len(schedule.segments))
        if equal and not letters >= {"N", "X"}:
            if "N" in letters or "X" not in letters:
                named = "paper" if "P" in letters or "N" in letters else "free"
            else:
                named = "paper-x" if "P" in letters else "free"
            for family in (named, "free", "paper" if "X" not in letters else "paper-x", *self.families):
                if family in self.families and family != "levels":
                    return family
        return "free"

    def seeds(self) -> list[Schedule]:
        """Return known good points, best guesses first: placements denser at either end, presets, and rivals' schedules.

        They come in each of the bases, one after the other. A front starts from the best guesses at several costs.
        """
        return list(self._seeds)

    @cached_property
    def _seeds(self) -> tuple[Schedule, ...]:
        found = [*self.guesses, *self._guesses()]
        if self.cuts:
            found = [self.repaired(schedule) for schedule in found]
        if self.front:
            for share in (0.75, 0.55, 0.4, 0.3, 0.2):
                if self.budget * share >= 2 + len(self.cuts):
                    cheaper = replace(self, speedup=self.speedup / share, front=False, guesses=())
                    found += cheaper._guesses()[:_GUESSES_AT_A_COST]
        return tuple({str(s): s for schedule in found for s in (self._in(basis, schedule) for basis in self.bases)}.values())

    def _guesses(self) -> list[Schedule]:
        found: list[Schedule] = []
        if "free" in self.families:
            for bend in (1.0, 1.25, 0.75, 1.5):
                places = {round((self.steps - 1) * (1 - (1 - u) ** bend)) for u in np.linspace(0, 1, self.full_steps)}
                found.append(self._build(self._trimmed([_Gene(start) for start in sorted(places)]), order=1))
        if "levels" in self.families:
            grids = (karras_levels(self.sigmas, self.full_steps, rho) for rho in _RHOS)
            found[1:1] = [at_levels(levels, self.sigmas) for levels in grids]
        if "free" in self.families:
            if self.reuse_guidance:
                found += self._late_reuse()
            found.append(self.repaired(segments_for_speedup(self.steps, self.speedup)))
            found.append(uniform(self.steps, self.full_steps))
            if self.removes:
                found.append(uniform(self.steps, self.full_steps, StepKind.NULL))
        rng = np.random.default_rng(0)
        shallow = self.depths[0]
        share = self.cost.share(shallow)
        for family in ("paper", "paper-x"):
            if family in self.families:
                found.append(self._equal_segments([(1, shallow)] * self.full_steps, _null_of(family), 1, rng))
                pairs = max(1, int(self.budget / (1 + share)))
                found.append(self._equal_segments([(2, shallow)] * pairs, _null_of(family), 1, rng))
        # DeepCache's shape: as many full steps as the partial ones leave of the budget.
        if "paper" in self.families and self.cost.partial_macs:
            count = int((self.budget - self.steps * share) / (1 - share))
            if count >= 1:
                found.append(self._equal_segments([(self.steps, shallow)] * count, StepKind.NULL, 1, rng))
        return found + [schedule for schedule in self._deepcaches() if self.family(schedule) in self.families]

    def _late_reuse(self) -> list[Schedule]:
        """Return even placements whose later full steps reuse guidance (T-GATE, Zhang et al., 2024)."""
        found = []
        for share in (0.3, 0.6):
            count = min(self.steps, int(self.budget / (1 - share / 2)))
            places = sorted({round(i * (self.steps - 1) / max(count - 1, 1)) for i in range(count)})
            first = len(places) - round(share * len(places))
            genes = [_Gene(place, reuses=i >= max(first, 1)) for i, place in enumerate(places)]
            found.append(self._build(self._trimmed(genes), order=1))
        return found

    def _deepcaches(self) -> list[Schedule]:
        """Return DeepCache at every interval and depth that the budget allows, the densest of each depth first."""
        fitting = []
        for depth in self.cost.partial_macs:
            every = (deepcache(self.steps, interval, depth) for interval in range(2, self.steps + 1))
            fitting.append([schedule for schedule in every if self.spent(schedule) <= self.budget])
        return [schedule for rank in zip_longest(*fitting) for schedule in rank if schedule is not None]

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return Optuna's description of every gene; a schedule has those of its family."""
        genes: dict[str, BaseDistribution] = {
            "family": CategoricalDistribution(self.families),
            "order": IntDistribution(0, _MAX_ORDER),
            "segments": IntDistribution(1, self._most_segments),
        }
        if len(self.bases) > 1:
            genes["basis"] = CategoricalDistribution(self.bases)
        for i in range(self._most_segments):
            genes[f"length_{i}"] = IntDistribution(1, self.steps)
            genes[f"interval_{i}"] = IntDistribution(1, self.steps)
            genes[f"branch_{i}"] = IntDistribution(min(self.depths), max(self.depths))
            genes[f"forecast_{i}"] = IntDistribution(0, 1)
            genes[f"null_{i}"] = CategoricalDistribution(tuple(kind.value for kind in (_NULLS if self.removes else _NULLS[:1])))
            if self.reuse_guidance:
                genes[f"reuses_{i}"] = CategoricalDistribution((False, True))
            if "levels" in self.families and i:
                genes[f"level_{i}"] = FloatDistribution(self.sigmas[-2] / 2, self.sigmas[0], log=True)
        return genes

    def encode(self, schedule: Schedule) -> dict[str, Any]:
        """Return the genes of a schedule of this space."""
        family = self.family(schedule)
        genes = {"family": family, "order": schedule.order, "segments": len(schedule.segments)}
        if len(self.bases) > 1:
            genes["basis"] = self._basis(schedule)
        if family == "levels":
            return genes | {f"level_{i}": level for i, level in enumerate(full_levels(schedule)) if i}
        for i, segment in enumerate(schedule.segments):
            genes[f"interval_{i}"] = segment.interval
            genes[f"branch_{i}"] = segment.depth or min(self.depths)
            if family == "free":
                genes[f"length_{i}"] = len(segment)
                genes[f"forecast_{i}"] = segment.forecast
                genes[f"null_{i}"] = _null_in(segment).value
                if self.reuse_guidance:
                    genes[f"reuses_{i}"] = segment.kinds[0].reuses_guidance
        return genes

    def decode(self, genes: Mapping[str, Any]) -> Schedule:
        """Return the schedule of genes, repaired to the run's length and the budget.

        Genes that were drawn one by one need not fit each other: lengths are scaled to the run.
        """
        return self._in(genes.get("basis", self.bases[0]), self._decoded(genes))

    def _decoded(self, genes: Mapping[str, Any]) -> Schedule:
        count, family, order = genes["segments"], genes["family"], genes["order"]
        if family != "free":
            count = min(count, self.full_steps)  # steps that reuse guidance leave room for more segments
        if family == "levels":
            return self._at_levels([genes[f"level_{i}"] for i in range(1, count)])
        if family != "free":
            pairs = [(genes[f"interval_{i}"], genes[f"branch_{i}"]) for i in range(count)]
            return self._equal_segments(pairs, _null_of(family), order, np.random.default_rng(0))
        ends = np.cumsum([genes[f"length_{i}"] for i in range(count)])
        starts = [0, *(round(float(end) * self.steps / ends[-1]) for end in ends[:-1])]
        drawn: dict[int, _Gene] = {}
        for i, start in enumerate(starts):
            if start < self.steps:
                null = StepKind(genes[f"null_{i}"])
                reuses = genes.get(f"reuses_{i}", False)
                partials, depth, forecast = genes[f"interval_{i}"] - 1, genes[f"branch_{i}"], genes[f"forecast_{i}"]
                drawn.setdefault(start, _Gene(start, partials, depth, null, reuses, forecast))
        return self._build(self._trimmed([*drawn.values()]), order)

    def filled(self, schedule: Schedule) -> Schedule:
        """Return a schedule with full steps in its longest gaps, as many as the budget still holds."""
        if schedule.sigmas is not None:
            levels = full_levels(schedule)
            while len(levels) < self.full_steps:
                ratios = [low / high for high, low in pairwise([*levels, self.sigmas[-2]])]
                widest = int(np.argmin(ratios))
                levels.insert(widest + 1, levels[widest] * ratios[widest] ** 0.5)
            return self._in(self._basis(schedule), self._at_levels(levels[1:]))
        genes = self._cut(self._genes(schedule))
        while self._cost(genes) + 1 <= self.budget:
            segments = self._build(genes, 1).segments
            nulls = [len(segment) - segment.interval for segment in segments]
            widest = int(np.argmax(nulls))
            if not nulls[widest]:
                break
            genes = self._with_full(genes, genes[widest].start + segments[widest].interval + nulls[widest] // 2)
        return self._in(self._basis(schedule), self._build(genes, schedule.order))

    def _basis(self, schedule: Schedule) -> str:
        """Return which of this space's bases a schedule is in."""
        return schedule.basis if schedule.basis in self.bases else self.bases[0]

    def _in(self, basis: str, schedule: Schedule) -> Schedule:
        """Return a schedule with a basis written; with the default one where it extrapolates nothing."""
        if self.bases == (DERIVATIVE,):
            return schedule
        return replace(schedule, basis=basis if "X" in schedule.letters else self.bases[0])

    # Noise levels of their own.

    def _at_levels(self, levels: Sequence[float]) -> Schedule:
        """Return full steps at the run's first noise level and at others, which are sorted and kept apart."""
        falling = [self.sigmas[0]]
        # The extrapolated steps between two full ones need their gaps, too.
        apart = min(_APART, (1 - 2 * SMALLEST_GAP) ** -(-self.steps // (len(levels) + 1)))
        for level in sorted(levels, reverse=True):
            falling.append(min(max(float(level), self.sigmas[-2]), falling[-1] * apart))
        return at_levels(falling, self.sigmas)

    def _mutate_levels(self, schedule: Schedule, rng: np.random.Generator) -> Schedule:
        levels = full_levels(schedule)
        if self.front and rng.random() < 0.3 and len(levels) > 1:
            del levels[1 + int(rng.integers(len(levels) - 1))]
        elif rng.random() < 0.3:  # all of them a little towards one end
            shares = np.log(np.array(levels) / levels[0]) / np.log(self.sigmas[-2] / levels[0])
            levels = [*(levels[0] * (self.sigmas[-2] / levels[0]) ** shares ** rng.uniform(0.9, 1.1))]
        elif len(levels) > 1:  # one of them up to half the way to the next
            i = 1 + int(rng.integers(len(levels) - 1))
            beside = [*levels, self.sigmas[-2]][i + int(rng.choice([-1, 1]))]
            levels[i] *= (beside / levels[i]) ** rng.uniform(0.1, 0.5)
        return self._at_levels(levels[1:])

    # Segments of any length.

    def _mutate_free(self, schedule: Schedule, rng: np.random.Generator) -> Schedule:
        genes, order, draw = self._genes(schedule), schedule.order, rng.random()
        movable = len(genes) - 1
        i = int(rng.integers(len(genes)))
        if self.reuse_guidance and rng.random() < 0.25:
            genes[i] = replace(genes[i], reuses=not genes[i].reuses)
        elif draw < 0.08 or (draw < 0.7 and not movable):
            order = int(rng.integers(_MAX_ORDER + 1))
        elif draw < 0.55:  # a full step moves a little
            i = 1 + int(rng.integers(movable))
            genes = _moved(genes, i, genes[i].start + int(rng.choice([-1, 1])) * int(rng.geometric(0.6)), self.steps)
        elif draw < 0.7:  # a full step moves anywhere
            genes = _moved(genes, 1 + int(rng.integers(movable)), int(rng.integers(1, self.steps)), self.steps)
        elif draw < 0.85:  # a segment gains or loses partial steps
            change = int(rng.choice([-1, 1])) * int(rng.geometric(0.6))
            genes[i] = replace(genes[i], partials=max(0, genes[i].partials + change))
        elif draw < 0.92 or not self.removes:
            genes[i] = replace(genes[i], depth=self._random_depth(rng), forecast=int(rng.integers(2)))
        else:  # null steps of the other kind: here, or in the whole run
            null = _NULLS[genes[i].null is _NULLS[0]]
            everywhere = rng.random() < 0.3
            genes = [replace(g, null=null) if everywhere or j == i else g for j, g in enumerate(genes)]
        if self.front and rng.random() < 0.3 and len(genes) > 1:
            del genes[1 + int(rng.integers(len(genes) - 1))]
        return self._build(self._fill(self._make_room(genes, rng, keep=i), rng), order)

    def _genes(self, schedule: Schedule) -> list[_Gene]:
        genes, start = [], 0
        for segment in schedule.segments:
            depth, reuses = segment.depth or min(self.depths), segment.kinds[0].reuses_guidance
            genes.append(_Gene(start, segment.interval - 1, depth, _null_in(segment), reuses, segment.forecast))
            start += len(segment)
        return genes

    def _cut(self, genes: Sequence[_Gene]) -> list[_Gene]:
        """Return genes with a segment at the start of every window."""
        genes = list(genes)
        for cut in self.cuts:
            if all(gene.start != cut for gene in genes):
                genes = self._with_full(genes, cut)
        return genes

    def _build(self, genes: Sequence[_Gene], order: int) -> Schedule:
        segments, genes = [], self._cut(genes)
        for gene, stop in zip(genes, [*(g.start for g in genes[1:]), self.steps], strict=True):
            partials = min(gene.partials, stop - gene.start - 1) if self.cost.partial_macs else 0
            nulls = stop - gene.start - 1 - partials
            full, shallow = _CONDITIONAL if gene.reuses and gene.start not in (0, *self.cuts) else _BOTH
            null = gene.null if self.removes else StepKind.EXTRAPOLATED
            kinds = (full, *(shallow,) * partials, *(null,) * nulls)
            depth, forecast = (gene.depth, gene.forecast) if partials else (None, 0)
            segments.append(Segment(kinds, depth, forecast=forecast))
        extrapolates = any(StepKind.EXTRAPOLATED in segment.kinds for segment in segments)
        return Schedule(tuple(segments), order if extrapolates else 1)

    def _cost(self, genes: Sequence[_Gene]) -> float:
        return self.spent(self._build(genes, 1))

    def _make_room(self, genes: list[_Gene], rng: np.random.Generator, keep: int = 0) -> list[_Gene]:
        """Drop full steps at random, not the first nor the one to keep, and at last partial steps, until the budget holds."""
        kept = genes[keep] if keep < len(genes) else genes[0]
        while self._cost(genes) > self.budget:
            droppable = [i for i, gene in enumerate(genes) if i and gene is not kept and gene.start not in self.cuts]
            if not droppable:
                return self._trimmed(genes)
            genes = [gene for i, gene in enumerate(genes) if i != droppable[rng.integers(len(droppable))]]
        return genes

    def _fill(self, genes: list[_Gene], rng: np.random.Generator) -> list[_Gene]:
        """Put full steps in the place of null ones, at random, while the budget holds another."""
        while not self.front and len(genes) < self.steps:
            left = self.budget - self._cost(genes)
            letters = self._build(genes, 1).letters
            least = 0.5 if self.reuse_guidance else 1
            places = [i for i, letter in enumerate(letters) if letter in "NX" and least * self._price(i) <= left]
            if not places:
                break
            place = places[rng.integers(len(places))]
            genes = self._with_full(genes, place, reuses=left < self._price(place))
        return genes

    def _trimmed(self, genes: list[_Gene]) -> list[_Gene]:
        """Repair genes to the budget without a draw: partial steps go from the longest stretch, then full ones from crowds."""
        genes = self._cut(genes)
        while self._cost(genes) > self.budget:
            intervals = [segment.interval for segment in self._build(genes, 1).segments]
            longest = int(np.argmax(intervals))
            if intervals[longest] > 1:
                genes = [replace(g, partials=intervals[longest] - 2) if i == longest else g for i, g in enumerate(genes)]
                continue
            starts = [gene.start for gene in genes]
            gaps = [b - a for a, b in zip(starts, [*starts[2:], self.steps + 1], strict=False)]
            gaps = [np.inf if start in self.cuts else gap for start, gap in zip(starts[1:], gaps, strict=False)]
            genes = [gene for i, gene in enumerate(genes) if i != 1 + int(np.argmin(gaps))]
        return genes

    def repaired(self, schedule: Schedule) -> Schedule:
        """Return a schedule with as many of its full and partial steps as the budget holds; crowded ones go first."""
        return self._build(self._trimmed(self._genes(schedule)), schedule.order)

    @staticmethod
    def _with_full(genes: list[_Gene], place: int, reuses: bool = False) -> list[_Gene]:
        before = max((g for g in genes if g.start < place), key=lambda g: g.start)
        return sorted([*genes, replace(before, start=place, partials=0, reuses=reuses)], key=lambda g: g.start)

    # The paper's equal segments.

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

    def _equal_segments(
        self, genes: Sequence[tuple[int, int]], null: StepKind, order: int, rng: np.random.Generator
    ) -> Schedule:
        """Return N_segment equal segments with (interval, branch) each; intervals shrink at random until the budget holds."""
        lengths = _lengths(self.steps, len(genes))
        most = self.steps if self.cost.partial_macs else 1
        genes = [(min(interval, length, most), depth) for (interval, depth), length in zip(genes, lengths, strict=True)]

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
        extrapolates = any(StepKind.EXTRAPOLATED in segment.kinds for segment in segments)
        return Schedule(tuple(segments), order if extrapolates else 1)

    def _random_depth(self, rng: np.random.Generator) -> int:
        return int(rng.choice(self.depths))


@dataclass(frozen=True)
class _Gene:
    """A segment of any length: where it starts, its partial steps (as many as fit) and their depth, its kind of null step.

    `reuses`: its full and partial steps run the conditional half alone; not at the start of the run. `forecast`: the order in
    which its partial steps extrapolate the deep feature.
    """

    start: int
    partials: int = 0
    depth: int = 1
    null: StepKind = StepKind.EXTRAPOLATED
    reuses: bool = False
    forecast: int = 0


def _moved(genes: list[_Gene], i: int, place: int, steps: int) -> list[_Gene]:
    """Return the genes with one segment's start moved, or as they are where that place is taken or outside the run."""
    if not 0 < place < steps or any(gene.start == place for gene in genes):
        return genes
    return sorted([*genes[:i], replace(genes[i], start=place), *genes[i + 1 :]], key=lambda gene: gene.start)


def _null_in(segment: Segment) -> StepKind:
    return StepKind.NULL if StepKind.NULL in segment.kinds else StepKind.EXTRAPOLATED


def _null_of(family: str) -> StepKind:
    return StepKind.NULL if family == "paper" else StepKind.EXTRAPOLATED


def _lengths(steps: int, segments: int) -> list[int]:
    """Return the lengths of `segments` equal parts of a run."""
    return [b - a for a, b in pairwise(even_edges(steps, segments))]
