"""The one family of errors that this project raises."""


class FlexiError(Exception):
    """Bad input, said in words: what came, what was expected, what to do. Every error of ours is one."""


class ScheduleError(FlexiError, ValueError):
    """A schedule, or a schedule file, that cannot be used."""
