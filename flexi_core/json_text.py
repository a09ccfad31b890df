"""JSON from strangers: bounded in depth before it is parsed, and without halves of characters."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np

_CHUNK = 2**20  # bytes
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # of a character beyond 16 bits, as JSON writes it


def parse_json(data: bytes, most_nested: int, **options: Any) -> Any:
    """Return the value of a JSON text.

    Args:
        data: in UTF-8; some editors put a byte-order mark first.
        most_nested: lists and objects within each other.
        options: of `json.loads`.

    Raises:
        ValueError: it is not UTF-8, not JSON, nested deeper, or has a half of a character.
    """
    if _is_deeper(data, most_nested):
        raise ValueError(f"its values are nested more than {most_nested} deep")
    text = data.decode("utf-8-sig")
    value = json.loads(text, **options)
    if _HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("it has a half of a character (a lone surrogate)") from error
    return value


def _is_deeper(data: bytes, most: int) -> bool:
    """Return whether brackets outside of strings stand deeper in each other than `most`; they need not match."""
    if sum(map(data.count, (b"[", b"{"))) <= most:
        return False
    depth, inside, escaping = 0, False, False  # in a string; behind a backslash that escapes what follows
    for start in range(0, len(data), _CHUNK):
        text = np.frombuffer(data, np.uint8, min(_CHUNK, len(data) - start), start)
        quotes = text == ord('"')
        if escaping or (text == ord("\\")).any():
            escaped = _escaped(text == ord("\\"), escaping)
            quotes &= ~escaped[:-1]
            escaping = bool(escaped[-1])
        within = np.logical_xor.accumulate(np.concatenate([[inside], quotes]))[1:]
        inside = bool(within[-1])
        opened = ((text == ord("[")) | (text == ord("{"))) & ~within
        closed = ((text == ord("]")) | (text == ord("}"))) & ~within
        depths = depth + np.cumsum(opened.astype(np.int32) - closed)
        if depths.max() > most:
            return True
        depth = int(depths[-1])
    return False


def _escaped(backslashes: np.ndarray, escaping: bool) -> np.ndarray:
    """Return for each character, and the one after them [n + 1], whether an odd number of backslashes stands before it.

    Args:
        backslashes: which characters are one [n].
        escaping: so many stand before the first.
    """
    places = np.arange(len(backslashes))
    last_other = np.maximum.accumulate(np.where(backslashes, -1 - escaping, places))
    odd = (places - last_other) % 2 == 1  # of the run that ends here
    return np.concatenate([[escaping], odd & backslashes])
