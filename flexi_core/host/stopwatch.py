"""Time of a device, without a wait for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ..run.run import processor_time


def stopwatch_of(device: torch.device) -> Callable[[], Callable[[], float]]:
    """Return a stopwatch for a device (see `Run`): on CUDA by events, which cost no wait.

    Waiting for the device before and after each step made a U-Net's steps 12 to 24 % slower on an H200
    (docs/results/gpu.md), since the host could not prepare the next one meanwhile.
    """
    return partial(_DeviceSpan, device) if device.type == "cuda" else processor_time


class _DeviceSpan:
    """A span of a CUDA device's time: begun when made, ended by the first call; the next ones tell its seconds."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._end = device, None
        self._begin = self._mark()

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def __call__(self) -> float:
        if self._end is None:
            self._end = self._mark()
            return 0.0
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) / 1000
