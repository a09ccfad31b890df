"""The blocks of a transformer that offers no hooks: those of its lists of equal modules, met on a shallow view of it.

The code that runs is the network's own forward, on a copy of the modules above the lists; each block in the lists is a shallow
copy as well, whose `forward` shows what it is given before the block itself runs, or in the place of it. Nothing of the host's
model is changed, and its weights are shared.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn

BlockKey = tuple[str, int]
Visit = Callable[[BlockKey, dict[str, Any], Callable[[dict[str, Any]], Any]], Any]
_Path = tuple[str, ...]

_INNER = "_apply_model"  # the host's own code around a network, without the wrappers of packs
_NETWORK = "diffusion_model"
# Encoders of prompts and refiners are lists too, of 27 % of the main one's size (ACE-Step 1.5's lyrics) and less; they run in
# every step. Lists of two kinds of blocks that take turns are of like size.
_LEAST_SHARE = 0.4  # of the parameters of the largest list


class BlockLists:
    """The lists of blocks of one network of the host's.

    Args:
        model: the host's model around the network.
        lists: by path from the model.
    """

    def __init__(self, model: nn.Module, lists: dict[_Path, nn.Module]) -> None:
        self._model, self._lists = model, lists
        self._forms: dict[BlockKey, tuple[type | None, tuple[Any, ...]]] = {}
        self.odd = ""  # in words, for which reason the blocks cannot be skipped
        self.alone = False  # whether the network has no hooks, or broken ones

    def holds(self, key: BlockKey) -> bool:
        """Return whether a key is that of a block in the lists."""
        return any(key[0] == _name(path) for path in self._lists)

    def watched(self, forward: Callable[..., torch.Tensor], visit: Visit) -> Callable[..., torch.Tensor]:
        """Return a forward like the model's that hands every block of the lists to `visit(key, args, original)`.

        `args["x"]` has the block's tensors by their place or name among its arguments, and so have the streams that
        `original(args)` returns. Where visit does not call `original`, the network gets the streams that visit returns.

        Args:
            forward: the model's own, or the rest of the host's wrapper chain, whose `around` puts it around another one.
            visit: is met once by every block.
        """
        order = _Order(self)
        view = self._view(lambda key, block: partial(self._meet, key, block, visit, order))
        method = MethodType(getattr(type(self._model), _INNER), view)
        around = getattr(forward, "around", None)
        return method if around is None else around(method, view)

    def _view(self, stand_in: Callable[[BlockKey, nn.Module], Callable[..., Any]]) -> nn.Module:
        copies: dict[_Path, nn.Module] = {(): _shallow(self._model)}
        for path, blocks in self._lists.items():
            for i in range(1, len(path) + 1):
                if path[:i] not in copies:
                    above = copies[path[: i - 1]]
                    copies[path[:i]] = above._modules[path[i - 1]] = _shallow(above._modules[path[i - 1]])
            modules = copies[path]._modules
            for number, (name, block) in enumerate(blocks._modules.items()):
                modules[name] = _shallow(block)
                # Not by setattr, which a compiled block hands on to the block that it was made from.
                modules[name].__dict__["forward"] = stand_in((_name(path), number), block)
        return copies[()]

    def _meet(self, key: BlockKey, block: nn.Module, visit: Visit, order: _Order, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(enumerate(args)), **kwargs}
        tensors = {slot: v for slot, v in given.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
        shapes = {slot: value.shape for slot, value in tensors.items()}
        order.enter(key, tensors)
        ran: list[Any] = []

        def original(_: dict[str, Any]) -> dict[str, Any]:
            ran.append(block.forward(*args, **kwargs))  # the hooks of the block itself are its copy's
            streams = self._streams(key, ran[0], shapes)
            order.leave(streams)
            return {"x": streams}

        out = visit(key, {"x": tensors}, original)
        if ran:
            return ran[0]
        form, slots = self._forms[key]
        streams = [out["x"][slot] for slot in slots]
        return streams[0] if form is None else form(streams)

    def _streams(self, key: BlockKey, out: Any, shapes: dict[Any, torch.Size]) -> dict[Any, torch.Tensor]:
        """Return what a block returned by the arguments that it goes on from: the first of its shape, each once."""
        form = type(out) if isinstance(out, tuple | list) else None
        found: dict[Any, torch.Tensor] = {}
        for part in [out] if form is None else out:
            slot = next((s for s, shape in shapes.items() if s not in found and shape == getattr(part, "shape", None)), None)
            if slot is None:
                self.odd = "blocks return something else than the hidden states that they take"
                return {}
            found[slot] = part
        self._forms[key] = form, tuple(found)
        return found


class _Order:
    """Follows one pass: whether every block runs once, and whether what it returns goes to the next block alone."""

    def __init__(self, lists: BlockLists) -> None:
        self._lists = lists
        self._met: list[BlockKey] = []
        self._returned: list[list[weakref.ref]] = []  # in the present list

    def enter(self, key: BlockKey, given: dict[Any, torch.Tensor]) -> None:
        name, number = key
        if number == 0:
            self._returned.clear()  # what a list ends in may go anywhere
        if key in self._met or (number and self._met[-1:] != [(name, number - 1)]):
            self._lists.odd = "blocks do not run once each, in the order of their list"
        self._met.append(key)
        before_last = self._returned[-2] if len(self._returned) > 1 else []
        # With gradients the graph keeps every tensor.
        alive = [] if torch.is_grad_enabled() else [value for ref in before_last if (value := ref()) is not None]
        if any(all(value is not each for each in given.values()) for value in alive):
            self._lists.odd = "blocks return hidden states that others than the next block take in"

    def leave(self, streams: dict[Any, torch.Tensor]) -> None:
        self._returned.append([weakref.ref(value) for value in streams.values()])


def find_block_lists(model: nn.Module) -> BlockLists | None:
    """Return the lists that hold most of a network's parameters; None where it has none, or is compiled as a whole.

    Args:
        model: the host's model around the network.
    """
    network = getattr(model, _NETWORK, None)
    if not isinstance(network, nn.Module) or not callable(getattr(type(model), _INNER, None)) or hasattr(network, "_orig_mod"):
        return None
    lists = dict(_outermost(network, (_NETWORK,)))
    sizes = {path: sum(value.numel() for value in blocks.parameters()) for path, blocks in lists.items()}
    least = _LEAST_SHARE * max(sizes.values(), default=0)
    chosen = {path: blocks for path, blocks in lists.items() if sizes[path] >= least}
    return BlockLists(model, chosen) if chosen else None


def _outermost(module: nn.Module, path: _Path) -> Iterator[tuple[_Path, nn.Module]]:
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            blocks = list(child.children())
            if len(blocks) > 1 and len({type(block) for block in blocks}) == 1:
                yield (*path, name), child
        else:
            yield from _outermost(child, (*path, name))


def _name(path: _Path) -> str:
    return ".".join(path[1:])


def _shallow(module: nn.Module) -> nn.Module:
    view = copy.copy(module)
    view.__dict__["_modules"] = dict(module._modules)
    return view
