"""Segments: one full step each, and the steps that live off it (Flexiffusion, arXiv 2409.17566)."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ScheduleError
from .kinds import StepKind

MAX_STEPS = 10_000
MAX_DEPTH = 1_000
MAX_ORDER = 3
MAX_BLEND = 100
BASES = ("derivative", "denoised")  # what extrapolated steps carry on: (x - denoised) / sigma, or the denoised latent
DEFAULT_DEPTH = 3  # the shallowest depth at which held features did not drift in long runs


@dataclass(frozen=True)
class Segment:
    """One full step and the steps that live off it.

    Args:
        kinds: the steps in order: a full one, then partial ones, then nulls. Behind a full step that ran the conditional half
            alone, partial steps do so too.
        depth: how many of the shallowest blocks a partial step runs (the paper's branch); None without partial steps.
        forecast: order in which its partial steps extrapolate the deep feature from the full steps before them; 0 holds it.
        blend: of the segment's extrapolated steps: what the held prediction, its linear and its quadratic change are each
            multiplied with; None for the schedule's order, every factor 1.

    Raises:
        ScheduleError: the order is another, or a depth or a blend is missing, superfluous or out of range.
    """

    kinds: tuple[StepKind, ...]
    depth: int | None = None
    blend: tuple[float, ...] | None = None
    forecast: int = 0

    def __post_init__(self) -> None:
        letters = self.letters
        if letters[:1] not in ("F", "f"):
            raise ScheduleError(f"a segment starts with a full step, this one is {letters or 'empty'!r}; put an F first")
        if any(kind.is_full for kind in self.kinds[1:]):
            raise ScheduleError(f"a segment has one full step, this one is {letters!r}; put a | before every later F")
        partial = any(kind.is_partial for kind in self.kinds)
        if any(kind.is_partial for kind in self.kinds[self.interval :]):
            raise ScheduleError(
                f"in a segment the partial steps come before the null steps, this one is {letters!r}; "
                "move its P forward or start a new segment with F"
            )
        if letters[0] == "f" and "P" in letters:
            raise ScheduleError(f"after f only one half has a deep feature, this segment is {letters!r}; write p, or F first")
        if (self.depth is None) == partial:
            raise ScheduleError(f"the segment {letters!r} has depth {self.depth}; a depth belongs to a segment with P steps")
        if self.depth is not None and not 1 <= self.depth <= MAX_DEPTH:
            raise ScheduleError(f"the segment {letters!r} has depth {self.depth}; a depth is 1 to {MAX_DEPTH} blocks")
        if not 0 <= self.forecast <= MAX_ORDER or (self.forecast and self.depth is None):
            raise ScheduleError(
                f"the segment {letters!r} has forecast order {self.forecast}; it is 0 to {MAX_ORDER}, above 0 with P steps"
            )
        if self.blend is not None:
            self._check_blend()

    def _check_blend(self) -> None:
        if "X" not in self.letters:
            raise ScheduleError(f"the segment {self.letters!r} has a blend and no extrapolated step X; leave out the ~")
        if not 1 <= len(self.blend) <= MAX_ORDER + 1:
            raise ScheduleError(f"a blend has {len(self.blend)} factors; it is 1 to {MAX_ORDER + 1}: held, linear, and so on")
        if not all(abs(factor) <= MAX_BLEND for factor in self.blend):  # and so no NaN
            raise ScheduleError(f"a blend is {', '.join(map(str, self.blend))}; factors are -{MAX_BLEND} to {MAX_BLEND}")

    @property
    def letters(self) -> str:
        return "".join(kind.value for kind in self.kinds)

    @property
    def interval(self) -> int:
        """The paper's interval: the segment's active steps, full and partial."""
        return sum(not kind.is_null for kind in self.kinds)

    def __len__(self) -> int:
        return len(self.kinds)


@dataclass(frozen=True)
class Step:
    """One step of a schedule: its kind, its segment's number, its depth and forecast if partial, its blend if extrapolated."""

    kind: StepKind
    depth: int | None
    segment: int
    blend: tuple[float, ...] | None = None
    forecast: int = 0
