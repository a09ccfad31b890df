"""What stretches of cheaper steps cost in quality, measured once per teacher; the best schedules of the additive model.

The final error of a run that is full but for one stretch is measured at several places and lengths (LeMiCa, arXiv
2511.00090, puts such errors on the edges of a graph). A schedule's error is taken for the sum of its stretches', and dynamic
programming finds the schedules of least sum under a budget: the first population of a search.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import count as counting
from itertools import islice
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from flexi_core.errors import FlexiError
from flexi_core.metrics import latent_mse
from flexi_core.run.replay import PredictionStore
from flexi_core.schedule.presets import all_full
from flexi_core.schedule.schedule import Schedule
from flexi_core.tune import SampleProgress

from ..backends.protocol import Backend
from ..backends.teacher import SEARCH_SEEDS
from ..space.space import Space

KINDS = ("X", "P", "f")  # letters of the schedule text
PLACES = {"X": 10, "P": 4, "f": 4}
LENGTHS = {"X": (0.06, 0.2), "P": (0.06, 0.2), "f": (0.06, 0.3)}  # of stretches, as shares of the run
# Of the errors that are summed: 1 as if each stretch erred in its own direction, 0.5 as if all erred in the same.
EXPONENTS = (1.0, 0.75)
_DEPTHS = 1  # measured of a network's partial depths, the shallowest first
_LONGEST = 40  # no stretch of X is longer; gaps and ages of guidance beyond it are taken for it
_STATES = 20_000_000  # most states of a plan; in long runs gaps and ages are told apart up to what they leave
# How wrong the slope of an extrapolation is: in parts of what the stretch before left, and of the rate at the computed step.
# Kendall's tau over 60 schedules, half of them good ones: without both 0.46, with these 0.70.
_LEFT, _OWN = 1.0, 0.3
_SMOOTH = 0.2  # weight of the bends of log rates beside the log errors that they are fitted to
_END = 3  # steps from the last place to the end: a stretch there reaches the last step, whose error is like no other's
_APART = 4  # steps in which two guesses differ at least: one full step moved by one place differs in two
_TRIED = 400  # paths looked at for guesses that are apart
_LEAST = 1e-12  # latent units squared: below it an error is rounding


@dataclass(frozen=True)
class Stretch:
    """One measured run: full but for a stretch of steps.

    Args:
        kind: X, P or f.
        after: number of the full step before the stretch.
        length: in steps.
        error: mean paired error to the teacher, latent units squared.
        depth: of partial steps, else 0.
    """

    kind: str
    after: int
    length: int
    error: float
    depth: int = 0


@dataclass(frozen=True)
class Sensitivities:
    """The errors of single stretches, and the additive model of every schedule made of them.

    Args:
        steps: of the run.
        samples: that were measured on.
        macs: that the measurement spent, of the network's.
        stretches: what was measured.
    """

    steps: int
    samples: int
    macs: float
    stretches: tuple[Stretch, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "stretches": [asdict(stretch) for stretch in self.stretches]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sensitivities:
        """Return what `as_dict` gave.

        Raises:
            FlexiError: it is not that.
        """
        try:
            return cls(**{**values, "stretches": tuple(Stretch(**stretch) for stretch in values["stretches"])})
        except (TypeError, KeyError) as error:
            raise FlexiError(f"these are not the sensitivities of this version ({error}); measure them again") from error

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of step that were measured."""
        return tuple(kind for kind in KINDS if any(stretch.kind == kind for stretch in self.stretches))

    @property
    def depths(self) -> tuple[int, ...]:
        """The depths at which partial steps were measured."""
        return tuple(sorted({stretch.depth for stretch in self.stretches if stretch.kind == "P"}))

    def rms(self, kind: str, after: int, length: int, gap: int | np.ndarray = 1, depth: int = 0) -> float | np.ndarray:
        """Return the error of one stretch, the root of its mse.

        Each step adds the rate of its place, times how far it is carried: sqrt(j) at j steps from the computed one; for an X
        step sqrt(j (j + gap)), the root of the remainder of Newton's form. What the X stretch before it left is carried on
        with the slope that was taken across the gap.

        Args:
            kind: X, P or f.
            after: number of the computed step before the stretch.
            length: in steps.
            gap: of an X stretch: from the computed step to the one before it; or several.
            depth: of partial steps.
        """
        table = self._tables[kind, depth]
        if kind != "X" or not after:  # after the first step X is held: there is no other computed step
            return table[after, length]
        gap = np.asarray(gap)
        ahead = np.arange(1, length + 1)
        rates = self._rates[kind, depth]
        own = (rates[after + 1 : after + length + 1] * np.sqrt(ahead * (ahead + gap[..., None]))).sum(-1)
        left = table[np.maximum(after - gap, 0), np.maximum(gap - 1, 0)]
        return own + (_OWN * rates[after] + _LEFT * left) * (length / np.maximum(gap, 1)) ** 2

    def predict(self, schedule: Schedule, exponent: float = EXPONENTS[0]) -> float:
        """Return the error that the model expects of a schedule of F, f, P and X steps.

        Args:
            schedule: of the run's length.
            exponent: of the errors that are summed: 1 for their own sum, 0.5 for that of their roots.

        Raises:
            FlexiError: the schedule is of another length, or has steps that were not measured.
        """
        if len(schedule) != self.steps:
            raise FlexiError(f"the schedule has {len(schedule)} steps, the sensitivities are of {self.steps}")
        if unknown := set(schedule.letters) - {"F", *self.kinds}:
            raise FlexiError(f"steps of kind {', '.join(sorted(unknown))} were not measured; measured: {', '.join(self.kinds)}")
        total, start, last, both = 0.0, 0, None, 0
        for segment in schedule.segments:
            partials = segment.letters.count("P")
            nulls = len(segment) - 1 - partials
            at = start + partials
            if segment.letters[0] == "F":
                both = at
            gap = 1 if partials or last is None else start - last
            total += self._partial(start, partials, segment.depth or 0, exponent)
            total += self._null(at, nulls, gap, at - both, exponent)
            start, last = start + len(segment), at
        return total ** (1 / exponent)

    def plan(self, space: Space, count: int, kinds: Sequence[str] | None = None) -> list[Schedule]:
        """Return schedules of least predicted error in a space, those of each exponent in turn; they differ in some steps.

        Those whose last step is computed come first: between sparse steps a stretch errs less than it does between full
        ones, but for the last, so that the sum makes too little of it. A space without segments of any length has none.

        Args:
            space: whose budget they keep.
            count: at most so many.
            kinds: of step that may be used beside F, of those that were measured and that the space has; all by default.

        Raises:
            FlexiError: the space is of another step count.
        """
        if space.steps != self.steps:
            raise FlexiError(f"the space is of {space.steps} steps, the sensitivities are of {self.steps}")
        if "free" not in space.families:
            return []
        kinds = [kind for kind in self.kinds if kinds is None or kind in kinds]
        if not space.reuse_guidance:
            kinds = [kind for kind in kinds if kind != "f"]
        paths = [
            _Paths(self, space, kinds, exponent, last_computed).best()
            for last_computed in (True, False)
            for exponent in EXPONENTS
        ]
        found: list[Schedule] = []
        while paths and len(found) < count:
            for path in list(paths):
                near = islice(path, _TRIED)
                schedule = next((s for s in near if all(_differ(s, other) >= _APART for other in found)), None)
                if schedule is None:
                    paths.remove(path)
                elif len(found) < count:
                    found.append(schedule)
        return found

    def _partial(self, start: int, partials: int, depth: int, exponent: float) -> float:
        """Return the summand of a segment's partial steps, whose full step is `start`."""
        return self.rms("P", start, partials, depth=depth) ** (2 * exponent) if partials else 0.0

    def _null(self, at: int, nulls: int, gap: int | np.ndarray, age: int | np.ndarray, exponent: float) -> float | np.ndarray:
        """Return the summand of the null steps behind a computed one, and of the guidance that they and it live on.

        Args:
            at: number of the computed step.
            nulls: how many.
            gap: from it to the computed step before it.
            age: of its guidance, in steps; 0 where it is its own.
        """
        total = self.rms("X", at, nulls, gap) ** (2 * exponent) if nulls else 0.0
        if np.any(age):
            # What a stretch of reused guidance errs more by these steps than by those before them.
            table, both = self._tables["f", 0] ** (2 * exponent), np.maximum(at - age, 0)
            more = table[both, np.minimum(age + nulls, self.steps)] - table[both, np.maximum(age - 1, 0)]
            total = total + (np.asarray(age) > 0) * more
        return total

    @cached_property
    def _rates(self) -> dict[tuple[str, int], np.ndarray]:
        """By kind and depth: the rate of error of every step."""
        return {key: self._fitted(*key) for key in sorted({(stretch.kind, stretch.depth) for stretch in self.stretches})}

    def _fitted(self, kind: str, depth: int) -> np.ndarray:
        measured = self._measured(kind, depth)
        measured = [s for s in measured if s.after or kind != "X"] or measured
        knots = sorted({stretch.after + 1 for stretch in measured} | {self.steps - 1})
        carried = [_carried(kind, stretch.length) for stretch in measured]
        errors = np.array([math.log(max(stretch.error, _LEAST)) / 2 for stretch in measured])
        places = np.arange(self.steps)

        def residuals(logs: np.ndarray) -> np.ndarray:
            rates = np.exp(np.interp(places, knots, logs))
            sums = [rates[s.after + 1 : s.after + 1 + s.length] @ far for s, far in zip(measured, carried, strict=True)]
            return np.concatenate([np.log(sums) - errors, _SMOOTH * np.diff(logs, 2)])

        return np.exp(np.interp(places, knots, least_squares(residuals, np.full(len(knots), errors.mean())).x))

    @cached_property
    def _tables(self) -> dict[tuple[str, int], np.ndarray]:
        """By kind and depth: the root of the mse of every stretch behind full steps [step before it, length]."""
        tables = {}
        for (kind, depth), rates in self._rates.items():
            far = _carried(kind, self.steps)
            table = np.zeros((self.steps, self.steps + 1))
            for after in range(self.steps):
                sums = np.cumsum(rates[after + 1 :] * far[: self.steps - after - 1])
                table[after, 1:] = np.pad(sums, (0, after + 1), "edge" if len(sums) else "constant")
            tables[kind, depth] = table
        held = sorted((s.length, max(s.error, _LEAST)) for s in self._measured("X", 0) if not s.after)
        if held:
            lengths, errors = zip(*held, strict=True)
            # A longer stretch is never taken for better than a shorter one.
            errors = np.log(np.maximum.accumulate(errors)) / 2
            tables["X", 0][0, 1:] = np.exp(_line(np.log(lengths), errors, np.log(np.arange(1, self.steps + 1))))
        return tables

    def _measured(self, kind: str, depth: int) -> list[Stretch]:
        return [stretch for stretch in self.stretches if (stretch.kind, stretch.depth) == (kind, depth)]


