"""What a run's sampler does, found by trying it on a few numbers: no sampler is known by its name.

It is run on a latent of a handful of numbers and noise levels, with answers that are given in place of a network's. From where
it asks, how its states follow from the answers, and what another seed changes, follows what a null step may be under it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

# (denoise(x, sigma), x, sigmas [n + 1], seed) -> where the sampler ends
Solver = Callable[..., torch.Tensor]

_LEVELS = 4  # and the end of the run
_MOST_QUESTIONS = 64
_LONGEST_FOLLOWED = 200  # steps; of a longer run, a few levels are tried alone
_SAME_LEVEL = 1e-3  # relative
_SAME = 1e-4  # of the largest number beside it: float32's rounding, many times over


@dataclass(frozen=True)
class SamplerTraits:
    """What decides how null steps are predicted, and which presets there are.

    Args:
        draws_noise: another seed makes another picture from the same start.
        noise_of_interval: the noise belongs to the noise levels between which it is drawn (a Brownian path), so that a run of
            fewer steps meets the same.
        evaluations: most questions to the network in a step.
        memory: how many steps before its own a step's answers are taken from.
        is_linear: its states are linear in its start and the answers.
        keeps_levels: it asks at each of the run's noise levels, and nowhere above the first.
        reads_guidance: it reads the prediction without the prompt, which an extrapolated step does not have (CFG++).
        renews: a step ends in its answer and fresh noise alone (LCM).
        asks_between: it asks elsewhere than where steps begin, too.
        goes_back: how far it goes back up within its steps, in levels: -1 where each question lies below the last, 0 where
            one may be at the same level, 1 where a step looks ahead of the next one's start. More is new noise.
    """

    draws_noise: bool = False
    noise_of_interval: bool = False
    evaluations: int = 1
    memory: int = 0
    is_linear: bool = True
    keeps_levels: bool = True
    reads_guidance: bool = False
    renews: bool = False
    asks_between: bool = field(default=True, compare=False)
    goes_back: int = field(default=1, compare=False)

    @property
    def kind(self) -> str:
        """The kind of sampler that presets are measured for."""
        noise = "brownian" if self.noise_of_interval else "noise" if self.draws_noise else "no noise"
        return f"{noise}, memory {self.memory}, {self.evaluations} a step{', renewed' if self.renews else ''}"

    @property
    def words(self) -> str:
        """What kind of sampler it is, in words."""
        parts = ["draws noise" if self.draws_noise else "draws no noise"]
        parts += [f"asks {self.evaluations} times a step"] if self.evaluations > 1 else []
        parts += ["goes by earlier steps too"] if self.memory else []
        return ", ".join(parts)


PLAIN = SamplerTraits()  # Euler's


class _OwnLevels(Exception):
    """The sampler asked too often, or where no step of the run is."""


@dataclass(frozen=True)
class _Trial:
    """One trial run: the noise levels asked for [m], the states there [m, k], and the last state [k], float64."""

    asked: tuple[float, ...]
    states: torch.Tensor
    end: torch.Tensor

    @property
    def everything(self) -> torch.Tensor:
        """All states and the end [m + 1, k]."""
        return torch.cat([self.states, self.end[None]])


def probe(solve: Solver, sigmas: Sequence[float]) -> SamplerTraits | None:
    """Return what a sampler does on a run's noise levels; None where it cannot be tried.

    Args:
        solve: the sampler with any denoiser, `solve(denoise, x, sigmas, seed)`. An attribute `reads_guidance` that it sets is
            taken over.
        sigmas: of the run [n + 1], falling.
    """
    # Some samplers cannot do with the exact numbers that others are told apart by best.
    for dtype in (torch.float64, torch.float32):
        try:
            traits = _probe(solve, _levels(sigmas).to(dtype))
            return _on_every_level(traits, solve, sigmas, dtype) if traits.keeps_levels else traits
        except _OwnLevels:
            return SamplerTraits(keeps_levels=False)
        except Exception:  # whatever a sampler's code does with a model of another kind: it is then not known
            continue
    return None


def _probe(solve: Solver, levels: torch.Tensor) -> SamplerTraits:
    first, other = (_try(solve, levels, seed, _shrink, torch.ones(1, 4)) for seed in (1, 2))
    reads_guidance = bool(getattr(solve, "reads_guidance", False))
    starts = [_last_at(first.asked, level) for level in levels[:-1].tolist()]
    if None in starts or max(first.asked) > float(levels[0]) * (1 + _SAME_LEVEL):
        return SamplerTraits(keeps_levels=False, reads_guidance=reads_guidance)
    draws_noise = not torch.allclose(first.everything, other.everything, rtol=_SAME, atol=_SAME)
    evaluations = -(-len(first.asked) // (len(levels) - 1))
    try:
        response = _response(solve, levels, len(first.asked))
    except Exception:  # it asks otherwise where the answers are others: not linear
        response = None
    if response is None:
        return SamplerTraits(draws_noise, False, evaluations, _LEVELS - 1, False, True, reads_guidance)
    own = draws_noise and _noise_is_of_interval(solve, levels, starts, response)
    renews = draws_noise and all(abs(float(response[start][0])) <= _SAME for start in starts[1:])
    return SamplerTraits(draws_noise, own, evaluations, _memory(response, starts), True, True, reads_guidance, renews)


def _on_every_level(traits: SamplerTraits, solve: Solver, sigmas: Sequence[float], dtype: torch.dtype) -> SamplerTraits:
    """Add to what a sampler does on a few noise levels where it asks on all of them: what is around it may change some."""
    grid = torch.tensor([float(s) for s in sigmas], dtype=dtype) if len(sigmas) <= _LONGEST_FOLLOWED else _levels(sigmas)
    limit = _MOST_QUESTIONS + 4 * len(grid)
    try:
        asked = _try(solve, grid.to(dtype), 1, _shrink, torch.ones(1, 4), limit).asked
    except _OwnLevels:
        raise
    except Exception:  # not known then, and taken for the freest
        return traits
    starts = grid[:-1].tolist()
    if any(_last_at(asked, level) is None for level in starts) or max(asked) > starts[0] * (1 + _SAME_LEVEL):
        return replace(traits, keeps_levels=False)
    between = any(_last_at(starts, sigma) is None for sigma in asked)
    return replace(traits, asks_between=between, goes_back=_goes_back(asked, len(starts)))


def _goes_back(asked: Sequence[float], steps: int) -> int:
    """Return how many levels questions go back up to, as `SamplerTraits.goes_back`; what most steps do not do is a restart."""
    rises = repeats = 0
    lowest = math.inf
    for sigma in asked:
        rises += sigma > lowest * (1 + _SAME_LEVEL)
        repeats += abs(sigma - lowest) <= lowest * _SAME_LEVEL
        lowest = min(lowest, sigma)
    many = max((steps - 1) // 2, 1)
    return 1 if rises >= many else 0 if repeats >= many else -1


def _levels(sigmas: Sequence[float]) -> torch.Tensor:
    """Return four of a run's noise levels, or as many between its ends where it has fewer, and its end [5]."""
    high, end = float(sigmas[0]), float(sigmas[-1])
    steps = [float(s) for s in sigmas[:-1]]
    if len(steps) >= _LEVELS:
        chosen = [steps[round(i * (len(steps) - 1) / (_LEVELS - 1))] for i in range(_LEVELS)]
    else:
        low = steps[-1] if len(steps) > 1 else max(end * 1.5, high / 8) if end < high / 2 else (high + end) / 2
        chosen = [high * (low / high) ** (i / (_LEVELS - 1)) for i in range(_LEVELS)]
    return torch.tensor([*chosen, end])


