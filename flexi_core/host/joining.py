"""Two models as one, with a noise level where the second takes over."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import comfy.model_patcher
import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ..errors import FlexiError
from ..stages.bounds import Boundary, Stages, with_boundary
from ..stages.options import in_place_of
from .calls import HAS_PREDICT_NOISE
from .keys import JOIN, KEY, STAGED

log = logging.getLogger(__name__)

STAGE_NAMES = ("high noise", "low noise")


def stages_in(guider: Any) -> Stages | None:
    """Return the stages of the run that a guider makes; None where one network runs all of it."""
    options = guider.model_options.get("transformer_options", {})
    staged = options.get(JOIN) or options.get(STAGED)
    return staged and staged.stages


def join_models(
    high: comfy.model_patcher.ModelPatcher,
    low: comfy.model_patcher.ModelPatcher,
    boundary: Boundary,
    in_grid: bool = True,
) -> tuple[comfy.model_patcher.ModelPatcher, tuple[str, ...]]:
    """Return one model whose high noise levels are one model's and whose low ones another's, and what is to be said of it.

    What either has of its own (LoRAs, patches, hooks, a function around its guidance) stays its own; what is put on the joined
    model is for both. The noise levels of a run are those of the first.

    Args:
        high: for the noise levels above the boundary.
        low: for those on and below it.
        boundary: between them, found for each run when it starts.
        in_grid: put the noise level next to the boundary on it, where a step would straddle it.

    Raises:
        FlexiError: the models' latents or predictions differ, they are one model, one of them is joined, or the boundary's unit
            is none of this model's.
    """
    for name, model in zip(STAGE_NAMES, (high, low), strict=True):
        if has_stages(model):
            raise FlexiError(f"the {name} model has stages already; give Flexi Join Models the models themselves")
    if high.is_clone(low):
        raise FlexiError(
            "both inputs are one loaded model, and only one set of patches can be in its weights; for one model with other "
            "LoRAs in each half use LoRA hooks on the conditioning, or two KSampler (Advanced) nodes"
        )
    formats = [type(model.model.latent_format).__name__ for model in (high, low)]
    if formats[0] != formats[1]:
        raise FlexiError(f"the models' latents differ: high noise has {formats[0]}, low noise {formats[1]}; join alike ones")
    samplings = [model.get_model_object("model_sampling") for model in (high, low)]
    predictions = [_prediction_type(sampling) for sampling in samplings]
    if predictions[0] != predictions[1]:
        raise FlexiError(
            f"the models' predictions differ: high noise predicts as {predictions[0]}, low noise as {predictions[1]}; join "
            "alike ones"
        )
    join = _Join(boundary, in_grid, _own_options(high))
    join.level([1.0, 0.0], samplings[0])  # a unit that this model has not is refused now
    clone = high.clone()
    clone.set_additional_models(JOIN, [low.clone()])
    wrappers = {
        WrappersMP.OUTER_SAMPLE: join,
        WrappersMP.SAMPLER_SAMPLE: _sampler_sample_joined,
        WrappersMP.CALC_COND_BATCH: _calc_cond_batch_joined,
    }
    if HAS_PREDICT_NOISE:
        wrappers[WrappersMP.PREDICT_NOISE] = _predict_noise_joined
    for kind, wrapper in wrappers.items():
        clone.add_wrapper_with_key(kind, JOIN, wrapper)
    clone.add_callback_with_key(CallbacksMP.ON_PRE_RUN, JOIN, join.see_start)
    put_in_order(clone)
    own = [getattr(sampling, "sigmas", None) for sampling in samplings]
    if None not in own and (own[0].shape != own[1].shape or not torch.allclose(own[0].cpu(), own[1].cpu(), rtol=1e-4)):
        shifts = [getattr(sampling, "shift", None) for sampling in samplings]
        numbers = "" if None in shifts else f" (shift {shifts[0]:g}, not {shifts[1]:g})"
        return clone, (f"The noise levels of a run are the high noise model's{numbers}; the low noise model's differ.",)
    return clone, ()


def has_stages(model: comfy.model_patcher.ModelPatcher) -> bool:
    return any(model.get_additional_models_with_key(key) for key in (JOIN, STAGED))


def put_in_order(model: comfy.model_patcher.ModelPatcher) -> None:
    """Let a run's stages be known before a schedule is laid over it, and each of its networks be called where it has to be."""
    for kind in {*model.wrappers}:
        for key in (JOIN, STAGED, KEY) if kind == WrappersMP.OUTER_SAMPLE else (STAGED, KEY, JOIN):
            own = [*model.get_wrappers(kind, key)]
            model.remove_wrappers_with_key(kind, key)
            for wrapper in own:
                model.add_wrapper_with_key(kind, key, wrapper)


