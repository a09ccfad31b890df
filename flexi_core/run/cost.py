"""Cost of a schedule in multiply-accumulate operations, counted on the real network by torch's flop counter.

The network runs on the meta device, with its own code and the shapes of a real call: no arithmetic, no memory, exact counts.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import accumulate, groupby
from operator import itemgetter
from statistics import fmean
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

from ..networks.block_lists import BlockKey, BlockLists, Visit, find_block_lists
from ..networks.transformer import ModelCall, run_watched, streams_of
from ..networks.unet import NetworkCall, block_count, watched_features
from ..schedule.schedule import Schedule
from .plan import Plan
from .run import Run, StepRecord

log = logging.getLogger(__name__)

_LAYER = re.compile(r".*\.network\.(?:(?P<part>input|output)_blocks\.(?P<block>\d+)|(?P<middle>middle)_block)\.\d+")


@dataclass(frozen=True)
class NetworkCost:
    """What one row of a batch costs.

    Args:
        full_macs: every block.
        blocks: by block: ("input", 0), ("middle", 0), ("output", 8) and so on for an LDM-layout U-Net, a transformer's own keys
            such as ("double_block", 3) in the order in which they run; empty for a network of another kind.
        feature_bytes: size of the deep feature that partial steps of a depth need.
    """

    full_macs: float
    blocks: Mapping[BlockKey, float] = field(default_factory=dict)
    feature_bytes: Mapping[int, float] = field(default_factory=dict, compare=False)

    @cached_property
    def partial_macs(self) -> dict[int, float]:
        """The cost of a partial step, by depth: the blocks that run, and what is no block's (embeddings, output layer)."""
        outside = self.full_macs - sum(self.blocks.values())
        n = sum(part == "input" for part, _ in self.blocks)
        if n:
            added = [self.blocks["input", i] + self.blocks["output", n - 1 - i] for i in range(n - 1)]
        else:
            added = list(self.blocks.values())[:-1]
        return {i + 1: outside + macs for i, macs in enumerate(accumulate(added))}

    def at(self, step: int) -> NetworkCost:
        """Return what a step of the schedule's own run costs."""
        return self

    def of(self, stage: int) -> NetworkCost:
        """Return what the network of a stage costs."""
        return self

    def macs(self, depth: int) -> float:
        """Return the cost of one row at a depth; `FULL_DEPTH`, or one that the network does not have, runs every block."""
        return self.partial_macs.get(depth, self.full_macs)

    def share(self, depth: int) -> float:
        """Return the cost of a partial step as a share of a full one."""
        return self.macs(depth) / self.full_macs

    def cache_bytes(self, plan: Plan, rows: int) -> float:
        """Return the memory that a plan's deep features need at one time, for a batch with all its conditionings."""
        kept = {(step.depth, 1 + step.forecast) for step in plan.steps if step.kind.is_partial}
        return rows * max((count * self.feature_bytes.get(depth, 0.0) for depth, count in kept), default=0.0)


@dataclass(frozen=True)
class StagedCost(NetworkCost):
    """What one row costs in a run of several networks; for itself it is what a step costs on average.

    Args:
        full_macs, blocks, feature_bytes: as those of `over`.
        by_step: the stage of each step.
        by_stage: the cost of each stage's network.
    """

    by_step: tuple[int, ...] = ()
    by_stage: Mapping[int, NetworkCost] = field(default_factory=dict)

    @classmethod
    def over(cls, by_step: Iterable[int], by_stage: Mapping[int, NetworkCost]) -> StagedCost:
        """Return the cost of a run.

        Args:
            by_step: the stage of each step.
            by_stage: the cost of each stage's network.
        """
        by_step = tuple(by_step)
        costs = [by_stage[stage] for stage in by_step]
        keys = [key for key in costs[0].blocks if all(key in cost.blocks for cost in costs)]
        return cls(
            fmean(cost.full_macs for cost in costs),
            {key: fmean(cost.blocks[key] for cost in costs) for key in keys},
            {depth: max(cost.feature_bytes.get(depth, 0.0) for cost in costs) for depth in costs[0].feature_bytes},
            by_step,
            dict(by_stage),
        )

    def at(self, step: int) -> NetworkCost:
        """Return what a step of the schedule's own run costs."""
        return self.by_stage[self.by_step[step]]

    def of(self, stage: int) -> NetworkCost:
        """Return what the network of a stage costs."""
        return self.by_stage[stage]


def count_macs(network: nn.Module, call: NetworkCall | ModelCall, lists: BlockLists | None = None) -> NetworkCost | None:
    """Count the multiply-accumulates of one row of a call, block by block; once for a network and a call's shapes.

    Args:
        network: the U-Net, or the host's model around a network of another kind.
        call: a real call of it, or one without data: then its options are taken as they are.
        lists: the network's lists of blocks, where its hooks are broken; found here otherwise.

    Returns:
        the cost, or None when the network's code does not run on the meta device (said in the log).
    """
    shapes = call if call.x.is_meta else call.shapes()
    key = None if lists else _shapes_key(shapes.shapes())
    if key is None:
        return _counted(network, shapes, lists)
    known = _known.setdefault(network, {})
    cost = known.get(key) or _counted(network, shapes, lists)
    if cost is not None:  # what failed may have been another pack's patch, gone at the next run
        known[key] = cost
    return cost


_known: WeakKeyDictionary[nn.Module, dict[Hashable, NetworkCost]] = WeakKeyDictionary()


