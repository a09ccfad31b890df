"""This pack's own code, and what it keeps, stays out of graphs; the network that it calls is compiled as without it.

Traced by torch.compile, the bookkeeping of a run would be compiled into the network's graph, and the network anew for every
step. Newer hosts leave the options of a call out of what a graph depends on: calls with hooks get graphs of their own. Hosts
newer than ComfyUI 0.33 run some networks in a captured memory graph, whose memory serves the next call again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

_WRAPPED = ("_torchdynamo_orig_backend", "_torchdynamo_orig_callable")  # what torch wraps, in newer and older versions
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


def for_later_calls() -> AbstractContextManager:
    """Return a context for tensors that outlive a call of the network: outside the host's memory graph, where it has one."""
    pause = getattr(sys.modules.get("comfy.model_prefetch"), "pause_malloc_graph", None)
    return nullcontext() if pause is None else pause()


def graphs_apart(network: object) -> AbstractContextManager:
    """Return a context in which a network compiled as a whole neither takes nor leaves a graph for the calls outside of it.

    There its backend is the same and its graphs depend on all that it reads, hooks included.
    """
    backend = None  # stays so where the callback shows none: to take the callback itself for one would break the run
    inner = getattr(getattr(network, "dynamo_ctx", None), "callback", None)
    while (inner := next((it for name in _WRAPPED if (it := getattr(inner, name, None)) is not None), None)) is not None:
        backend = inner
    stance = getattr(sys.modules.get("torch.compiler"), "set_stance", None)
    return nullcontext() if backend is None or stance is None else stance("default", force_backend=_Apart(backend))


@dataclass
class _Apart:
    """A backend of torch.compile that equals itself alone: graphs are kept by backend."""

    backend: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.backend(*args, **kwargs)
