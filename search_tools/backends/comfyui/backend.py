"""The ComfyUI back end: the search on a user's own run, sampled by the host's own nodes under the pack's own adapter.

A workflow's sampling node is taken with everything that the host's executor computes for it; a candidate is that very node,
called with a model that carries the candidate's schedule. Several nodes that share a run are taken together.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from flexi_core.errors import FlexiError
from flexi_core.files import file_stem
from flexi_core.run.cost import NetworkCost
from flexi_core.run.replay import Replay
from flexi_core.run.run import StepRecord
from flexi_core.run.sampler import PLAIN, SamplerTraits, Solver, probe
from flexi_core.schedule.presets import all_full
from flexi_core.schedule.schedule import Schedule
from flexi_core.tune import BlendFitter, Observe, Observed, SampleProgress

from ..batches import BatchedBackend
from ..protocol import Features
from ..teacher import TeacherSettings, TeacherStore
from ..windows import WindowFitter
from . import workflow
from .host import open_host
from .node import SamplingNode
from .run import SamplingRun
from .saved_workflow import is_saved, to_api

log = logging.getLogger(__name__)

# Functions of other packs that may remember what they saw: a prediction taken from a store would pass them by.
_LISTENERS = ("sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function", "model_function_wrapper")


class ComfyBackend(BatchedBackend):
    """Samples, features and costs of a workflow's sampling node, all steps full being the teacher.

    Sample `seed + i` has that seed and, of several prompts, the one at its place.

    Args:
        comfyui: the host's folder.
        graph: a workflow as the page saves it, or its API form.
        node: id of the sampling node; needed where there are several.
        prompts: positive prompts to take in turn; the workflow's own where there are none.
        base_directory: as the host's own option.
        clip_vision: name of a model in models/clip_vision whose features are measured on.
        name: of the workflow, for the result's file.
        store_folder: of the teacher's latents.

    Raises:
        FlexiError: the host, the workflow, or a node in it cannot do what is asked.
    """

    batch = 1
    _most_fitted = 4  # one after the other; twice as many gained 0.3 dB in trials
    _most_fitted_under_noise = 8  # four overfit by 1 to 6 dB

    def __init__(
        self,
        comfyui: str,
        graph: dict[str, Any],
        node: str | None = None,
        prompts: Sequence[str] = (),
        base_directory: str | None = None,
        clip_vision: str | None = None,
        name: str = "workflow",
        store_folder: Path | None = None,
    ) -> None:
        if not is_saved(graph):
            workflow.find_sampler(workflow.checked(graph), node)  # where that fails, the host need not come up
        self._host = open_host(comfyui, base_directory)
        define = cache(self._host.define)  # the host makes a definition anew each time, with its lists of files
        graph = workflow.checked(to_api(graph, define) if is_saved(graph) else graph)
        sampler = workflow.find_sampler(graph, node)
        graph = workflow.unmarked(workflow.reduced(graph, sampler), sampler)
        self._graph = workflow.with_paths(graph, self._host.options)
        self._spec = {
            "comfyui": str(comfyui),
            "graph": self._graph,
            "node": sampler,
            "prompts": list(prompts),
            "base_directory": base_directory,
            "clip_vision": clip_vision,
            "name": name,
        }
        graphs = [workflow.with_prompt(self._graph, sampler, text, define) for text in prompts] or [self._graph]
        decoder = workflow.find_decoder(self._graph, sampler)
        self._vae = None if decoder is None else self._host.evaluate(self._graph, decoder, ("vae",))["vae"]
        names = workflow.find_run(self._graph, sampler)
        # One for each prompt; what they have in common was computed once.
        inputs = {name: [self._host.evaluate(workflow.begun(each, name, names), name) for each in graphs] for name in names}
        from flexi_core import host  # it imports the host, which is there only now

        self._apply_schedule, self._packed = host.apply_schedule, host.packed
        self._run = SamplingRun([SamplingNode(self._host, self._graph, name, inputs[name]) for name in names])
        first, self._last = self._run.nodes[0], self._run.nodes[-1]
        self.sigmas, self.cuts, self._model = self._run.sigmas, self._run.cuts, self._last.model
        self.settings = TeacherSettings(first.sampler, first.scheduler, len(self.sigmas) - 1, first.cfg)
        # Latents of several streams, as of pictures and sound, are packed into one; people look at the first stream.
        streams, latent = first.inputs[0]["latent_image"]["samples"], first.latent
        self._packs = bool(getattr(streams, "is_nested", False))
        self._latent_shape = tuple((streams.unbind()[0] if self._packs else latent).shape[1:])
        self.features = self._features(clip_vision, latent)
        made_from = [each for node in self._run.nodes for each in node.unseeded], str(self._model.load_device)
        known = {**self.identity, "inputs": _digest(made_from)[:16]}
        self._store = TeacherStore(self.settings, known, store_folder, latent.shape[1:])
        if self._run.words:
            log.warning(self._run.words)
        if first.is_noiseless:
            log.warning("the sampling node adds no noise: every seed may give the same picture")

    @classmethod
    def open(cls, spec: Mapping[str, Any], settings: TeacherSettings) -> ComfyBackend:
        """Return the back end of a `spec`; its settings are its workflow's."""
        return cls(**{key: value for key, value in spec.items() if key != "kind"})

    @property
    def spec(self) -> dict[str, Any]:
        """What opens this back end again."""
        return {"kind": "comfyui", **self._spec}

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the teacher's samples; also the teacher's part of a schedule file."""
        return {
            "model": "comfyui",
            **self._run.teacher,
            "sampler": self.settings.sampler,
            "scheduler": self.settings.scheduler,
            "steps": self.settings.steps,
            "sigmas": [float(sigma) for sigma in self.sigmas],
            "size": list(self._latent_shape[-2:]),
            "prompts": hashlib.sha256("\n".join(self._spec["prompts"]).encode()).hexdigest()[:16],
            "workflow": workflow.digest(self._graph, self._last.name),
        }

    @property
    def solver(self) -> Solver:
        """The sampler of the last node, for any denoiser."""
        from flexi_core.host import HostSolver

        return HostSolver(self._last.run_sampler, self._model)

    @cached_property
    def traits(self) -> SamplerTraits:
        """What the sampler does on the run's noise levels; Euler's, where it cannot be tried."""
        return probe(self.solver, self.sigmas.tolist()) or PLAIN

    @property
    def starts(self) -> tuple[int, ...]:
        """Steps at which another network begins within a node's window."""
        found: list[int] = []
        for node, edge in zip(self._run.nodes, self._run.edges, strict=False):
            found += [edge + start for start in (node.stages.starts(node.sigmas.tolist()) if node.stages else ())]
        return tuple(found)

    @property
    def most_fitted(self) -> int:
        """Samples that blends are fitted on."""
        return self._most_fitted_under_noise if self.traits.draws_noise else self._most_fitted

    def make_fitter(self, observed: Observed) -> BlendFitter | WindowFitter:
        """Return what fits schedules: of several nodes, window by window."""
        return WindowFitter(observed, self.traits, self._run.edges) if self.cuts else super().make_fitter(observed)

    @cached_property
    def cost(self) -> NetworkCost:
        """MACs of one row, full and at every partial depth; of a node's several networks each step's own."""
        cost = self._last.probed.cost if self.cuts else self._last.cost
        if cost is None:
            log.warning("the network's MACs cannot be counted: every computed step is taken to cost the same")
            return NetworkCost(1.0)
        return cost

    def default_file(self, speedup: float) -> Path:
        """Return where FlexiLoadSchedule finds the result of a search for a reduction of MACs; the folder is made.

        Raises:
            FlexiError: the folder cannot be made.
        """
        folder = self._host.schedule_folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FlexiError(f"{folder} cannot be made ({error.strerror or error}); give --out") from error
        return folder / f"{file_stem(self._spec['name'])}_{speedup:g}x.json"

    @torch.inference_mode()
    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """Return what people look at [N, C, H, W], -1..1: decoded where the workflow decodes, of a film the middle frame."""
        latents = self._first_stream(latents)
        if self._vae is None:
            return latents[:, :, latents.shape[2] // 2] if latents.ndim == 5 else latents
        images = torch.cat([self._vae.decode(row[None]).cpu() for row in latents])  # [N, (T,) H, W, C]
        images = images[:, images.shape[1] // 2] if images.ndim == 5 else images
        return images.movedim(-1, 1) * 2 - 1

    def _first_stream(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the first stream of packed latents [N, C, ...]; others as they are."""
        if not self._packs:
            return latents
        return latents[:, 0, : math.prod(self._latent_shape)].reshape(-1, *self._latent_shape)

    def _features(self, clip_vision: str | None, latent: torch.Tensor) -> Features:
        from .features import ClipVisionFeatures, PooledLatents, features_of

        if clip_vision is not None:
            path = self._host.find_model("clip_vision", clip_vision)
            return ClipVisionFeatures(path, clip_vision, self.pictures)
        if self._packs:  # the network is not asked: what is packed how, only a whole run says
            return PooledLatents(self._first_stream)
        # A schedule that the workflow's own graph puts on the model is none of the features' business.
        model, _ = self._apply_schedule(self._model, all_full(1))
        return features_of(model, self._last.conditioning, latent)

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
    ) -> tuple[torch.Tensor, list[StepRecord]]:
        """Sample one picture; see `BatchedBackend.draw_batch`, and `SamplingNode.with_steps` for another step count."""
        latent, records = self._run.sample(
            schedule, seed, self._apply_schedule, steps=steps, progress=progress, replay=replay, observe=observe
        )
        return self._packed(latent["samples"]).detach().cpu(), records

    @cached_property
    def replays(self) -> bool:
        """Whether a prediction depends on its step alone, as far as can be seen; guidance with a memory does not."""
        options = [node.model.model_options for node in self._run.nodes]
        listening = [name for name in _LISTENERS if any(each.get(name) for each in options)]
        if listening:
            log.info("predictions are not reused: the model has %s", ", ".join(listening))
        return not listening


def _digest(value: Any) -> str:
    """Return a digest of every number, text and tensor in a nest of values, models left out."""
    digest = hashlib.sha256()
    waiting, seen = [value], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            values = value.detach().to("cpu").contiguous()
            digest.update(f"{tuple(values.shape)}{values.dtype}".encode())
            digest.update(values.flatten().view(torch.uint8).numpy().tobytes() if values.dtype.itemsize else b"")
        elif isinstance(value, str | int | float | bool):
            digest.update(repr(value).encode())
        elif id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, Mapping):
                waiting += [part for key in sorted(value, key=str) for part in (str(key), value[key])]
            elif isinstance(value, list | tuple):
                waiting += value
            elif getattr(value, "is_nested", False):
                waiting += value.unbind()
            elif hasattr(value, "original_conds"):  # a guider
                waiting += [value.original_conds, getattr(value, "cfg", None)]
    return digest.hexdigest()
