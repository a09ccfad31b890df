"""Captioned 32x32 scenes without end: one upright shape on a plain gradient.

A scene is five attributes and a little continuous variation (place, radius, tint, gradient), drawn by signed distance, so
that edges are anti-aliased and any number of fresh scenes can be made for training, for judging and for FID.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..errors import FlexiError

IMAGE_SIZE = 32

SIZES = {"small": 4.2, "large": 7.2}  # radius, pixels
COLOURS = {
    "red": (0.86, 0.14, 0.16),
    "green": (0.20, 0.74, 0.25),
    "blue": (0.22, 0.40, 0.95),
    "yellow": (0.96, 0.86, 0.18),
    "white": (0.96, 0.96, 0.96),
    "purple": (0.66, 0.24, 0.80),
}
SHAPES = ("circle", "square", "triangle", "ring")
PLACES = {
    "top left": (-1, -1),
    "top": (0, -1),
    "top right": (1, -1),
    "left": (-1, 0),
    "center": (0, 0),
    "right": (1, 0),
    "bottom left": (-1, 1),
    "bottom": (0, 1),
    "bottom right": (1, 1),
}
BACKGROUNDS = {
    "black": (0.06, 0.06, 0.06),
    "grey": (0.50, 0.50, 0.50),
    "navy": (0.06, 0.10, 0.36),
    "brown": (0.42, 0.26, 0.13),
    "teal": (0.05, 0.44, 0.44),
}

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "size": tuple(SIZES),
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "place": tuple(PLACES),
    "background": tuple(BACKGROUNDS),
}
FREE = -1  # a caption part that is left open

_PLACE_STEP = 7.5  # pixels between neighbouring places
_PLACE_JITTER = 1.0  # pixels, either way
_FILLER_WORDS = {"a", "an", "the", "at", "in", "on", "of", "background", "shape"}


@dataclass(frozen=True)
class Caption:
    """What a prompt asks for: per attribute an index into `ATTRIBUTES`, or `FREE`."""

    size: int = FREE
    colour: int = FREE
    shape: int = FREE
    place: int = FREE
    background: int = FREE

    @property
    def indices(self) -> tuple[int, ...]:
        return (self.size, self.colour, self.shape, self.place, self.background)

    def __str__(self) -> str:
        word = {name: ATTRIBUTES[name][i] if i != FREE else "" for name, i in zip(ATTRIBUTES, self.indices, strict=True)}
        if all(i == FREE for i in self.indices):
            return ""
        parts = ["a", word["size"], word["colour"], word["shape"] or "shape"]
        if word["place"]:
            parts += ["at the", word["place"]]
        if word["background"]:
            parts += ["on a", word["background"], "background"]
        return " ".join(part for part in parts if part)


def parse_caption(text: str) -> Caption:
    """Read a caption such as `a large red circle at the center on a navy background`.

    Order and filler words do not matter; a part left out is free; the empty text is the unconditional prompt.

    Raises:
        FlexiError: a word is not known, or an attribute is given twice.
    """
    lookup = {value: (name, i) for name, values in ATTRIBUTES.items() for i, value in enumerate(values)}
    words = text.lower().replace(",", " ").replace(".", " ").replace("-", " ").split()
    found: dict[str, int] = {}
    while words:
        take = 2 if " ".join(words[:2]) in lookup else 1
        value, words = " ".join(words[:take]), words[take:]
        if value in _FILLER_WORDS:
            continue
        if value not in lookup:
            known = "; ".join(f"{name}: {', '.join(values)}" for name, values in ATTRIBUTES.items())
            raise FlexiError(f"the demo model does not know the word {value!r}; it knows {known}")
        name, index = lookup[value]
        if found.get(name, index) != index:
            raise FlexiError(
                f"the caption gives two values for {name}: {ATTRIBUTES[name][found[name]]!r} and {value!r}; keep one of them"
            )
        found[name] = index
    return Caption(**found)


def random_attributes(n: int, generator: torch.Generator) -> torch.Tensor:
    """Return attribute indices [n, 5], every value of an attribute equally likely."""
    columns = [torch.randint(len(values), (n,), generator=generator) for values in ATTRIBUTES.values()]
    return torch.stack(columns, dim=1)


def captions_of(attributes: torch.Tensor) -> list[Caption]:
    """Return one full caption per row of attribute indices [n, 5]."""
    return [Caption(*row) for row in attributes.tolist()]


def render(attributes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw scenes.

    Args:
        attributes: indices [n, 5] in the order of `ATTRIBUTES`.
        generator: source of the continuous variation.

    Returns:
        images [n, 3, 32, 32], -1..1, float32.
    """
    n = attributes.shape[0]
    size, colour, shape, place, background = attributes.unbind(1)

    def uniform(*shape_: int) -> torch.Tensor:
        return torch.rand(n, *shape_, generator=generator) * 2 - 1

    radius = (torch.tensor(list(SIZES.values()))[size] * (1 + 0.06 * uniform())).view(n, 1, 1)
    middle = (IMAGE_SIZE - 1) / 2 + _PLACE_STEP * torch.tensor(list(PLACES.values()), dtype=torch.float32)[place]
    middle = middle + _PLACE_JITTER * uniform(2)
    axis = torch.arange(IMAGE_SIZE, dtype=torch.float32)
    dx = axis.view(1, 1, -1) - middle[:, 0].view(n, 1, 1)
    dy = axis.view(1, -1, 1) - middle[:, 1].view(n, 1, 1)
    coverage = (0.5 - _signed_distance(shape, dx, dy, radius)).clamp(0, 1).unsqueeze(1)

    paint = torch.tensor(list(COLOURS.values()))[colour] + 0.04 * uniform(3)
    ground = torch.tensor(list(BACKGROUNDS.values()))[background] + 0.03 * uniform(3)
    angle = math.pi * uniform().view(n, 1, 1)
    ramp = (axis.view(1, 1, -1) * torch.cos(angle) + axis.view(1, -1, 1) * torch.sin(angle)) / IMAGE_SIZE
    ramp = (ramp - ramp.mean(dim=(1, 2), keepdim=True)) * 0.16
    image = ground.view(n, 3, 1, 1) + ramp.unsqueeze(1)
    image = image * (1 - coverage) + paint.view(n, 3, 1, 1) * coverage
    return image.clamp(0, 1) * 2 - 1


def _signed_distance(shape: torch.Tensor, dx: torch.Tensor, dy: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Return the distance to the edge in pixels [n, 32, 32], negative inside."""
    distance = torch.sqrt(dx**2 + dy**2)
    circle = distance - radius
    square = torch.maximum(dx.abs(), dy.abs()) - 0.92 * radius
    # An upright triangle with its apex on top: the base, and two sides whose outward normals lean 26.6 degrees upwards.
    side = (dx.abs() * 2 - dy) / math.sqrt(5) - 0.50 * radius
    triangle = torch.maximum(side, dy - 0.92 * radius)
    ring = (distance - 0.78 * radius).abs() - 0.27 * radius
    stacked = torch.stack([circle, square, triangle, ring.expand_as(circle)], dim=1)
    return stacked.gather(1, shape.view(-1, 1, 1, 1).expand(-1, 1, *stacked.shape[2:])).squeeze(1)