def _shrink(number: int, x: torch.Tensor) -> torch.Tensor:
    return x / 2


def _try(
    solve: Solver,
    levels: torch.Tensor,
    seed: int,
    answer: Callable[[int, torch.Tensor], torch.Tensor],
    start: torch.Tensor,
    limit: int = _MOST_QUESTIONS,
) -> _Trial:
    """Run a sampler from a start [1, k] whose question number i is answered by `answer(i, x)`; `limit` is the most of them."""
    asked: list[float] = []
    states: list[torch.Tensor] = []

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        if len(asked) == limit:
            raise _OwnLevels
        asked.append(sigma)
        states.append(x.detach().double().flatten().clone())
        return answer(len(asked) - 1, x).to(x)

    end = solve(denoise, start.reshape(1, 1, 1, -1).to(levels), levels.float(), seed)
    found = _Trial(tuple(asked), torch.stack(states), end.detach().double().flatten())
    if not found.everything.isfinite().all():
        raise ValueError("the sampler's states are not finite")
    return found


def _response(solve: Solver, levels: torch.Tensor, questions: int) -> torch.Tensor | None:
    """Return how a sampler's states follow from its start and the answers; None where they are not linear in these.

    Its noise, the same at one seed, is what it makes of nothing.

    Returns:
        coefficients [m + 1, m + 1], float64: rows are the states at its m questions and its end, columns the start and the
        answers.
    """
    units = torch.eye(questions + 1, dtype=torch.float64)
    mixed = torch.linspace(-1, 1, questions + 1, dtype=torch.float64).sin()

    def linear_part(inputs: torch.Tensor) -> torch.Tensor:
        def run(given: torch.Tensor) -> torch.Tensor:
            trial = _try(solve, levels, 1, lambda i, x: given[i + 1].reshape(x.shape), given[0])
            if len(trial.asked) != questions:
                raise ValueError("the sampler asks otherwise where the answers are others")
            return trial.everything

        return run(inputs) - run(torch.zeros_like(inputs))

    response, both = linear_part(units), linear_part(mixed[:, None])
    expected = response @ mixed
    size = float(expected.abs().max())
    return response if torch.allclose(both[:, 0], expected, rtol=_SAME, atol=_SAME * size) else None


