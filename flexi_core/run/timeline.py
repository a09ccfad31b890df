"""A picture of a run: one cell for each step, as high as its share of a full step's compute.

The filled area is the compute that was spent, the empty area what the schedule saved.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..schedule.kinds import StepKind
from ..words import shortened, visible
from .report import RunReport, StepReport

WIDTH = 1024  # pixels
MARGIN, _CELL_HEIGHT, _GAP, _LINE = 28, 88, 3, 26
_NUMBER_WIDTH = 26  # pixels, with air around it
_STEPS_PER_ROW = 60
_STAGE_HEIGHT = 30  # pixels
_HEADLINE = 84  # characters in a line
_MOST_ROWS = 24  # of cells: 1440 steps
_MOST_LINES = 40  # of each text: the picture is then 4,800 pixels high at most
_MIN_SHARE = 0.12  # so that the cheapest step is still seen

EMPTY, TEXT, FAINT = "#2b2e36", "#eceff4", "#9aa2b1"


@dataclass(frozen=True)
class Paper:
    """What a picture is drawn on: the colours of the ground, of what was saved, and of words."""

    ground: str
    empty: str = EMPTY
    text: str = TEXT
    faint: str = FAINT


DARK = Paper("#1d1f24")
CLEAR = Paper("#808a9900", "#80808038", "#808a99", "#808a99")  # for a page in a dark or a light theme
_FALLBACK = "#f0564f"
_STAGE_COLOURS = ("#c9d3e3", "#8291a8")


def draw_timeline(report: RunReport, paper: Paper = DARK) -> torch.Tensor:
    """Return the picture of a finished run.

    Returns:
        RGB image [1, H, WIDTH, 3], 0..1; on `CLEAR` paper with its opacity [1, H, WIDTH, 4].
    """
    if not report.steps:
        return draw_message(str(report), paper)
    first, *others = _lines([*report.words[:1], _numbers(report)], _HEADLINE)
    rows = [report.steps[i : i + _STEPS_PER_ROW] for i in range(0, len(report.steps), _STEPS_PER_ROW)][:_MOST_ROWS]
    left_out = len(report.steps) - sum(map(len, rows))
    notes = _lines([*([f"{left_out} more steps are not drawn."] if left_out else []), *_notes(report)], 112)
    head = 44 + 30 * len(others)
    row_height = _CELL_HEIGHT + _LINE + 10 + (_STAGE_HEIGHT if report.stages else 0)
    height = 2 * MARGIN + head + len(rows) * row_height + 20 + (14 + _LINE * len(notes) if notes else 0)
    image, draw = canvas(height, paper)
    y = MARGIN
    for i, line in enumerate([first, *others]):
        draw.text((MARGIN, y + 30 * i), line, fill=paper.text, font=font(24), anchor="lt")
    y += head
    columns = len(report.steps) if len(rows) == 1 else _STEPS_PER_ROW
    for row in rows:
        _draw_row(draw, report, row, y, (WIDTH - 2 * MARGIN) / columns, paper)
        _draw_stages(draw, report, row, y + _CELL_HEIGHT + _LINE, (WIDTH - 2 * MARGIN) / columns, paper)
        y += row_height
    _draw_legend(draw, report, y, paper)
    y += 34
    for line in notes:
        draw.text((MARGIN, y), line, fill=paper.faint, font=font(16), anchor="lt")
        y += _LINE
    return picture(image)


def draw_message(text: str, paper: Paper = DARK) -> torch.Tensor:
    """Return a picture [1, H, WIDTH, 3 or 4] of a text, for where there is no run to draw; see `draw_timeline`."""
    lines = _lines(text.splitlines(), 96)
    image, draw = canvas(2 * MARGIN + _LINE * len(lines), paper)
    for i, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + i * _LINE), line, fill=paper.text, font=font(18), anchor="lt")
    return picture(image)


def _lines(texts: Sequence[str], width: int) -> list[str]:
    """Return texts from anywhere broken into lines of so many characters, not too many of them."""
    bounded = (shortened(visible(text), width * _MOST_LINES) for text in texts[:_MOST_LINES])
    lines = [line for text in bounded for line in textwrap.wrap(text, width)]
    return lines if len(lines) <= _MOST_LINES else [*lines[: _MOST_LINES - 1], "... (Flexi Report has more)"]


def _numbers(report: RunReport) -> str:
    parts = [f"{len(report.reached)} steps"]
    if report.speedup_macs is not None:
        parts.append(f"{report.speedup_macs:.2f}x fewer MACs")
    estimate = report.all_full_seconds
    timing = f"{report.seconds:.2f} s"
    parts.append(timing if estimate is None else f"{timing}, all steps full about {estimate:.2f} s")
    return "   ·   ".join(parts)


def _notes(report: RunReport) -> list[str]:
    reasons = Counter(reason for step in report.steps for reason in step.fallbacks)
    fell_back = [f"{count} step{'s' if count > 1 else ''} ran in full: {reason}." for reason, count in reasons.items()]
    return [*report.words[1:], *fell_back, *report.notes]


def _draw_row(
    draw: ImageDraw.ImageDraw, report: RunReport, row: tuple[StepReport, ...], top: float, pitch: float, paper: Paper
) -> None:
    bottom = top + _CELL_HEIGHT
    every = 1 if pitch >= _NUMBER_WIDTH else 5
    for i, step in enumerate(row):
        left, right = MARGIN + i * pitch, MARGIN + (i + 1) * pitch - _GAP
        draw.rectangle((left, top, right, bottom), fill=paper.empty)
        colour, share = step.ran.colour, _share(report, step)
        if step.reached and step.ran is StepKind.EXTRAPOLATED:
            draw.rectangle((left, bottom - 10, right, bottom), fill=colour)
        elif step.reached and step.ran is StepKind.NULL:
            draw.line((left, bottom, right, bottom), fill=colour, width=3)
        elif step.reached:
            draw.rectangle((left, bottom - share * _CELL_HEIGHT, right, bottom), fill=colour)
        if step.depth is not None and step.reached and pitch >= 16:
            place = ((left + right) / 2, bottom - share * _CELL_HEIGHT - 4)
            draw.text(place, str(step.depth), fill=step.ran.colour, font=font(14), anchor="mb")
        if step.fallbacks:
            middle, size = (left + right) / 2, min(7.0, pitch / 2 - 1)
            draw.polygon([(middle - size, top - 12), (middle + size, top - 12), (middle, top - 2)], fill=_FALLBACK)
        if step.number == 1 or step.number % every == 0:
            draw.text(((left + right) / 2, bottom + 8), str(step.number), fill=paper.faint, font=font(14), anchor="mt")


def _draw_stages(
    draw: ImageDraw.ImageDraw, report: RunReport, row: tuple[StepReport, ...], top: float, pitch: float, paper: Paper
) -> None:
    """Draw a bar with its name under the steps of each stage."""
    for number, stage in enumerate(report.stages):
        places = [i for i, step in enumerate(row) if step in stage.steps]
        if not places:
            continue
        left, right = MARGIN + places[0] * pitch, MARGIN + (places[-1] + 1) * pitch - _GAP
        draw.rectangle((left, top + 4, right, top + 8), fill=_STAGE_COLOURS[number % len(_STAGE_COLOURS)])
        name = shortened(stage.name, 24)
        if draw.textlength(name, font=font(14)) <= right - left:
            draw.text((left, top + 12), name, fill=paper.faint, font=font(14), anchor="lt")


def _share(report: RunReport, step: StepReport) -> float:
    """Return how much of a full step's compute the step took, for the height of its cell."""
    if step.ran.is_null:
        return 0.0
    share = 1.0
    if step.ran.is_partial:
        cost = report.cost_of(step)
        share = cost.share(step.depth) if cost is not None else 0.5
    return max(share * (0.5 if step.ran.reuses_guidance else 1), _MIN_SHARE)


