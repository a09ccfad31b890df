"""The training script, for a few batches: it writes weights that load, and goes on from its checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from flexi_core.demo import train
from flexi_core.demo.classifier import load_classifier
from flexi_core.demo.model import DemoModel
from flexi_core.demo.train import BATCH, accept, train_classifier, train_unet


@pytest.fixture(autouse=True)
def tiny_network(monkeypatch):
    """Train a network of two blocks: what is trained is no part of these laws."""
    tiny = {"model_channels": 32, "channel_mult": [1], "num_res_blocks": [1], "transformer_depth": [0]}
    tiny = train.UNET_CONFIG | tiny | {"transformer_depth_output": [0, 0], "transformer_depth_middle": -1}
    monkeypatch.setattr(train, "UNET_CONFIG", tiny)
    monkeypatch.setattr(train, "METADATA", train.METADATA | {"unet_config": json.dumps(tiny)})


def _images(path):
    with safe_open(path, framework="pt") as file:
        return int(file.metadata()["images"])


def test_training_writes_weights_that_load_and_continues_from_its_checkpoint(tmp_path):
    seen: list[tuple[int, int]] = []
    path = train_unet(tmp_path, images=20 * BATCH, seed=0, progress=lambda done, total, *_: seen.append((done, total)))
    assert _images(path) == 20 * BATCH and seen == [(20 * BATCH, 20 * BATCH)]
    first = DemoModel.load(path).unet.state_dict()
    path = train_unet(tmp_path, images=22 * BATCH, seed=0, progress=lambda *_: None)
    assert _images(path) == 22 * BATCH
    second = DemoModel.load(path).unet.state_dict()
    assert any(not torch.equal(first[name], second[name]) for name in first)
    again = train_unet(tmp_path, images=22 * BATCH, seed=0, progress=lambda *_: None)
    assert all(torch.equal(second[name], value) for name, value in DemoModel.load(again).unet.state_dict().items())
    assert not list(tmp_path.glob("*.part"))


def test_the_acceptance_reads_untrained_weights_as_bad_ones(tmp_path):
    classifier = train_classifier(tmp_path, images=512, seed=0, progress=lambda *_: None)
    assert load_classifier(classifier).training is False
    unet = train_unet(tmp_path, images=BATCH, seed=0, progress=lambda *_: None)
    found = accept(classifier, unet, samples=2)
    assert found["classifier, worst attribute"] < 0.9
    assert 0 <= found["samples, every attribute"] <= min(v for k, v in found.items() if k.startswith("samples"))
