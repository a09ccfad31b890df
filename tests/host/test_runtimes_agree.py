"""The embedded runtime and the host: the same weights, noise and noise levels make the same pictures."""

import ast
import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from flexi_core import Schedule
from flexi_core.demo.model import DemoModel
from flexi_core.demo.scenes import parse_caption
from flexi_core.networks.fingerprint import architecture_fingerprint, weights_fingerprint
from flexi_core.runtime import sampling
from flexi_core.runtime.file_model import FileModel
from flexi_core.runtime.solvers import STOCHASTIC

PACK = Path(__file__).parents[2]
STEPS = 8
MIXED = "2*(F)|FPX@2|FPN@3"
REUSED = "FX|fpX@2~0.9,1.2|FpX@2^1~1,.5,-.25"
TEXTS = {"all-full": f"{STEPS}*(F)", "mixed": MIXED, "guidance reused, blended": REUSED}
CAPTION = "a small green ring at the top left on a brown background"
BROWNIAN = ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")


@pytest.fixture(scope="module")
def embedded():
    return DemoModel.load()


def first_seed(host):
    """Return with which seed the host begins a run of seed 0 on a CPU: 1, as we do; in older hosts 0, the start's own noise."""
    drawn = importlib.import_module("comfy.k_diffusion.sampling").default_noise_sampler(torch.zeros(4), seed=0)(None, None)
    (seed,) = (seed for seed in (0, 1) if torch.equal(torch.randn(4, generator=torch.Generator().manual_seed(seed)), drawn))
    return seed


@pytest.mark.parametrize("steps", [1, 5, 20, 50])
@pytest.mark.parametrize("scheduler", list(sampling.SCHEDULERS))
def test_noise_levels_equal_the_hosts(host, demo_model, embedded, scheduler, steps):
    ours, theirs = sampling.SCHEDULERS[scheduler](embedded, steps), host.sigmas(demo_model, scheduler, steps)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("steps", [2, 8])
@pytest.mark.parametrize("scheduler", list(sampling.SCHEDULERS))
@pytest.mark.parametrize("sampler", list(sampling.SAMPLERS))
def test_a_samplers_noise_levels_equal_the_hosts(host, demo_model, embedded, sampler, scheduler, steps):
    ours = sampling.sigmas_of(embedded, sampler, scheduler, steps)
    theirs = host.comfy.samplers.KSampler(demo_model, steps, "cpu", sampler=sampler, scheduler=scheduler).sigmas
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [
        *((sampler, "normal") for sampler in sampling.SAMPLERS if sampler not in STOCHASTIC),
        *(("euler", "simple"), ("dpmpp_2m", "karras"), ("uni_pc", "simple")),
    ],
)
def test_samplers_agree_with_the_hosts(host, demo_model, embedded, apply, sampler, scheduler, text):
    noise = sampling.make_noise(7, 2)
    sigmas = sampling.sigmas_of(embedded, sampler, scheduler, STEPS)
    ours, run = sampling.sample(
        embedded, Schedule.parse(text), sigmas, noise, [parse_caption(CAPTION)] * 2, sampler=sampler, cfg=3.0
    )
    model, handle = apply(demo_model, text)
    positive = host.adapter.demo_conditioning(CAPTION)
    theirs = host.sample(model, sampler, STEPS, scheduler=scheduler, noise=noise, positive=positive)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert [record.network_calls for record in run.records] == [step.network_calls for step in handle.report.steps]


# On grids that are the host's bit for bit: a Brownian motion is another one between levels that differ in their last digit.
@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [*((sampler, "simple") for sampler in sorted(STOCHASTIC)), *((sampler, "karras") for sampler in BROWNIAN)],
)
def test_samplers_that_draw_noise_agree_with_the_hosts_row_by_row(host, demo_model, embedded, apply, sampler, scheduler):
    noise, seeds, text = sampling.make_noise(7, 2), (41, 1234567), f"{STEPS}*(F)"
    sigmas = sampling.sigmas_of(embedded, sampler, scheduler, STEPS)
    prompts = [parse_caption(CAPTION)] * 2
    ours, run = sampling.sample(embedded, Schedule.parse(text), sigmas, noise, prompts, sampler=sampler, cfg=3.0, seeds=seeds)
    model, handle = apply(demo_model, text)
    options = {"scheduler": scheduler, "positive": host.adapter.demo_conditioning(CAPTION)}
    offset = 0 if sampler in BROWNIAN else 1 - first_seed(host)
    for row, seed in enumerate(seeds):
        theirs = host.sample(model, sampler, STEPS, noise=noise[row : row + 1], seed=seed + offset, **options)
        torch.testing.assert_close(ours[row : row + 1], theirs, rtol=0, atol=1e-4)
        assert [record.network_calls for record in run.records] == [step.network_calls for step in handle.report.steps]


