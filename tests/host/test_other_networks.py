"""Networks without U-Net blocks: null steps work, partial steps run in full and are reported."""

import pytest
import torch

from flexi_core.schedule import StepKind

FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 32,
    "context_in_dim": 32,
    "hidden_size": 64,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [8, 12, 12],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
}
SD3 = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "depth": 2,
    "input_size": None,
    "num_patches": 64,
    "pos_embed_max_size": 8,
    "adm_in_channels": 32,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 128}},
    "pos_embed_scaling_factor": None,
}


@pytest.fixture(scope="module", params=["Flux", "SD3"])
def transformer(host, request):
    """A tiny model of the family with random weights: Flux has its own place for wrappers, SD3 has none."""
    import comfy.supported_models

    config = getattr(comfy.supported_models, request.param)(
        {"Flux": FLUX, "SD3": SD3}[request.param] | {"dtype": torch.float32}
    )
    inner = config.get_model({}, device=torch.device("cpu")).eval()
    rng = torch.Generator().manual_seed(0)
    for value in (*inner.diffusion_model.parameters(), *inner.diffusion_model.buffers()):
        value.data.copy_(torch.randn(value.shape, generator=rng) * 0.05)
    cpu = torch.device("cpu")
    return host.comfy.model_patcher.ModelPatcher(inner, load_device=cpu, offload_device=cpu)


@pytest.fixture(scope="module")
def sample(host):
    rng = torch.Generator().manual_seed(1)
    prompts = [[[torch.randn(1, 4, 32, generator=rng), {"pooled_output": torch.randn(1, 32, generator=rng)}]] for _ in range(2)]
    noise = torch.randn(2, 16, 8, 8, generator=rng)
    return lambda model: host.sample(model, noise=noise, positive=prompts[0], negative=prompts[1])


def test_all_full_schedule_equals_plain_sampling(transformer, apply, sample):
    model, handle = apply(transformer, "8*(F)")
    assert torch.equal(sample(model), sample(transformer))
    assert sum(step.network_calls for step in handle.report.steps) == 8


def test_null_steps_save_their_calls(transformer, apply, sample):
    model, handle = apply(transformer, "2*(F)|FXX|FNN")
    first = sample(model)
    assert first.isfinite().all()
    assert torch.equal(sample(model), first)
    assert handle.report.letters == "FFFXXFNN"
    assert [step.network_calls for step in handle.report.steps] == [1, 1, 1, 0, 0, 1, 0, 0]
    assert handle.report.speedup_macs == pytest.approx(2.0)


def test_partial_steps_run_in_full_and_say_why(transformer, apply, sample):
    model, handle = apply(transformer, "F|FPP@2|FPPP@1")
    assert torch.equal(sample(model), sample(transformer))
    assert {step.ran for step in handle.report.steps} == {StepKind.FULL}
    assert "has no U-Net blocks to run partially" in str(handle.report)
