"""The embedded back end: the search on the project's own small model, with nothing downloaded."""

from __future__ import annotations

import time
from functools import cached_property
from pathlib import Path

import torch

from flexi_core.cost import NetworkCost, count_macs, run_macs
from flexi_core.demo.classifier import load_classifier
from flexi_core.demo.model import LATENT_SHAPE, DemoModel
from flexi_core.demo.sampling import SAMPLERS, SCHEDULERS, make_noise, sample
from flexi_core.demo.scenes import Caption, captions_of, random_attributes
from flexi_core.errors import FlexiError
from flexi_core.fingerprint import architecture_fingerprint, weights_fingerprint
from flexi_core.presets import all_full
from flexi_core.replay import PredictionStore, Replay, ReplayMiss
from flexi_core.run import Run
from flexi_core.schedule import Schedule
from flexi_core.unet_steps import NetworkCall

from .backend import SampleProgress, Samples
from .teacher import TeacherSettings, TeacherStore

_BATCH = 16  # samples at once; more is no faster on a CPU


class ClassifierFeatures:
    """The embedded classifier's penultimate features [N, 64]."""

    name = "embedded scene classifier"

    def __init__(self) -> None:
        self.classifier = load_classifier()

    @torch.inference_mode()
    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        return self.classifier.features(latents)


class EmbeddedBackend:
    """Samples, features and costs of the embedded model under one teacher's settings.

    Sample `seed + i` has a noise and a caption of its own, whatever else is sampled beside it.

    Raises:
        FlexiError: the sampler or scheduler is not one that the embedded model has.
    """

    def __init__(self, settings: TeacherSettings, store_folder: Path | None = None) -> None:
        for name, known in ((settings.sampler, SAMPLERS), (settings.scheduler, SCHEDULERS)):
            if name not in known:
                raise FlexiError(f"the embedded model has no {name!r}; it has {', '.join(known)}")
        self.settings = settings
        self.model = DemoModel.load()
        self.features = ClassifierFeatures()
        self.sigmas = self.grid(settings.steps)
        self._store = TeacherStore(settings, self.identity, store_folder)

    def grid(self, steps: int) -> torch.Tensor:
        """Return the scheduler's sigmas [steps + 1]."""
        return SCHEDULERS[self.settings.scheduler](self.model, steps)

    @property
    def spec(self) -> dict:
        """What opens this back end again."""
        return {"kind": "embedded"}

    @cached_property
    def identity(self) -> dict:
        """What decides the teacher's samples; also the teacher's part of a schedule file."""
        return {
            "model": "embedded",
            "architecture": architecture_fingerprint(self.model.unet),
            "weights": weights_fingerprint(self.model.unet),
            "sampler": self.settings.sampler,
            "scheduler": self.settings.scheduler,
            "steps": self.settings.steps,
            "sigmas": [float(s) for s in self.sigmas],
            "cfg": self.settings.cfg,
            "size": list(LATENT_SHAPE[1:]),
        }

    @cached_property
    def cost(self) -> NetworkCost:
        """MACs of one row, full and at every partial depth."""
        unet = self.model.unet
        call = NetworkCall(torch.zeros(1, *LATENT_SHAPE), torch.zeros(1), self.model.context([Caption()]))
        return count_macs(unet, call)

    def attributes(self, seed: int, count: int) -> torch.Tensor:
        """Return the caption attributes [count, 5] of samples seed, seed + 1, ..."""
        rows = [random_attributes(1, torch.Generator().manual_seed(seed + i)) for i in range(count)]
        return torch.cat(rows)

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
        noise, captions = make_noise(seed, count, LATENT_SHAPE), captions_of(self.attributes(seed, count))
        latents, macs, total = [], 0.0, count * (len(sigmas) - 1)
        began = time.perf_counter()
        for at in range(0, count, _BATCH):
            rows = len(noise[at : at + _BATCH])
            inner = None if progress is None else lambda i, n, at=at, rows=rows: progress(at * n + i * rows, total)
            out, run = self._sample_batch(
                schedule,
                sigmas,
                noise[at : at + _BATCH],
                captions[at : at + _BATCH],
                inner,
                predictions and Replay(predictions, (seed + at, rows, len(sigmas))),
            )
            latents.append(out)
            macs += run_macs(run.records, self.cost)
        seconds = time.perf_counter() - began
        return Samples(torch.cat(latents), seconds, macs)

    def _sample_batch(self, schedule, sigmas, noise, captions, progress, replay: Replay | None) -> tuple[torch.Tensor, Run]:
        def run(replay: Replay | None) -> tuple[torch.Tensor, Run]:
            return sample(
                self.model,
                schedule,
                sigmas,
                noise,
                captions,
                sampler=self.settings.sampler,
                cfg=self.settings.cfg,
                progress=progress,
                replay=replay,
            )

        try:
            return run(replay)
        except ReplayMiss:
            return run(None)

    def teacher(self, seed: int, count: int, progress: SampleProgress | None = None) -> torch.Tensor:
        """Return the teacher's images [count, 3, 32, 32], from the store where they are."""
        stored = self._store.get(seed, count)
        if stored is not None:
            return stored
        latents = self.sample(all_full(self.settings.steps), seed, count, progress=progress).latents
        self._store.put(seed, latents)
        return latents

    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the latents: this model works on pixels."""
        return latents

    def caption_accuracy(self, latents: torch.Tensor, seed: int) -> torch.Tensor:
        """Return for each image whether every attribute is read as its caption asks [N]."""
        return (self.features.classifier.predict(latents) == self.attributes(seed, len(latents))).all(dim=1)
