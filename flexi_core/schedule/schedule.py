"""The schedule: which blocks of the network each sampling step runs.

A schedule is a value. Its segments (Flexiffusion, arXiv 2409.17566) each open with one full step, go on with partial steps
that reuse the full step's deep feature, and end with null steps. Its text, what people type and share, is in `grammar`; its
file in `file`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import ScheduleError
from .grammar import parse, unparse
from .kinds import StepKind
from .segment import BASES, MAX_ORDER, MAX_STEPS, Segment, Step

# Of the noise level above it; nearer ones are taken for one level (`plan.SIGMA_TOLERANCE`). Tried at single gaps, the host's
# dpmpp_sde ends in an error at 1e-6 and deis in NaN at 1e-7; samplers that draw noise and remember steps are 2 to 28 times off
# at 1e-4 already, and ipndm_v at any.
SMALLEST_GAP = 1e-4
SMALLEST_LEVEL = 1e-6  # above 0; samplers divide by it in float32
_MAX_LEVEL = 1e18  # its square is still a float32


def falls(sigmas: Sequence[float], gap: float = 0.0) -> bool:
    """Return whether noise levels [n + 1] fall from step to step in float32, as samplers get them.

    Args:
        sigmas: finite.
        gap: the least fall, as a share of the level before.
    """
    with np.errstate(over="ignore"):
        levels = np.asarray(sigmas, np.float64).astype(np.float32)
    high, low = levels[:-1], levels[1:]
    return bool(np.isfinite(levels).all() and (low < high).all() and (high - low >= np.float32(gap) * high).all())


@dataclass(frozen=True)
class Schedule:
    """Segments in order, and how extrapolated steps are computed.

    Args:
        segments: at least one.
        order: of the extrapolation in segments without a blend: 0 holds the last prediction, 1 is linear, at most 3.
        sigmas: the noise levels [n + 1] that its steps run at, in place of the sampling run's own; None keeps those.
        basis: of the extrapolation, one of `BASES`; None leaves it to the sampler (see `basis.rule_of`).
        info: what the schedule's file says beside the schedule (teacher, measured, provenance, unknown keys); it takes no
            part in equality.

    Raises:
        ScheduleError: no segment, too many steps, an order out of range, an unknown basis, or sigmas that are too few, too many
            or do not fall.
    """

    segments: tuple[Segment, ...]
    order: int = 1
    sigmas: tuple[float, ...] | None = None
    basis: str | None = None
    info: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not self.segments:
            raise ScheduleError("the schedule is empty; write one letter for each step, for example 10*(FX)")
        if self.segments[0].kinds[0].reuses_guidance:
            raise ScheduleError("the first step has no guidance to reuse; start with F")
        if len(self) > MAX_STEPS:
            raise ScheduleError(f"the schedule has {len(self)} steps; at most {MAX_STEPS} are supported")
        if not 0 <= self.order <= MAX_ORDER:
            raise ScheduleError(f"the extrapolation order is {self.order}; it is 0 (hold) to {MAX_ORDER}")
        if self.basis not in (None, *BASES):
            raise ScheduleError(f"the basis is {self.basis!r}; it is one of {', '.join(BASES)}")
        if self.sigmas is not None:
            self._check_sigmas()

    def _check_sigmas(self) -> None:
        if len(self.sigmas) != len(self) + 1:
            raise ScheduleError(
                f"the schedule of {len(self)} steps has {len(self.sigmas)} noise levels; it is {len(self) + 1}, the end's too"
            )
        if not all(math.isfinite(level) and level >= 0 for level in self.sigmas):
            raise ScheduleError("a noise level of the schedule is not a number from 0 up")
        if not falls(self.sigmas, SMALLEST_GAP):
            raise ScheduleError(
                "the schedule's noise levels do not fall from step to step, or by less than "
                f"{SMALLEST_GAP:g} of the level before, which samplers do not bear"
            )
        if any(0 < level < SMALLEST_LEVEL for level in self.sigmas) or max(self.sigmas) > _MAX_LEVEL:
            raise ScheduleError(
                f"the schedule's noise levels are {min(self.sigmas):g} to {max(self.sigmas):g}; a level is 0, or "
                f"{SMALLEST_LEVEL:g} to {_MAX_LEVEL:g}"
            )

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read schedule text such as `FPPNN@2|2*(FPNNN@1)|FPPPP@3` or `10*(FXXXX); order=2`.

        Raises:
            ScheduleError: the text is not a schedule; the message names the place.
        """
        return cls(*parse(text))

    def __str__(self) -> str:
        return unparse(self.segments, self.order, self.sigmas, self.basis)

    def __len__(self) -> int:
        return sum(len(segment) for segment in self.segments)

    @property
    def letters(self) -> str:
        """One letter for each step, without segments and depths."""
        return "".join(segment.letters for segment in self.segments)

    @property
    def is_all_full(self) -> bool:
        return set(self.letters) == {"F"}

    def steps(self) -> Iterator[Step]:
        """Yield the steps in order."""
        for number, segment in enumerate(self.segments):
            for kind in segment.kinds:
                extrapolated = kind is StepKind.EXTRAPOLATED
                depth, forecast = (segment.depth, segment.forecast) if kind.is_partial else (None, 0)
                yield Step(kind, depth, number, segment.blend if extrapolated else None, forecast)

    @property
    def reuses_guidance(self) -> bool:
        """Whether any step runs the conditional half alone."""
        return any(kind.reuses_guidance for segment in self.segments for kind in segment.kinds)

    def with_info(self, **entries: Any) -> Schedule:
        """Return the schedule with these entries of its info set."""
        return replace(self, info={**self.info, **entries})

    @property
    def teacher_sigmas(self) -> tuple[float, ...] | None:
        """The sigma grid [n + 1] of the run that the schedule was made for, where its file has one."""
        sigmas = self.info.get("teacher", {}).get("sigmas")
        return None if sigmas is None else tuple(sigmas)
