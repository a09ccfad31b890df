"""The calls of one run as they pass through the host: each is answered as its step asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.ldm.modules.attention
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP

from ..networks.controlnet import ShallowControl
from ..networks.graphs import outside_graphs
from ..networks.transformer import ModelCall
from ..networks.unet import NetworkCall, block_count
from ..run.nested_samplers import OwnLevel
from ..run.run import Run
from .keys import KEY


class OngoingRun:
    """The run with what the adapter has to remember of it; lives in the run's own model options."""

    def __init__(self, run: Run, post_cfg_functions: int, own: OwnLevel, has_two_models: bool) -> None:
        self.run, self.post_cfg_functions, self.own = run, post_cfg_functions, own
        self.has_two_models = has_two_models

    def __deepcopy__(self, memo: dict) -> OngoingRun:
        return self  # of options that are copied for a call: the run stays one


def _predict_noise(executor, x, timestep, model_options=None, seed=None):
    model_options = {} if model_options is None else model_options
    host_run = model_options.get("transformer_options", {}).get(KEY)
    if host_run is None:
        return executor(x, timestep, model_options, seed)
    listens = len(model_options.get("sampler_post_cfg_function", ())) > host_run.post_cfg_functions
    return host_run.run.predict(
        x,
        float(timestep.max()),
        lambda: executor(x, timestep, model_options, seed),
        must_compute="the sampler reads the unguided prediction, which an extrapolated step does not have" if listens else "",
        level=host_run.own.sigma,
    )


class _Guider:
    """Stands for a guider of the host before a sampler: its questions go through `_predict_noise`, all else to the guider."""

    def __init__(self, guider: Any) -> None:
        self.__dict__["_guider"] = guider

    def __call__(self, x, timestep, model_options=None, seed=None):
        return _predict_noise(self._guider, x, timestep, model_options, seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._guider, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._guider, name, value)


def _sampler_sample(executor, guider, *args, **kwargs):
    return executor(_Guider(guider), *args, **kwargs)


# ComfyUI before 0.3.52 has no hook around the guider's answer: there the sampler gets a stand-in for the guider.
HAS_PREDICT_NOISE = hasattr(WrappersMP, "PREDICT_NOISE")


ASKED_AT = {WrappersMP.PREDICT_NOISE: _predict_noise} if HAS_PREDICT_NOISE else {WrappersMP.SAMPLER_SAMPLE: _sampler_sample}


def answer_conds(executor, model, conds, x_in, timestep, model_options):
    """Leave the unconditional half out where guidance is reused; let control nets run a partial step's own blocks alone."""
    options = model_options.get("transformer_options", {})
    host_run = options.get(KEY)
    if host_run is None:
        return executor(model, conds, x_in, timestep, model_options)
    run, sigma = host_run.run, float(timestep.max())
    depth = run.partial_depth(sigma)
    if depth is not None and block_count(model.diffusion_model) is not None:
        views: dict[int, ShallowControl] = {}  # conditionings that share a control net still share it
        conds = [cond and [_with_shallow_control(entry, depth, views) for entry in cond] for cond in conds]
    if len(conds) != 2 or any(cond is None for cond in conds):
        if host_run.has_two_models:
            run.guides_itself(sigma, "the guider has two models")
        elif len(conds) > 1:
            unguided = "the run is not guided" if len(conds) == 2 else f"the guider has {len(conds)} conditionings, not two"
            run.guides_itself(sigma, unguided)
        return executor(model, conds, x_in, timestep, model_options)

    def halves(both: bool):
        # The host leaves a conditioning out that is None.
        return executor(model, conds if both else [conds[0], None], x_in, timestep, model_options)

    window = getattr(options.get("context_window"), "index_list", ())
    return [*run.guide(x_in, sigma, halves, tuple(window))]


def _with_shallow_control(entry: dict[str, Any], depth: int, views: dict[int, ShallowControl]) -> dict[str, Any]:
    control = entry.get("control")
    if control is None:
        return entry
    return {**entry, "control": views.setdefault(id(control), ShallowControl(control, depth))}


@outside_graphs
def answer_network(executor, *args, **kwargs):
    """Run the calls of a U-Net; a network of another kind is met at `answer_model`."""
    network = executor.class_obj
    if block_count(network) is None:
        return executor(*args, **kwargs)

    call = network_call(*args, **kwargs)
    host_run = call.options.get(KEY)
    if host_run is None:
        return call.run(executor)
    return host_run.run.forward(network, call, sigma_in(call.options), Forward(executor))


@outside_graphs
def network_call(x, timesteps, context=None, y=None, control=None, transformer_options=None, **others) -> NetworkCall:
    options = {} if transformer_options is None else transformer_options
    return NetworkCall(x, timesteps, context, y, control, options, others)


class Forward:
    """The host's own forward with the wrappers that other packs have put between it and ours."""

    def __init__(self, executor: WrapperExecutor) -> None:
        self._executor = executor

    @outside_graphs
    def __call__(self, *args, **kwargs):
        return self._executor(*args, **kwargs)

    def around(self, forward: Callable[..., torch.Tensor], owner: Any = None) -> Callable[..., torch.Tensor]:
        """Return another forward with the same wrappers around it, for which it is `owner`'s."""
        executor = self._executor
        owner = executor.class_obj if owner is None else owner
        return WrapperExecutor.new_class_executor(forward, owner, executor.wrappers, executor.idx + 1).execute


def answer_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
    """Run the calls of a network that is no U-Net: transformers differ in their arguments, the model around them does not."""
    options = {} if transformer_options is None else transformer_options
    call = ModelCall(x, t, c_concat, c_crossattn, control, options, kwargs)
    model, host_run = executor.class_obj, options.get(KEY)
    if host_run is None or block_count(model.diffusion_model) is not None:
        return call.run(executor)
    return host_run.run.forward(model, call, sigma_in(options), Forward(executor))


@outside_graphs
def sigma_in(options: dict[str, Any]) -> float:
    return float(options["sigmas"].max())


def counted_attention(_, *args, **kwargs):
    """Stand for the attention that the host chose, which may need a real device; the MACs are the same."""
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)
