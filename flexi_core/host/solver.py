"""A sampler of the host by itself, with any denoiser in the network's place."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import torch

from ..run.nested_samplers import OwnLevel, listened


class HostSolver:
    """The solver that a sampler of the host is, for any denoiser; its noise is that of a seed of its own.

    Args:
        sampler: of the run.
        patcher: of the run's model, whose noise levels some samplers look at.
        cfg: the run's guidance scale, which some samplers look at.
    """

    def __init__(self, sampler: comfy.samplers.Sampler, patcher: comfy.model_patcher.ModelPatcher, cfg: float = 1.0) -> None:
        self.own, self.cfg = OwnLevel(), cfg
        sampler = listened(sampler, self.own)
        self._function = getattr(sampler, "sampler_function", None)
        self._options = getattr(sampler, "extra_options", {})
        self._patcher = patcher
        self.reads_guidance = False  # whether it asked for the prediction without the prompt
        self.interrupted: BaseException | None = None  # by the user, while it was tried

    @property
    def name(self) -> str:
        """The sampler's name, as people choose it where it is the host's own."""
        name = getattr(self._function, "__name__", "the sampler")
        return name.removeprefix("sample_").removesuffix("_function")

    def __call__(
        self, denoise: Callable[[torch.Tensor, float], torch.Tensor], x: torch.Tensor, sigmas: torch.Tensor, seed: int = 0
    ) -> torch.Tensor:
        """Return where the sampler ends.

        Raises:
            TypeError: the sampler is not one of the host's own kind.
        """
        extra = {"seed": seed, "model_options": {}, "denoise_mask": None}
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a sampler's library, about the made-up run
            torch.default_generator.manual_seed(seed)  # the CPU's alone: no other device is put back behind it
            try:
                return self._function(
                    _StandIn(denoise, self), x, sigmas.clone(), extra_args=extra, callback=None, disable=True, **self._options
                )
            except comfy.model_management.InterruptProcessingException as error:
                self.interrupted = error
                raise


class _StandIn:
    """Stands for the model before a sampler that is tried: its answers are given, its noise levels the real model's."""

    def __init__(self, denoise: Callable[[torch.Tensor, float], torch.Tensor], solver: HostSolver) -> None:
        self._denoise, self._solver = denoise, solver
        patcher = solver._patcher
        base = SimpleNamespace(model_sampling=patcher.get_model_object("model_sampling"))
        self.inner_model = SimpleNamespace(inner_model=base, model_patcher=patcher, model_options={}, cfg=solver.cfg, conds={})

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, model_options: Any = None, **_: Any) -> torch.Tensor:
        own = self._solver.own.sigma
        denoised = self._denoise(x, float(sigma.max()) if own is None else own)
        for listener in (model_options or {}).get("sampler_post_cfg_function", ()):
            self._solver.reads_guidance = True
            denoised = listener(
                {"denoised": denoised, "cond_denoised": denoised, "uncond_denoised": denoised, "input": x, "sigma": sigma,
                 "model": self.inner_model.inner_model, "cond_scale": 1.0, "model_options": model_options}
            )  # fmt: skip
        return denoised
