"""Two experts as one model in the host: what a schedule over both is worth, and what loading both costs.

    python benchmarks/joined.py train expert.safetensors --minutes 8
    python benchmarks/joined.py pictures expert.safetensors --comfyui ComfyUI
    python benchmarks/joined.py memory --comfyui ComfyUI

`train` goes on with the embedded model at its high noise levels alone; `pictures` joins what came of it with the embedded model
and compares presets over both with two sampling windows; `memory` generates two experts of a size and counts what is loaded.
"""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from scene_host import open_comfy
from torch.nn.attention import SDPBackend, sdpa_kernel

from flexi_core.demo.captions import embed_captions
from flexi_core.demo.model import TOKEN_TABLE, DemoModel, read_weights
from flexi_core.demo.scenes import FREE, captions_of, random_attributes
from flexi_core.demo.train import METADATA, NOISE_SPREAD, draw_scenes, loss_weight
from flexi_core.metrics import psnr_db
from flexi_core.runtime.sampling import make_noise
from flexi_core.schedule.presets import Preset
from flexi_core.stages.bounds import Boundary
from flexi_core.tensor_files import save_tensors

BOUNDARY = 500  # of the 1000 timesteps: sigma 1.54
SEED = 3_000_000  # far from those of training and search
STEPS, CFG = 20, 3.0
_BATCH, _RATE, _AVERAGED = 32, 1e-4, 0.995
_HELD_OUT = 512
_MIB_PER_SQUARE = 0.0059  # of a generated network's channels

app = typer.Typer(add_completion=False)


def _loss(model: DemoModel, rows: int, span: tuple[int, int], rng: torch.Generator) -> torch.Tensor:
    """Return the weighted loss of eps on fresh scenes at timesteps of a span, as the embedded model was trained."""
    x0, tokens = draw_scenes(rows, rng)
    context = model.token_table[tokens]
    low, high = span
    t = (low + (torch.arange(rows) + torch.rand(rows, generator=rng)) * ((high - low) / rows)).long()
    sigma = model.sigmas[t].view(-1, 1, 1, 1)
    noise = (NOISE_SPREAD * torch.randn(rows, 1, 1, 1, generator=rng)).exp() * torch.randn(x0.shape, generator=rng)
    x = (x0 + sigma * noise) / (sigma**2 + 1).sqrt()
    with torch.autocast("cpu", torch.bfloat16):
        eps = model.unet(x, t, context)
    return (loss_weight(sigma) * (eps.float() - noise).square()).mean()