@pytest.mark.parametrize("steps", [8, 40])
@pytest.mark.parametrize("sampler", list(sampling.SAMPLERS))
def test_solvers_agree_with_the_hosts_on_a_denoiser_in_closed_form(host, demo_model, gaussian, sampler, steps):
    asked = ([], [])

    def denoise(x, sigma, levels):
        levels.append(float(sigma))
        return gaussian.denoise(x.double(), sigma.double()).float()

    class HostsModel:
        inner_model = SimpleNamespace(model_patcher=demo_model, inner_model=demo_model.model)

        def __call__(self, x, sigma, **options):
            return denoise(x, sigma[0], asked[1])

    x, sigmas = gaussian.start(10.0)[:1].float(), gaussian.sigmas(steps).float()
    ours = sampling.SAMPLERS[sampler](lambda x, sigma: denoise(x, sigma, asked[0]), x, sigmas, [6])
    seed = 6 if sampler in BROWNIAN else 7 - first_seed(host)
    function = host.comfy.samplers.sampler_object(sampler).sampler_function
    theirs = function(HostsModel(), x.clone(), sigmas.clone(), extra_args={"seed": seed}, disable=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-5)
    assert asked[0] == pytest.approx(asked[1], rel=1e-6)


def test_fingerprints_agree_with_the_hosts(demo_model, embedded):
    network = demo_model.model.diffusion_model
    assert architecture_fingerprint(embedded.unet) == architecture_fingerprint(network)
    assert weights_fingerprint(embedded.unet) == weights_fingerprint(network)


# Layouts of `--unet` that the embedded model does not have; those with tokens of a level's own width need no conditioning.
LAYOUTS = {
    "linear": {"use_linear_in_transformer": True, "num_heads": 4},
    "head width, scale and shift": {"num_head_channels": 16, "use_scale_shift_norm": True},
    "projections alone": {"transformer_depth": [0, 0], "transformer_depth_output": [0] * 4, "transformer_depth_middle": 0},
    "one middle block": {"transformer_depth_middle": -1, "num_res_blocks": [1, 2], "transformer_depth": [0, 1, 1],
                         "transformer_depth_output": [0, 0, 1, 1, 1]},
    "self-attention": {"context_dim": 64},
}  # fmt: skip


@pytest.mark.parametrize("size", [(8, 8), (7, 10)], ids=str)
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_unet_from_a_file_samples_as_in_the_host(host, generated, apply, tmp_path, layout, prediction, size):
    model_base = host.comfy.model_base
    config = {
        "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1, 2],
        "num_res_blocks": [1, 1], "transformer_depth": [0, 1], "transformer_depth_output": [0, 0, 1, 1],
        "transformer_depth_middle": 1, "context_dim": 8, "use_spatial_transformer": True, "legacy": False,
        "num_heads": 2, **LAYOUTS[layout],
    }  # fmt: skip
    described = type("Described", (host.comfy.supported_models_base.BASE,), {"unet_config": {}, "unet_extra_config": {}})
    described.latent_format = host.comfy.latent_formats.LatentFormat
    described.sampling_settings = {"beta_schedule": "linear", "linear_start": 0.00085, "linear_end": 0.012}
    kind = model_base.ModelType.EPS if prediction == "eps" else model_base.ModelType.V_PREDICTION
    cpu = torch.device("cpu")
    inner = model_base.BaseModel(described({**config, "dtype": torch.float32}), kind, device=cpu)
    generated(inner.diffusion_model)

    conditioned = layout not in ("projections alone", "self-attention")
    table = torch.randn(4, config["context_dim"], generator=torch.Generator().manual_seed(1))
    tensors = inner.diffusion_model.state_dict() | ({"class_embedding.weight": table} if conditioned else {})
    said = {"unet_config": json.dumps(config), "prediction": prediction, "beta_schedule": "linear 0.00085 0.012"}
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "u.safetensors", metadata=said)
    ours = FileModel.load(tmp_path / "u.safetensors", size)

    noise, labels = sampling.make_noise(7, 2, (4, *size)), [1, 1] if conditioned else None
    sigmas, text = sampling.sigmas_normal(ours, STEPS), "2*(F)|FPX@1|FPN@2"
    mine, run = sampling.sample(ours, Schedule.parse(text), sigmas, noise, labels, cfg=2.0)
    patcher = host.comfy.model_patcher.ModelPatcher(inner.eval(), load_device=cpu, offload_device=cpu)
    model, handle = apply(patcher, text)
    cond, uncond = ([[table[row].view(1, 1, -1), {}]] if conditioned else [[None, {}]] for row in (1, 3))
    theirs = host.sample(model, steps=STEPS, noise=noise, positive=cond, negative=uncond, cfg=2.0 if conditioned else 1.0)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
    assert [record.network_calls for record in run.records] == [step.network_calls for step in handle.report.steps]
    assert not any(record.fallbacks for record in run.records)
    # What a schedule file carries, so that the host knows the run again.
    for fingerprint in (architecture_fingerprint, weights_fingerprint):
        assert fingerprint(ours.unet) == fingerprint(inner.diffusion_model)


def test_the_documented_way_to_write_a_unets_file_works(host, generated, tmp_path, monkeypatch):
    text = (PACK / "docs" / "guide" / "unet-file.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (config,) = (
        node.value for node in ast.parse(code).body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "config"
    )
    network = importlib.import_module("comfy.ldm.modules.diffusionmodules.openaimodel").UNetModel
    unet = generated(network(**ast.literal_eval(config), dtype=torch.float32, operations=host.comfy.ops.disable_weight_init))
    monkeypatch.chdir(tmp_path)
    exec(code, {"unet": unet, "classes": torch.nn.Embedding(11, 48)})
    model = FileModel.load(tmp_path / "unet.safetensors")
    assert model.classes == 10 and model.latent_shape == (4, 16, 16)
    assert weights_fingerprint(model.unet) == weights_fingerprint(unet)