def _prediction_type(sampling: Any) -> str:
    """Return the name of the host's class that turns a network's output into the denoised latent."""
    return next((cls.__name__ for cls in type(sampling).__mro__ if "calculate_denoised" in vars(cls)), "unknown")


def _own_options(model: comfy.model_patcher.ModelPatcher) -> dict[str, Any]:
    """Return the options that a run of a model begins with, but for a schedule: that is the run's."""
    own = comfy.model_patcher.create_model_options_clone(model.model_options)
    transformer = own.setdefault("transformer_options", {})
    for name, kinds in (("wrappers", model.wrappers), ("callbacks", model.callbacks)):
        comfy.patcher_extension.merge_nested_dicts(transformer.setdefault(name, {}), kinds, copy_dict1=False)
        for of_kind in transformer[name].values():
            of_kind.pop(KEY, None)
    return own


class _Join:
    """Finds the boundary of a joined model's run, and puts it into the run's grid; outermost, so that a schedule meets it."""

    def __init__(self, boundary: Boundary, in_grid: bool, high_options: dict[str, Any]) -> None:
        self.boundary, self.in_grid, self.high_options = boundary, in_grid, high_options
        self.leads = False  # whether the run that is made is the joined model's

    def see_start(self, _: comfy.model_patcher.ModelPatcher) -> None:
        """Say so where the joined model is made ready for a run that another model leads: its second network is not asked."""
        if not self.leads:
            log.warning(
                "Flexiffusion: a joined model is the second one of its guider: its high noise model alone answers, at every "
                "level. Put the joined model first, or give the guider one of the two."
            )

    def level(self, sigmas: Sequence[float], sampling: Any) -> float:
        """Return the boundary as a noise level of a run [n + 1] of a model with this sampling."""
        ends = (float(getattr(sampling, "sigma_min", 0)), float(getattr(sampling, "sigma_max", 0)))
        return self.boundary.level(sigmas, lambda sigma: float(sampling.timestep(torch.tensor([sigma]))), ends)

    def stages(self, sigmas: torch.Tensor, sampling: Any) -> Stages:
        """Return the stages of a run [n + 1] of a model with this sampling."""
        return Stages((self.level(sigmas.tolist(), sampling),), STAGE_NAMES)

    def grid(self, sigmas: torch.Tensor, sampling: Any) -> torch.Tensor:
        """Return a run's noise levels [n + 1], with the boundary among them where that is asked for."""
        levels = sigmas.tolist()
        found = with_boundary(levels, self.level(levels, sampling)) if self.in_grid else levels
        return sigmas if found == levels else sigmas.new_tensor(found)

    def __call__(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        guider = executor.class_obj
        patcher = guider.model_patcher
        sampling = patcher.get_model_object("model_sampling")
        stages, sigmas = self.stages(sigmas, sampling), self.grid(sigmas, sampling)
        options = guider.model_options.setdefault("transformer_options", {})
        low = patcher.get_additional_models_with_key(JOIN)[0]
        options[JOIN] = _Joined(stages, patcher, low, self.high_options)
        self.leads = True
        try:
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            options.pop(JOIN, None)
            self.leads = False


def levels_of(model: comfy.model_patcher.ModelPatcher, sigmas: torch.Tensor) -> torch.Tensor:
    """Return the noise levels [n + 1] that a model samples at where a sampler is given others: a joined one's boundary."""
    for join in model.get_wrappers(WrappersMP.OUTER_SAMPLE, JOIN):
        sigmas = join.grid(sigmas, model.get_model_object("model_sampling"))
    return sigmas


def stages_of(model: comfy.model_patcher.ModelPatcher, sigmas: torch.Tensor) -> Stages | None:
    """Return where the network of a model's run changes; None where it does not.

    Args:
        model: joined, with stages, or neither.
        sigmas: of the run [n + 1], as `levels_of` has them.
    """
    for join in model.get_wrappers(WrappersMP.OUTER_SAMPLE, JOIN):
        return join.stages(sigmas, model.get_model_object("model_sampling"))
    for outer in model.get_wrappers(WrappersMP.OUTER_SAMPLE, STAGED):
        return outer.args[0]
    return None


class _Joined:
    """The run of a joined model; lives in the run's own model options."""

    def __init__(
        self,
        stages: Stages,
        high: comfy.model_patcher.ModelPatcher,
        low: comfy.model_patcher.ModelPatcher,
        high_options: dict[str, Any],
    ) -> None:
        self.stages, self.high, self.low = stages, high, low
        self._high_options, self._low_options = high_options, _own_options(low)
        self._encoded: dict[int, tuple[Any, Any]] = {}  # conditioning for the low model, by that for the high one
        self._alike = _encodes_as(high.model, low.model)

    def __deepcopy__(self, memo: dict) -> _Joined:
        return self  # of options that are copied for a call: the run stays one

    def is_low(self, timestep: torch.Tensor) -> bool:
        """Return whether a noise level [B] is the low model's."""
        return self.stages.at(float(timestep.max())) > 0

    def begin(self, guider: Any, noise: torch.Tensor, **known: Any) -> None:
        """Make the low model ready as the host does the high one, and encode the conditioning for it."""
        scratch = comfy.model_patcher.create_model_options_clone(self.low.model_options)
        comfy.sampler_helpers.prepare_model_patcher(self.low, guider.conds, scratch)  # LoRAs that come with a prompt
        self.low.pre_run()
        if self._alike:
            return
        given = {c["uuid"]: c.get("model_conds", {}) for conds in guider.original_conds.values() for c in conds}
        for kind, conds in guider.conds.items():
            bare = [{**cond, "model_conds": given.get(cond.get("uuid"), {})} for cond in conds]
            encode = self.low.model.extra_conds
            encoded = comfy.samplers.encode_model_conds(encode, bare, noise, noise.device, kind, **known)
            for cond, own in zip(conds, encoded, strict=True):
                self._encoded[id(cond["model_conds"])] = cond["model_conds"], own["model_conds"]

    def end(self) -> None:
        """Leave the low model as it was."""
        self.low.cleanup()
        self.low.restore_hook_patches()

    def options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return the options of a call with the low model's own in the place of the high one's."""
        # Its clones on other devices are the high model's.
        run = {key: value for key, value in options.items() if key not in ("multigpu_clones", "multigpu_thread_pool")}
        return in_place_of(run, self._high_options, self._low_options)

    def conds(self, conds: Sequence[list[dict[str, Any]] | None]) -> list[list[dict[str, Any]] | None]:
        """Return conditionings as the low model takes them."""
        if self._alike:
            return conds
        return [entries and list(map(self._for_low, entries)) for entries in conds]

    def _for_low(self, entry: dict[str, Any]) -> dict[str, Any]:
        found = self._encoded.get(id(entry["model_conds"]))
        if found is None:
            raise FlexiError(
                "the joined models take conditioning each in its own form, and another node cuts it up (context windows); "
                "sample them in two KSampler (Advanced) nodes"
            )
        return {**entry, "model_conds": found[1]}


def _encodes_as(one: Any, other: Any) -> bool:
    """Return whether two of the host's models take conditioning in the same form."""
    configs = [{**model.model_config.unet_config, "dtype": None} for model in (one, other)]
    keys = [getattr(model, "concat_keys", ()) for model in (one, other)]
    return type(one) is type(other) and configs[0] == configs[1] and keys[0] == keys[1]


def _joined_run(model_options: dict[str, Any] | None) -> _Joined | None:
    return (model_options or {}).get("transformer_options", {}).get(JOIN)


def _sampler_sample_joined(
    executor, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, *args, **kwargs
):
    joined = _joined_run(extra_args.get("model_options"))
    if joined is None:
        return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *args, **kwargs)
    try:
        joined.begin(guider, noise, latent_image=latent_image, denoise_mask=denoise_mask, seed=extra_args.get("seed"))
        return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *args, **kwargs)
    finally:
        joined.end()


def _predict_noise_joined(executor, x, timestep, model_options=None, seed=None):
    joined = _joined_run(model_options)
    if joined is not None and joined.is_low(timestep):
        model_options = joined.options(model_options)
    return executor(x, timestep, {} if model_options is None else model_options, seed)


def _calc_cond_batch_joined(executor, model, conds, x_in, timestep, model_options):
    """Let the low model answer in its stage; a second model of the guider's answers for itself."""
    joined = _joined_run(model_options)
    if joined is None or model is not joined.high.model or not joined.is_low(timestep):
        return executor(model, conds, x_in, timestep, model_options)
    options = model_options if HAS_PREDICT_NOISE else joined.options(model_options)
    return executor(joined.low.model, joined.conds(conds), x_in, timestep, options)
