"""Fingerprints: the same wherever the same network is, another for another network."""

import copy

import pytest
import torch
from torch import nn

from flexi_core.networks.fingerprint import architecture_fingerprint, weights_fingerprint


def both(network: nn.Module) -> tuple[str, str]:
    return architecture_fingerprint(network), weights_fingerprint(network)


def test_copies_in_half_and_single_precision_agree(unet):
    # fp16 is where shipped weights come from; raised to fp32 they are the same network.
    half = copy.deepcopy(unet).half()
    assert both(half) == both(copy.deepcopy(half).float()) == both(unet)


def test_the_fingerprints_are_those_of_the_text_they_travel_in(unet):
    assert all(fingerprint.startswith("sha256:") and len(fingerprint) == 23 for fingerprint in both(unet))


def test_other_weights_are_another_network_of_the_same_architecture(unet):
    for name, _ in [*unet.named_parameters()][::7]:
        other = copy.deepcopy(unet)
        other.get_parameter(name).add_(0.01)
        assert architecture_fingerprint(other) == architecture_fingerprint(unet)
        assert weights_fingerprint(other) != weights_fingerprint(unet)


@pytest.mark.parametrize("change", [{"model_channels": 64}, {"context_dim": 16}, {"transformer_depth_middle": 2}])
def test_another_shape_is_another_architecture(unet, make_unet, change):
    assert architecture_fingerprint(make_unet(**change)) != architecture_fingerprint(unet)


def test_the_order_in_which_parameters_were_made_does_not_count():
    one, other = nn.Module(), nn.Module()
    one.a, one.b = nn.Linear(2, 3), nn.Linear(3, 4)
    other.b, other.a = one.b, one.a
    assert both(one) == both(other)


def test_a_name_counts():
    one, other = nn.Module(), nn.Module()
    one.a = other.b = nn.Linear(2, 3)
    assert architecture_fingerprint(one) != architecture_fingerprint(other)
    assert weights_fingerprint(one) != weights_fingerprint(other)


@pytest.mark.parametrize("numel", [1, 2, 63, 64, 65, 1280 * 2560 * 9])
def test_a_tensor_of_any_size_is_read_to_its_ends(numel):
    # The last one is a convolution of Stable Diffusion 1.5: its last index has no float32 of its own.
    network = nn.Module()
    network.weight = nn.Parameter(torch.zeros(numel, dtype=torch.float16), requires_grad=False)
    before = weights_fingerprint(network)
    for end in (0, -1):
        network.weight[end] = 1
        assert weights_fingerprint(network) != before
        network.weight[end] = 0
    assert weights_fingerprint(network) == before
