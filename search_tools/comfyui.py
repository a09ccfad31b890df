"""The ComfyUI back end: the search on a user's own run, sampled by the host's own nodes under the pack's own adapter.

A workflow's sampling node is taken with everything that the host's executor computes for it; a candidate is that very node,
called with a model that carries the candidate's schedule.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from flexi_core.cost import NetworkCost
from flexi_core.errors import FlexiError
from flexi_core.files import file_stem
from flexi_core.fingerprint import architecture_fingerprint, weights_fingerprint
from flexi_core.presets import all_full
from flexi_core.replay import Replay
from flexi_core.report import RunReport
from flexi_core.run import StepRecord
from flexi_core.sampler import PLAIN, SamplerTraits, probe
from flexi_core.schedule import Schedule

from . import workflow
from .backend import Features, SampleProgress
from .batches import BatchedBackend
from .comfyui_host import open_host
from .fitting import Observe
from .saved_workflow import is_saved, to_api
from .teacher import TeacherSettings, TeacherStore

log = logging.getLogger(__name__)

_PROBED_STEPS = 3  # the shortest run that every sampler of the host makes
# Functions of other packs that may remember what they saw: a prediction taken from a store would pass them by.
_LISTENERS = ("sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function", "model_function_wrapper")
_UNNAMED = "custom"  # sigmas that no scheduler node made


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
        graph = workflow.checked(to_api(graph, self._host.define) if is_saved(graph) else graph)
        self._node = workflow.find_sampler(graph, node)
        graph = workflow.unmarked(workflow.reduced(graph, self._node), self._node)
        self._graph = workflow.with_paths(graph, self._host.options)
        self._kind = self._graph[self._node]["class_type"]
        self._spec = {
            "comfyui": str(comfyui),
            "graph": self._graph,
            "node": self._node,
            "prompts": list(prompts),
            "base_directory": base_directory,
            "clip_vision": clip_vision,
            "name": name,
        }
        graphs = [workflow.with_prompt(self._graph, self._node, text, self._host.define) for text in prompts] or [self._graph]
        decoder = workflow.find_decoder(self._graph, self._node)
        self._vae = None if decoder is None else self._host.evaluate(self._graph, decoder, ("vae",))["vae"]
        # One for each prompt; what they have in common was computed once.
        self._inputs = [_first_item(self._host.evaluate(each, self._node)) for each in graphs]
        from flexi_core import host  # it imports the host, which is there only now

        self._apply_schedule, self._packed = host.apply_schedule, host.packed
        self.sigmas, self._run_sampler, self._probe, latent = self._measure()
        self.settings = TeacherSettings(self._sampler, self._scheduler, len(self.sigmas) - 1, self._cfg)
        # Latents of several streams, as of pictures and sound, are packed into one; people look at the first stream.
        streams = self._inputs[0]["latent_image"]["samples"]
        self._packs = bool(getattr(streams, "is_nested", False))
        self._latent_shape = tuple((streams.unbind()[0] if self._packs else latent).shape[1:])
        self.features = self._features(clip_vision, latent)
        made_from = [_without_seed(each) for each in self._inputs], str(self._model.load_device)
        self._store = TeacherStore(self.settings, {**self.identity, "inputs": _digest(made_from)[:16]}, store_folder)
        if self._is_noiseless:
            log.warning("the sampling node adds no noise: every seed may give the same picture")

    @property
    def spec(self) -> dict[str, Any]:
        """What opens this back end again."""
        return {"kind": "comfyui", **self._spec}

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the teacher's samples; also the teacher's part of a schedule file."""
        from flexi_core.host import patches_note, unpatched_weights

        network = self._model.get_model_object("diffusion_model")
        identity = {
            "model": "comfyui",
            "architecture": architecture_fingerprint(network),
            "weights": weights_fingerprint(network, unpatched_weights(self._model)),
            "sampler": self._sampler,
            "scheduler": self._scheduler,
            "steps": self.settings.steps,
            "sigmas": [float(sigma) for sigma in self.sigmas],
            "cfg": self._cfg,
            "size": list(self._latent_shape[-2:]),
            "prompts": hashlib.sha256("\n".join(self._spec["prompts"]).encode()).hexdigest()[:16],
            "workflow": workflow.digest(self._graph, self._node),
        }
        # What changes the weights for a while, as a LoRA; `weights` are the original ones.
        patches = patches_note(self._model)
        return {**identity, "patches": patches} if patches else identity

    @cached_property
    def traits(self) -> SamplerTraits:
        """What the sampler does on the run's noise levels; Euler's, where it cannot be tried."""
        from flexi_core.host import HostSolver

        return probe(HostSolver(self._run_sampler, self._model), self.sigmas.tolist()) or PLAIN

    @property
    def most_fitted(self) -> int:
        """Samples that blends are fitted on."""
        return self._most_fitted_under_noise if self.traits.draws_noise else self._most_fitted

    @cached_property
    def cost(self) -> NetworkCost:
        """MACs of one row, full and at every partial depth."""
        cost = self._probe.cost
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
            return latents
        images = torch.cat([self._vae.decode(row[None]).cpu() for row in latents])  # [N, (T,) H, W, C]
        images = images[:, images.shape[1] // 2] if images.ndim == 5 else images
        return images.movedim(-1, 1) * 2 - 1

    def _first_stream(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the first stream of packed latents [N, C, ...]; others as they are."""
        if not self._packs:
            return latents
        return latents[:, 0, : math.prod(self._latent_shape)].reshape(-1, *self._latent_shape)

    @property
    def _model(self) -> Any:
        """The MODEL of the sampling node."""
        inputs = self._inputs[0]
        return inputs["guider"].model_patcher if "guider" in inputs else inputs["model"]

    @property
    def _sampler(self) -> str:
        inputs = self._inputs[0]
        if "sampler_name" in inputs:
            return inputs["sampler_name"]
        function = getattr(inputs["sampler"], "sampler_function", None)
        return getattr(function, "__name__", type(inputs["sampler"]).__name__).removeprefix("sample_")

    @property
    def _scheduler(self) -> str:
        found = workflow.find_value(self._graph, self._node, "scheduler")
        return found if isinstance(found, str) else _UNNAMED

    @property
    def _cfg(self) -> float:
        inputs = self._inputs[0]
        return float(inputs["cfg"] if "cfg" in inputs else getattr(inputs["guider"], "cfg", 1.0))

    @property
    def _is_noiseless(self) -> bool:
        inputs = self._inputs[0]
        return inputs.get("add_noise") in ("disable", False) or type(inputs.get("noise")).__name__ == "Noise_EmptyNoise"

    def _conditioning(self) -> list:
        """Return the CONDITIONING under which latents are read: the negative one, where there is none the positive."""
        inputs = self._inputs[0]
        if "guider" not in inputs:
            return inputs["negative"]
        conds = inputs["guider"].original_conds
        entries = conds.get("negative") or conds.get("positive") or next(iter(conds.values()))
        return [[entry.get("cross_attn"), entry] for entry in entries]

    def _features(self, clip_vision: str | None, latent: torch.Tensor) -> Features:
        from .comfyui_features import ClipVisionFeatures, PooledLatents, features_of

        if clip_vision is not None:
            path = self._host.find_model("clip_vision", clip_vision)
            return ClipVisionFeatures(path, clip_vision, self.pictures)
        if self._packs:  # the network is not asked: what is packed how, only a whole run says
            return PooledLatents(self._first_stream)
        # A schedule that the workflow's own graph puts on the model is none of the features' business.
        model, _ = self._apply_schedule(self._model, all_full(1))
        return features_of(model, self._conditioning(), latent)

    def _measure(self) -> tuple[torch.Tensor, Any, RunReport, torch.Tensor]:
        """Return the run's noise levels [n + 1], its sampler, the report of its first steps, and their latent."""
        levels: list[torch.Tensor] = []
        samplers: list[Any] = []

        def shorten(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
            levels.append(sigmas.detach().float().cpu().clone())
            samplers.append(sampler)
            # A copy: some samplers write to theirs.
            return executor(noise, latent_image, sampler, sigmas[: _PROBED_STEPS + 1].clone(), *args, **kwargs)

        from comfy.patcher_extension import WrappersMP

        model = self._model.clone()
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "flexiffusion search", shorten)
        patched, handle = self._apply_schedule(model, all_full(1))
        latent = self._call(self._inputs[0], patched, 0, None)
        if handle.report is None or handle.report.run is None:
            notes = " ".join(handle.report.notes) if handle.report else "the sampling node made no run"
            raise FlexiError(f"node {self._node} ({self._kind}) cannot be searched for: {notes}")
        return levels[0], samplers[0], handle.report, latent

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
        """Sample one picture; see `BatchedBackend.draw_batch`.

        Another step count is on the scheduler's own grid; where the sampling node is given its noise levels, on theirs,
        resampled in log sigma.
        """
        kind, inputs = self._kind, self._inputs[seed % len(self._inputs)]
        if steps is not None:
            kind, inputs = self._with_steps(inputs, steps)
        patched, handle = self._apply_schedule(self._model_of(inputs), schedule, replay=replay, observe=observe)
        latent = self._call(inputs, patched, seed, progress, kind)
        if handle.report is None or handle.report.run is None:
            notes = " ".join(handle.report.notes) if handle.report else "it made no run"
            raise FlexiError(f"node {self._node} ({self._kind}) did not sample under the schedule: {notes}")
        return latent, handle.report.run.records

    @cached_property
    def replays(self) -> bool:
        """Whether a prediction depends on its step alone, as far as can be seen; guidance with a memory does not."""
        listening = [name for name in _LISTENERS if self._model.model_options.get(name)]
        if listening:
            log.info("predictions are not reused: the model has %s", ", ".join(listening))
        return not listening

    def _model_of(self, inputs: Mapping[str, Any]) -> Any:
        return inputs["guider"].model_patcher if "guider" in inputs else inputs["model"]

    def _call(
        self, inputs: Mapping[str, Any], model: Any, seed: int, progress: SampleProgress | None, kind: str | None = None
    ) -> torch.Tensor:
        """Return the latent [1, ...] of the sampling node with another model and seed."""
        kind, values = kind or self._kind, dict(inputs)
        if "guider" in values:
            guider = copy.copy(values["guider"])
            guider.model_patcher, guider.model_options = model, model.model_options
            noise = copy.copy(values["noise"])
            noise.seed = seed
            values |= {"guider": guider, "noise": noise}
        else:
            values |= {"model": model, workflow.SEEDS[kind]: seed}
        return self._packed(self._host.call(kind, values, progress)[0]["samples"]).detach().cpu()

    def _with_steps(self, inputs: Mapping[str, Any], steps: int) -> tuple[str, dict[str, Any]]:
        """Return the class and the inputs of a node that samples the same run in another number of steps."""
        whole = len(self.sigmas) - 1 == inputs.get("steps") and not inputs.get("start_at_step")
        if self._kind == "KSampler" or (self._kind == "KSamplerAdvanced" and whole):
            return self._kind, {**inputs, "steps": steps}
        sigmas = resampled(self.sigmas, steps)
        if self._kind != "KSamplerAdvanced":
            return self._kind, {**inputs, "sigmas": sigmas}
        # A window of a scheduler's steps has no shorter form that starts and ends at the same noise levels.
        import comfy.samplers

        kept = {name: inputs[name] for name in ("model", "cfg", "positive", "negative", "latent_image")}
        sampler = comfy.samplers.sampler_object(inputs["sampler_name"])
        return "SamplerCustom", {**kept, "add_noise": inputs["add_noise"] == "enable", "sampler": sampler, "sigmas": sigmas}


def resampled(sigmas: torch.Tensor, steps: int) -> torch.Tensor:
    """Return a grid [steps + 1] with the ends of another [n + 1] and its shape: evenly spread places on it, in log sigma.

    A last 0 stays beside the levels, as in the host's own grids.
    """
    levels = sigmas[:-1] if sigmas[-1] == 0 else sigmas
    count = steps if sigmas[-1] == 0 else steps + 1
    places = torch.linspace(0, len(levels) - 1, count, dtype=torch.float64)
    logs, low = levels.double().log(), places.floor().long()
    high = (low + 1).clamp(max=len(levels) - 1)
    grid = torch.lerp(logs[low], logs[high], places - low).exp().float()
    return torch.cat([grid, torch.zeros(1)]) if sigmas[-1] == 0 else grid


def _first_item(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return a sampling node's inputs with the first latent of a batch: each sample has one picture and a seed of its own."""
    latent = dict(inputs["latent_image"])
    for name in ("samples", "noise_mask", "batch_index"):
        if latent.get(name) is not None:
            latent[name] = latent[name][:1]
    return {**inputs, "latent_image": latent}


def _without_seed(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in workflow.SEEDS.values()}


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
