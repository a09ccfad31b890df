"""Partial steps of a U-Net: identities with the full pass, and what patches and control nets see."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from flexi_core.networks.unet import NetworkCall, block_count, full_pass, partial_pass

DEPTHS = [1, 2, 3]


def kept_feature(unet, call, depth):
    prediction, feature = full_pass(unet, call, unet._forward, depth)
    assert feature is not None
    return prediction, feature


def patched(call: NetworkCall, *patches) -> NetworkCall:
    return replace(call, options={**call.options, "patches": {"output_block_patch": list(patches)}})


def test_the_tiny_network_tells_its_inputs_apart(unet, make_call):
    # Every identity below would hold for a network that answers with a constant.
    one, other = make_call(seed=0).run(unet._forward), make_call(seed=1).run(unet._forward)
    assert (one - other).abs().mean() > 0.01
    assert (one[:2] - one[2:]).abs().mean() > 1e-4


@pytest.mark.parametrize("depth", [None, *DEPTHS])
def test_keeping_the_feature_does_not_change_the_full_pass(unet, make_call, depth):
    prediction, _ = full_pass(unet, make_call(), unet._forward, depth)
    assert torch.equal(prediction, make_call().run(unet._forward))


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_partial_step_at_the_same_input_equals_the_full_pass(unet, make_call, depth):
    prediction, feature = kept_feature(unet, make_call(), depth)
    assert torch.equal(partial_pass(unet, make_call(), depth, feature), prediction)


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_partial_step_reads_the_feature_and_its_own_input(unet, make_call, depth):
    _, feature = kept_feature(unet, make_call(), depth)
    partial = partial_pass(unet, make_call(seed=1), depth, feature)
    assert not torch.equal(partial, make_call(seed=1).run(unet._forward))
    assert not torch.equal(partial, partial_pass(unet, make_call(), depth, feature))
    assert not torch.equal(partial, partial_pass(unet, make_call(seed=1), depth, feature + 1))


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_partial_step_leaves_the_network_the_call_and_the_feature_as_they_were(unet, make_call, depth):
    weights, blocks = {k: v.clone() for k, v in unet.state_dict().items()}, list(unet.output_blocks)
    _, feature = kept_feature(unet, make_call(), depth)
    call, before = make_call(), feature.clone()
    partial_pass(unet, call, depth, feature)
    assert torch.equal(feature, before)
    assert torch.equal(call.x, make_call().x)
    assert list(unet.output_blocks) == blocks
    assert all(torch.equal(value, weights[name]) for name, value in unet.state_dict().items())
    assert torch.equal(call.run(unet._forward), make_call().run(unet._forward))


@pytest.mark.parametrize("depth", DEPTHS)
def test_patches_see_the_output_blocks_by_their_numbers_in_the_whole_network(unet, make_call, depth):
    seen = []

    def look(h, skip, options):
        seen.append(options["block"])
        return h, skip

    _, feature = kept_feature(unet, make_call(), depth)
    partial_pass(unet, patched(make_call(), look), depth, feature)
    assert seen == [("output", i) for i in range(4 - depth, 4)]


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_patch_that_writes_in_place_runs_after_the_feature_is_kept(unet, make_call, depth):
    order = []

    def write(h, skip, options):
        order.append(options["block"])
        h.mul_(1.5)
        return h, skip * 0.5

    plain = make_call().run(unet._forward)
    prediction, kept = full_pass(unet, patched(make_call(), write), unet._forward, depth)
    assert order == [("output", i) for i in range(4)]
    assert not torch.equal(prediction, plain)
    assert torch.equal(partial_pass(unet, patched(make_call(), write), depth, kept), prediction)


def test_the_feature_is_kept_before_the_first_patch_touches_it(unet, make_call):
    def ruin(h, skip, options):
        if options["block"] == ("output", 2):
            h.zero_()
        return h, skip

    _, feature = kept_feature(unet, make_call(), 2)
    _, kept = full_pass(unet, patched(make_call(), ruin), unet._forward, 2)
    assert torch.equal(kept, feature)
    assert kept.abs().sum() > 0


def test_several_patches_run_in_their_order(unet, make_call):
    calls = []
    first = lambda h, skip, options: (calls.append("first"), (h, skip))[1]  # noqa: E731
    second = lambda h, skip, options: (calls.append("second"), (h, skip))[1]  # noqa: E731
    full_pass(unet, patched(make_call(), first, second), unet._forward, 1)
    assert calls == ["first", "second"] * 4


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_callers_patch_lists_are_not_grown(unet, make_call, depth):
    call = patched(make_call())
    full_pass(unet, call, unet._forward, depth)
    assert call.options["patches"] == {"output_block_patch": []}


class Numbered(nn.Module):
    """A layer of the host's kind: counts itself in transformer_options and notes what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList()


