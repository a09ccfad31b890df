"""Words to the page, where there is one."""

from __future__ import annotations

import logging
import sys
from typing import Any

log = logging.getLogger(__name__)


def server() -> Any:
    """Return the page's server; None where there is none."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def tell(words: str, node: str) -> None:
    """Show words on a node of the page; this never raises."""
    try:
        page = server()
        if node and hasattr(page, "send_progress_text"):
            page.send_progress_text(words, node)
    except Exception:  # the page may be gone
        log.exception("Flexiffusion: words could not be shown on node %s", node)
