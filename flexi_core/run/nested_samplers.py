"""Samplers around samplers: the noise level of the innermost, whatever those around it tell the network.

Sampler functions that add detail (Detail Daemon, lying sigmas) run another sampler and give the network a noise level that is
not that sampler's own. What the inner one asks at says which step it is in, however large the difference.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch


class OwnLevel:
    """The noise level of the question that the innermost sampler asks now; `sigma` is None where there is no inner one."""

    def __init__(self) -> None:
        self._asked: torch.Tensor | None = None

    @property
    def sigma(self) -> float | None:
        return None if self._asked is None else float(torch.as_tensor(self._asked).max())

    def ask(self, sigma: torch.Tensor, model: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return a model's answer to a question at a noise level [B]; samplers around the first to ask change nothing."""
        if self._asked is not None:
            return model()
        self._asked = sigma
        try:
            return model()
        finally:
            self._asked = None


def listened(sampler: Any, own: OwnLevel) -> Any:
    """Return a sampler of the host whose inner samplers tell `own` where they ask; itself where its options hold none.

    The sampler that came is left as it is.
    """
    options = getattr(sampler, "extra_options", None)
    options = options if isinstance(options, dict) else {}
    inner = {
        name: _telling(value, own) for name, value in options.items() if callable(getattr(value, "sampler_function", None))
    }
    if not inner:
        return sampler
    outer = copy.copy(sampler)
    outer.extra_options = {**options, **inner}
    return outer


def _telling(sampler: Any, own: OwnLevel) -> Any:
    telling, function = copy.copy(listened(sampler, own)), sampler.sampler_function

    @functools.wraps(function)
    def ask_through(model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return function(_Telling(model, own), *args, **kwargs)

    telling.sampler_function = ask_through
    return telling


class _Telling:
    """Stands for the model before an inner sampler: tells where it asks, and is the model in all else."""

    def __init__(self, model: Any, own: OwnLevel) -> None:
        self.__dict__.update(_model=model, _own=own)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._own.ask(sigma, lambda: self._model(x, sigma, *args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._model, name, value)