def measure_sensitivities(
    backend: Backend,
    kinds: Sequence[str] = ("X",),
    samples: int = 4,
    *,
    places: Mapping[str, int] = PLACES,
    lengths: Mapping[str, Sequence[float]] = LENGTHS,
    progress: SampleProgress = lambda done, total: None,
) -> Sensitivities:
    """Measure what stretches of cheaper steps cost in quality, against the teacher.

    The runs share their first steps, so that late stretches are cheap.

    Args:
        backend: samples.
        kinds: of `KINDS`; partial steps are left out for a network that cannot be partial.
        samples: to measure on.
        places: how many places, by kind.
        lengths: of the stretches, by kind, as shares of the run.
        progress: called with the runs done and the runs in all.

    Raises:
        FlexiError: a kind is not known, or the run has too few steps for a stretch.
    """
    if unknown := set(kinds) - set(KINDS):
        raise FlexiError(f"unknown kinds of step: {', '.join(sorted(unknown))}; known: {', '.join(KINDS)}")
    steps = backend.settings.steps
    if steps < 3:
        raise FlexiError(f"the run has {steps} steps; stretches of it can be measured from 3 on")
    wanted = []
    for kind in (kind for kind in KINDS if kind in kinds):
        sizes = {max(1, round(share * steps)) for share in lengths[kind]}
        for depth in tuple(backend.cost.partial_macs)[:_DEPTHS] if kind == "P" else (0,):
            for after in reversed(_places(steps, places[kind])):
                rest = steps - 1 - after
                fitting = {min(size, rest) for size in sizes} | ({rest} if rest <= _END else set())
                wanted += [(kind, after, length, depth) for length in sorted(fitting)]
    store, total = PredictionStore(), len(wanted) + 1
    teacher = backend.sample(all_full(steps), SEARCH_SEEDS, samples, predictions=store)
    progress(1, total)
    macs, measured = teacher.macs, []
    for done, (kind, after, length, depth) in enumerate(wanted, 2):
        run = _run_of(steps, kind, after, length, depth)
        made = backend.sample(run, SEARCH_SEEDS, samples, predictions=store)
        macs += made.macs
        measured.append(Stretch(kind, after, length, float(latent_mse(made.latents, teacher.latents).mean()), depth))
        progress(done, total)
    return Sensitivities(steps, samples, macs, tuple(measured))


