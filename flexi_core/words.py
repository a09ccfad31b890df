"""Words of strangers as they may be shown: without control characters, and no longer than a reader bears."""

from __future__ import annotations

import re

# Control characters, halves of characters, and those that turn the reading direction of what follows.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str, keep: str = "\n\t") -> str:
    """Return a text with unseen characters spelled out, as \\x1b.

    Args:
        text: from anywhere.
        keep: unseen characters that stay.
    """
    return _UNSEEN.sub(lambda found: found[0] if found[0] in keep else _spelled(found[0]), text)


def shortened(text: str, most: int) -> str:
    """Return a text of at most so many characters; what is left out stands as three dots and its length."""
    if len(text) <= most:
        return text
    end = f" ... ({len(text)} characters)"
    return text[: max(most - len(end), 0)] + end


def _spelled(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
