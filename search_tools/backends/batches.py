"""What every back end does alike: a schedule's samples batch by batch, the stored teacher, and fits to it."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property

import torch

from flexi_core.run.cost import NetworkCost, run_macs
from flexi_core.run.replay import PredictionStore, Replay, ReplayMiss
from flexi_core.run.run import StepRecord
from flexi_core.run.sampler import SamplerTraits
from flexi_core.schedule.presets import all_full
from flexi_core.schedule.schedule import Schedule
from flexi_core.tune import BlendFitter, Observe, Observed, SampleProgress, Samples
from flexi_core.tune.fit import Trajectory

from .teacher import TeacherSettings, TeacherStore


class BatchedBackend(ABC):
    """The part of a `Backend` that follows from how it samples one batch.

    A kind of back end sets `settings` and `_store`, says what a row costs, and draws.
    """

    settings: TeacherSettings
    traits: SamplerTraits  # what the sampler does
    cost: NetworkCost
    batch = 16  # samples at once; more is no faster on a CPU
    most_fitted: int | None = None  # samples that blends are fitted on
    cuts: tuple[int, ...] = ()  # steps at which one window of the run ends and the next begins
    starts: tuple[int, ...] = ()  # steps at which another network of the run begins
    replays = True  # whether a prediction depends on its step, its seeds and what went in alone
    _store: TeacherStore

    @property
    def sampler(self) -> str:
        """The sampler's name."""
        return self.settings.sampler

    @abstractmethod
    def draw_batch(
        self,
        schedule: Schedule,
        seed: int,
        rows: int,
        *,
        steps: int | None,
        progress: SampleProgress | None,
        replay: Callable[..., Replay] | None,
        observe: Observe | None,
    ) -> tuple[torch.Tensor, Sequence[StepRecord]]:
        """Return the latents [rows, ...] of samples seed, seed + 1, ... under a schedule, and what its steps computed.

        Args:
            schedule: of the run's length.
            seed: of the first sample.
            rows: how many samples, at most `batch`.
            steps: another step count than the teacher's.
            progress: called with the steps done and the steps in all.
            replay: makes the run's view of a store; of a window of the run, by its number.
            observe: makes what follows the run's steps.
        """

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
        """Sample under a schedule; see `Backend.sample`."""
        latents, macs, length = [], 0.0, steps or self.settings.steps
        began = time.perf_counter()
        for first, rows in self.batches(seed, count):
            before = (first - seed) * length

            def inner(done: int, of: int, rows: int = rows, before: int = before) -> None:
                progress(before + rows * (done * length // of), count * length)

            latent, spent = self._drawn(schedule, first, rows, steps, progress and inner, predictions)
            latents.append(latent)
            macs += spent
            if progress is not None:
                progress(before + rows * length, count * length)
        return Samples(torch.cat(latents), time.perf_counter() - began, macs)

    def fit(
        self, schedule: Schedule, seed: int, count: int, predictions: PredictionStore | None = None
    ) -> tuple[Schedule, float]:
        """Return a schedule with fitted blends, and the MACs that its runs took; see `Backend.fit`."""
        return self._fitter.fit(schedule, self.batches(seed, min(count, self.most_fitted or count)), predictions)

    def observed(
        self,
        schedule: Schedule,
        seed: int,
        rows: int,
        observe: Observe,
        predictions: PredictionStore | None = None,
    ) -> tuple[torch.Tensor, float]:
        """Sample one batch, followed by an observer; see `Backend.observed`."""
        return self._drawn(schedule, seed, rows, None, None, predictions, observe)

    def keep_trajectory(self, seed: int, rows: int, basis: str, trajectory: Trajectory, response: torch.Tensor) -> None:
        """Keep a batch's trajectory for fits; see `Backend.keep_trajectory`."""
        self._fitter.keep((seed, rows), basis, trajectory, torch.as_tensor(self.sigmas), response)

    def batches(self, seed: int, count: int) -> list[tuple[int, int]]:
        """Return the first seed and the size of every batch; see `Backend.batches`."""
        return [(seed + at, min(self.batch, count - at)) for at in range(0, count, self.batch)]

    def teacher(self, seed: int, count: int, progress: SampleProgress | None = None) -> torch.Tensor:
        """Return the teacher's latents [count, ...], from the store where they are."""
        stored = self._store.get(seed, count)
        if stored is not None:
            return stored
        latents = self.sample(all_full(self.settings.steps), seed, count, progress=progress).latents
        self._store.put(seed, latents)
        return latents

    def caption_accuracy(self, latents: torch.Tensor, seed: int) -> torch.Tensor | None:
        """Return None: nothing here reads whether a picture is what its prompt asks."""
        return None

    @cached_property
    def _fitter(self) -> BlendFitter:
        def observed(
            schedule: Schedule, batch: tuple[int, int], observe: Observe, predictions: PredictionStore | None
        ) -> float:
            return self.observed(schedule, *batch, observe, predictions)[1]

        return self.make_fitter(observed)

    def make_fitter(self, observed: Observed) -> BlendFitter:
        """Return what fits schedules to the teacher."""
        return BlendFitter(observed, self.traits)

    def _drawn(
        self,
        schedule: Schedule,
        seed: int,
        rows: int,
        steps: int | None,
        progress: SampleProgress | None,
        predictions: PredictionStore | None,
        observe: Observe | None = None,
    ) -> tuple[torch.Tensor, float]:
        """Return the latents [rows, ...] of a batch and the MACs spent on it, with what a store has where that suffices."""

        def draw(replay: Callable[..., Replay] | None) -> tuple[torch.Tensor, float]:
            latents, records = self.draw_batch(
                schedule, seed, rows, steps=steps, progress=progress, replay=replay, observe=observe
            )
            return latents, run_macs(records, self.cost)

        if predictions is not None and self.replays:
            try:
                return draw(lambda *window: Replay(predictions, (seed, rows, steps, *window)))
            except ReplayMiss:
                pass
        return draw(None)
