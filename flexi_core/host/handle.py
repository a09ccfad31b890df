"""What a model hands out of its runs: their reports, and what they began from."""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_patcher
import torch

from ..run.report import RunReport
from .again import Again

log = logging.getLogger(__name__)

_LATENT_TYPES = (torch.float32, torch.float16, torch.bfloat16)  # in which hosts hand latents on
_REPORTS_KEPT = 8  # a graph may sample several times with one model
_RUNS_KEPT = 2  # what they began from, each with the size of two latents


class RunHandle:
    """Where the reports of a patched model's last runs are found. Sampling writes to it and never reads from it."""

    def __init__(self) -> None:
        # With the digests of what the run made; None where they could not be taken.
        self._reports: deque[tuple[frozenset[str] | None, RunReport]] = deque(maxlen=_REPORTS_KEPT)
        self._begun: deque[tuple[frozenset[str], Again]] = deque(maxlen=_RUNS_KEPT)
        self.leads = False  # whether this model's own schedule is around the run that is made
        self.stands_aside = False  # for a run of full steps, which leaves no report

    @property
    def report(self) -> RunReport | None:
        """The last run's report; None before the first run has ended."""
        return self._reports[-1][1] if self._reports else None

    def report_of(self, latent: Any) -> RunReport | None:
        """Return the report of the run that made a latent (see `packed`); None where none of those kept did."""
        digest = _digest(latent)
        return next((report for made, report in reversed(self._reports) if made is None or digest in made), None)

    def full_run(self, latent: Any, on_step: Callable[[], None]) -> tuple[torch.Tensor, float] | None:
        """Sample the run that made a latent once more, with every step computed.

        Args:
            latent: of one of the last runs, as `report_of` takes it.
            on_step: is called after each step.

        Returns:
            its latent and the seconds that it took; None where what it began from is no longer known.
        """
        begun = self.begun(latent)
        if begun is None:
            return None
        self.stands_aside = True
        try:
            return begun.sample(on_step)
        finally:
            self.stands_aside = False

    def begun(self, latent: Any) -> Again | None:
        """Return what the run that made a latent began from; None where it is no longer known."""
        digest = _digest(latent)
        return next((begun for made, begun in reversed(self._begun) if digest in made), None)

    def see_start(self, _: comfy.model_patcher.ModelPatcher) -> None:
        """Say so where the model is made ready for a run that another model leads: it is the second one of a guider."""
        if not self.leads:
            note = (
                "The schedule did not run: this model is the second one of its guider, and the first one's schedule is for "
                "both. Put Flexi Apply before the first."
            )
            self.keep(lambda: RunReport(None, 0.0, [note]), None, 0.0)

    def keep(
        self,
        report: Callable[[], RunReport],
        made: Callable[[], Sequence[torch.Tensor]] | None,
        seconds: float,
        begun: Again | None = None,
    ) -> None:
        """Add the report of a run that came to its end, the latents that it made and what it began from; this never raises."""
        try:
            digests = made and frozenset(_digest(latent.to(dtype)) for latent in made() for dtype in _LATENT_TYPES)
            self._reports.append((digests, report()))
            if begun is not None:
                self._begun.append((digests, begun))
        except Exception as error:  # the picture is there, and stays
            log.exception("Flexiffusion: the report of a run failed")
            self._reports.append(
                (None, RunReport(None, seconds, [f"{failed_words('The report', error)} The picture is as planned."]))
            )


def failed_words(what: str, error: Exception) -> str:
    return f"{what} failed ({type(error).__name__}: {error}), an error of Flexiffusion's own; the log has more."


def packed(latent: Any) -> torch.Tensor:
    """Return a latent as it is sampled: one of several streams [B, ...] (the host's NestedTensor) packed to [B, 1, N]."""
    if not getattr(latent, "is_nested", False):
        return latent
    return torch.cat([stream.reshape(stream.shape[0], 1, -1) for stream in latent.unbind()], dim=-1)


def _digest(latent: Any) -> str:
    values = packed(latent).detach().to("cpu", torch.float32).contiguous()
    return hashlib.sha256(f"{tuple(values.shape)}".encode() + values.numpy().tobytes()).hexdigest()
