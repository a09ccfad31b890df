"""The back ends by their kind. Each opens itself from its own `spec`, and is imported when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from flexi_core.errors import FlexiError

from .protocol import Backend
from .teacher import TeacherSettings

KINDS = {
    "embedded": "embedded.EmbeddedBackend",
    "unet": "unet_file.UNetFileBackend",
    "comfyui": "comfyui.backend.ComfyBackend",
}


def open_backend(spec: Mapping[str, Any], settings: TeacherSettings) -> Backend:
    """Return the back end of a `Backend.spec`.

    Raises:
        FlexiError: the kind is not known, or the back end refuses its spec.
    """
    kind = spec.get("kind")
    if kind not in KINDS:
        raise FlexiError(f"unknown back end {kind!r}; known: {', '.join(KINDS)}")
    module, _, name = KINDS[kind].rpartition(".")
    return getattr(importlib.import_module(f".{module}", __package__), name).open(spec, settings)
