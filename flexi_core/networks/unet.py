"""Partial steps of an LDM-layout U-Net, without a copied forward (DeepCache, Ma et al., 2023).

With n input blocks, `output_blocks[n-1-i]` takes the skip of `input_blocks[i]`. A partial step of depth k runs
`input_blocks[:k]` and `output_blocks[n-k:]`; the deep feature that enters `output_blocks[n-k]` comes from a full step. The
code that runs is the network's own `_forward`, on a shallow view of the network, so that whatever patches it carries keep
working; the embedded model and the host's U-Nets share this module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ..run.cache import Feature
from .graphs import for_later_calls, outside_graphs

_MIDDLE = "middle_block_after_patch"


@dataclass(frozen=True)
class NetworkCall:
    """The arguments of one call of a diffusion network, as the host passes them.

    Args:
        x: scaled latent [B, C, H, W].
        timesteps: the model's own time [B].
        context: conditioning tokens [B, M, D].
        y: vector conditioning [B, A].
        control: residuals of control nets, lists by "input", "middle", "output".
        options: the host's transformer_options.
        kwargs: whatever else the call carried.
    """

    x: torch.Tensor
    timesteps: torch.Tensor
    context: torch.Tensor | None = None
    y: torch.Tensor | None = None
    control: dict[str, list] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    kwargs: dict[str, Any] = field(default_factory=dict)

    method = "_forward"

    @outside_graphs
    def run(self, forward: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Return forward's prediction for these arguments."""
        return forward(self.x, self.timesteps, self.context, self.y, self.control, self.options, **self.kwargs)

    def shapes(self) -> NetworkCall:
        """Return the call on the meta device: shapes and types without data, patches or control residuals."""
        tensors = (self.x, self.timesteps, self.context, self.y, self.kwargs)
        x, timesteps, context, y, kwargs = on_meta(tensors)
        return NetworkCall(x, timesteps, context, y, None, {"cond_or_uncond": self.options.get("cond_or_uncond", [0])}, kwargs)


@outside_graphs
def on_meta(values: Any) -> Any:
    """Return a nest of values with every tensor on the meta device."""
    return tree_map_only(torch.Tensor, _meta_like, values)


