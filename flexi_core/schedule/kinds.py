"""The kinds of steps: what each computes, what people call it, and how it is drawn. One table; nobody else lists them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class _Row:
    """What is known of one kind of step.

    Args:
        label: what people call it.
        blocks: that it runs: "all", "shallow", or none.
        colour: of its cell on a screen.
        height: of its cell, and its share of a full step's work where that is not counted: a partial step's share depends on
            the network. A removed step takes up nothing, and is drawn all the same.
        style: of its letter at a terminal, as rich has it.
        prompt_alone: whether its guidance is that of the last step that ran both halves.
    """

    label: str
    blocks: str
    colour: str
    height: float
    style: str
    prompt_alone: bool = False


class StepKind(Enum):
    """What one step of the sampling run computes; its value is its letter."""

    FULL = "F"  # every block
    PARTIAL = "P"  # the shallow blocks, on the deep feature of the segment's full step
    NULL = "N"  # nothing: the step is removed from the run's sigmas
    EXTRAPOLATED = "X"  # nothing: the prediction is extrapolated from the last computed steps
    FULL_CONDITIONAL = "f"  # every block, with the prompt alone: the guidance is that of the last step that ran both halves
    PARTIAL_CONDITIONAL = "p"  # the shallow blocks, with the prompt alone

    @property
    def label(self) -> str:
        """What people call such a step."""
        return _TABLE[self.value].label

    @property
    def is_full(self) -> bool:
        return _TABLE[self.value].blocks == "all"

    @property
    def is_partial(self) -> bool:
        return _TABLE[self.value].blocks == "shallow"

    @property
    def is_null(self) -> bool:
        return not _TABLE[self.value].blocks

    @property
    def reuses_guidance(self) -> bool:
        return _TABLE[self.value].prompt_alone

    @property
    def colour(self) -> str:
        """Of its cell on a screen, as `#rrggbb`."""
        return _TABLE[self.value].colour

    @property
    def height(self) -> float:
        """Of its cell, 0 to 1: its share of a full step's work, as far as that is known of any network."""
        return _TABLE[self.value].height

    @property
    def style(self) -> str:
        """Of its letter at a terminal, in rich's words."""
        return _TABLE[self.value].style


_TABLE = {
    "F": _Row("full", "all", "#3d7ff0", 1.0, "white on blue"),
    "P": _Row("partial", "shallow", "#35b597", 0.5, "black on cyan"),
    "N": _Row("removed", "", "#565c69", 0.08, "dim"),
    "X": _Row("extrapolated", "", "#f0a63c", 0.2, "black on yellow"),
    "f": _Row("full, guidance reused", "all", "#9b7ff0", 0.5, "white on magenta", prompt_alone=True),
    "p": _Row("partial, guidance reused", "shallow", "#7ad0a0", 0.25, "black on green", prompt_alone=True),
}
