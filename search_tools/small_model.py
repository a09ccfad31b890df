"""What the back ends of small models share: sampling under a schedule, the stored teacher, identity and cost."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from flexi_core.cost import NetworkCost, count_macs, run_macs
from flexi_core.demo.model import SmallModel
from flexi_core.demo.sampling import SAMPLERS, SCHEDULERS, make_noise, sample
from flexi_core.errors import FlexiError
from flexi_core.extrapolation import Observer
from flexi_core.fingerprint import architecture_fingerprint, weights_fingerprint
from flexi_core.plan import make_plan
from flexi_core.presets import all_full
from flexi_core.replay import PredictionStore, Replay, ReplayMiss
from flexi_core.run import Run
from flexi_core.schedule import Schedule
from flexi_core.unet_steps import NetworkCall

from .backend import Features, SampleProgress, Samples
from .fitting import BlendFitter, Observe
from .teacher import TeacherSettings, TeacherStore

_BATCH = 16  # samples at once; more is no faster on a CPU


class SmallModelBackend(ABC):
    """Samples, features and costs of a model of the embedded runtime under one teacher's settings.

    Sample `seed + i` has a noise and a prompt of its own, whatever else is sampled beside it.

    Args:
        settings: of the teacher.
        model: that samples.
        features: what Frechet distances are measured on.
        store_folder: of the teacher's samples; the user's cache folder by default.

    Raises:
        FlexiError: the sampler or scheduler is not one that the embedded runtime has.
    """

    kind: str  # of `open_backend`; also the name of the model in schedule files

    def __init__(
        self, settings: TeacherSettings, model: SmallModel, features: Features, store_folder: Path | None = None
    ) -> None:
        for name, known in ((settings.sampler, SAMPLERS), (settings.scheduler, SCHEDULERS)):
            if name not in known:
                raise FlexiError(f"the embedded runtime has no {name!r}; it has {', '.join(known)}")
        self.settings, self.model, self.features = settings, model, features
        self.sigmas = self.grid(settings.steps)
        self._store = TeacherStore(settings, self.identity, store_folder)

    @abstractmethod
    def prompts(self, seed: int, count: int) -> Sequence[Any] | None:
        """Return what samples seed, seed + 1, ... are conditioned on; None where the model takes no conditioning."""

    @property
    def spec(self) -> dict[str, Any]:
        """What opens this back end again."""
        return {"kind": self.kind}

    def grid(self, steps: int) -> torch.Tensor:
        """Return the scheduler's sigmas [steps + 1]."""
        return SCHEDULERS[self.settings.scheduler](self.model, steps)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the teacher's samples; also the teacher's part of a schedule file."""
        return {
            "model": self.kind,
            "architecture": architecture_fingerprint(self.model.unet),
            "weights": weights_fingerprint(self.model.unet),
            "sampler": self.settings.sampler,
            "scheduler": self.settings.scheduler,
            "steps": self.settings.steps,
            "sigmas": [float(s) for s in self.sigmas],
            "cfg": self.settings.cfg,
            "size": list(self.model.latent_shape[1:]),
            **self.own_identity(),
        }

    def own_identity(self) -> dict[str, Any]:
        """Return what else decides the samples of a model of this kind."""
        return {}

    @cached_property
    def cost(self) -> NetworkCost:
        """MACs of one row, full and at every partial depth."""
        context, _ = self.model.conditioning(self.prompts(0, 1), 1)
        return count_macs(self.model.unet, NetworkCall(torch.zeros(1, *self.model.latent_shape), torch.zeros(1), context))

    def sample(
        self,
        schedule: Schedule,
        seed: int,
        count: int,
        *,
        steps: int | None = None,
        progress: SampleProgress | None = None,
        predictions: PredictionStore | None = None,
    ) -> Samples:
        """Sample under a schedule.

        Args:
            schedule: of the run's length.
            seed: of the first sample.
            count: of samples.
            steps: another step count than the teacher's, on the scheduler's own grid.
            progress: called with the samples' steps done and the steps in all.
            predictions: where network evaluations are looked up before they are computed, and kept.
        """
        sigmas = self.sigmas if steps is None else self.grid(steps)
        latents, macs, total = [], 0.0, count * (len(sigmas) - 1)
        noise, prompts = make_noise(seed, count, self.model.latent_shape), self.prompts(seed, count)
        began = time.perf_counter()
        for at in range(0, count, _BATCH):
            rows = len(noise[at : at + _BATCH])
            inner = None if progress is None else lambda i, n, at=at, rows=rows: progress(at * n + i * rows, total)
            out, run = self._sample_batch(
                schedule,
                sigmas,
                noise[at : at + _BATCH],
                None if prompts is None else prompts[at : at + _BATCH],
                inner,
                predictions and Replay(predictions, (seed + at, rows, len(sigmas))),
            )
            latents.append(out)
            macs += run_macs(run.records, self.cost)
        seconds = time.perf_counter() - began
        return Samples(torch.cat(latents), seconds, macs)

    def fit(
        self, schedule: Schedule, seed: int, count: int, predictions: PredictionStore | None = None
    ) -> tuple[Schedule, float]:
        """Return a schedule with fitted blends, and the MACs that its runs took; see `Backend.fit`."""
        batches = [(seed + at, min(_BATCH, count - at)) for at in range(0, count, _BATCH)]
        return self._fitter.fit(schedule, batches, predictions)

    @cached_property
    def _fitter(self) -> BlendFitter:
        def observed(schedule: Schedule, batch: tuple[int, int], observe: Observe, predictions: PredictionStore | None):
            seed, rows = batch
            plan = make_plan(schedule, self.sigmas.tolist())
            observer = observe(plan, SAMPLERS[self.settings.sampler])
            noise, prompts = make_noise(seed, rows, self.model.latent_shape), self.prompts(seed, rows)
            replay = predictions and Replay(predictions, (seed, rows, len(self.sigmas)))
            _, run = self._sample_batch(schedule, self.sigmas, noise, prompts, None, replay, observer)
            return run_macs(run.records, self.cost)

        return BlendFitter(observed)

    def _sample_batch(
        self, schedule, sigmas, noise, prompts, progress, replay: Replay | None, observer: Observer | None = None
    ) -> tuple[torch.Tensor, Run]:
        def run(replay: Replay | None) -> tuple[torch.Tensor, Run]:
            return sample(
                self.model,
                schedule,
                sigmas,
                noise,
                prompts,
                sampler=self.settings.sampler,
                cfg=self.settings.cfg,
                progress=progress,
                replay=replay,
                observer=observer,
            )

        try:
            return run(replay)
        except ReplayMiss:
            return run(None)

    def teacher(self, seed: int, count: int, progress: SampleProgress | None = None) -> torch.Tensor:
        """Return the teacher's latents [count, C, H, W], from the store where they are."""
        stored = self._store.get(seed, count)
        if stored is not None:
            return stored
        latents = self.sample(all_full(self.settings.steps), seed, count, progress=progress).latents
        self._store.put(seed, latents)
        return latents

    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the latents: these models work on pixels, or on latents that nothing here decodes."""
        return latents

    def caption_accuracy(self, latents: torch.Tensor, seed: int) -> torch.Tensor | None:
        """Return None: nothing here can read the pictures of any model."""
        return None
