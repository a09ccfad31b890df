"""Schedule text: parse and print.

    schedule = group *(["|"] group) [";" option *("," option)]
    group    = count "*" "(" group *(["|"] group) ")" | letters ["@" depth ["^" order]] ["~" factor *("," factor)]
    option   = "order" "=" number | "sigmas" "=" level *("/" level) | "basis" "=" name

Spaces and line ends are free. Segments are letters F, P, N, X, f, p; a run such as FFXX splits before each F, so that `|` may
be left out.
"""

from __future__ import annotations

import re
from itertools import groupby

from ..errors import ScheduleError
from .kinds import StepKind
from .segment import BASES, DEFAULT_DEPTH, MAX_STEPS, Segment

MAX_TEXT = 100_000  # characters
_MAX_NESTING = 8
_LETTERS = "".join(kind.value for kind in StepKind)
_TOKEN = re.compile(
    r"\s*(?:(-?(?:\d{1,20}\.?\d{0,20}|\.\d{1,20})e-?\d{1,3}|-?\d*\.\d+|-\d+)|(\d+)|([A-Za-z]+)|([|@*();=,~^/])|(\S))"
)


Written = tuple[
    tuple[Segment, ...], int, tuple[float, ...] | None, str | None
]  # segments, order, sigmas, basis of a `Schedule`


def parse(text: str) -> Written:
    """Return what a text says; see `Schedule.parse`."""
    if not isinstance(text, str):
        raise ScheduleError(f"a schedule is text, this is {type(text).__name__}")
    if len(text) > MAX_TEXT:
        raise ScheduleError(f"the schedule text has {len(text)} characters; at most {MAX_TEXT} are read")
    if not text.strip():
        raise ScheduleError("the schedule text is empty; write one letter for each step, for example 10*(FX)")
    return _Parser(text).schedule()


def unparse(segments: tuple[Segment, ...], order: int, sigmas: tuple[float, ...] | None, basis: str | None) -> str:
    """Return the text of a schedule's parts; equal neighbouring segments are folded into `n*(...)`."""
    parts = []
    for segment, group in groupby(segments):
        text = segment.letters + (f"@{segment.depth}" if segment.depth is not None else "")
        text += f"^{segment.forecast}" if segment.forecast else ""
        text += "" if segment.blend is None else "~" + ",".join(map(_decimal, segment.blend))
        count = len(list(group))
        parts.append(text if count == 1 else f"{count}*({text})")
    options = [] if order == 1 else [f"order={order}"]
    options += [] if basis is None else [f"basis={basis}"]
    options += [] if sigmas is None else ["sigmas=" + "/".join(map(_decimal, sigmas))]
    return "|".join(parts) + ("; " + ", ".join(options) if options else "")


def _decimal(value: float) -> str:
    return repr(float(value)).removesuffix(".0").replace("e+", "e")