@outside_graphs
def _meta_like(value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(value, device="meta")


def block_count(network: nn.Module) -> int | None:
    """Return the number of input blocks of an LDM-layout U-Net, None for any other network."""
    inputs, outputs = getattr(network, "input_blocks", None), getattr(network, "output_blocks", None)
    middle = getattr(network, "middle_block", None)
    if not isinstance(inputs, nn.ModuleList) or not isinstance(outputs, nn.ModuleList) or not isinstance(middle, nn.Sequential):
        return None
    return len(inputs) if len(inputs) == len(outputs) and callable(getattr(network, "_forward", None)) else None


class UNetSteps:
    """Full and partial passes of one U-Net."""

    def __init__(self, network: nn.Module) -> None:
        self._network, self._blocks = network, block_count(network)
        self._in_order = ""  # a patch of the last full pass that must meet every block

    def why_not(self, depth: int) -> str:
        """Return in words why no partial step of a depth can run; empty when one can."""
        if self._in_order:
            return f"{self._in_order} patches the middle block and others, and goes through them in order"
        return f"depth {depth} needs more than the network's {self._blocks} blocks" if depth >= self._blocks else ""

    @outside_graphs
    def full(
        self, call: NetworkCall, forward: Callable[..., torch.Tensor], depth: int | None
    ) -> tuple[torch.Tensor, Feature | None]:
        """Run every block; with a depth also return what partial steps of that depth take in, where it can be kept."""
        self._in_order = _met_in_order(call.options)
        if depth is None or self.why_not(depth):
            return call.run(forward), None
        skips: list[torch.Tensor] = []

        def note(h: torch.Tensor, skip: torch.Tensor) -> None:
            skips.append(skip.new_empty((len(skip), 0, *skip.shape[2:])))  # the shape alone: no bytes

        prediction, feature = full_pass(self._network, _watched_entry(call, self._blocks - depth, note), forward, depth)
        return prediction, None if feature is None else {"deep": feature, "skip": skips[-1]}

    @outside_graphs
    def partial(
        self, call: NetworkCall, forward: Callable[..., torch.Tensor], depth: int, feature: Feature
    ) -> torch.Tensor | None:
        """Run the shallow blocks on a kept feature; None when patches now give them another size than in the full step."""

        def compare(h: torch.Tensor, skip: torch.Tensor) -> None:
            if skip.shape[2:] != feature["skip"].shape[2:]:
                raise _OtherSize

        call = _watched_entry(call, self._blocks - depth, compare)
        try:
            return partial_pass(self._network, call, depth, feature["deep"], getattr(forward, "around", None))
        except _OtherSize:
            return None


@outside_graphs
def full_pass(
    network: nn.Module, call: NetworkCall, forward: Callable[..., torch.Tensor], depth: int | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run every block; with a depth also return the deep feature that partial steps of that depth take in.

    Args:
        network: the U-Net.
        call: its arguments.
        forward: the network's own forward, or the rest of the host's wrapper chain.
        depth: of the partial steps to come, less than the network's block count, or None.

    Returns:
        prediction [B, C, H, W], and the deep feature [B, ...] or None.
    """
    if depth is None:
        return call.run(forward), None
    kept: list[torch.Tensor] = []

    def keep(h: torch.Tensor, skip: torch.Tensor) -> None:
        with for_later_calls():
            kept.append(h.clone())  # patches after this one may write to h in place

    return _watched_entry(call, block_count(network) - depth, keep).run(forward), kept[-1] if kept else None


@outside_graphs
def partial_pass(
    network: nn.Module,
    call: NetworkCall,
    depth: int,
    feature: torch.Tensor,
    around: Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]] | None = None,
) -> torch.Tensor:
    """Run the `depth` shallowest input and output blocks on a kept deep feature [B, ...].

    Args:
        network: the U-Net.
        call: its arguments.
        depth: less than the network's block count.
        feature: that a full pass kept.
        around: puts around the shallow network's forward what the host has around the whole one's.

    Returns:
        prediction [B, C, H, W]; at the input at which the feature was kept, the full prediction bit for bit.
    """
    n = block_count(network)
    skipped = [*network.input_blocks[depth:], network.middle_block, *network.output_blocks[: n - depth]]
    view = copy.copy(network)
    view._modules = {
        **network._modules,
        "input_blocks": nn.ModuleList(network.input_blocks[:depth]),
        "middle_block": type(network.middle_block)(_Stored(feature)),
        "output_blocks": nn.ModuleList(network.output_blocks[n - depth :]),
    }
    options = _ShiftedOptions(_without_middle_patches(call.options), n - depth, sum(map(_transformers, skipped)))
    call = replace(call, options=options, control=_shallow_control(call.control, n - depth))
    forward = partial(type(network)._forward, view)
    return call.run(forward if around is None else around(forward))


def watched_features(call: NetworkCall, network: nn.Module, sizes: dict[int, float]) -> NetworkCall:
    """Return a call that notes the bytes of the deep feature at every depth of a full pass."""
    n = block_count(network)

    def note(h: torch.Tensor, skip: torch.Tensor, options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        sizes[n - options["block"][1]] = h.nbytes
        return h, skip

    return _with_output_patch(call, note)


def _with_output_patch(call: NetworkCall, patch: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> NetworkCall:
    """Return a call with one more patch before the output blocks, ahead of all others."""
    patches = call.options.get("patches", {})
    patches = {**patches, "output_block_patch": [patch, *patches.get("output_block_patch", ())]}
    return replace(call, options={**call.options, "patches": patches})


def _watched_entry(call: NetworkCall, number: int, watch: Callable[[torch.Tensor, torch.Tensor], None]) -> NetworkCall:
    """Return a call that shows what enters an output block, the feature and the skip, before patches change them."""

    def patch(h: torch.Tensor, skip: torch.Tensor, options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        if options.get("block") == ("output", number):
            watch(h, skip)
        return h, skip

    return _with_output_patch(call, patch)


@outside_graphs
def _without_middle_patches(options: dict[str, Any]) -> dict[str, Any]:
    """Return options without the patches behind the middle block: the kept feature has been through them."""
    patches = options.get("patches", {})
    if _MIDDLE not in patches:
        return options
    return {**options, "patches": {name: value for name, value in patches.items() if name != _MIDDLE}}


@outside_graphs
def _met_in_order(options: dict[str, Any]) -> str:
    """Return the name of an object that patches the middle block and others too (SUPIR's counts them), empty without one."""
    patches = options.get("patches", {})
    middle = [owner for patch in patches.get(_MIDDLE, ()) if (owner := getattr(patch, "__self__", None)) is not None]
    others = (patch for name, of_kind in patches.items() if name != _MIDDLE for patch in of_kind)
    # Some patches come with the class of layers that they are for.
    functions = (each for patch in others for each in (patch if isinstance(patch, tuple) else (patch,)))
    elsewhere = {id(getattr(function, "__self__", None)) for function in functions}
    return next((type(owner).__name__ for owner in middle if id(owner) in elsewhere), "")


class _OtherSize(Exception):
    """The kept feature belongs to blocks of another size; ends a partial pass."""


class _Stored(nn.Module):
    """Stands for the deep blocks: returns the feature that they made."""

    @outside_graphs
    def __init__(self, feature: torch.Tensor) -> None:
        super().__init__()
        self.feature = feature

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.feature


class _ShiftedOptions(dict):
    """transformer_options in which the view's output blocks carry their numbers in the whole network.

    Patches address blocks by number; `transformer_index` counts transformers from the input on.
    """

    @outside_graphs
    def __init__(self, options: dict[str, Any], output_offset: int, transformers: int) -> None:
        super().__init__(options)
        self._offset, self._transformers = output_offset, transformers

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "block" and value[0] == "output":
            if value[1] == 0 and "transformer_index" in self:
                super().__setitem__("transformer_index", self["transformer_index"] + self._transformers)
            value = ("output", value[1] + self._offset)
        super().__setitem__(key, value)


@outside_graphs
def _transformers(block: nn.Module) -> int:
    return sum(hasattr(layer, "transformer_blocks") for layer in block)


@outside_graphs
def _shallow_control(control: dict[str, list] | None, skipped_outputs: int) -> dict[str, list] | None:
    """Leave the residuals of the blocks that run: the network pops "output" from the end, deepest block first."""
    if control is None:
        return None
    shallow = {name: list(values) for name, values in control.items() if name != "middle"}
    if "output" in shallow:
        shallow["output"] = shallow["output"][: max(len(shallow["output"]) - skipped_outputs, 0)]
    return shallow
