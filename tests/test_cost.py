"""MACs: against an independent count of the layers that ran, and by hand."""

import gc
from collections import Counter
from weakref import ref

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flexi_core import Schedule
from flexi_core.networks.unet import NetworkCall, partial_pass
from flexi_core.run.cost import NetworkCost, all_full_macs, count_macs, predicted_speedup, run_macs, schedule_cost
from flexi_core.run.plan import make_plan
from flexi_core.run.run import Run
from flexi_core.runtime.sampling import sample_euler

# Three levels: partial steps of depth 1 and 2 cost 8 and 20 of 100.
COST = NetworkCost(100.0, {("input", 0): 3.0, ("input", 1): 5.0, ("input", 2): 30.0, ("middle", 0): 41.0,
                           ("output", 0): 9.0, ("output", 1): 7.0, ("output", 2): 4.0})  # fmt: skip


def layer_macs(network: nn.Module, run) -> dict[str, int]:
    """Return the MACs of each convolution and linear layer that a run calls, by name, from weights and output shapes."""
    names = {module: name for name, module in network.named_modules()}
    macs: Counter[str] = Counter()

    def count(module, _, output):
        per_output = module.weight.numel() // module.weight.shape[0]
        macs[names[module]] += output.numel() * per_output

    hooks = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return macs


@pytest.fixture(scope="module")
def convolutional(make_unet):
    """A U-Net without attention, so that layers hold all its MACs."""
    return make_unet(transformer_depth=[0, 0], transformer_depth_output=[0] * 4, transformer_depth_middle=0)


def test_a_network_is_counted_once_for_its_shapes(make_unet, make_call):
    network, passes = make_unet(), []
    network.out.register_forward_hook(lambda *_: passes.append(1))
    small, again, large = (count_macs(network, make_call(seed=seed, size=size)) for seed, size in ((0, 16), (1, 16), (0, 32)))
    assert small is again and len(passes) == 2 and large.full_macs > small.full_macs
    kept = ref(network)
    del network
    gc.collect()
    assert kept() is None


def test_the_count_is_that_of_the_layers_that_run(convolutional, make_call):
    call = make_call()
    full = layer_macs(convolutional, lambda: call.run(convolutional._forward))
    cost = count_macs(convolutional, call)
    assert cost.full_macs == sum(full.values()) / 4
    for depth in (1, 2, 3):
        shallow = [
            *(f"input_blocks.{i}." for i in range(depth)),
            *(f"output_blocks.{i}." for i in range(4 - depth, 4)),
            "out.",
            "time_embed.",
        ]
        assert cost.partial_macs[depth] == sum(v for name, v in full.items() if name.startswith(tuple(shallow))) / 4


def test_each_depth_adds_the_cost_of_its_two_blocks(convolutional, make_call):
    call = make_call()
    full = layer_macs(convolutional, lambda: call.run(convolutional._forward))
    cost = count_macs(convolutional, call)
    for depth in (2, 3):
        blocks = (f"input_blocks.{depth - 1}.", f"output_blocks.{4 - depth}.")
        added = sum(v for name, v in full.items() if name.startswith(blocks)) / 4
        assert cost.partial_macs[depth] - cost.partial_macs[depth - 1] == added > 0


def test_the_count_on_meta_tensors_is_the_flop_counters_on_the_real_module(unet, make_call):
    call = make_call()
    # torch's counter sees attention in its plain form only.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call.run(unet._forward)
    cost = count_macs(unet, make_call())
    assert cost.full_macs == counter.get_total_flops() / 2 / 4
    assert 0 < cost.partial_macs[1] < cost.partial_macs[2] < cost.partial_macs[3] < cost.full_macs


def test_a_partial_pass_really_spends_what_is_counted(unet, make_call):
    cost = count_macs(unet, make_call())
    feature = torch.zeros(4, 32, 16, 16)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        partial_pass(unet, make_call(), 2, feature)
    assert cost.partial_macs[2] == counter.get_total_flops() / 2 / 4


def test_the_cost_of_a_row_does_not_depend_on_the_rows(unet, make_call):
    assert count_macs(unet, make_call(slots=(0,))) == count_macs(unet, make_call(slots=(1, 0)))


