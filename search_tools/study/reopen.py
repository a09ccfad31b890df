"""The back end of a study, opened again by a command that came later.

A study may be a stranger's. Nothing that it says names what is imported, written to, or reached over a network: the ComfyUI
that is brought up, with its packs, is the one that the user of the command names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexi_core.errors import FlexiError

from ..backends.protocol import Backend
from ..backends.registry import open_backend
from ..settings import SearchSettings

_OF_A_WORKFLOW = ("graph", "node", "prompts", "clip_vision", "name")  # what a study may say of a run in ComfyUI
_OF_A_FILE = ("file", "size")


@dataclass(frozen=True)
class OwnHost:
    """The ComfyUI that a user names; see the options of that name."""

    comfyui: Path | None = None
    base_directory: Path | None = None

    def __post_init__(self) -> None:
        if self.base_directory is not None and self.comfyui is None:
            raise FlexiError("--base-directory: for a run in ComfyUI; give its folder with --comfyui")


_NONE = OwnHost()


def reopen(settings: SearchSettings, own: OwnHost = _NONE) -> Backend:
    """Return the back end that a study was made with.

    Args:
        settings: of the study.
        own: the user's own ComfyUI.

    Raises:
        FlexiError: it cannot be opened here, its model is another one by now, or it is a run in ComfyUI and none was named.
    """
    spec = _spec_of(settings.backend, own)
    try:
        backend = open_backend(spec, settings.teacher_settings)
        identity = backend.identity
    except (ImportError, OSError, RuntimeError) as error:  # a library, a file, a device of the machine that searched
        raise FlexiError(f"the back end of the study cannot be opened here: {error}") from error
    changed = [key for key, value in settings.identity.items() if _plain(identity).get(key) != value]
    if changed:
        raise FlexiError(f"the model that opens here is not the study's: another {', '.join(changed)}")
    return backend


def _spec_of(stored: Mapping[str, Any], own: OwnHost) -> dict[str, Any]:
    """Return what opens a study's back end, with the folders of the user's own ComfyUI in place of those that the study names.

    Raises:
        FlexiError: they are needed and were not given, or the study names a file on another machine.
    """
    kind = stored.get("kind")
    if kind == "comfyui":
        if own.comfyui is None:
            raise FlexiError(
                "the study is of a run in ComfyUI; which ComfyUI is run, no study may say: give the folder of yours, --comfyui"
            )
        base = None if own.base_directory is None else str(own.base_directory.absolute())
        kept = {key: stored[key] for key in _OF_A_WORKFLOW if key in stored}
        return {"kind": kind, **kept, "comfyui": str(own.comfyui.absolute()), "base_directory": base}
    if kind == "unet" and str(stored.get("file")).replace("\\", "/").startswith("//"):
        raise FlexiError(
            f"the study names a U-Net on another machine, {stored['file']!r}; only files of this one are opened for it"
        )
    return {key: stored[key] for key in ("kind", *_OF_A_FILE) if key in stored}


def _plain(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity as a study gives it back."""
    return json.loads(json.dumps(identity))