def _draw_legend(draw: ImageDraw.ImageDraw, report: RunReport, top: float, paper: Paper) -> None:
    counts = Counter(step.ran for step in report.reached)
    entries = [(kind.colour, f"{counts[kind]} {kind.label}") for kind in StepKind if counts[kind]]
    fallbacks = sum(bool(step.fallbacks) for step in report.steps)
    if fallbacks:
        entries.append((_FALLBACK, f"{fallbacks} ran in full instead"))
    x, letters = float(MARGIN), font(18)
    for colour, text in entries:
        draw.rectangle((x, top, x + 16, top + 16), fill=colour)
        draw.text((x + 24, top + 8), text, fill=paper.text, font=letters, anchor="lm")
        x += 24 + draw.textlength(text, font=letters) + 28


def canvas(height: int, paper: Paper = DARK) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Return an empty picture of a height in pixels, and what draws on it."""
    image = Image.new("RGBA" if paper is CLEAR else "RGB", (WIDTH, height), paper.ground)
    return image, ImageDraw.Draw(image)


def font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Return the font of a size in pixels."""
    return ImageFont.load_default(size)


def picture(image: Image.Image) -> torch.Tensor:
    """Return a picture as the host's IMAGE [1, H, W, 3], 0..1; with 4 channels where it has an opacity."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0)[None]
