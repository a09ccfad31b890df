"""Partial steps of the host's own UNetModel: the full prediction, bit for bit, at the input of the full step."""

import pytest
import torch

from flexi_core.networks.unet import NetworkCall, block_count, full_pass, partial_pass

pytestmark = pytest.mark.usefixtures("small_latents")


@pytest.fixture(scope="module")
def network(demo_model):
    return demo_model.model.diffusion_model


@pytest.fixture
def call(host):
    context = torch.cat([host.positive[0][0], host.negative[0][0]])

    def make(control=None, **patches):
        options = {"cond_or_uncond": [0, 1], "patches": patches}
        return NetworkCall(host.noise(2), torch.full((2,), 500), context, control=control, options=options)

    return make


def residuals(network, seed=0):
    """Return the residuals of a control net: one for every input block, the middle, and every output block's skip."""
    rng = torch.Generator().manual_seed(seed)
    shapes = []
    seen = lambda h, skip, options: (shapes.append(skip.shape), (h, skip))[1]  # noqa: E731
    call = NetworkCall(
        torch.zeros(2, 3, 16, 16), torch.zeros(2), torch.zeros(2, 5, 64), options={"patches": {"output_block_patch": [seen]}}
    )
    call.run(network._forward)
    output = [torch.randn(shape, generator=rng) for shape in reversed(shapes)]  # popped from the end, deepest first
    return lambda: {"output": list(output), "middle": [torch.randn(shapes[0], generator=torch.Generator().manual_seed(1))]}


@torch.no_grad()
def test_partial_step_equals_the_full_one_at_every_depth(network, call):
    for depth in range(1, block_count(network)):
        full, feature = full_pass(network, call(), network._forward, depth)
        assert torch.equal(full, call().run(network._forward))
        assert torch.equal(partial_pass(network, call(), depth, feature), full), depth


@torch.no_grad()
def test_partial_step_adds_the_shallow_residuals_of_a_control_net_alone(network, call):
    control = residuals(network)
    plain = call().run(network._forward)
    for depth in (1, 3, block_count(network) - 1):
        full, feature = full_pass(network, call(control()), network._forward, depth)
        assert not torch.equal(full, plain)
        given = control()
        assert torch.equal(partial_pass(network, call(given), depth, feature), full), depth
        assert len(given["output"]) == block_count(network), "the caller's residuals were taken"


@torch.no_grad()
def test_patches_see_their_blocks_numbers_on_partial_steps(network, call):
    def watched(run, *args):
        seen = []

        def note(h, skip, options):
            seen.append(options["block"])
            return h, skip

        run(network, call(output_block_patch=[note]), *args)
        return seen

    n = block_count(network)
    whole = watched(lambda net, c: c.run(net._forward))
    assert whole == [("output", i) for i in range(n)]
    for depth in (1, 3):
        _, feature = full_pass(network, call(), network._forward, depth)
        assert watched(partial_pass, depth, feature) == whole[n - depth :]


@torch.no_grad()
def test_patch_that_writes_in_place_does_not_reach_the_kept_feature(network, call):
    def double(h, skip, options):
        return h.mul_(2), skip

    full, feature = full_pass(network, call(output_block_patch=[double]), network._forward, 3)
    assert torch.equal(partial_pass(network, call(output_block_patch=[double]), 3, feature), full)


@torch.no_grad()
def test_partial_step_leaves_the_network_as_it_was(network, call):
    blocks = [list(part) for part in (network.input_blocks, network.output_blocks)]
    _, feature = full_pass(network, call(), network._forward, 2)
    partial_pass(network, call(), 2, feature)
    assert blocks == [list(part) for part in (network.input_blocks, network.output_blocks)]


def test_lora_on_the_shallow_blocks_reaches_partial_steps(host, demo_model, apply, repatched):
    name = "diffusion_model.output_blocks.5.0.in_layers.2.weight"
    weight = demo_model.model.state_dict()[name]
    changed = demo_model.clone()
    changed.add_patches({name: ("diff", (torch.ones_like(weight) * 0.05,))})
    text = "F|FPPPPP@1"
    plain, patched = (host.sample(apply(model, text)[0], steps=7) for model in (demo_model, changed))
    assert not torch.equal(plain, patched)
    assert torch.equal(host.sample(apply(demo_model, text)[0], steps=7), plain)
