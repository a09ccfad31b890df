"""The back end of a study, opened again by a command that came later."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flexi_core.errors import FlexiError

from .backend import Backend, open_backend
from .settings import SearchSettings


def reopen(settings: SearchSettings) -> Backend:
    """Return the back end that a study was made with.

    Raises:
        FlexiError: it cannot be opened here, or its model is another one by now.
    """
    try:
        backend = open_backend(settings.backend, settings.teacher_settings)
        identity = backend.identity
    except (ImportError, OSError, RuntimeError) as error:  # a library, a file, a device of the machine that searched
        raise FlexiError(f"the back end of the study cannot be opened here: {error}") from error
    changed = [key for key, value in settings.identity.items() if _plain(identity).get(key) != value]
    if changed:
        raise FlexiError(f"the model that opens here is not the study's: another {', '.join(changed)}")
    return backend


def _plain(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity as a study gives it back."""
    return json.loads(json.dumps(identity))