def test_without_attention_four_times_the_pixels_cost_four_times(convolutional, make_call):
    small, large = (count_macs(convolutional, make_call(size=size)).full_macs for size in (16, 32))
    assert large / small == pytest.approx(4, rel=0.01)  # the timestep's embedding costs the same


def test_counting_leaves_the_network_on_its_device_and_as_it_was(unet, make_call):
    before = make_call().run(unet._forward)
    count_macs(unet, make_call())
    assert torch.equal(make_call().run(unet._forward), before)
    assert {value.device.type for value in unet.parameters()} == {"cpu"}


def test_a_partial_step_can_have_every_depth_below_the_block_count(unet, make_call):
    assert set(count_macs(unet, make_call()).partial_macs) == {1, 2, 3}


def test_every_block_has_its_share_and_the_rest_is_no_blocks(convolutional, make_call):
    call = make_call()
    full = layer_macs(convolutional, lambda: call.run(convolutional._forward))
    cost = count_macs(convolutional, call)
    assert set(cost.blocks) == {*((part, i) for part in ("input", "output") for i in range(4)), ("middle", 0)}
    for (part, i), macs in cost.blocks.items():
        prefix = "middle_block." if part == "middle" else f"{part}_blocks.{i}."
        assert macs == sum(v for name, v in full.items() if name.startswith(prefix)) / 4


class Stubborn(nn.Module):
    def forward(self, x, *args, **kwargs):
        return x * float(x.sum())


def test_a_network_that_cannot_be_counted_has_no_cost_and_says_so(make_call, caplog):
    assert count_macs(Stubborn(), make_call()) is None
    assert "the MACs of Stubborn cannot be counted" in caplog.text


def test_any_network_that_runs_on_meta_tensors_has_a_full_cost(make_call):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3, padding=1)

        def forward(self, x, *args, **kwargs):
            return self.conv(x)

    assert count_macs(Plain(), make_call()) == NetworkCost(5 * 3 * 9 * 16 * 16)


@pytest.mark.parametrize(
    ("text", "macs"),
    [("FFFF", 400), ("FNNN", 100), ("FXXX", 100), ("FPPN@1", 116), ("FP@1|FPX@2", 228), ("10*(FPXXX@2)", 1200)],
)
def test_the_cost_of_a_schedule_by_hand(text, macs):
    schedule = Schedule.parse(text)
    assert schedule_cost(schedule, COST) == macs
    assert predicted_speedup(schedule, COST) == pytest.approx(len(schedule) * 100 / macs)


def test_the_share_of_a_depth():
    assert COST.share(2) == 0.2
    assert COST.share(0) == 1.0


@pytest.mark.parametrize("text", ["FFFFFF", "FPPNNN@2", "FNNFXX", "FPX@1|FPN@3"])
def test_a_finished_run_spent_what_its_schedule_costs_for_every_row(unet, make_call, text):
    schedule = Schedule.parse(text)
    cost = count_macs(unet, make_call())
    sigmas = torch.linspace(6, 0, 7)
    run = Run(make_plan(schedule, sigmas.tolist()))

    def model(x, sigma):
        def compute():
            call = make_call(slots=(1, 0))
            without, with_ = run.forward(unet, call, float(sigma), unet.forward).chunk(2)
            return with_ + without

        return run.predict(x, float(sigma), compute)

    sample_euler(model, torch.zeros(2, 3, 16, 16), sigmas[list(run.plan.kept)])
    assert run_macs(run.records, cost) == pytest.approx(4 * schedule_cost(schedule, cost))
    assert all_full_macs(run, cost) == pytest.approx(4 * 6 * cost.full_macs)
    speedup = all_full_macs(run, cost) / run_macs(run.records, cost)
    assert speedup == pytest.approx(predicted_speedup(schedule, cost))


def test_a_call_keeps_its_shapes_and_no_data(make_call):
    call = make_call()
    shapes = NetworkCall(
        call.x, call.timesteps, call.context, torch.ones(4, 2), {"output": [call.x]}, call.options, {"extra": call.x}
    ).shapes()
    assert shapes.x.shape == call.x.shape and shapes.y.shape == (4, 2)
    tensors = (shapes.x, shapes.timesteps, shapes.context, shapes.y, shapes.kwargs["extra"])
    assert {t.device.type for t in tensors} == {"meta"}
    assert shapes.control is None
