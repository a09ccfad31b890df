"""Runs of the host that tuning samples: a KSampler's or a guider's, with a seed of its own for each sample."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ..errors import FlexiError
from ..run.plan import Plan
from ..run.replay import PredictionStore
from ..run.sampler import SamplerTraits, Solver, probe
from ..schedule.schedule import Schedule
from ..tune import BlendFitter, Observe, SampleProgress, Samples
from ..tune.fit import Trajectory
from ..tune.levels import resampled
from . import HostSolver, apply_schedule, levels_of, packed, stages_of, teacher_of


def sampler_names() -> list[str]:
    """Return the samplers that the host offers."""
    return list(comfy.samplers.KSampler.SAMPLERS)


def scheduler_names() -> list[str]:
    """Return the schedulers that the host offers."""
    return list(comfy.samplers.KSampler.SCHEDULERS)


def progress_bar(total: int) -> comfy.utils.ProgressBar:
    """Return the bar of the node that runs; `update(1)` moves it on."""
    return comfy.utils.ProgressBar(total)


def is_interrupt(error: Exception) -> bool:
    """Return whether an error is the user's own wish to stop."""
    return isinstance(error, comfy.model_management.InterruptProcessingException)


class HostRun(Protocol):
    """What a sampling node is given, but for the seed."""

    model: ModelPatcher
    cfg: float
    latent: dict[str, Any]

    @property
    def sampler(self) -> str:
        """The sampler's name."""
        ...

    @property
    def scheduler(self) -> str:
        """The scheduler's name."""
        ...

    @property
    def guider(self) -> str:
        """What guides it, by name; empty for a KSampler's own."""
        ...

    @property
    def solver(self) -> comfy.samplers.Sampler:
        """The host's sampler."""
        ...

    @property
    def sigmas(self) -> torch.Tensor:
        """Noise levels [n + 1]."""
        ...

    @property
    def samples(self) -> torch.Tensor:
        """The latents that are gone on from [B, ...]."""
        ...

    def with_model(self, model: ModelPatcher) -> HostRun:
        """Return the run with another model."""
        ...

    def sample(self, seed: int, steps: int | None, callback: Callable[..., None] | None) -> Any:
        """Return the samples of one picture: a tensor [1, ...], or the host's NestedTensor."""
        ...


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
    guider = ""

    @property
    def solver(self) -> comfy.samplers.Sampler:
        """The host's sampler."""
        return comfy.samplers.sampler_object(self.sampler)

    def with_model(self, model: ModelPatcher) -> KSamplerRun:
        """Return the run with another model."""
        return replace(self, model=model)

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
        """The latents that are gone on from [B, ...]."""
        return _samples_of(self.model, self.latent)

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


@dataclass(frozen=True)
class GuiderRun:
    """What a SamplerCustomAdvanced is given, but for the seed.

    Args:
        guider_object, solver, sigmas, noise: of the host: GUIDER, SAMPLER, SIGMAS [n + 1], NOISE.
        latent: LATENT; its first picture is sampled.
    """

    guider_object: Any
    solver: comfy.samplers.Sampler
    sigmas: torch.Tensor
    noise: Any
    latent: dict[str, Any]
    scheduler = "custom"

    @property
    def model(self) -> ModelPatcher:
        """The guider's MODEL."""
        return self.guider_object.model_patcher

    @property
    def cfg(self) -> float:
        """The guidance scale; 1 of a guider that has none."""
        return float(getattr(self.guider_object, "cfg", 1.0))

    @property
    def guider(self) -> str:
        """Kind of the guider."""
        return type(self.guider_object).__name__

    @property
    def sampler(self) -> str:
        """The sampler's name."""
        return HostSolver(self.solver, self.model, self.cfg).name

    @property
    def samples(self) -> torch.Tensor:
        """The latents that are gone on from [B, ...]."""
        return _samples_of(self.model, self.latent)

    def with_model(self, model: ModelPatcher) -> GuiderRun:
        """Return the run with another model, in a guider of its own."""
        guider = copy.copy(self.guider_object)
        guider.model_patcher, guider.model_options = model, model.model_options
        return replace(self, guider_object=guider)

    def sample(self, seed: int, steps: int | None, callback: Callable[..., None] | None) -> Any:
        """Return the samples of one picture: a tensor [1, ...], or the host's NestedTensor."""
        noise = copy.copy(self.noise)
        noise.seed = seed
        latent, mask = self.samples[:1], self.latent.get("noise_mask")
        samples = self.guider_object.sample(
            noise.generate_noise({**self.latent, "samples": latent}),
            latent,
            self.solver,
            self.sigmas if steps is None else resampled(self.sigmas, steps),
            denoise_mask=None if mask is None else mask[:1],
            callback=callback,
            disable_pbar=True,
            seed=seed,
        )
        return samples.to(comfy.model_management.intermediate_device())


def _samples_of(model: ModelPatcher, latent: dict[str, Any]) -> torch.Tensor:
    """Return the samples of a LATENT [B, ...]; newer hosts give an empty one the size that the model wants."""
    known = inspect.signature(comfy.sample.fix_empty_latent_channels).parameters
    ratios = {name: value for name, value in latent.items() if name in known}
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"], **ratios)


class HostRuns:
    """The runs of a sampling node, as `tune.Runs`; what they cost is counted in network evaluations.

    Args:
        run: of the node.
        on_step: called after every step of every run.

    Raises:
        FlexiError: its sampler cannot be tried.
    """

    cuts: tuple[int, ...] = ()

    def __init__(self, run: HostRun, on_step: Callable[[], None] = lambda: None) -> None:
        self._run, self.on_step = run, on_step
        self.sampler, self.sigmas = run.sampler, run.sigmas.float().cpu()
        self.solver = HostSolver(run.solver, run.model, run.cfg)
        traits = probe(self.solver, self.sigmas.tolist())
        if self.solver.interrupted is not None:
            raise self.solver.interrupted
        if traits is None or not traits.keeps_levels:
            raise FlexiError(f"{run.sampler} could not be tried, or chooses its own noise levels; tuning is for other samplers")
        self.traits: SamplerTraits = traits
        self._fitter = BlendFitter(self._spent, traits)
        self.first: dict[str, Any] = {}  # the samples of the first seed, by the text of their schedule

    @property
    def starts(self) -> tuple[int, ...]:
        """Steps at which another network of the run begins."""
        stages = stages_of(self._run.model, self.sigmas)
        return () if stages is None else stages.starts(self.sigmas.tolist())

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
            **({"guider": run.guider} if run.guider else {}),
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
        samples = self._run.with_model(patched).sample(seed, steps, after_step)
        if handle.report is None or handle.report.run is None:
            notes = " ".join(handle.report.notes) if handle.report else "it made no run"
            raise FlexiError(f"the run cannot be tuned: {notes}")
        self.first.setdefault(str(schedule) if steps is None else f"{steps} steps", samples)
        return packed(samples).detach().cpu(), float(schedule.letters.count("F"))