def _run_of(steps: int, kind: str, after: int, length: int, depth: int) -> Schedule:
    """Return the run that is full but for a stretch."""
    segments = ["F"] * after
    segments += ["F", *"f" * length] if kind == "f" else ["F" + kind * length + (f"@{depth}" if kind == "P" else "")]
    return Schedule.parse("|".join([*segments, *"F" * (steps - 1 - after - length)]))


class _Paths:
    """The schedules of a space from the least predicted error up: dynamic programming, then best-first search along it.

    A state before a step that runs: its number, the budget left, the gap to the computed step before it, and the age that
    guidance reused in it would have. A state behind the last computed step of a segment: the same of that step, with the age
    of its own guidance.

    Args:
        sensitivities: the additive model.
        space: the budget.
        kinds: of step that may be used beside F.
        exponent: of the errors that are summed.
        last_computed: whether the run may not end with an X step.
    """

    def __init__(
        self,
        sensitivities: Sensitivities,
        space: Space,
        kinds: Sequence[str],
        exponent: float,
        last_computed: bool = False,
    ) -> None:
        self._model, self._steps, self._exponent = sensitivities, space.steps, exponent
        self._last_computed = last_computed
        self._longest = _LONGEST if "X" in kinds else 0
        units = 20 if "P" in kinds else 2  # of the budget, in a full step

        def price(letters: str) -> int:
            return math.ceil((space.spent(Schedule.parse(f"F{letters}")) - 1) * units - 1e-6)

        self._full, self._reused = units, price("|f") if "f" in kinds else 0
        self._depths = {depth: price(f"P@{depth}") for depth in sensitivities.depths if "P" in kinds and depth in space.depths}
        self._budget = int(space.budget * units)
        pairs = _STATES // (space.steps * (self._budget + 1))
        self._gaps = max(1, min(space.steps, _LONGEST, math.isqrt(pairs) if "f" in kinds else pairs))
        self._ages = self._gaps if "f" in kinds else 0
        self._solve()

    def best(self) -> Iterator[Schedule]:
        """Yield schedules, the best first."""
        order = counting()
        least = self._before[0][self._budget, 0, 0]
        waiting = [(least, next(order), 0.0, False, 0, self._budget, 0, 0, ())]
        while waiting:
            _, _, spent, behind, at, left, gap, age, path = heapq.heappop(waiting)
            if not behind and at == self._steps:
                segments = zip(path[::2], path[1::2], strict=True)
                yield Schedule.parse("|".join(head + nulls + depth for (head, depth), (nulls, _) in segments))
                continue
            moves = self._nulls(at, left, gap, age) if behind else self._heads(at, left, gap, age)
            for error, letters, depth, state in moves:
                ahead = (self._before if behind else self._behind)[state[0]][state[1:]]
                after = spent + error
                if math.isfinite(after + ahead):
                    heapq.heappush(waiting, (after + ahead, next(order), after, not behind, *state, (*path, (letters, depth))))

    def _heads(self, k: int, left: int, gap: int, age: int) -> Iterator[tuple[float, str, str, tuple[int, ...]]]:
        """Yield what a segment at step k may start with: error, letters, depth, the state behind its computed steps."""
        if left >= self._full:
            yield 0.0, "F", "", (k, left - self._full, gap, 0)
        if k and self._ages and left >= self._reused:
            yield 0.0, "f", "", (k, left - self._reused, gap, age)
        for depth, partials, price, error in self._partials(k):
            if left >= price:
                yield error, "F" + "P" * partials, f"@{depth}", (k + partials, left - price, 1, 0)

    def _nulls(self, c: int, left: int, gap: int, age: int) -> Iterator[tuple[float, str, str, tuple[int, ...]]]:
        """Yield the null steps that may follow computed step c: error, letters, no depth, the state before the next segment."""
        for nulls, error in enumerate(self._errors[c]):
            yield error[gap, age], "X" * nulls, "", (c + nulls + 1, left, *self._next(nulls, age))

    def _partials(self, k: int) -> Iterator[tuple[int, int, int, float]]:
        """Yield the partial steps that may follow full step k: depth, how many, the price with the full step, the error."""
        for depth, price in self._depths.items():
            for partials in range(1, self._steps - k):
                error = self._model._partial(k, partials, depth, self._exponent)
                yield depth, partials, self._full + partials * price, error

    def _next(self, length: int, age: Any) -> tuple[int, Any]:
        """Return gap and age before the segment that follows a computed step of this age and `length` null steps."""
        return min(length + 1, self._gaps), np.minimum(age + length + 1, self._ages)

    def _solve(self) -> None:
        """Find the least error from every state to the end of the run [budget left, gap, age]."""
        shape = (self._budget + 1, self._gaps + 1, self._ages + 1)
        gaps, ages = np.arange(shape[1])[:, None], np.arange(shape[2])
        self._before = [np.full(shape, np.inf) for _ in range(self._steps)] + [np.zeros(shape)]
        self._behind = [np.full(shape, np.inf) for _ in range(self._steps)]
        self._errors = []
        for k in reversed(range(self._steps)):
            lengths = range(min(self._longest, self._steps - 1 - k) + 1)
            errors = [np.broadcast_to(self._model._null(k, nulls, gaps, ages, self._exponent), shape[1:]) for nulls in lengths]
            self._errors.insert(0, errors)
            if self._last_computed and lengths.stop == self._steps - k > 1:
                errors[-1] = np.full(shape[1:], np.inf)
            behind, before = self._behind[k], self._before[k]
            for nulls, error in zip(lengths, errors, strict=True):
                gap, age = self._next(nulls, ages)
                np.minimum(behind, self._before[k + nulls + 1][:, gap, age][:, None, :] + error, out=behind)

            def spend(price: int, ahead: np.ndarray, before: np.ndarray = before) -> None:
                left = before[price:]
                np.minimum(left, ahead[: len(left)], out=left)

            spend(self._full, behind[:, :, :1])
            if k and self._ages:
                spend(self._reused, behind)
            for _, partials, price, error in self._partials(k):
                spend(price, self._behind[k + partials][:, 1:2, :1] + error)


def _places(steps: int, count: int) -> list[int]:
    """Return numbers of full steps from the first to near the last, densest at the start, where errors change the most."""
    return sorted({round(max(steps - 1 - _END, 0) * (i / max(count - 1, 1)) ** 1.3) for i in range(count)} & set(range(steps)))


def _carried(kind: str, length: int) -> np.ndarray:
    """Return how far each step of a stretch behind full steps is carried [length]."""
    ahead = np.arange(1, length + 1)
    return np.sqrt(ahead * (ahead + 1) if kind == "X" else ahead)


def _line(places: np.ndarray, values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return values between places, linearly, and beyond them along the first and the last two."""
    if len(places) == 1:
        return np.full(len(at), values[0])
    found = np.interp(at, places, values)
    for outside, i, j in ((at < places[0], 0, 1), (at > places[-1], -2, -1)):
        slope = (values[j] - values[i]) / (places[j] - places[i])
        found[outside] = (values[i] + slope * (at - places[i]))[outside]
    return found


def _differ(a: Schedule, b: Schedule) -> int:
    return sum((x.kind, x.depth) != (y.kind, y.depth) for x, y in zip(a.steps(), b.steps(), strict=True))
