"""What a run keeps of the network's work is made outside the host's memory graph, where the host has one."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flexi_core.networks import graphs
from flexi_core.networks.transformer import ModelCall, TransformerSteps
from flexi_core.networks.unet import full_pass


@pytest.fixture
def made(monkeypatch):
    """The tensors that were made while a stand-in for the host's memory graph was paused, by the number of bytes."""
    found: list[int] = []

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            found.append(out.data_ptr())
            return out

    @contextmanager
    def pause_malloc_graph():
        with Note():
            yield

    monkeypatch.setitem(sys.modules, "comfy.model_prefetch", SimpleNamespace(pause_malloc_graph=pause_malloc_graph))
    return found


def test_the_deep_feature_of_a_unet_is_made_outside_the_memory_graph(unet, make_call, made):
    _, feature = full_pass(unet, make_call(), unet._forward, 2)
    assert feature.data_ptr() in made


def test_the_residuals_of_a_transformer_are_made_outside_the_memory_graph(made):
    def forward(x, t, c_concat, c_crossattn, control, options, **_):
        for i in range(3):
            block = {"original_block": lambda args, i=i: {"img": args["img"] + torch.sin(args["img"] + i)}}
            x = options["patches_replace"]["dit"]["double_block", i]({"img": x}, block)["img"]
        return x

    _, feature = TransformerSteps(nn.Module()).full(ModelCall(torch.ones(2, 3, 4), torch.ones(2)), forward, 1)
    assert feature and all(value.data_ptr() in made for value in feature.values())


def test_a_host_without_a_memory_graph_is_left_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "comfy.model_prefetch", SimpleNamespace())
    with graphs.for_later_calls():
        assert torch.ones(1).item() == 1


@pytest.mark.parametrize("name", ["_torchdynamo_orig_backend", "_torchdynamo_orig_callable"])
def test_a_compiled_network_gets_graphs_apart_by_its_own_backend(name, monkeypatch):
    forced = []
    compiler = SimpleNamespace(set_stance=lambda stance, force_backend: forced.append(force_backend))
    monkeypatch.setitem(sys.modules, "torch.compiler", compiler)
    callback = SimpleNamespace(**{name: SimpleNamespace(**{name: max})})
    graphs.graphs_apart(SimpleNamespace(dynamo_ctx=SimpleNamespace(callback=callback)))
    assert forced[0](2, 3) == 3


@pytest.mark.parametrize("network", [SimpleNamespace(), SimpleNamespace(dynamo_ctx=SimpleNamespace(callback=print))])
def test_a_network_that_shows_no_backend_is_run_as_it_is(network):
    with graphs.graphs_apart(network) as nothing:
        assert nothing is None
