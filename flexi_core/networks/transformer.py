"""Partial steps of a diffusion transformer, through the host's public replace hooks, or the network's own lists of blocks.

A transformer that offers its blocks under `patches_replace["dit"]` asks for each of them by a key such as
`("double_block", 3)`. A partial step of depth k runs the first k blocks that it asks for; each stream that passes through the
others takes in one stored residual, what a full step added to it between its first skipped block and the last. Structure is
what the network asks for: no list of families is kept, and one that follows the same hooks works the day it appears. One that
asks for none is met in its lists of blocks (`block_lists`), under keys such as `("layers", 3)`, in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..run.cache import Feature
from .block_lists import BlockKey, BlockLists, Visit
from .graphs import for_later_calls, graphs_apart, outside_graphs
from .unet import on_meta

# What the hooks call the hidden states that blocks hand on; a stream may be several tensors, as of pictures and sound.
_STREAMS = ("img", "txt", "x")
Stream = str | tuple[str, int | str]
_COMPILED = "OptimizedModule"  # torch.compile's


@dataclass(frozen=True)
class ModelCall:
    """The arguments of one call of the host's model around a diffusion network.

    Args:
        x: noisy latent [B, ...].
        t: sigma [B].
        c_concat: channels that go beside the latent [B, C, ...].
        c_crossattn: conditioning tokens [B, M, D].
        control: residuals of control nets.
        options: the host's transformer_options.
        kwargs: whatever else the conditioning carries.
    """

    x: torch.Tensor
    t: torch.Tensor
    c_concat: torch.Tensor | None = None
    c_crossattn: torch.Tensor | None = None
    control: dict[str, list] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    kwargs: dict[str, Any] = field(default_factory=dict)

    method = "apply_model"

    def run(self, forward: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Return forward's prediction for these arguments."""
        return forward(self.x, self.t, self.c_concat, self.c_crossattn, self.control, self.options, **self.kwargs)

    def shapes(self) -> ModelCall:
        """Return the call on the meta device: shapes and types without data, patches or control residuals."""
        x, t, c_concat, c_crossattn, kwargs = on_meta((self.x, self.t, self.c_concat, self.c_crossattn, self.kwargs))
        # Networks distilled to jump from one noise level to another look up the next one.
        levels = {name: self.options[name] for name in ("sigmas", "sample_sigmas") if name in self.options}
        options = {"cond_or_uncond": self.options.get("cond_or_uncond", [0]), **levels}
        return ModelCall(x, t, c_concat, c_crossattn, None, options, kwargs)


def watched(call: ModelCall, visit: Visit) -> ModelCall:
    """Return a call whose network hands every block that has a hook to `visit(key, args, original)`.

    `original(args)` runs the block as it would run without us, a hook that another pack has put there included.
    """
    replaced = call.options.get("patches_replace", {})
    hooks = {**replaced, "dit": _Hooks(replaced.get("dit", {}), visit)}
    return replace(call, options={**call.options, "patches_replace": hooks})


def run_watched(
    call: ModelCall, forward: Callable[..., torch.Tensor], visit: Visit, lists: BlockLists | None, of_list: Visit | None = None
) -> torch.Tensor:
    """Return a call's prediction, with every block handed to `visit(key, args, original)`.

    Args:
        call: of the host's model.
        forward: the model's own, or the rest of the host's wrapper chain.
        visit: meets the blocks that have hooks; those of lists that stand alone.
        lists: of the network's blocks.
        of_list: meets the blocks of lists that do not stand alone, up to the first that has a hook.
    """
    if lists is None:
        return watched(call, visit).run(forward)
    if lists.alone:
        return call.run(lists.watched(forward, visit))
    hooked = False

    def hook(key: BlockKey, args: dict[str, Any], original: Callable[[dict[str, Any]], Any]) -> Any:
        nonlocal hooked
        hooked = True
        return visit(key, args, original)

    def listed(key: BlockKey, args: dict[str, Any], original: Callable[[dict[str, Any]], Any]) -> Any:
        return original(args) if hooked else of_list(key, args, original)

    return watched(call, hook).run(lists.watched(forward, listed))