class HostLikeUNet(nn.Module):
    """The host's bookkeeping without its arithmetic: block numbers, transformer_index, and control residuals.

    `transformers` says which of the blocks hold one, in running order: 4 input, 1 middle, 4 output.
    """

    def __init__(self, transformers: str) -> None:
        super().__init__()
        blocks = [nn.Sequential(*[Numbered()] * int(letter)) for letter in transformers]
        self.input_blocks = nn.ModuleList(blocks[:4])
        self.middle_block = blocks[4]
        self.output_blocks = nn.ModuleList(blocks[5:])

    def forward(self, *args, **kwargs):
        return self._forward(*args, **kwargs)

    def _forward(self, x, timesteps, context, y, control, options):
        seen, controls = [], []
        options["transformer_index"] = 0

        def run(block, name, number):
            options["block"] = (name, number)
            for layer in block:
                if isinstance(layer, Numbered):
                    seen.append((options["block"], options["transformer_index"]))
                    options["transformer_index"] += 1
            if control and control.get(name):
                controls.append((options["block"], control[name].pop()))

        for i, block in enumerate(self.input_blocks):
            run(block, "input", i)
        run(self.middle_block, "middle", 0)
        for i, block in enumerate(self.output_blocks):
            run(block, "output", i)
            for patch in options.get("patches", {}).get("output_block_patch", ()):
                patch(x, x, options)
        return seen, controls


@pytest.mark.parametrize("transformers", ["011111111", "101010101", "222222222", "000000000", "000012000"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_transformers_are_numbered_as_in_the_whole_network(transformers, depth):
    network, x = HostLikeUNet(transformers), torch.zeros(1, 1, 2, 2)
    whole, _ = NetworkCall(x, x, options={}).run(network._forward)
    partial, _ = partial_pass(network, NetworkCall(x, x, options={}), depth, x)
    shallow = {("input", i) for i in range(depth)} | {("output", i) for i in range(4 - depth, 4)}
    assert partial == [entry for entry in whole if entry[0] in shallow]


@pytest.mark.parametrize("depth", DEPTHS)
def test_control_residuals_reach_the_blocks_that_they_are_for(depth):
    network, x = HostLikeUNet("011111111"), torch.zeros(1, 1, 2, 2)

    def control():
        return {"input": ["i3", "i2", "i1", "i0"], "middle": ["m0"], "output": ["o3", "o2", "o1", "o0"]}

    _, whole = NetworkCall(x, x, control=control(), options={}).run(network._forward)
    assert [name for _, name in whole] == ["i0", "i1", "i2", "i3", "m0", "o0", "o1", "o2", "o3"]
    given = control()
    _, partial = partial_pass(network, NetworkCall(x, x, control=given, options={}), depth, x)
    assert partial == [(("input", i), f"i{i}") for i in range(depth)] + [(("output", i), f"o{i}") for i in range(4 - depth, 4)]
    assert given == control()  # the host may hand the same lists to the next call


def test_a_control_net_of_fewer_residuals_than_blocks_is_cut_to_none():
    network, x = HostLikeUNet("011111111"), torch.zeros(1, 1, 2, 2)
    _, partial = partial_pass(network, NetworkCall(x, x, control={"output": ["deepest"]}, options={}), 2, x)
    assert partial == []


def test_options_of_the_call_reach_the_blocks_and_stay_the_callers(unet, make_call):
    _, feature = kept_feature(unet, make_call(), 2)
    call = make_call(marker="mine")
    seen = []
    partial_pass(unet, patched(call, lambda h, skip, options: (seen.append(options.get("marker")), (h, skip))[1]), 2, feature)
    assert seen == ["mine", "mine"]
    assert "block" not in call.options


@pytest.mark.parametrize(
    "network", [nn.Linear(2, 2), nn.Sequential(nn.Conv2d(3, 3, 1)), nn.Module(), nn.TransformerEncoderLayer(8, 2)]
)
def test_a_network_without_unet_blocks_has_no_block_count(network):
    assert block_count(network) is None


def test_the_block_count_is_that_of_the_input_blocks(unet, make_unet):
    assert block_count(unet) == 4
    wider = make_unet(
        channel_mult=[1, 1, 1],
        num_res_blocks=[1, 1, 1],
        transformer_depth=[0, 0, 0],
        transformer_depth_output=[0] * 6,
        transformer_depth_middle=0,
    )
    assert block_count(wider) == 6
