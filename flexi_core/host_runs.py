"""Runs of the host that tuning samples: one KSampler's, with a seed of its own for each sample."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from .errors import FlexiError
from .fit import Trajectory
from .host import HostSolver, apply_schedule, levels_of, packed, teacher_of
from .plan import Plan
from .replay import PredictionStore
from .sampler import SamplerTraits, Solver, probe
from .schedule import Schedule
from .tune import BlendFitter, Observe, SampleProgress, Samples


def sampler_names() -> list[str]:
    """Return the samplers that the host offers."""
    return list(comfy.samplers.KSampler.SAMPLERS)


def scheduler_names() -> list[str]:
    """Return the schedulers that the host offers."""
    return list(comfy.samplers.KSampler.SCHEDULERS)


def progress_bar(total: int) -> comfy.utils.ProgressBar:
    """Return the bar of the node that runs; `update(1)` moves it on."""
    return comfy.utils.ProgressBar(total)


@dataclass(frozen=True)
class KSamplerRun:
    """What a KSampler is given, but for the seed.

    Args:
        model: of the host.
        steps, cfg, sampler, scheduler, denoise: its settings.
        positive, negative: CONDITIONING.
        latent: LATENT; its first picture is sampled.
    """

    model: ModelPatcher
    steps: int
    cfg: float
    sampler: str
    scheduler: str
    positive: list
    negative: list
    latent: dict[str, Any]
    denoise: float = 1.0

    @property
    def sigmas(self) -> torch.Tensor:
        """Noise levels [n + 1]."""
        own = comfy.samplers.KSampler(
            self.model,
            steps=self.steps,
            device=self.model.load_device,
            sampler=self.sampler,
            scheduler=self.scheduler,
            denoise=self.denoise,
            model_options=self.model.model_options,
        )
        return levels_of(self.model, own.sigmas.float().cpu())

    @property
    def samples(self) -> torch.Tensor:
        """The latents that are gone on from [B, ...]; newer hosts give an empty one the size that the model wants."""
        known = inspect.signature(comfy.sample.fix_empty_latent_channels).parameters
        ratios = {name: value for name, value in self.latent.items() if name in known}
        return comfy.sample.fix_empty_latent_channels(self.model, self.latent["samples"], **ratios)

    def sample(self, seed: int, steps: int | None, callback: Callable[..., None] | None) -> Any:
        """Return the samples of one picture: a tensor [1, ...], or the host's NestedTensor."""
        latent = self.samples[:1]
        mask = self.latent.get("noise_mask")
        return comfy.sample.sample(
            self.model,
            comfy.sample.prepare_noise(latent, seed, None),
            self.steps if steps is None else steps,
            self.cfg,
            self.sampler,
            self.scheduler,
            self.positive,
            self.negative,
            latent,
            denoise=self.denoise,
            noise_mask=None if mask is None else mask[:1],
            callback=callback,
            disable_pbar=True,
            seed=seed,
        )


class HostRuns:
    """The runs of a KSampler, as `tune.Runs`; what they cost is counted in network evaluations.

    Args:
        run: of the KSampler.
        on_step: called after every step of every run.

    Raises:
        FlexiError: its sampler cannot be tried.
    """

    cuts: tuple[int, ...] = ()

    def __init__(self, run: KSamplerRun, on_step: Callable[[], None] = lambda: None) -> None:
        self._run, self.on_step = run, on_step
        self.sampler, self.sigmas = run.sampler, run.sigmas
        solver = HostSolver(comfy.samplers.sampler_object(run.sampler), run.model, run.cfg)
        traits = probe(solver, self.sigmas.tolist())
        if solver.interrupted is not None:
            raise solver.interrupted
        if traits is None or not traits.keeps_levels:
            raise FlexiError(f"{run.sampler} could not be tried, or chooses its own noise levels; tuning is for other samplers")
        self.traits: SamplerTraits = traits
        self._fitter = BlendFitter(self._spent, traits)
        self.first: dict[str, Any] = {}  # the samples of the first seed, by the text of their schedule

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the runs, and stands in a schedule's file."""
        run = self._run
        return {
            "model": "comfyui",
            **teacher_of(run.model, run.cfg),
            "sampler": run.sampler,
            "scheduler": run.scheduler,
            "steps": len(self.sigmas) - 1,
            "sigmas": [float(sigma) for sigma in self.sigmas],
            "size": list(run.samples.shape[-2:]),
        }

    def batches(self, seed: int, count: int) -> list[tuple[int, int]]:
        """Return seeds one by one: each picture has a noise of its own."""
        return [(seed + i, 1) for i in range(count)]

    def observed(
        self, schedule: Schedule, seed: int, rows: int, observe: Observe, predictions: PredictionStore | None = None
    ) -> tuple[torch.Tensor, float]:
        """Sample one picture, followed by an observer; see `tune.Runs.observed`."""
        return self._drawn(schedule, seed, None, observe)

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
        """Sample under a schedule; see `tune.Runs.sample`."""
        drawn = [self._drawn(schedule, seed, steps, None) for seed, _ in self.batches(seed, count)]
        return Samples(torch.cat([latent for latent, _ in drawn]), 0.0, sum(spent for _, spent in drawn))

    def fit(
        self, schedule: Schedule, seed: int, count: int, predictions: PredictionStore | None = None
    ) -> tuple[Schedule, float]:
        """Return a schedule with fitted blends, and what that took; see `tune.Runs.fit`."""
        return self._fitter.fit(schedule, self.batches(seed, count))

    def keep_trajectory(self, seed: int, rows: int, basis: str, trajectory: Trajectory, response: torch.Tensor) -> None:
        """Keep a picture's trajectory for fits; see `tune.Runs.keep_trajectory`."""
        self._fitter.keep((seed, rows), basis, trajectory, self.sigmas, response)

    def _spent(self, schedule: Schedule, batch: tuple[int, int], observe: Observe, _: PredictionStore | None) -> float:
        return self._drawn(schedule, batch[0], None, observe)[1]

    def _drawn(
        self, schedule: Schedule, seed: int, steps: int | None, observe: Callable[[Plan, Solver], Any] | None
    ) -> tuple[torch.Tensor, float]:
        def after_step(*_: Any) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            self.on_step()

        patched, handle = apply_schedule(self._run.model, schedule, observe=observe)
        samples = replace(self._run, model=patched).sample(seed, steps, after_step)
        if handle.report is None or handle.report.run is None:
            notes = " ".join(handle.report.notes) if handle.report else "it made no run"
            raise FlexiError(f"the run cannot be tuned: {notes}")
        self.first.setdefault(str(schedule) if steps is None else f"{steps} steps", samples)
        return packed(samples).detach().cpu(), float(schedule.letters.count("F"))
