"""The teacher's output, computed once and stored by what made it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flexi_core.demo.model import DEFAULT_CFG
from flexi_core.errors import FlexiError
from flexi_core.files import replace_file

log = logging.getLogger(__name__)

# Seeds of different uses never meet: the search sees none of the samples that judge its result.
SEARCH_SEEDS = 0
JUDGE_SEEDS = 1_000_000

_CHECKSUM = "sha256"


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

    Args:
        identity: everything that decides the samples (model, settings, sigmas); hashed into the file's name.
        folder: made when something is stored.
    """

    def __init__(self, settings: TeacherSettings, identity: dict, folder: Path | None = None) -> None:
        text = json.dumps({**asdict(settings), **identity}, sort_keys=True)
        self._key = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._folder = folder or cache_folder()

    def get(self, seed: int, count: int) -> torch.Tensor | None:
        """Return stored latents [count, ...] of samples seed, seed + 1, ..., or None."""
        for path in sorted(self._folder.glob(f"{self._key}-{seed}-*.safetensors")):
            if int(path.stem.rsplit("-", 1)[1]) >= count:
                try:
                    return _checked(path)[:count]
                except (OSError, SafetensorError, ValueError) as error:
                    log.warning("%s: the stored teacher samples cannot be read (%s); they are made again", path, error)
        return None

    def put(self, seed: int, latents: torch.Tensor) -> None:
        """Store latents; a folder that cannot be written to only costs time at the next search."""
        path = self._folder / f"{self._key}-{seed}-{len(latents)}.safetensors"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with replace_file(path) as temporary:
                save_file({"latents": latents.contiguous()}, temporary, {_CHECKSUM: _checksum(latents)})
        except OSError as error:
            log.warning("%s: the teacher's samples cannot be stored (%s); set FLEXI_CACHE to a folder that can", path, error)


def _checked(path: Path) -> torch.Tensor:
    """Return the latents of a file, which another machine may have written to a shared disk."""
    with safe_open(path, "pt") as file:
        latents, checksum = file.get_tensor("latents"), (file.metadata() or {}).get(_CHECKSUM)
    if checksum != _checksum(latents):
        raise ValueError("its content is not what was stored")
    return latents


def _checksum(latents: torch.Tensor) -> str:
    return hashlib.sha256(latents.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
