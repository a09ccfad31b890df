"""What the back ends of small models share: a batch under a schedule, identity and cost."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from flexi_core.demo.model import SmallModel
from flexi_core.errors import FlexiError
from flexi_core.networks.fingerprint import architecture_fingerprint, weights_fingerprint
from flexi_core.networks.unet import NetworkCall
from flexi_core.run.cost import NetworkCost, StagedCost, count_macs
from flexi_core.run.plan import make_plan
from flexi_core.run.replay import Replay
from flexi_core.run.run import StepRecord
from flexi_core.run.sampler import SamplerTraits, Solver
from flexi_core.runtime.sampling import SAMPLERS, SCHEDULERS, make_noise, sample, sigmas_of, solver_of, traits_of
from flexi_core.schedule.schedule import Schedule
from flexi_core.tune import Observe, SampleProgress

from .batches import BatchedBackend
from .protocol import Features
from .teacher import TeacherSettings, TeacherStore


class SmallModelBackend(BatchedBackend):
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
        self._store = TeacherStore(settings, self.identity, store_folder, model.latent_shape)

    @abstractmethod
    def prompts(self, seed: int, count: int) -> Sequence[Any] | None:
        """Return what samples seed, seed + 1, ... are conditioned on; None where the model takes no conditioning."""

    @property
    def spec(self) -> dict[str, Any]:
        """What opens this back end again."""
        return {"kind": self.kind}

    @property
    def solver(self) -> Solver:
        """The sampler, for any denoiser."""
        return solver_of(self.settings.sampler)

    @cached_property
    def traits(self) -> SamplerTraits:
        """What the sampler does."""
        return traits_of(self.settings.sampler, self.sigmas)

    def grid(self, steps: int) -> torch.Tensor:
        """Return the sampler's and the scheduler's sigmas [steps + 1]."""
        return sigmas_of(self.model, self.settings.sampler, self.settings.scheduler, steps)

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
    def starts(self) -> tuple[int, ...]:
        """Steps at which another network of the run begins."""
        return self.model.stages.starts(self.sigmas.tolist()) if self.model.stages else ()

    @cached_property
    def cost(self) -> NetworkCost:
        """MACs of one row, full and at every partial depth; of several networks each step's own."""
        context, _ = self.model.conditioning(self.prompts(0, 1), 1)
        call = NetworkCall(torch.zeros(1, *self.model.latent_shape), torch.zeros(1), context)
        if self.model.stages is None:
            return count_macs(self.model.unet, call)
        levels = {self.model.stages.at(float(sigma)): float(sigma) for sigma in self.sigmas[:-1]}
        by_stage = {stage: count_macs(self.model.network(sigma), call) for stage, sigma in levels.items()}
        return StagedCost.over((self.model.stages.at(float(sigma)) for sigma in self.sigmas[:-1]), by_stage)

    def draw_batch(
        self,
        schedule: Schedule,
        seed: int,
        rows: int,
        *,
        steps: int | None,
        progress: SampleProgress | None,
        replay: Callable[[], Replay] | None,
        observe: Observe | None,
    ) -> tuple[torch.Tensor, list[StepRecord]]:
        """Sample one batch; see `BatchedBackend.draw_batch`."""
        sigmas = self.sigmas if steps is None else self.grid(steps)
        plan = make_plan(schedule, sigmas.tolist(), self.traits, stages=self.model.stages)
        latents, run = sample(
            self.model,
            plan,
            sigmas,
            make_noise(seed, rows, self.model.latent_shape),
            self.prompts(seed, rows),
            sampler=self.settings.sampler,
            cfg=self.settings.cfg,
            seeds=range(seed, seed + rows),
            progress=progress,
            replay=replay and replay(),
            observer=observe and observe(plan, solver_of(self.settings.sampler)),
        )
        return latents, run.records

    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the latents: these models work on pixels, or on latents that nothing here decodes."""
        return latents