class TransformerSteps:
    """Full and partial passes of one network, which shows its blocks in its first full pass.

    Args:
        network: whose blocks they are.
        lists: of its blocks, for a network without hooks.
    """

    def __init__(self, network: nn.Module, lists: BlockLists | None = None) -> None:
        self._network, self._name, self._lists = network, type(network).__name__, lists
        self._shown: _Capture | None = None  # the last full pass
        self._broken = ""  # what came of the network's hooks

    def why_not(self, depth: int) -> str:
        """Return in words why no partial step of a depth can run; empty when one can."""
        if self._broken:
            return self._broken
        if self._shown is None:
            return ""
        count = len(self._shown.keys)
        if self._lists is not None and self._lists.odd:
            return f"{self._name}'s {self._lists.odd}"
        if not count and self._lists is not None:
            return f"{self._name}'s blocks do not run one by one: it may be compiled"
        if not count and self._name == _COMPILED:
            return "the compiled network does not ask for hooks of its blocks"
        if not count:
            return f"{self._name} has no blocks that can be skipped: neither a U-Net's nor hooks for a transformer's"
        if depth >= count:
            return f"depth {depth} needs more than the network's {count} blocks"
        return ""

    def full(
        self, call: ModelCall, forward: Callable[..., torch.Tensor], depth: int | None
    ) -> tuple[torch.Tensor, Feature | None]:
        """Run every block; with a depth also return what partial steps of that depth take in, where it can be kept."""
        if depth is None or self.why_not(depth):
            return call.run(forward), None
        capture, of_lists = _Capture(depth), _Capture(depth)
        try:
            with graphs_apart(self._network):
                prediction = run_watched(call, forward, capture, self._lists, of_lists)
        except Exception as error:
            if not self._breaks(error, "hooks for its blocks"):
                raise
            if self._lists is not None and not self._lists.alone:
                self._broken, self._lists.alone = "", True
                return self.full(call, forward, depth)
            return call.run(forward), None
        if self._lists is not None and not self._lists.alone:  # the first pass
            if capture.keys:
                self._lists = None
            else:
                capture, self._lists.alone = of_lists, True
        self._shown = capture
        if self._lists is not None and self._lists.odd:
            return prediction, None
        rows = call.x.shape[0]
        # Of a single latent every axis is its own.
        if rows > 1 and any(value is not None and value.shape[0] != rows for value in capture.feature.values()):
            self._broken = f"{self._name}'s blocks hand on hidden states whose first axis is not the latents'"
            return prediction, None
        return prediction, capture.feature if capture.feature and not capture.failed else None

    def partial(
        self, call: ModelCall, forward: Callable[..., torch.Tensor], depth: int, feature: Feature
    ) -> torch.Tensor | None:
        """Run the first `depth` blocks on a kept feature; None when the network asked for other blocks than before."""
        reuse = _Reuse(depth, feature, self._shown)
        try:
            with graphs_apart(self._network):
                prediction = run_watched(call, forward, reuse, self._lists)
        except _OtherSize:
            return None
        except Exception as error:
            if not self._breaks(error, "blocks, when some of them are skipped,"):
                raise
            return None
        return prediction if reuse.keys == self._shown.keys else None

    def _breaks(self, error: Exception, what: str) -> bool:
        """Return whether an error may be of the hooks alone: Python's own kinds are; what stops the run, or memory, is not."""
        if type(error).__module__ != "builtins":
            return False
        self._broken = f"{self._name}'s {what} failed ({type(error).__name__}: {error})"
        return True


class _OtherSize(Exception):
    """The kept residual belongs to streams of another size; ends a partial pass."""


class _Hooks(dict):
    """A `patches_replace["dit"]` with a hook for every block that a network asks for."""

    def __init__(self, others: dict, visit: Visit) -> None:
        super().__init__(others)
        self._visit = visit

    def __bool__(self) -> bool:
        return True  # some networks ask whether there is any hook

    def __contains__(self, key: object) -> bool:
        return isinstance(key, tuple)

    def __getitem__(self, key: BlockKey) -> Callable[[dict[str, Any], dict[str, Any]], Any]:
        other = super().get(key)

        def hook(args: dict[str, Any], extra: dict[str, Any]) -> Any:
            original = extra["original_block"] if other is None else lambda args: other(args, extra)
            return self._visit(key, args, original)

        return hook

    def get(self, key: object, default: Any = None) -> Any:
        return self[key] if isinstance(key, tuple) else default


