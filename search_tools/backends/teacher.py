"""The teacher's output, computed once and stored by what made it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from flexi_core.demo.model import DEFAULT_CFG
from flexi_core.errors import FlexiError
from flexi_core.tensor_files import save_tensors
from flexi_core.words import shortened, visible

log = logging.getLogger(__name__)

# Seeds of different uses never meet: the search sees none of the samples that judge its result.
SEARCH_SEEDS = 0
JUDGE_SEEDS = 1_000_000

_CHECKSUM, _OF = "sha256", "of"
_LONGEST_WORDS = 200  # characters
# What damaged files answer with, one that ends while it is mapped into memory included.
_UNREADABLE = (OSError, SafetensorError, ValueError, RuntimeError, TypeError, IndexError)


@dataclass(frozen=True)
class TeacherSettings:
    """The run whose output candidates are compared with.

    Args:
        sampler, scheduler: names of the host's.
        steps: all full.
        cfg: guidance scale.
    """

    sampler: str = "euler"
    scheduler: str = "normal"
    steps: int = 50
    cfg: float = DEFAULT_CFG

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 1000:
            raise FlexiError(f"the teacher has {self.steps} steps; use 1 to 1000")


def cache_folder() -> Path:
    """Return where teacher outputs are kept: $FLEXI_CACHE, else the user's cache folder."""
    base = os.environ.get("FLEXI_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "flexiffusion"


class TeacherStore:
    """Teacher samples on disk, one file for each sample range.

    A file says what it is of, and holds a hash of its content: a copy under another name, with fewer rows, of another shape,
    cut off, damaged, or with numbers that are not finite is left alone, said in one line, and computed again.

    Args:
        identity: everything that decides the samples (model, settings, sigmas); hashed into the file's name.
        folder: made when something is stored.
        shape: of one sample; None where it is not known before it is drawn.
    """

    def __init__(
        self, settings: TeacherSettings, identity: dict, folder: Path | None = None, shape: Sequence[int] | None = None
    ) -> None:
        text = json.dumps({**asdict(settings), **identity}, sort_keys=True)
        self._key = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._folder = folder or cache_folder()
        self._shape = None if shape is None else tuple(shape)

    def get(self, seed: int, count: int) -> torch.Tensor | None:
        """Return stored latents [count, ...] of samples seed, seed + 1, ..., or None."""
        for path, stored in self._files(seed):
            if stored >= count:
                try:
                    return self._checked(path, seed, stored)[:count]
                except _UNREADABLE as error:
                    words = shortened(visible(str(error), ""), _LONGEST_WORDS)
                    log.warning("%s: the stored teacher samples cannot be used (%s); they are made again", path, words)
        return None

    def _files(self, seed: int) -> list[tuple[Path, int]]:
        """Return the files that begin with a sample, and how many each says it has."""
        try:
            found = sorted(self._folder.glob(f"{self._key}-{seed}-*.safetensors"))
        except OSError:
            return []
        counts = [path.stem.rsplit("-", 1)[1] for path in found]
        return [(path, int(count)) for path, count in zip(found, counts, strict=True) if re.fullmatch("[0-9]{1,9}", count)]

    def _checked(self, path: Path, seed: int, count: int) -> torch.Tensor:
        """Return the latents of a file, which another machine may have written to a shared disk.

        Raises:
            ValueError: it is not what was stored under this name.
        """
        if not path.is_file():
            raise ValueError("it is no file")
        with safe_open(path, "pt") as file:
            shape = tuple(file.get_slice("latents").get_shape())
            if shape[:1] != (count,) or self._shape not in (None, shape[1:]):
                expected = count if self._shape is None else (count, *self._shape)
                raise ValueError(f"it has samples of the shape {shape}; {expected} are expected")
            latents, said = file.get_tensor("latents"), file.metadata() or {}
        if said.get(_OF) != self._name(seed, count):
            raise ValueError("it is a copy of another file")
        if said.get(_CHECKSUM) != _checksum(latents):
            raise ValueError("its content is not what was stored")
        if not latents.is_floating_point():
            raise ValueError(f"it has samples of {latents.dtype}; floating numbers are expected")
        if not latents.isfinite().all():
            raise ValueError("some of its numbers are not finite")
        return latents

    def _name(self, seed: int, count: int) -> str:
        return f"{self._key}-{seed}-{count}"

    def put(self, seed: int, latents: torch.Tensor) -> None:
        """Store latents; a folder that cannot be written to only costs time at the next search."""
        name = self._name(seed, len(latents))
        path = self._folder / f"{name}.safetensors"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_tensors({"latents": latents}, path, {_CHECKSUM: _checksum(latents), _OF: name})
        except OSError as error:
            log.warning("%s: the teacher's samples cannot be stored (%s); set FLEXI_CACHE to a folder that can", path, error)


def _checksum(latents: torch.Tensor) -> str:
    return hashlib.sha256(latents.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
