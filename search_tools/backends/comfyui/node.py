"""A sampling node of a workflow: its inputs as the host computed them, what they say of its run, and the run itself."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from flexi_core.errors import FlexiError
from flexi_core.run.cost import NetworkCost, StagedCost
from flexi_core.run.report import RunReport
from flexi_core.schedule.presets import all_full
from flexi_core.stages.bounds import Stages
from flexi_core.tune import SampleProgress
from flexi_core.tune.levels import resampled

from . import workflow
from .host import ComfyHost
from .workflow import Graph

_PROBED_STEPS = 3  # the shortest run that every sampler of the host makes
_UNNAMED = "custom"  # sigmas that no scheduler node made


class SamplingNode:
    """A sampling node whose run is made again and again, with other models and seeds.

    Args:
        host: brought up.
        graph: that it stands in.
        name: its id.
        inputs: what it gets, once for each prompt.

    Attributes:
        sigmas: its run's noise levels [n + 1].
        run_sampler: the host's sampler.
        probed: the report of its first steps.
        latent: in which these ended [1, ...].

    Raises:
        FlexiError: its run takes no schedule.
    """

    def __init__(self, host: ComfyHost, graph: Graph, name: str, inputs: Sequence[dict[str, Any]]) -> None:
        self._host, self._graph, self.name = host, graph, name
        self.kind, self.inputs = graph[name]["class_type"], [_first_item(each) for each in inputs]
        self.sigmas, self.run_sampler, self.probed, self.latent = self._measure()

    @property
    def steps(self) -> int:
        """Of its run."""
        return len(self.sigmas) - 1

    @property
    def model(self) -> Any:
        """Its MODEL."""
        return model_of(self.inputs[0])

    @property
    def sampler(self) -> str:
        """The sampler's name."""
        inputs = self.inputs[0]
        if "sampler_name" in inputs:
            return inputs["sampler_name"]
        function = getattr(inputs["sampler"], "sampler_function", None)
        return getattr(function, "__name__", type(inputs["sampler"]).__name__).removeprefix("sample_")

    @property
    def scheduler(self) -> str:
        """The scheduler's name."""
        found = workflow.find_value(self._graph, self.name, "scheduler")
        return found if isinstance(found, str) else _UNNAMED

    @property
    def cfg(self) -> float:
        """The guidance scale; 1 of a guider that has none."""
        inputs = self.inputs[0]
        return float(inputs["cfg"] if "cfg" in inputs else getattr(inputs["guider"], "cfg", 1.0))

    @property
    def is_noiseless(self) -> bool:
        """Whether it begins without a noise of its own."""
        inputs = self.inputs[0]
        return inputs.get("add_noise") in ("disable", False) or type(inputs.get("noise")).__name__ == "Noise_EmptyNoise"

    @property
    def said(self) -> str:
        """What it is, for messages."""
        return f"node {self.name} ({self.kind})"

    @property
    def conditioning(self) -> list:
        """The CONDITIONING under which latents are read: the negative one, where there is none the positive."""
        inputs = self.inputs[0]
        if "guider" not in inputs:
            return inputs["negative"]
        conds = inputs["guider"].original_conds
        entries = conds.get("negative") or conds.get("positive") or next(iter(conds.values()))
        return [[entry.get("cross_attn"), entry] for entry in entries]

    @property
    def unseeded(self) -> list[dict[str, Any]]:
        """Its inputs without the seed, which each sample has of its own."""
        return [{name: value for name, value in each.items() if name not in workflow.SEEDS.values()} for each in self.inputs]

    def inputs_of(self, seed: int) -> dict[str, Any]:
        """Return the inputs of a sample: of several prompts, those of the one at its place."""
        return self.inputs[seed % len(self.inputs)]

    def run(
        self, inputs: Mapping[str, Any], model: Any, seed: int, progress: SampleProgress | None, kind: str | None = None
    ) -> dict[str, Any]:
        """Return the LATENT that the node makes of inputs with another model and seed.

        Args:
            inputs: by name.
            model: in place of theirs.
            seed: in place of theirs.
            progress: called with the steps done and the steps in all.
            kind: class of the node; its own by default.
        """
        kind, values = kind or self.kind, dict(inputs)
        if "guider" in values:
            guider = copy.copy(values["guider"])
            guider.model_patcher, guider.model_options = model, model.model_options
            noise = copy.copy(values["noise"])
            noise.seed = seed
            values |= {"guider": guider, "noise": noise}
        else:
            values |= {"model": model, workflow.SEEDS[kind]: seed}
        return self._host.call(kind, values, progress)[0]

    @cached_property
    def teacher(self) -> dict[str, Any]:
        """What a schedule's file says of its model and settings."""
        from flexi_core.host import teacher_of

        return teacher_of(self.model, self.cfg)

    def with_steps(self, inputs: Mapping[str, Any], steps: int) -> tuple[str, dict[str, Any]]:
        """Return the class and the inputs of a node that samples the same run in another number of steps.

        They are on the scheduler's own grid; where the node is given its noise levels, or takes a window of a scheduler's
        steps, on its own grid, resampled in log sigma.
        """
        whole = self.steps == inputs.get("steps") and not inputs.get("start_at_step")
        if self.kind == "KSampler" or (self.kind == "KSamplerAdvanced" and whole):
            return self.kind, {**inputs, "steps": steps}
        sigmas = resampled(self.sigmas, steps)
        if self.kind != "KSamplerAdvanced":
            return self.kind, {**inputs, "sigmas": sigmas}
        # A window of a scheduler's steps has no shorter form that starts and ends at the same noise levels.
        import comfy.samplers

        kept = {name: inputs[name] for name in ("model", "cfg", "positive", "negative", "latent_image")}
        sampler = comfy.samplers.sampler_object(inputs["sampler_name"])
        return "SamplerCustom", {**kept, "add_noise": inputs["add_noise"] == "enable", "sampler": sampler, "sigmas": sigmas}

    @cached_property
    def stages(self) -> Stages | None:
        """Where the network of its run changes; None where it does not."""
        from flexi_core.host import stages_of

        return stages_of(self.model, self.sigmas)

    @cached_property
    def cost(self) -> NetworkCost | None:
        """MACs of one row, of several networks each step's own; None where they cannot be counted."""
        starts = self.stages.starts(self.sigmas.tolist()) if self.stages else ()
        if not starts:
            return self.probed.cost
        by_step = [self.stages.at(float(sigma)) for sigma in self.sigmas[:-1]]
        by_stage = {by_step[0]: self.probed.cost_in(by_step[0])}
        by_stage |= {by_step[start]: self._measure(start)[2].cost_in(by_step[start]) for start in starts}
        return None if None in by_stage.values() else StagedCost.over(by_step, by_stage)

    def _measure(self, begin: int = 0) -> tuple[torch.Tensor, Any, RunReport, torch.Tensor]:
        levels: list[torch.Tensor] = []
        samplers: list[Any] = []

        def shorten(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
            levels.append(sigmas.detach().float().cpu().clone())
            samplers.append(sampler)
            # A copy: some samplers write to theirs.
            return executor(noise, latent_image, sampler, sigmas[begin : begin + _PROBED_STEPS + 1].clone(), *args, **kwargs)

        from comfy.patcher_extension import WrappersMP

        from flexi_core.host import apply_schedule, packed

        model = self.model.clone()
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "flexiffusion search", shorten)
        patched, handle = apply_schedule(model, all_full(1))
        latent = packed(self.run(self.inputs[0], patched, 0, None)["samples"]).detach().cpu()
        if handle.report is None or handle.report.run is None:
            notes = " ".join(handle.report.notes) if handle.report else "the sampling node made no run"
            raise FlexiError(f"{self.said} cannot be searched for: {notes}")
        return levels[0], samplers[0], handle.report, latent


def model_of(inputs: Mapping[str, Any]) -> Any:
    """Return the MODEL that a sampling node gets, by itself or in a guider."""
    return inputs["guider"].model_patcher if "guider" in inputs else inputs["model"]


def _first_item(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return a sampling node's inputs with the first latent of a batch: each sample has one picture and a seed of its own."""
    latent = dict(inputs["latent_image"])
    for name in ("samples", "noise_mask", "batch_index"):
        if latent.get(name) is not None:
            latent[name] = latent[name][:1]
    return {**inputs, "latent_image": latent}
