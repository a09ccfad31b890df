"""Where one stage of a run ends and the next begins: boundaries in noise levels, and how people give them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import FlexiError
from ..schedule.levels import SIGMA_TOLERANCE

MOST = 1e18  # sigma; where a schedule's noise levels end too
_HALVINGS = 60  # of an interval of noise levels: below float32's rounding
WAN_BOUNDARIES = {"Wan 2.2 text to video (0.875)": 0.875, "Wan 2.2 image to video (0.900)": 0.9}
UNITS = ("timestep", "sigma", "share of the run", *WAN_BOUNDARIES)


@dataclass(frozen=True)
class Stages:
    """Stretches of noise levels, from high to low, each with a network of its own.

    Args:
        boundaries: the noise levels between them, falling. A level on a boundary belongs to the stage below it, as it does
            where a second sampling window begins there.
        names: of the stages, one more than boundaries.

    Raises:
        FlexiError: the boundaries do not fall, or are not one fewer than the names.
    """

    boundaries: tuple[float, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        falls = all(high > low for high, low in zip(self.boundaries, self.boundaries[1:], strict=False))
        if len(self.names) != len(self.boundaries) + 1 or not falls or not all(level >= 0 for level in self.boundaries):
            found = ", ".join(f"{level:g}" for level in self.boundaries)
            raise FlexiError(
                f"{len(self.names)} stages have the boundaries {found}; expected one fewer, each a noise level below the last"
            )

    def at(self, sigma: float) -> int:
        """Return the number of the stage that a noise level belongs to, 0 at the highest."""
        return sum(sigma <= level * (1 + SIGMA_TOLERANCE) for level in self.boundaries)

    def starts(self, sigmas: Sequence[float]) -> tuple[int, ...]:
        """Return the numbers of a run's steps at which another stage begins than that of the step before.

        Args:
            sigmas: of the run [n + 1], falling.
        """
        at = [self.at(float(sigma)) for sigma in sigmas[:-1]]
        return tuple(i for i in range(1, len(at)) if at[i] != at[i - 1])


@dataclass(frozen=True)
class Boundary:
    """A boundary as people give it.

    Args:
        value: of a unit; a preset has its own.
        unit: one of `UNITS`: a share of the model's time (that of a flow model is its noise level), a noise level, or a share
            of the run's steps.

    Raises:
        FlexiError: the unit is another, a noise level is below 0, or a share is not within 0 to 1.
    """

    value: float
    unit: str = UNITS[0]

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise FlexiError(f"the boundary's unit is {self.unit!r}; expected one of {', '.join(UNITS)}")
        if self.unit not in WAN_BOUNDARIES and not 0 <= self.value <= (MOST if self.unit == "sigma" else 1):
            wanted = "0 or more" if self.unit == "sigma" else "0 to 1"
            raise FlexiError(f"the boundary is {self.value:g}; as {self.unit} it is {wanted}")

    def level(self, sigmas: Sequence[float], timestep: Callable[[float], float], ends: tuple[float, float]) -> float:
        """Return the boundary as a noise level.

        Args:
            sigmas: of the run [n + 1], falling.
            timestep: returns the model's time at a noise level.
            ends: the model's lowest and highest noise level, both above 0.

        Raises:
            FlexiError: the model's time does not begin at 0 or above, and has no shares.
        """
        if self.unit == "sigma":
            return self.value
        if self.unit == "share of the run":
            return sigmas[math.floor(self.value * (len(sigmas) - 1) + 0.5)]
        (low, high), share = ends, WAN_BOUNDARIES.get(self.unit, self.value)
        if not 0 <= timestep(low) < timestep(high):
            raise FlexiError("this model's time is no share of a whole; give the boundary as sigma, or as a share of the run")
        wanted = share * timestep(high)
        if timestep(low) >= wanted:
            return 0.0
        for _ in range(_HALVINGS):
            middle = (low * high) ** 0.5
            low, high = (low, middle) if timestep(middle) >= wanted else (middle, high)
        return high


def with_boundary(sigmas: Sequence[float], level: float) -> list[float]:
    """Return a run's noise levels [n + 1] with the one next to a boundary put on it, where a step would straddle it.

    The run keeps its ends and its number of steps, so that a schedule for it still fits.
    """
    levels = [float(sigma) for sigma in sigmas]
    on = any(abs(sigma - level) <= SIGMA_TOLERANCE * level for sigma in levels)
    if len(levels) < 3 or on or not levels[-1] < level < levels[0]:
        return levels
    below = next(i for i, sigma in enumerate(levels) if sigma < level)
    above_is_nearer = levels[below] == 0 or level * level > levels[below] * levels[below - 1]
    levels[min(max(below - above_is_nearer, 1), len(levels) - 2)] = level
    return levels
