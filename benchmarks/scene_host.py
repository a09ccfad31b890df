"""Models of captioned scenes in the host, sampled in batches by its own samplers: one back end for searching and judging."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from flexi_core.demo.classifier import load_classifier
from flexi_core.demo.scenes import Caption, captions_of, random_attributes
from flexi_core.errors import FlexiError
from flexi_core.networks.fingerprint import architecture_fingerprint, weights_fingerprint
from flexi_core.run.cost import NetworkCost
from flexi_core.run.replay import Replay
from flexi_core.run.run import StepRecord
from flexi_core.run.sampler import PLAIN, SamplerTraits, Solver, probe
from flexi_core.runtime.sampling import make_noise
from flexi_core.schedule.presets import all_full
from flexi_core.schedule.schedule import Schedule
from flexi_core.tune import Observe, SampleProgress
from search_tools.backends.batches import BatchedBackend
from search_tools.backends.teacher import TeacherSettings, TeacherStore

BATCH = BatchedBackend.batch


def open_comfy(checkout: Path, device: str = "cpu") -> None:
    """Make the host's own modules importable, without its server and nodes.

    Args:
        checkout: its folder.
        device: cpu or cuda; read once, when the host's model management is imported.
    """
    sys.path.insert(0, str(checkout.expanduser().resolve()))
    from comfy.cli_args import args

    args.cpu, args.use_pytorch_cross_attention = device == "cpu", True


@dataclass(frozen=True)
class SceneModel:
    """A MODEL of the host that draws captioned scenes.

    Args:
        name: of the network, for reports.
        model: the host's.
        latent_shape: of one sample (C, H, W).
        conditioning: CONDITIONING of captions, one row each.
        pictures: latents [N, ...] to pictures [N, 3, 32, 32], -1..1.
    """

    name: str
    model: Any
    latent_shape: tuple[int, int, int]
    conditioning: Callable[[Sequence[Caption]], list]
    pictures: Callable[[torch.Tensor], torch.Tensor]


def embedded_model() -> SceneModel:
    """Return the embedded U-Net, whose latents are pixels; the host must be open."""
    from flexi_core.demo.captions import embed_captions
    from flexi_core.demo.model import LATENT_SHAPE, TOKEN_TABLE, WEIGHTS, read_weights
    from flexi_core.host import load_demo_model

    table = read_weights(WEIGHTS)[1][TOKEN_TABLE]
    return SceneModel(
        "embedded", load_demo_model(), LATENT_SHAPE, lambda captions: [[embed_captions(table, captions), {}]], lambda x: x
    )


class SceneFeatures:
    """The bundled classifier's penultimate features [N, 64] of what latents show."""

    name = "embedded scene classifier"

    def __init__(self, pictures: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.classifier, self._pictures = load_classifier(), pictures

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        return self.of_pictures(self._pictures(latents))

    @torch.inference_mode()
    def of_pictures(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return features of pictures [N, 3, 32, 32], -1..1."""
        return self.classifier.features(pictures)

    def class_probabilities(self, latents: torch.Tensor) -> list[torch.Tensor]:
        """Return the probabilities [N, K] of each attribute's values."""
        with torch.inference_mode():
            return [logits.softmax(dim=1) for logits in self.classifier(self._pictures(latents)).values()]


class SceneBackend(BatchedBackend):
    """Samples, features and costs of a scene model in the host, under one teacher's settings.

    Sample `seed + i` has the noise and the caption of the embedded back end's, whatever else is sampled beside it.

    Args:
        scenes: the model.
        settings: of the teacher; the names are the host's.
        store_folder: of the teacher's samples; the user's cache folder by default.
    """

    def __init__(self, scenes: SceneModel, settings: TeacherSettings, store_folder: Path | None = None) -> None:
        self.scenes, self.settings, self.features = scenes, settings, SceneFeatures(scenes.pictures)
        self._store = TeacherStore(settings, self.identity, store_folder)

    @property
    def spec(self) -> dict[str, Any]:
        """What the model is; a search with this back end has one worker."""
        return {"kind": "scenes in the host", "name": self.scenes.name}

    @cached_property
    def sigmas(self) -> torch.Tensor:
        """The run's noise levels [n + 1]."""
        import comfy.samplers

        wanted = self.settings
        sampler = comfy.samplers.KSampler(
            self.scenes.model, wanted.steps, self.scenes.model.load_device, wanted.sampler, wanted.scheduler, denoise=1.0
        )
        return sampler.sigmas.float().cpu()

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the teacher's samples; also the teacher's part of a schedule file."""
        network = self.scenes.model.get_model_object("diffusion_model")
        return {
            "model": self.scenes.name,
            "architecture": architecture_fingerprint(network),
            "weights": weights_fingerprint(network),
            "sampler": self.settings.sampler,
            "scheduler": self.settings.scheduler,
            "steps": self.settings.steps,
            "sigmas": [float(sigma) for sigma in self.sigmas],
            "cfg": self.settings.cfg,
            "size": list(self.scenes.latent_shape[-2:]),
            "runtime": "host",
        }

    @property
    def solver(self) -> Solver:
        """The sampler, for any denoiser."""
        import comfy.samplers

        from flexi_core.host import HostSolver

        return HostSolver(comfy.samplers.sampler_object(self.settings.sampler), self.scenes.model)

    @cached_property
    def traits(self) -> SamplerTraits:
        """What the sampler does on the run's noise levels; Euler's, where it cannot be tried."""
        return probe(self.solver, self.sigmas.tolist()) or PLAIN

    @cached_property
    def cost(self) -> NetworkCost:
        """MACs of one row, full and at every partial depth."""
        from flexi_core.host import apply_schedule

        patched, handle = apply_schedule(self.scenes.model, all_full(2))
        self.draw(patched, 0, 1, steps=2)
        return handle.report.cost

    def draw(
        self,
        model: Any,
        seed: int,
        count: int,
        *,
        sampler: str | None = None,
        scheduler: str | None = None,
        steps: int | None = None,
        progress: SampleProgress | None = None,
    ) -> torch.Tensor:
        """Return the latents [count, ...] of one batch that a MODEL makes, by the teacher's settings but for those given."""
        import comfy.sample

        noise = make_noise(seed, count, self.scenes.latent_shape)
        with torch.inference_mode():
            return comfy.sample.sample(
                model,
                noise,
                steps or self.settings.steps,
                self.settings.cfg,
                sampler or self.settings.sampler,
                scheduler or self.settings.scheduler,
                self.scenes.conditioning(captions_of(self.attributes(seed, count))),
                self.scenes.conditioning([Caption()]),
                torch.zeros_like(noise),
                disable_pbar=True,
                seed=seed,
                callback=None if progress is None else lambda step, _, __, total: progress(step + 1, total),
            )

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
        from flexi_core.host import apply_schedule

        patched, handle = apply_schedule(self.scenes.model, schedule, replay=replay, observe=observe)
        latents = self.draw(patched, seed, rows, steps=steps, progress=progress)
        if handle.report.run is None:
            raise FlexiError(f"the host did not sample under {schedule}: {' '.join(handle.report.notes)}")
        return latents, handle.report.run.records

    def attributes(self, seed: int, count: int) -> torch.Tensor:
        """Return the caption attributes [count, 5] of samples seed, seed + 1, ..."""
        return torch.cat([random_attributes(1, torch.Generator().manual_seed(seed + i)) for i in range(count)])

    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """Return what people look at [N, 3, 32, 32], -1..1."""
        return self.scenes.pictures(latents)

    def read(self, latents: torch.Tensor, seed: int) -> torch.Tensor:
        """Return for each attribute whether it is what the caption of its sample asks [N, 5]."""
        return self.features.classifier.predict(self.pictures(latents)) == self.attributes(seed, len(latents))

    def caption_accuracy(self, latents: torch.Tensor, seed: int) -> torch.Tensor:
        """Return for each picture whether every attribute is read as its caption asks [N]."""
        return self.read(latents, seed).all(dim=1)
