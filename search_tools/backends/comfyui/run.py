"""A run of one sampling node, or of several that share it: each takes its own window of the steps, the next goes on from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch

from flexi_core.errors import FlexiError
from flexi_core.run.replay import Replay
from flexi_core.run.run import StepRecord
from flexi_core.schedule.levels import same_grid
from flexi_core.schedule.schedule import Schedule
from flexi_core.tune import Observe, SampleProgress

from ..windows import InWindow, shares
from .node import SamplingNode, model_of


class SamplingRun:
    """The run of sampling nodes.

    Args:
        nodes: in order; each but the first adds no noise and goes on with the latent of the one before it.

    Attributes:
        sigmas: noise levels of the whole run [n + 1].
        edges: steps at which the nodes' windows begin, and the run's end.

    Raises:
        FlexiError: the windows do not join, or the nodes differ in what one schedule cannot differ in.
    """

    def __init__(self, nodes: Sequence[SamplingNode]) -> None:
        self.nodes = tuple(nodes)
        for one, other in pairwise(self.nodes):
            _check_joint(one, other)
        self.sigmas = _joined([node.sigmas for node in self.nodes])
        self.edges = (0, *accumulate(node.steps for node in self.nodes))

    @property
    def cuts(self) -> tuple[int, ...]:
        """Steps at which one node's window ends and the next one's begins."""
        return self.edges[1:-1]

    @property
    def teacher(self) -> dict[str, Any]:
        """What a schedule's file says of the models and their settings: what is alike once, the rest for each window."""
        said = [node.teacher for node in self.nodes]
        if len(said) == 1:
            return said[0]
        alike = {key: value for key, value in said[0].items() if all(key in each and each[key] == value for each in said)}
        stages = [
            {"steps": node.steps, **{key: value for key, value in each.items() if key not in alike}}
            for node, each in zip(self.nodes, said, strict=True)
        ]
        return {**alike, "stages": stages}

    @property
    def words(self) -> str:
        """In words, which node makes which steps; empty for one node."""
        if not self.cuts:
            return ""
        stretches = ", ".join(
            f"{start + 1} to {stop} by {node.said}"
            for node, (start, stop) in zip(self.nodes, pairwise(self.edges), strict=True)
        )
        return (
            f"One run of {len(self.nodes)} sampling nodes is searched for: steps {stretches}. The schedule's file is for each "
            "of them: load it once, and apply it to each node's model."
        )

    def sample(
        self,
        schedule: Schedule,
        seed: int,
        apply: Callable[..., tuple[Any, Any]],
        *,
        steps: int | None = None,
        progress: SampleProgress | None = None,
        replay: Callable[..., Replay] | None = None,
        observe: Observe | InWindow | None = None,
    ) -> tuple[dict[str, Any], list[StepRecord]]:
        """Return the LATENT of one sample, and what its steps computed.

        Args:
            schedule: of the whole run.
            seed: of the sample.
            apply: puts a schedule on a model, as the pack's node does.
            steps: another step count; the windows keep their shares of it.
            progress: called with the steps done and the steps in all.
            replay: makes a node's view of a store.
            observe: makes what follows the run's steps, or one window's, with which the run then ends.
        """
        calls = [self._call(number, seed, steps) for number in range(len(self.nodes))]
        if self.cuts:
            grids = [
                node.sigmas if steps is None else inputs["sigmas"] for node, (_, inputs) in zip(self.nodes, calls, strict=True)
            ]
            schedule = schedule.with_info(teacher={"sigmas": [float(sigma) for sigma in _joined(grids)]})
        latent, records = None, []
        for number, (node, (kind, inputs)) in enumerate(zip(self.nodes, calls, strict=True)):
            here = observe
            if isinstance(observe, InWindow):
                if number > observe.number:
                    break
                here = observe.observe if number == observe.number else None
            patched, handle = apply(
                model_of(inputs), schedule, replay=replay and (lambda number=number: replay(number)), observe=here
            )
            inputs = inputs if latent is None else {**inputs, "latent_image": latent}
            latent = node.run(inputs, patched, seed, progress and self._told(number, progress), kind)
            if handle.report is None or handle.report.run is None:
                notes = " ".join(handle.report.notes) if handle.report else "it made no run"
                raise FlexiError(f"{node.said} did not sample under the schedule: {notes}")
            records += handle.report.run.records
        return latent, records

    def _call(self, number: int, seed: int, steps: int | None) -> tuple[str, Mapping[str, Any]]:
        """Return the class and the inputs of a node for a sample."""
        node = self.nodes[number]
        inputs = node.inputs_of(seed)
        if steps is None:
            return node.kind, inputs
        return node.with_steps(inputs, shares(self.edges, steps)[number])

    def _told(self, number: int, progress: SampleProgress) -> SampleProgress:
        """Return a callback that counts a window's steps as the run's."""
        start, stop, n = self.edges[number], self.edges[number + 1], self.edges[-1]
        return lambda done, total: progress(start + done * (stop - start) // max(total, 1), n)


def _joined(grids: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the noise levels of a run [n + 1] from those of its windows."""
    return torch.cat([*(grid[:-1] for grid in grids), grids[-1][-1:]])


def _check_joint(one: SamplingNode, other: SamplingNode) -> None:
    end, begin = float(one.sigmas[-1]), float(other.sigmas[0])
    alone = f"or search it alone with --node {one.name}"
    if not same_grid([end], [begin]):
        raise FlexiError(
            f"{other.said} adds no noise and goes on from {one.said}, but begins at noise level {begin:.4g} where that one "
            f"ends at {end:.4g}: they are no one run. Let it start at the step at which the other ends, with the same steps, "
            f"scheduler and shift, and let the other return its leftover noise, {alone}"
        )
    for what, a, b in (
        ("sampler", one.sampler, other.sampler),
        ("network", one.teacher["architecture"], other.teacher["architecture"]),
    ):
        if a != b:
            named = f" ({a}, {b})" if what == "sampler" else ""
            raise FlexiError(
                f"{other.said} goes on from {one.said} with another {what}{named}: one schedule cannot be for both. "
                f"Give them the same {what}, {alone}"
            )
