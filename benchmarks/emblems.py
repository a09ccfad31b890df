"""Pictures for the held-back U-Net: 24 classes of emblems, unlike the scenes of the embedded model.

A class is a figure and a colour. Place, radius, tilt and the ground's two colours vary freely, so that noise decides them and a
schedule that follows the teacher badly shows it. The network sees a picture as 12 channels of 16x16: every 2x2 pixels in one
place (`unfold`, `fold`).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

SIZE = 32
FIGURES = ("cross", "star", "crescent", "diamond")
PAINTS = {
    "crimson": (0.80, 0.08, 0.22),
    "orange": (0.98, 0.55, 0.10),
    "lime": (0.62, 0.90, 0.16),
    "cyan": (0.16, 0.82, 0.90),
    "violet": (0.52, 0.30, 0.92),
    "ivory": (0.97, 0.94, 0.84),
}
CLASSES = tuple(f"{paint} {figure}" for figure in FIGURES for paint in PAINTS)
LATENT_SHAPE = (12, SIZE // 2, SIZE // 2)


def draw(labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw one emblem for each class number [n]; returns pictures [n, 3, 32, 32], -1..1."""
    n = len(labels)
    figure, paint = labels // len(PAINTS), torch.tensor(list(PAINTS.values()))[labels % len(PAINTS)]

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    radius, tilt = uniform(7.5, 10.5, 1, 1), uniform(-0.35, 0.35, 1, 1)
    axis = torch.arange(SIZE) - (SIZE - 1) / 2
    dx, dy = axis.view(1, 1, -1) - uniform(-5, 5, 1, 1), axis.view(1, -1, 1) - uniform(-5, 5, 1, 1)
    dx, dy = dx * tilt.cos() + dy * tilt.sin(), dy * tilt.cos() - dx * tilt.sin()
    coverage = (0.5 - _signed_distance(figure, dx, dy, radius)).clamp(0, 1).unsqueeze(1)

    low, high = uniform(0.05, 0.45, 3), uniform(0.05, 0.45, 3)
    angle = uniform(0, 2 * math.pi, 1, 1)
    ramp = (0.5 + (axis.view(1, 1, -1) * angle.cos() + axis.view(1, -1, 1) * angle.sin()) / (SIZE * math.sqrt(2))).unsqueeze(1)
    ground = low.view(n, 3, 1, 1) * (1 - ramp) + high.view(n, 3, 1, 1) * ramp
    return (ground * (1 - coverage) + paint.view(n, 3, 1, 1) * coverage) * 2 - 1


def unfold(pictures: torch.Tensor) -> torch.Tensor:
    """Return latents [n, 12, 16, 16] of pictures [n, 3, 32, 32]."""
    return F.pixel_unshuffle(pictures, 2)


def fold(latents: torch.Tensor) -> torch.Tensor:
    """Return the pictures [n, 3, 32, 32] of latents [n, 12, 16, 16]."""
    return F.pixel_shuffle(latents, 2)


def _signed_distance(figure: torch.Tensor, dx: torch.Tensor, dy: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Return about the distance to the edge in pixels [n, 32, 32], negative inside."""
    distance, angle = torch.sqrt(dx**2 + dy**2), torch.atan2(dx, -dy)
    wide, high = dx.abs(), dy.abs()
    arm = 0.30 * radius
    cross = torch.minimum(torch.maximum(wide - arm, high - 0.95 * radius), torch.maximum(high - arm, wide - 0.95 * radius))
    # Five points: the edge goes straight from a tip at the radius to a dent at 0.45 of it, 36 degrees on.
    sector = (torch.remainder(angle + math.pi / 5, 2 * math.pi / 5) - math.pi / 5).abs()
    px, py = distance * sector.sin(), distance * sector.cos()
    dent_x, dent_y = 0.45 * radius * math.sin(math.pi / 5), 0.45 * radius * math.cos(math.pi / 5)
    length = torch.sqrt(dent_x**2 + (radius - dent_y) ** 2)
    star = (px * (radius - dent_y) - (radius - py) * dent_x) / length
    bite = torch.sqrt((dx - 0.5 * radius) ** 2 + dy**2)
    crescent = torch.maximum(distance - 0.95 * radius, 0.8 * radius - bite)
    diamond = (wide / 0.72 + high - radius) * 0.58
    stacked = torch.stack([cross, star, crescent, diamond], dim=1)
    return stacked.gather(1, figure.view(-1, 1, 1, 1).expand(-1, 1, SIZE, SIZE)).squeeze(1)