@torch.no_grad()
def _held_out(model: DemoModel) -> tuple[float, float]:
    """Return the loss below and above the boundary, of the same scenes and noise every time."""
    found = []
    for span in ((0, BOUNDARY), (BOUNDARY, 1000)):
        rng = torch.Generator().manual_seed(SEED)
        parts = [_loss(model, 64, span, rng) for _ in range(_HELD_OUT // 64)]
        found.append(float(torch.stack(parts).mean()))
    return found[0], found[1]


@app.command()
def train(out: Path, minutes: Annotated[float, typer.Option(help="Of one core.")] = 8.0) -> None:
    """Train the embedded model on, at the timesteps above the boundary alone."""
    torch.set_num_threads(1)
    model = DemoModel.load()
    before, average = _held_out(model), copy.deepcopy(model.unet)
    model.unet.requires_grad_(True)
    optimizer, rng = torch.optim.Adam(model.unet.parameters(), _RATE), torch.Generator().manual_seed(1)
    until, images = time.monotonic() + 60 * minutes, 0
    while time.monotonic() < until:
        optimizer.zero_grad(set_to_none=True)
        with sdpa_kernel(SDPBackend.MATH):
            _loss(model, _BATCH, (BOUNDARY, 1000), rng).backward()
        torch.nn.utils.clip_grad_norm_(model.unet.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for kept, value in zip(average.parameters(), model.unet.parameters(), strict=True):
                kept.lerp_(value, 1 - _AVERAGED)
        images += _BATCH
    model.unet = average.requires_grad_(False)
    after = _held_out(model)
    weights = {name: value.half() for name, value in model.unet.state_dict().items()}
    save_tensors(weights | {TOKEN_TABLE: model.token_table.half()}, out, METADATA | {"images": str(images)})
    print(f"{images} images. Held-out loss below / above the boundary: {before[0]:.4f} / {before[1]:.4f} before, "
          f"{after[0]:.4f} / {after[1]:.4f} after")  # fmt: skip


@app.command()
def pictures(
    expert: Path,
    comfyui: Annotated[Path, typer.Option(help="Checkout.")],
    samples: Annotated[int, typer.Option(min=1)] = 16,
) -> None:
    """Print a table: presets over the joined model, and the same in two windows, against all steps of the joined model."""
    torch.set_num_threads(1)
    open_comfy(comfyui)
    import comfy.sample
    import comfy.samplers

    from flexi_core.host import apply_schedule, join_models, load_demo_model

    high, low = load_demo_model(), load_demo_model()
    weights = read_weights(expert)[1]
    table = weights.pop(TOKEN_TABLE)
    high.model.diffusion_model.load_state_dict(weights)
    attributes = random_attributes(samples, torch.Generator().manual_seed(SEED))
    positive = [[embed_captions(table, captions_of(attributes)), {}]]
    negative = [[embed_captions(table, captions_of(torch.full_like(attributes, FREE))), {}]]
    noise = make_noise(SEED, samples)
    rows = ["| | steps in full | dB to all steps | MACs | same latents as two windows |", "|-|-|-|-|-|"]

    def sample(model: Any, sampler: str, steps: int = STEPS, **options: Any) -> torch.Tensor:
        given = {"noise": noise, "latent_image": noise * 0, "disable_pbar": True, "seed": 0, **options}
        start = given.pop("noise")
        return comfy.sample.sample(
            model, start, steps, CFG, sampler, "normal", positive, negative, given.pop("latent_image"), **given
        )

    def windows(first: Any, second: Any, sampler: str, at: int) -> torch.Tensor:
        half = sample(first, sampler, last_step=at)
        options = {"start_step": at, "latent_image": half, "noise": half * 0, "disable_noise": True}
        return sample(second, sampler, **options)

    levels = comfy.samplers.calculate_sigmas(high.get_model_object("model_sampling"), "normal", STEPS).tolist()
    at = min(range(1, STEPS), key=lambda i: abs(levels[i] - float(DemoModel.load().sigmas[BOUNDARY])))
    joined, _ = join_models(high, low, Boundary(levels[at], "sigma"))
    with torch.inference_mode():
        for sampler in ("euler", "dpmpp_2m", "heun", "uni_pc", "dpmpp_sde"):
            whole = sample(joined, sampler)
            apart = float((whole - windows(high, low, sampler, at)).abs().max())
            rows.append(f"| **{sampler}**, joined, all steps | {STEPS} | | 1.00x | {_apart(apart)} |")
            alone = float(psnr_db(sample(low, sampler), whole).mean())
            rows.append(f"| the second model alone | {STEPS} | {alone:.1f} | 1.00x | |")
            for name in ("2x", "3x"):
                model, handle = apply_schedule(joined, Preset(name))
                made = sample(model, sampler)
                report = handle.report
                experts = [apply_schedule(each, report.schedule)[0] if report.schedule else each for each in (high, low)]
                apart = float((made - windows(*experts, sampler, at)).abs().max())
                full = sum(step.ran.is_full for step in report.reached) or STEPS
                gain = report.speedup_macs or 1.0
                close = float(psnr_db(made, whole).mean())
                rows.append(f"| {name} | {full} | {close:.1f} | {gain:.2f}x | {_apart(apart)} |")
                if full < STEPS:
                    plain = float(psnr_db(sample(joined, sampler, full), whole).mean())
                    rows.append(f"| {full} plain steps | {full} | {plain:.1f} | {STEPS / full:.2f}x | |")
    print("\n".join(rows))


def _apart(largest: float) -> str:
    return "yes" if largest == 0 else f"{largest:.2g} apart at most"


def _resident_mib() -> tuple[float, float]:
    """Return what this process holds in RAM now, and held at most, in MiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return tuple(int(lines[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))


@app.command()
def memory(
    comfyui: Annotated[Path, typer.Option(help="Checkout.")],
    mib: Annotated[int, typer.Option(help="Size of each expert.")] = 1024,
    options: Annotated[str, typer.Option(help="Of the host, such as lowvram.")] = "lowvram",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    way: Annotated[str, typer.Option(help="joined or windows; by default both, each in a process of its own.")] = "",
) -> None:
    """Count what two generated experts take: RAM, loads, bytes on the device at each step."""
    if not way:
        for each in ("windows", "joined"):
            command = [sys.executable, __file__, "memory", "--comfyui", str(comfyui), "--mib", str(mib), "--options", options]
            subprocess.run([*command, "--device", device, "--way", each], check=True)
        return
    torch.set_num_threads(1)
    open_comfy(comfyui, device)
    from comfy.cli_args import args

    for option in options.split(","):
        if option:
            setattr(args, option.split("=")[0], float(option.split("=")[1]) if "=" in option else True)
    import comfy.model_base
    import comfy.model_management
    import comfy.model_patcher
    import comfy.sample
    import comfy.supported_models
    from comfy.patcher_extension import CallbacksMP

    from flexi_core.host import join_models

    loads: Counter[str] = Counter()
    before, _ = _resident_mib()

    def expert(name: str) -> Any:
        torch.manual_seed(len(name))
        config = comfy.supported_models.SD15(_network(mib))
        inner = comfy.model_base.BaseModel(config, device=torch.device("cpu")).eval()
        for value in inner.diffusion_model.parameters():
            value.data.normal_(0, 0.01)
        management = comfy.model_management
        patcher = comfy.model_patcher.ModelPatcher(inner, management.get_torch_device(), management.unet_offload_device())
        patcher.add_callback(CallbacksMP.ON_LOAD, lambda *_: loads.update([name]))
        return patcher

    high, low = expert("high"), expert("low")
    gc.collect()
    size = sum(value.nbytes for value in high.model.diffusion_model.parameters()) / 2**20
    held, _ = _resident_mib()
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prompt = [[torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(1)), {}]]
    on_device: list[str] = []

    def note(*_: Any) -> None:
        on_device.append("/".join(f"{model.loaded_size() / 2**20:.0f}" for model in (high, low)))

    def sample(model: Any, latent: torch.Tensor, given: torch.Tensor, **options: Any) -> torch.Tensor:
        options |= {"disable_pbar": True, "callback": note, "seed": 0}
        return comfy.sample.sample(model, given, 4, 1.0, "euler", "normal", prompt, prompt, latent, **options)

    began = time.monotonic()
    with torch.inference_mode():
        for _ in range(2):
            if way == "joined":
                made = sample(join_models(high, low, Boundary(0.5, "share of the run"))[0], noise * 0, noise)
            else:
                half = sample(high, noise * 0, noise, last_step=2)
                made = sample(low, half, noise * 0, start_step=2, disable_noise=True)
    now, most = _resident_mib()
    print(
        f"{way}: two experts of {size:.0f} MiB, {options or 'no option'}, {device}: {held - before:.0f} MiB held before "
        f"sampling, {now - before:.0f} after two runs, {most - before:.0f} at most; loads {dict(loads)}; on the device, MiB of "
        f"high/low: {' '.join(on_device)}; {time.monotonic() - began:.1f} s; sum of the latent {float(made.double().sum()):.6f}"
    )


def _network(mib: int) -> dict[str, Any]:
    """Return the description of a U-Net of about this size in float32."""
    channels = max(1, round((mib / _MIB_PER_SQUARE) ** 0.5 / 32)) * 32
    return {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": channels, "context_dim": 64,
        "channel_mult": [1, 2], "num_res_blocks": [2, 2], "transformer_depth": [0, 0, 1, 1], "transformer_depth_middle": 1,
        "transformer_depth_output": [0, 0, 0, 1, 1, 1], "use_spatial_transformer": True, "use_temporal_attention": False,
        "legacy": False, "use_linear_in_transformer": True, "adm_in_channels": None, "num_heads": 8, "dtype": torch.float32,
    }  # fmt: skip


if __name__ == "__main__":
    app()
