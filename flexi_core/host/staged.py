"""A model with a decoder of its own for each stage of noise levels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import comfy.ldm.modules.attention
import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import comfy.model_patcher
import comfy.ops
import torch
from comfy.patcher_extension import WrappersMP

from ..errors import FlexiError
from ..networks.fingerprint import architecture_fingerprint, weights_fingerprint
from ..networks.graphs import outside_graphs
from ..networks.unet import block_count
from ..stages.bounds import Stages
from ..stages.network import load_stages, with_decoder
from .calls import Forward, network_call, sigma_in
from .joining import has_stages, put_in_order
from .keys import STAGED
from .mismatch import unpatched_weights


def stage_model(model: comfy.model_patcher.ModelPatcher, path: Path) -> comfy.model_patcher.ModelPatcher:
    """Return a model whose decoder is another in each stage of a file; the model's own stays for nothing but that.

    Patches of the model's weights reach the encoder that the stages share, and hooks every stage.

    Args:
        model: the base, a U-Net.
        path: of the stage file.

    Raises:
        FlexiError: the file cannot be read or is for another base, or the model has stages already or is no U-Net.
    """
    if has_stages(model):
        raise FlexiError("the model has stages already; give Flexi Stage Model the base model itself")
    network = model.get_model_object("diffusion_model")
    if block_count(network) is None:
        raise FlexiError("the model is no U-Net; a stage file's decoders are for the U-Net that they were trained on")
    found = load_stages(path)
    found.check_base(architecture_fingerprint(network), weights_fingerprint(network, unpatched_weights(model)))
    cast = model.model.manual_cast_dtype
    decoders = torch.nn.ModuleList(found.decoders(partial(_HostParts, comfy.ops.pick_operations(network.dtype, cast))))
    own = comfy.model_patcher.ModelPatcher(decoders.to(network.dtype), model.load_device, model.offload_device)
    clone = model.clone()
    clone.set_additional_models(STAGED, [own])
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, STAGED, partial(_outer_sample_staged, found.stages))
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, STAGED, _diffusion_model_staged)
    put_in_order(clone)
    return clone


class _HostParts:
    """Makes a decoder of the host's own modules, which its forward knows; see `stages.network.Parts`."""

    def __init__(self, operations: Any, arguments: Mapping[str, Any], groups: Callable[[int], int]) -> None:
        class Fitting(operations):
            class GroupNorm(operations.GroupNorm):
                def __init__(self, num_groups: int, num_channels: int, *args: Any, **kwargs: Any) -> None:
                    super().__init__(groups(num_channels), num_channels, *args, **kwargs)

        self._arguments, self._made = arguments, {"dtype": torch.float32, "operations": Fitting}

    def residual(self, channels: int, out: int) -> torch.nn.Module:
        emb, scale_shift = 4 * self._arguments["model_channels"], self._arguments["use_scale_shift_norm"]
        return openaimodel.ResBlock(channels, emb, 0.0, out, use_scale_shift_norm=scale_shift, **self._made)

    def transformer(self, channels: int, heads: int, dim_head: int, depth: int) -> torch.nn.Module:
        context = {"context_dim": self._arguments["context_dim"], "use_linear": self._arguments["use_linear_in_transformer"]}
        return comfy.ldm.modules.attention.SpatialTransformer(channels, heads, dim_head, depth, **context, **self._made)

    def upsample(self, channels: int) -> torch.nn.Module:
        return openaimodel.Upsample(channels, True, **self._made)

    def out(self, channels: int, out: int) -> torch.nn.Module:
        operations, dtype = self._made["operations"], self._made["dtype"]
        norm = operations.GroupNorm(32, channels, dtype=dtype)
        return torch.nn.Sequential(norm, torch.nn.SiLU(), operations.Conv2d(channels, out, 3, padding=1, dtype=dtype))

    def block(self, layers: Sequence[torch.nn.Module]) -> torch.nn.Module:
        return openaimodel.TimestepEmbedSequential(*layers)


class _Staged:
    """The run of a stage model: its networks, one for each stage; lives in the run's own model options."""

    def __init__(self, stages: Stages, networks: Sequence[torch.nn.Module]) -> None:
        self.stages, self.networks = stages, networks

    def __deepcopy__(self, memo: dict) -> _Staged:
        return self  # of options that are copied for a call: the run stays one


def _outer_sample_staged(stages: Stages, executor, *args, **kwargs):
    guider = executor.class_obj
    network = guider.model_patcher.get_model_object("diffusion_model")
    decoders = guider.model_patcher.get_additional_models_with_key(STAGED)[0].model
    options = guider.model_options.setdefault("transformer_options", {})
    options[STAGED] = _Staged(stages, [with_decoder(network, decoder) for decoder in decoders])
    try:
        return executor(*args, **kwargs)
    finally:
        options.pop(STAGED, None)


@outside_graphs
def _diffusion_model_staged(executor, *args, **kwargs):
    """Call the network of the stage in the place of the base's, with all that is around it."""
    call = network_call(*args, **kwargs)
    staged = call.options.get(STAGED)
    if staged is None:
        return executor(*args, **kwargs)
    network = staged.networks[staged.stages.at(sigma_in(call.options))]
    return call.run(Forward(executor).around(partial(type(network)._forward, network), network))