class _Parser:
    """Recursive descent over the tokens of one text."""

    def __init__(self, text: str) -> None:
        self.text = text
        # Without trailing spaces, which match no token and would be scanned anew from each of them.
        self.tokens = [(m.group().strip(), m.start(m.lastindex)) for m in _TOKEN.finditer(text.rstrip())]
        self.at = 0

    def schedule(self) -> Written:
        segments = self.groups(nesting=0)
        order, sigmas, basis = 1, None, None
        if self.take(";"):
            while self.peek():
                name = self.next("an option such as order=2")
                if name not in ("order", "basis", "sigmas"):
                    raise self.error(f"unknown option {name!r}; known: order, basis, sigmas")
                self.expect("=")
                if name == "order":
                    order = self.number("the extrapolation order")
                elif name == "basis":
                    basis = self.next(f"a basis: {' or '.join(BASES)}")
                else:
                    sigmas = self.decimals("/", "a noise level such as 14.6")
                if not self.take(","):
                    break
        if self.peek():
            raise self.error(f"unexpected {self.peek()!r}; segments are joined by |")
        return tuple(segments), order, sigmas, basis

    def groups(self, nesting: int) -> list[Segment]:
        segments = self.group(nesting)
        steps = sum(map(len, segments))
        while self.take("|") or self.begins():
            more = self.group(nesting)
            steps += sum(map(len, more))
            self.bound(steps)
            segments += more
        return segments

    def group(self, nesting: int) -> list[Segment]:
        if self.peek().isdigit():
            count = self.number("a repeat count")
            self.expect("*")
            self.expect("(")
            if nesting == _MAX_NESTING:
                raise self.error(f"repeats are nested more than {_MAX_NESTING} deep; write them out")
            inside = self.groups(nesting + 1)
            self.expect(")")
            if count == 0:
                raise self.error("a repeat count of 0 leaves no steps; use 1 or more")
            self.bound(count * sum(len(segment) for segment in inside))
            return inside * count
        return self.segments()

    def segments(self) -> list[Segment]:
        letters = self.next("steps: letters F, P, N, X, f, p")
        start = self.tokens[self.at - 1][1]
        self.bound(len(letters))
        for offset, letter in enumerate(letters):
            if letter not in _LETTERS:
                hint = f"; did you mean {letter.upper()}?" if letter.upper() in _LETTERS else ""
                raise ScheduleError(
                    f"at character {start + offset + 1}: unknown step {letter!r}; steps are F (full), P (partial), "
                    f"N (removed), X (extrapolated), f and p (full and partial with the last guidance){hint}"
                )
        if letters[0] not in "Ff":
            raise ScheduleError(
                f"at character {start + 1}: a segment starts with a full step, this one is {letters!r}; put an F first"
            )
        depth = self.number("a depth") if self.take("@") else None
        if depth is not None and not set(letters) & set("Pp"):
            raise self.error(f"{letters!r} has depth {depth} and no partial step P to run at it; leave out @{depth}")
        forecast = self.number("a forecast order") if depth is not None and self.take("^") else 0
        blend = self.decimals(",", "a factor of a blend such as 0.98") if self.take("~") else None
        if blend is not None and "X" not in letters:
            raise self.error(f"{letters!r} has a blend and no extrapolated step X; leave out the ~")
        segments = []
        for part in re.findall("[Ff][^Ff]*", letters):
            kinds = tuple(StepKind(letter) for letter in part)
            partial = any(kind.is_partial for kind in kinds)
            own = (DEFAULT_DEPTH if depth is None else depth) if partial else None
            segments.append(Segment(kinds, own, blend if "X" in part else None, forecast if partial else 0))
        return segments

    def decimals(self, between: str, what: str) -> tuple[float, ...]:
        found = [self.decimal(what)]
        while self.take(between):
            self.bound(len(found) - 1)
            found.append(self.decimal(what))
        return tuple(found)

    def decimal(self, what: str) -> float:
        token = self.peek()
        try:
            value = float(token) if len(token) <= 30 else None
        except ValueError:
            value = None
        if value is None or not token[-1].isdigit():
            raise self.error(f"expected {what}, found {token[:20] or 'the end'!r}")
        self.at += 1
        return value

    def bound(self, steps: int) -> None:
        if steps > MAX_STEPS:
            raise ScheduleError(f"the schedule has {steps} steps or more; at most {MAX_STEPS} are supported")

    def peek(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else ""

    def begins(self) -> bool:
        """Return whether another segment, or a repeat of some, begins here."""
        following = self.tokens[self.at + 1][0] if self.at + 1 < len(self.tokens) else ""
        return self.peek()[:1] in ("F", "f") or (self.peek().isdigit() and following == "*")

    def take(self, token: str) -> bool:
        found = self.peek() == token
        self.at += found
        return found

    def next(self, wanted: str) -> str:
        token = self.peek()
        if not token.isalpha():
            raise self.error(f"expected {wanted}, found {token or 'the end'!r}")
        self.at += 1
        return token

    def expect(self, token: str) -> None:
        if not self.take(token):
            raise self.error(f"expected {token!r}, found {self.peek() or 'the end'!r}")

    def number(self, what: str) -> int:
        token = self.peek()
        if not token.isdecimal() or len(token) > 6:
            raise self.error(f"expected {what} (a whole number of at most 6 digits), found {token[:20] or 'the end'!r}")
        self.at += 1
        return int(token)

    def error(self, message: str) -> ScheduleError:
        place = self.tokens[self.at][1] + 1 if self.at < len(self.tokens) else len(self.text) + 1
        return ScheduleError(f"at character {place} of the schedule {_clip(self.text)!r}: {message}")


def _clip(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