def _last_at(asked: Sequence[float], level: float) -> int | None:
    """Return the last question at a noise level: a step's start, after the corrector's of the step before."""
    return next((i for i in reversed(range(len(asked))) if abs(asked[i] - level) <= _SAME_LEVEL * level), None)


def _memory(response: torch.Tensor, starts: Sequence[int]) -> int:
    """Return from how many earlier steps a step takes answers otherwise than through the state that it begins in."""
    longest = 0
    for i, (start, stop) in enumerate(zip(starts, [*starts[1:], len(response) - 1], strict=True)):
        before, after = response[start], response[stop]
        # The run's own start is passed on by states alone.
        carried = float(after[0] / before[0]) if abs(float(before[0])) > _SAME else 0.0
        left = (after - carried * before)[1 : start + 1].abs()  # of the answers before the step's own
        size = _SAME * max(float(after.abs().max()), 1e-3)
        longest = max(longest, *(i - j for j in range(i) if float(left[starts[j] : starts[j + 1]].max()) > size), 0)
    return longest


def _noise_is_of_interval(solve: Solver, levels: torch.Tensor, starts: Sequence[int], response: torch.Tensor) -> bool:
    """Return whether a step's noise is the same where the run had one step less before it."""
    shorter = torch.cat([levels[:1], levels[2:]])

    def noise(grid: torch.Tensor, at: int) -> torch.Tensor:
        """Return what the step to level number `at` of a grid adds to nothing."""
        trial = _try(solve, grid, 1, lambda _, x: torch.zeros_like(x), torch.zeros(1, 4))
        found = [_last_at(trial.asked, float(level)) for level in grid[at - 1 : at + 1]]
        if None in found:
            raise ValueError("the sampler asks elsewhere on a shorter run")
        begin, stop = found
        return trial.states[stop] - carried * trial.states[begin]

    begin, stop = response[starts[2]][0], response[starts[3]][0]
    carried = float(stop / begin) if abs(float(begin)) > _SAME else 0.0
    try:
        whole, short = noise(levels, 3), noise(shorter, 2)
    except Exception:
        return False
    return bool(whole.abs().max() > _SAME) and torch.allclose(whole, short, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))
