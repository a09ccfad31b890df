"""The options that one model is sampled with, where another takes its place for a part of the run."""

from __future__ import annotations

from collections.abc import Mapping
from types import FunctionType, MethodType
from typing import Any


def in_place_of(run: Mapping[str, Any], first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's options with a second model's own in the place of the first's.

    Hooks and patches that either model had before they were joined stay its own; what was put on the joined model, and what the
    run itself adds, is for both.

    Args:
        run: of the run under way, which began from copies of the first model's.
        first: the first model's own: dicts of dicts, of lists that only grow at their end, and of values.
        second: the second model's own.
    """
    out = dict(second)
    for key, value in run.items():
        had, has = first.get(key), second.get(key)
        if isinstance(value, dict) and (isinstance(had, dict) or isinstance(has, dict)):
            out[key] = in_place_of(value, had if isinstance(had, dict) else {}, has if isinstance(has, dict) else {})
        elif isinstance(value, list):
            out[key] = [*(has or ()), *value[len(had or ()) :]]
        elif not _is_copy(value, had):
            out[key] = value
    return out


def _is_copy(value: Any, of: Any) -> bool:
    """Return whether a value is another or a copy of it; hosts copy a model's objects with the model."""
    if value is of:
        return True
    if type(value) is not type(of) or isinstance(value, FunctionType):
        return False
    if isinstance(value, MethodType):
        return value.__func__ is of.__func__
    return value == of if isinstance(value, str | int | float) else True
