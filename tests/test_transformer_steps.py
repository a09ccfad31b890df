"""Partial steps of transformers whose hooks are as different as real networks' are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from flexi_core.networks.transformer import ModelCall, TransformerSteps

BLOCKS = 4
DEPTH = 2


class Toy(nn.Module):
    pass


class Stopped(Exception):
    """Stands for the host's own exceptions: an interrupted run, no memory left."""


def call(seed: int = 0, others: dict | None = None) -> ModelCall:
    rng = torch.Generator().manual_seed(seed)
    options = {"patches_replace": {"dit": others}} if others else {}
    return ModelCall(torch.randn(2, 3, 4, generator=rng), torch.ones(2), options=options)


def network(block: Callable[[int, Any], Any], form: str, asks_first: bool = False) -> Callable[..., torch.Tensor]:
    """Return a forward of four blocks that add `block(i, stream)` to each of their streams.

    Args:
        block: what a block adds.
        form: how a hook gets and returns streams: `named` (img and txt), `bare` (img in, itself out), `pair` (img is two).
        asks_first: whether it looks for hooks only where the table is not empty.
    """

    def forward(x, t, c_concat, c_crossattn, control, options, **_):
        hooks = options.get("patches_replace", {}).get("dit", {})
        streams = {"named": {"img": x, "txt": x.flip(1)}, "bare": {"img": x}, "pair": {"img": (x, x.flip(1))}}[form]
        for i in range(BLOCKS):

            def original(args, i=i, names=tuple(streams)):
                out = {name: added(args[name], i) for name in names}
                return out["img"] if form == "bare" else out

            if (hooks or not asks_first) and ("double_block", i) in hooks:
                out = hooks["double_block", i]({**streams, "vec": t}, {"original_block": original})
            else:
                out = original(streams)
            streams = {"img": out} if form == "bare" else {name: out[name] for name in streams}
        parts = [part for value in streams.values() for part in (value if isinstance(value, tuple) else (value,))]
        return sum(parts)

    def added(value, i):
        return tuple(added(part, i) for part in value) if isinstance(value, tuple) else value + block(i, value)

    return forward


def counted() -> tuple[list[int], Callable[[int, torch.Tensor], torch.Tensor]]:
    """Return the blocks that ran, and what blocks add."""
    ran: list[int] = []

    def block(i: int, value: torch.Tensor) -> torch.Tensor:
        ran.append(i)
        return torch.sin(value * (i + 1))

    return ran, block


@pytest.mark.parametrize("asks_first", [False, True])
@pytest.mark.parametrize("form", ["named", "bare", "pair"])
def test_a_partial_step_on_the_same_input_is_the_full_step_and_runs_the_shallow_blocks_alone(form, asks_first):
    ran, block = counted()
    forward, steps, same = network(block, form, asks_first), TransformerSteps(Toy()), call()
    plain = same.run(forward)
    full, feature = steps.full(same, forward, DEPTH)
    assert torch.equal(full, plain) and feature
    ran.clear()
    partial = steps.partial(same, forward, DEPTH, feature)
    assert set(ran) == set(range(DEPTH))
    torch.testing.assert_close(partial, plain)


@pytest.mark.parametrize("form", ["named", "bare", "pair"])
def test_a_partial_step_on_another_input_adds_what_the_skipped_blocks_added_before(form):
    _, block = counted()
    forward, steps = network(block, form), TransformerSteps(Toy())
    whole, feature = steps.full(call(), forward, DEPTH)
    other = steps.partial(call(1), forward, DEPTH, feature)
    assert other.shape == whole.shape and not torch.equal(other, whole)
    shallow = network(lambda i, value: block(i, value) if i < DEPTH else torch.zeros_like(value), form)
    torch.testing.assert_close(other - call(1).run(shallow), whole - call().run(shallow))


def test_a_hook_that_returns_all_its_arguments_passes_its_block_by_in_full_and_partial_steps():
    _, block = counted()
    forward, steps = network(block, "named"), TransformerSteps(Toy())
    same = call(others={("double_block", 3): lambda args, extra: args})  # as skip-layer guidance does
    plain = same.run(forward)
    full, feature = steps.full(same, forward, DEPTH)
    assert torch.equal(full, plain) and feature is not None
    torch.testing.assert_close(steps.partial(same, forward, DEPTH, feature), plain)


@pytest.mark.parametrize("step", ["full", "partial"])
def test_a_network_whose_hooks_are_broken_runs_plainly_and_the_reason_is_said(step):
    _, block = counted()
    sound, steps = network(block, "named"), TransformerSteps(Toy())

    def forward(x, t, c_concat, c_crossattn, control, options, **kwargs):
        if broken and "dit" in options.get("patches_replace", {}):
            raise KeyError("img_slice")
        return sound(x, t, c_concat, c_crossattn, control, options, **kwargs)

    same, broken = call(), step == "full"
    plain = same.run(sound)
    full, feature = steps.full(same, forward, DEPTH)
    assert torch.equal(full, plain)
    if step == "partial":
        broken = True
        assert steps.partial(same, forward, DEPTH, feature) is None
    assert "Toy" in steps.why_not(DEPTH) and "img_slice" in steps.why_not(DEPTH)
    again, kept = steps.full(same, forward, DEPTH)
    assert torch.equal(again, plain) and kept is None


def test_what_stops_a_run_is_not_taken_for_a_broken_hook():
    def forward(*_, **__):
        raise Stopped

    steps = TransformerSteps(Toy())
    with pytest.raises(Stopped):
        steps.full(call(), forward, DEPTH)
    assert not steps.why_not(DEPTH)


def test_an_error_of_the_network_itself_comes_through():
    def forward(*_, **__):
        raise ValueError("of its own")

    with pytest.raises(ValueError, match="of its own"):
        TransformerSteps(Toy()).full(call(), forward, DEPTH)
