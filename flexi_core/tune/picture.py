"""A picture of a front: how near each speed-up is predicted to come, and the one that was taken."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..run.timeline import EMPTY, FAINT, MARGIN, TEXT, WIDTH, canvas, font, picture

HEIGHT = 420  # pixels
_LINE, _CHOSEN, _PLAIN = "#3d7ff0", "#f0a63c", "#9aa2b1"
_LEFT, _TOP, _BOTTOM = 96, 64, 56  # pixels around the axes
_DB_STEP = 10


def draw_front(
    front: Sequence[tuple[int, float]], steps: int, chosen: tuple[int, float] | None = None, plain_db: float | None = None
) -> torch.Tensor:
    """Return the picture of a front.

    Args:
        front: full steps and predicted PSNR in dB of each schedule.
        steps: of the run.
        chosen: full steps and PSNR as it came out.
        plain_db: of as many plain steps as the chosen schedule has.

    Returns:
        RGB image [1, HEIGHT, WIDTH, 3], 0..1.
    """
    image, draw = canvas(HEIGHT)
    draw.text((MARGIN, 20), f"{steps} steps: how near each speed-up comes, PSNR in dB", fill=TEXT, font=font(22), anchor="lt")
    points = [(steps / full, db) for full, db in front]
    seen = [db for _, db in points] + [db for db in (chosen and chosen[1], plain_db) if db is not None]
    low, high = (_DB_STEP * edge(db / _DB_STEP) for edge, db in ((math.floor, min(seen)), (math.ceil, max(seen))))
    high = max(high, low + _DB_STEP)
    most = max(max(speedup for speedup, _ in points), 2.0)

    def place(speedup: float, db: float) -> tuple[float, float]:
        # Speed-ups by their logarithm: twice as fast is as far everywhere.
        across = math.log(speedup) / math.log(most)
        up = (db - low) / (high - low)
        return _LEFT + across * (WIDTH - MARGIN - _LEFT), HEIGHT - _BOTTOM - up * (HEIGHT - _BOTTOM - _TOP)

    for db in range(int(low), int(high) + 1, _DB_STEP):
        y = place(1.0, db)[1]
        draw.line((_LEFT, y, WIDTH - MARGIN, y), fill=EMPTY)
        draw.text((_LEFT - 10, y), str(db), fill=FAINT, font=font(16), anchor="rm")
    for speedup in (1, 1.5, 2, 3, 5, 10, 20):
        if speedup <= most:
            x = place(speedup, low)[0]
            draw.text((x, HEIGHT - _BOTTOM + 10), f"{speedup:g}x", fill=FAINT, font=font(16), anchor="mt")
    draw.line([place(*point) for point in sorted(points)], fill=_LINE, width=3)
    if chosen is not None:
        at = steps / chosen[0]
        if plain_db is not None:
            _dot(draw, place(at, plain_db), _PLAIN, f"{chosen[0]} plain steps {plain_db:.1f}")
        _dot(draw, place(at, chosen[1]), _CHOSEN, f"taken {chosen[1]:.1f}")
    return picture(image)


def _dot(draw, centre: tuple[float, float], colour: str, text: str) -> None:
    x, y = centre
    draw.ellipse((x - 7, y - 7, x + 7, y + 7), fill=colour)
    right = x < WIDTH * 0.7
    draw.text((x + 14 if right else x - 14, y - 10), text, fill=colour, font=font(16), anchor="lm" if right else "rm")
