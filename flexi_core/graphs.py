"""This pack's own code stays out of torch.compile's graphs; the network that it calls is compiled as without it.

Traced, the bookkeeping of a run would be compiled into the network's graph, and the network anew for every step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

_outside: list[Callable[..., Any]] = []


def outside_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function that torch.compile shall not trace; what it calls is compiled all the same."""
    _outside.append(function)
    return function


def keep_outside() -> None:
    """Tell torch.compile of the marked functions, where something has loaded it: to load it takes more than a second."""
    # `torch.compiler.disable(recursive=False)` would have to stand around the functions, and so load it with this pack.
    skip = getattr(sys.modules.get("torch._dynamo.decorators"), "skip", None)
    while skip is not None and _outside:
        skip(_outside.pop())
