"""The host's kinds of U-Net, small and with random weights: typed by the host's own model classes."""

import pytest
import torch

from flexi_core.networks.unet import NetworkCall, block_count, full_pass, partial_pass

MIXED = "2*(F)|FPX@2|FPN@3"  # 8 steps
SMALL = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": [2, 2],
    "transformer_depth": [1, 1, 1, 1],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 32,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_linear_in_transformer": True,
    "num_heads": 2,
    "num_head_channels": -1,
}
VIDEO = {
    "in_channels": 8,
    "use_temporal_resblock": True,
    "use_temporal_attention": True,
    "extra_ff_mix_layer": True,
    "merge_strategy": "learned_with_images",
    "merge_factor": 0.0,
    "video_kernel_size": [3, 1, 1],
    "use_spatial_context": True,
    "disable_temporal_crossattention": False,
}
# The host's class, its prediction, what differs of the layout, and what the prompts carry.
KINDS = {
    "SD1.5": ("SD15", "EPS", {"use_linear_in_transformer": False}, {}),
    "SD2 (v-prediction)": ("SD20", "V_PREDICTION", {}, {}),
    "SDXL": (
        "SDXL",
        "EPS",
        {"num_classes": "sequential", "adm_in_channels": 2816, "transformer_depth": [0, 0, 2, 2],
         "transformer_depth_output": [0, 0, 0, 2, 2, 2]},
        {"pooled_output": torch.linspace(-1, 1, 1280)[None]},
    ),
    "SDXL refiner": (
        "SDXLRefiner",
        "EPS",
        {"num_classes": "sequential", "adm_in_channels": 2560},
        {"pooled_output": torch.linspace(-1, 1, 1280)[None]},
    ),
    "SVD (video)": ("SVD_img2vid", "V_PREDICTION_EDM", {**VIDEO, "num_classes": "sequential", "adm_in_channels": 768}, {}),
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def small_unet(host, generated, request):
    """A model of the kind, and a function that samples it: (model, network, sample)."""
    import comfy.supported_models
    from comfy.model_base import ModelType

    kind, prediction, layout, carried = KINDS[request.param]

    class Config(getattr(comfy.supported_models, kind)):
        unet_extra_config = {}

        def model_type(self, state_dict, prefix=""):
            return getattr(ModelType, prediction)

    config = Config({**SMALL, **layout, "dtype": torch.float32})
    inner = config.get_model({}, device=torch.device("cpu")).eval()
    generated(inner.diffusion_model)
    rng = torch.Generator().manual_seed(0)
    cpu = torch.device("cpu")
    model = host.comfy.model_patcher.ModelPatcher(inner, load_device=cpu, offload_device=cpu)
    video = kind == "SVD_img2vid"
    prompts = [[[torch.randn(1, 5, 32, generator=rng), dict(carried)]] for _ in range(2)]
    frames = torch.randn(3 if video else 2, 4, 16, 16, generator=rng)
    if video:
        for prompt in prompts:
            prompt[0][1]["concat_latent_image"] = torch.randn(1, 4, 16, 16, generator=rng)

    def sample(model):
        return host.sample(model, noise=frames, positive=prompts[0], negative=prompts[1])

    return model, inner.diffusion_model, sample


@pytest.mark.matrix("Architectures: U-Nets", "{small_unet}")
def test_kind_of_unet_keeps_the_laws(small_unet, cell):
    model, network, sample = small_unet
    report = cell(model, sample, MIXED)
    assert not any(step.fallbacks for step in report.steps)
    assert set(report.cost.partial_macs) == set(range(1, block_count(network)))
    assert report.cache_mib == report.predicted_cache_mib > 0


@pytest.mark.matrix("Architectures: U-Nets", "{small_unet}")
def test_partial_step_equals_the_full_one_at_every_depth(small_unet):
    model, network, sample = small_unet
    calls = []
    from comfy.patcher_extension import WrappersMP

    def remember(executor, *args, **kwargs):
        calls.append((args, kwargs))
        return executor(*args, **kwargs)

    watched = model.clone()
    watched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "remember", remember)
    sample(watched)
    (x, timesteps, context, y, control, options), kwargs = calls[0]
    plain = {"cond_or_uncond": options["cond_or_uncond"]}
    with torch.no_grad():
        for depth in range(1, block_count(network)):
            call = NetworkCall(x, timesteps, context, y, control, dict(plain), dict(kwargs))
            full, feature = full_pass(network, call, network._forward, depth)
            again = NetworkCall(x, timesteps, context, y, control, dict(plain), dict(kwargs))
            assert torch.equal(partial_pass(network, again, depth, feature), full), depth