def _shapes_key(call: NetworkCall | ModelCall) -> Hashable | None:
    """Return what tells a call's shapes from another's; None where it carries what cannot be compared."""
    leaves, nest = tree_flatten([getattr(call, part.name) for part in fields(call)])
    if not all(isinstance(leaf, torch.Tensor | int | float | str | None) for leaf in leaves):
        return None
    return str(nest), *((leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)


def _counted(network: nn.Module, shapes: NetworkCall | ModelCall, lists: BlockLists | None) -> NetworkCost | None:
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    weights = {f"network.{name}": torch.empty_like(value, device="meta") for name, value in tensors.items()}
    unet, rows = block_count(network) is not None, shapes.x.shape[0]
    counter = FlopCounterMode(display=False)
    blocks: Counter[BlockKey] = Counter()
    sizes: dict[Hashable, float] = {}

    def visit(key: BlockKey, args: dict[str, Any], original: Callable[[dict[str, Any]], Any]) -> Any:
        before = counter.get_total_flops()
        given = dict(args)
        out = original(args)
        blocks[key] += (counter.get_total_flops() - before) / 2 / rows
        sizes[key] = sum(stream.nbytes for stream in streams_of(out, given).values() if stream is not None) / rows
        return out

    if lists is None and not unet:
        lists = find_block_lists(network)
    if unet:
        shapes = watched_features(shapes, network, sizes)
    try:
        with torch.no_grad(), counter, _OneExpert():
            functional_call(_Pass(network, None if unet else visit, lists), weights, (shapes,))
    except Exception as error:  # whatever an unknown network's code raises on meta tensors: the count is a courtesy
        if lists is not None and not lists.alone:
            lists.alone = True
            return _counted(network, shapes, lists)
        log.warning("Flexiffusion: the MACs of %s cannot be counted: %s", type(network).__name__, error)
        return None
    if unet:
        for name, by_operator in counter.get_flop_counts().items():
            if layer := _LAYER.fullmatch(name):
                # The host calls a block's layers one by one, never the block: so they are what is added up.
                key = layer["part"] or layer["middle"], int(layer["block"] or 0)
                blocks[key] += sum(by_operator.values()) / 2 / rows
        feature_bytes = {depth: size / rows for depth, size in sizes.items()}
    else:
        if lists is not None and not all(map(lists.holds, sizes)):  # it has hooks
            blocks = Counter({key: macs for key, macs in blocks.items() if not lists.holds(key)})
            sizes = {key: size for key, size in sizes.items() if not lists.holds(key)}
        keys = list(sizes)
        feature_bytes = {
            depth: sum(sizes[[*stretch][-1]] for _, stretch in groupby(keys[depth:], itemgetter(0)))
            for depth in range(1, len(keys))
        }
    return NetworkCost(counter.get_total_flops() / 2 / rows, dict(blocks), feature_bytes)


def schedule_cost(schedule: Schedule, cost: NetworkCost) -> float:
    """Return the MACs of one sample under a schedule, for each of its conditionings.

    Guidance doubles this and its teacher alike; a step that reuses guidance computes one half of two.
    """
    total = 0.0
    for i, step in enumerate(schedule.steps()):
        if not step.kind.is_null:
            here = cost.at(i)
            total += (here.macs(step.depth) if step.kind.is_partial else here.full_macs) * (
                0.5 if step.kind.reuses_guidance else 1
            )
    return total


def predicted_speedup(schedule: Schedule, cost: NetworkCost) -> float:
    """Return the teacher's MACs over the schedule's; without reused guidance it is the same for a run that is not guided."""
    return len(schedule) * cost.full_macs / schedule_cost(schedule, cost)


def run_macs(records: Iterable[StepRecord], cost: NetworkCost) -> float:
    """Return the MACs that a run really spent, over all its rows."""
    return sum(rows * cost.of(record.stage).macs(depth) for record in records for depth, rows in record.calls.items())


def all_full_macs(run: Run, cost: NetworkCost) -> float:
    """Return the MACs of the same run with every step full, from the evaluations and rows that this run had."""
    steps = zip(run.records, run.plan.steps, strict=True)
    computed = [record for record, step in steps if record.network_calls and not step.kind.reuses_guidance]
    rows = sum(sum(record.calls.values()) for record in computed)
    asked = sum(record.evaluations for record in computed)
    return all_full_evaluations(run) * rows / asked * cost.full_macs if asked else 0.0


def all_full_evaluations(run: Run) -> float:
    """Return how often the sampler would have asked in the steps that it came to, with none of them removed.

    Exact where no step was removed, and for samplers that ask the same number of times at every step; one that asks twice at
    most of them is counted with its mean.
    """
    asked_at = [record.evaluations for record in run.records if record.evaluations]
    return sum(asked_at) / len(asked_at) * run.reached if asked_at else 0.0


class _OneExpert(TorchDispatchMode):
    """Lets mixtures of experts run without data: every token goes to the first expert, at the cost of any other."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.bincount.default and args[0].is_meta:
            return torch.tensor([args[0].numel()])
        return function(*args, **(kwargs or {}))


class _Pass(nn.Module):
    """One call of a network, as a module whose weights can be stood in for."""

    def __init__(self, network: nn.Module, visit: Visit | None, lists: BlockLists | None) -> None:
        super().__init__()
        self.network, self._visit, self._lists = network, visit, lists

    def forward(self, call: NetworkCall | ModelCall) -> torch.Tensor:
        own = getattr(self.network, call.method, self.network)
        if self._visit is None:
            return call.run(own)
        return run_watched(call, own, self._visit, self._lists, self._visit)
