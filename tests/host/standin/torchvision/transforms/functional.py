"""Imported by the host at start."""

from enum import Enum


class InterpolationMode(Enum):
    """The names that the host mentions."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
