"""The one family of errors that this project raises."""

from .words import shortened, visible

_LONGEST = 2_000  # characters


class FlexiError(Exception):
    """Bad input, said in words: what came, what was expected, what to do. Every error of ours is one.

    What it quotes may be a stranger's: unseen characters are spelled out, and a long message is cut.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(shortened(visible(str(message)), _LONGEST))


class ScheduleError(FlexiError, ValueError):
    """A schedule, or a schedule file, that cannot be used."""
