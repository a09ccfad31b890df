"""Caption tokens of the embedded model: one token per attribute, with a row of its own for "left open"."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .scenes import ATTRIBUTES, FREE, Caption

_ROWS = [len(values) + 1 for values in ATTRIBUTES.values()]  # the last row of each slot stands for FREE
TABLE_ROWS = sum(_ROWS)


def token_rows(attributes: torch.Tensor) -> torch.Tensor:
    """Return rows of the embedding table [n, 5] for attribute indices [n, 5]; `FREE` takes the slot's last row."""
    rows = torch.tensor(_ROWS, device=attributes.device)
    offsets = torch.cumsum(rows, 0) - rows
    return torch.where(attributes == FREE, rows - 1, attributes) + offsets


def embed_captions(table: torch.Tensor | nn.Parameter, captions: Sequence[Caption]) -> torch.Tensor:
    """Return the context [n, 5, D] of captions, from the embedding table [TABLE_ROWS, D]."""
    attributes = torch.tensor([caption.indices for caption in captions], device=table.device)
    return table[token_rows(attributes)]
