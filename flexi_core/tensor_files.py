"""Tensors written to a file, whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from .files import replace_file


def save_tensors(
    tensors: Mapping[str, torch.Tensor], path: str | os.PathLike[str], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file.

    Raises:
        OSError: it cannot be written; a full disk, too, which safetensors has an error of its own for.
    """
    try:
        with replace_file(path) as temporary:
            save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, metadata)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from error