class _Capture:
    """Keeps what the blocks from `depth` on add, per stretch of one kind and stream. A stream that ends has None."""

    def __init__(self, depth: int) -> None:
        self.keys: list[BlockKey] = []
        self.named: list[bool] = []  # for each key, whether the block names its streams or returns one as it is
        self.feature: Feature = {}
        self.failed = False
        self._depth = depth
        self._stretch = 0
        self._entries: dict[Stream, torch.Tensor] = {}

    @outside_graphs
    def __call__(self, key: BlockKey, args: dict[str, Any], original: Callable[[dict[str, Any]], Any]) -> Any:
        self.keys.append(key)
        if len(self.keys) <= self._depth:
            self.named.append(True)  # is not asked for
            return original(args)
        if _opens_stretch(self.keys, self._depth):
            self._stretch += 1
            with for_later_calls():  # clones: blocks write to their streams in place
                self._entries = {name: value.clone() for name, value in streams_of(args, {}).items() if value is not None}
        given = dict(args)
        out = original(args)
        self.named.append(isinstance(out, dict))
        for name, value in streams_of(out, given).items():
            if value is not None and (name not in self._entries or value.shape != self._entries[name].shape):
                self.failed = True
                continue
            with for_later_calls():
                self.feature[self._stretch, name] = None if value is None else value - self._entries[name]
        return out


class _Reuse:
    """Skips the blocks from `depth` on.

    Host code between blocks (a control net's residuals) runs again and is in the stored residual already; so a stream is put
    right at the last block of each stretch of one kind, from what it was at the first skipped one.
    """

    def __init__(self, depth: int, feature: Feature, shown: _Capture) -> None:
        self.keys: list[BlockKey] = []
        self._depth, self._feature, self._expected, self._named = depth, feature, shown.keys, shown.named
        self._stretch = 0
        self._final: dict[Stream, torch.Tensor | None] = {}

    @outside_graphs
    def __call__(self, key: BlockKey, args: dict[str, Any], original: Callable[[dict[str, Any]], Any]) -> Any:
        self.keys.append(key)
        seen = len(self.keys)
        if seen <= self._depth or self.keys != self._expected[:seen]:
            return original(args)
        now = streams_of(args, {})
        if _opens_stretch(self.keys, self._depth):
            self._stretch += 1
            own = {name: value for (stretch, name), value in self._feature.items() if stretch == self._stretch}
            if any(value is not None and now[name].shape != value.shape for name, value in own.items()):
                raise _OtherSize
            self._final = {name: None if value is None else now[name] + value for name, value in own.items()}
        streams = self._final
        if seen < len(self._expected) and self._expected[seen][0] == key[0]:
            streams = {name: now[name] for name in streams}
        together = _together(streams, args)
        return together if self._named[seen - 1] else next(iter(together.values()))


def _opens_stretch(keys: list[BlockKey], depth: int) -> bool:
    """Return whether the last block of those met so far is the first skipped one, or the first of another kind."""
    return len(keys) == depth + 1 or keys[-1][0] != keys[-2][0]


def streams_of(out: Any, args: dict[str, Any]) -> dict[Stream, torch.Tensor | None]:
    """Return the streams in what a block was given, or in what it returned; what else is there does not count.

    Args:
        out: a dictionary by name, or one stream as it is.
        args: of the block, whose one stream has the name that `out` lacks; x, where there are several.
    """
    if not isinstance(out, dict):
        names = [name for name in _STREAMS if isinstance(args.get(name), torch.Tensor | tuple | list)]
        out = {names[0] if len(names) == 1 else "x": out}
    found: dict[Stream, torch.Tensor | None] = {}
    for name, value in out.items():
        if name not in _STREAMS:
            continue
        if isinstance(value, dict):
            found |= {(name, slot): part for slot, part in value.items()}
        elif isinstance(value, tuple | list):
            found |= {(name, i): part for i, part in enumerate(value) if part is None or isinstance(part, torch.Tensor)}
        elif value is None or isinstance(value, torch.Tensor):
            found[name] = value
    return found


def _together(streams: dict[Stream, torch.Tensor | None], args: dict[str, Any]) -> dict[str, Any]:
    """Return streams by name, those of several tensors put together as they are in a block's arguments."""
    found: dict[str, Any] = {}
    for stream, value in streams.items():
        if isinstance(stream, str):
            found[stream] = value
        else:
            name, place = stream
            whole = args[name]
            parts = found.setdefault(name, dict(whole) if isinstance(whole, dict) else list(whole))
            parts[place] = value
    return {name: type(args[name])(value) if isinstance(value, list) else value for name, value in found.items()}
