"""A small diffusion transformer on the embedded model's scenes, in a layout that ComfyUI loads by itself.

    python benchmarks/scene_dit.py train FILE.safetensors --comfyui ~/comfy/ComfyUI   # about an hour on one core
    python benchmarks/scene_dit.py draw-samples FILE.safetensors PICTURE.png --comfyui ~/comfy/ComfyUI

The host takes the file for a Stable Diffusion 3 transformer (four joint blocks, width 256): a flow model with shift 3 over
16x16x16 latents, which are the scenes' pixels on a frame of four directions of colour, every 2x2 of them in one place.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from einops import einsum
from safetensors.torch import load_file, save_file
from scene_host import SceneBackend, SceneModel, open_comfy
from torch import nn
from torch.nn import functional as F

from flexi_core import FlexiError
from flexi_core.demo.captions import TABLE_ROWS, embed_captions, token_rows
from flexi_core.demo.scenes import ATTRIBUTES, FREE, IMAGE_SIZE, Caption, random_attributes, render
from flexi_core.demo.trainer import BATCH, fit
from flexi_core.files import replace_file
from search_tools.backends.teacher import JUDGE_SEEDS, TeacherSettings
from search_tools.report.pictures import save_image_rows

DEPTH = 4  # blocks; the host's width is 64 times this
TOKEN_WIDTH = 64
POOLED_WIDTH = 16  # the layout's pooled text, always zero here
LATENT_SHAPE = (16, IMAGE_SIZE // 2, IMAGE_SIZE // 2)
TOKEN_TABLE = "caption_embedding.weight"
SHIFT = 3.0  # the host's for this layout
LATENT_SCALE, LATENT_SHIFT = 1.5305, 0.0609  # of the host's latent format
LEARNING_RATE = 1.0e-3
WARMUP_IMAGES = 10_000
DROP_ALL, DROP_ONE = 0.10, 0.08  # captions dropped whole, for classifier-free guidance, and each part alone
DEFAULT_CFG = 3.0
SCHEDULER = "simple"  # even steps of time before the shift, as flow models of this layout are sampled
# Four directions of colour at equal angles: a tight frame, so that decoding is the transpose.
FRAME = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) * 0.5

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


def encode(pictures: torch.Tensor) -> torch.Tensor:
    """Return what the network sees [n, 16, 16, 16] of pictures [n, 3, 32, 32]."""
    return F.pixel_unshuffle(einsum(FRAME, pictures, "k c, n c h w -> n k h w"), 2)


def decode(latents: torch.Tensor) -> torch.Tensor:
    """Return the pictures [n, 3, 32, 32] of the host's latents [n, 16, 16, 16]."""
    inner = F.pixel_shuffle((latents - LATENT_SHIFT) * LATENT_SCALE, 2)
    return einsum(FRAME, inner, "k c, n k h w -> n c h w")


class SceneDiT(nn.Module):
    """The host's own transformer, and the table of caption tokens."""

    def __init__(self) -> None:
        super().__init__()
        import comfy.ops
        from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

        layout = {"input_size": None, "patch_size": 2, "in_channels": 16, "out_channels": 16, "depth": DEPTH}
        layout |= {"num_patches": 64, "pos_embed_max_size": 8, "adm_in_channels": POOLED_WIDTH, "qk_norm": "rms"}
        into = {"in_features": TOKEN_WIDTH, "out_features": 64 * DEPTH}
        layout |= {"context_embedder_config": {"target": "torch.nn.Linear", "params": into}}
        self.network = OpenAISignatureMMDITWrapper(**layout, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
        self.tokens = nn.Embedding(TABLE_ROWS, TOKEN_WIDTH)
        self._initialise()

    def _initialise(self) -> None:
        """Fill the weights, which the host leaves as they are: Xavier, and zero where a block or the output begins closed."""
        from comfy.ldm.modules.diffusionmodules.mmdit import get_2d_sincos_pos_embed_torch

        for name, value in self.network.named_parameters():
            if value.ndim == 1:
                nn.init.constant_(value, 1.0 if name.endswith(("ln_q.weight", "ln_k.weight")) else 0.0)
            elif "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(value)
            elif "_embedder" in name and name.startswith(("t_", "y_")):
                nn.init.normal_(value, std=0.02)
            else:
                nn.init.xavier_uniform_(value.flatten(1))
        nn.init.normal_(self.tokens.weight, std=0.5)
        self.network.pos_embed.copy_(get_2d_sincos_pos_embed_torch(64 * DEPTH, 8, 8).view(1, 64, 64 * DEPTH))

    def loss(self, rng: torch.Generator) -> torch.Tensor:
        """Return the mean squared error of the velocity on a fresh batch (Lipman et al., 2023)."""
        device = self.tokens.weight.device
        attributes = random_attributes(BATCH, rng)
        x0 = encode(render(attributes, rng))
        drop = torch.rand(BATCH, len(ATTRIBUTES), generator=rng) < DROP_ONE
        drop |= torch.rand(BATCH, 1, generator=rng) < DROP_ALL
        context = self.tokens(token_rows(attributes.masked_fill(drop, FREE)).to(device))
        # Stratified, and laid where the shifted grid of the host has its steps, the last ones included.
        u = (torch.arange(BATCH) + torch.rand(BATCH, generator=rng)) / BATCH
        sigma = (SHIFT * u / (1 + (SHIFT - 1) * u)).view(-1, 1, 1, 1)
        noise = torch.randn(x0.shape, generator=rng)
        x = ((1 - sigma) * x0 + sigma * noise).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            velocity = self.network(
                x, 1000 * sigma.flatten().to(device), context, torch.zeros(BATCH, POOLED_WIDTH, device=device)
            )
        return (velocity.float() - (noise - x0).to(device)).square().mean()


@app.command()
def train(
    file: Annotated[Path, typer.Argument(help="Weights to write, for the host's Load Diffusion Model.")],
    comfyui: Annotated[Path, typer.Option(help="A ComfyUI checkout.")] = Path("~/comfy/ComfyUI"),
    images: Annotated[int, typer.Option(help="Scenes to train on.")] = 320_000,
    seed: Annotated[int, typer.Option(help="Of the weights and the scenes.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Train the transformer; a checkpoint beside the file is continued."""
    open_comfy(comfyui, device)
    said = 0.0

    def progress(done: int, total: int, loss: float, rate: float) -> None:
        nonlocal said
        if time.monotonic() - said > 20:
            said = time.monotonic()
            left = (total - done) / rate / 60
            print(f"{done} of {total} scenes, loss {loss:.4f}, {rate:.0f} a second, {left:.0f} minutes left", flush=True)

    model, done = fit(
        lambda: SceneDiT().to(device),
        SceneDiT.loss,
        file.with_suffix(".checkpoint"),
        images=images,
        seed=seed,
        learning_rate=LEARNING_RATE,
        warmup_images=WARMUP_IMAGES,
        progress=progress,
    )
    weights = {name: value.half().cpu().contiguous() for name, value in model.network.state_dict().items()}
    tokens = {TOKEN_TABLE: model.tokens.weight.detach().half().cpu()}
    for path, tensors in ((file, weights), (tokens_file(file), tokens)):
        with replace_file(path) as temporary:
            save_file(tensors, temporary, metadata={"images": str(done), "seed": str(seed)})


def tokens_file(file: Path) -> Path:
    """Return where the caption tokens of a weights file are; the host's loader would warn of them in the file itself."""
    return file.with_suffix(".tokens.safetensors")


def scene_model(file: Path) -> SceneModel:
    """Return the model of a weights file, by the host's own loader, with the caption tokens beside the file.

    Raises:
        FlexiError: a file is missing.
    """
    import comfy.sd

    for path in (file, tokens_file(file)):
        if not path.is_file():
            raise FlexiError(f"{path}: no such file; `python benchmarks/scene_dit.py train {file}` writes it")
    table = load_file(tokens_file(file))[TOKEN_TABLE].float()
    pooled = torch.zeros(1, POOLED_WIDTH)

    def conditioning(captions: Sequence[Caption]) -> list:
        return [[embed_captions(table, captions), {"pooled_output": pooled}]]

    return SceneModel("scene DiT", comfy.sd.load_diffusion_model(str(file)), LATENT_SHAPE, conditioning, decode)


@app.command()
def draw_samples(
    file: Annotated[Path, typer.Argument(help="Weights that train wrote.")],
    picture: Annotated[Path, typer.Argument(help="PNG to write: rows of samples.")],
    comfyui: Annotated[Path, typer.Option(help="A ComfyUI checkout.")] = Path("~/comfy/ComfyUI"),
    cfg: Annotated[float, typer.Option(help="Guidance scale.")] = DEFAULT_CFG,
    steps: Annotated[int, typer.Option(help="Euler steps.")] = 50,
    samples: Annotated[int, typer.Option(min=1, help="To draw and to read.")] = 48,
) -> None:
    """Show what the network draws, and how many of the attributes are right."""
    open_comfy(comfyui)
    backend = SceneBackend(scene_model(file), TeacherSettings("euler", SCHEDULER, steps, cfg))
    latents = backend.teacher(JUDGE_SEEDS, samples)
    right = backend.read(latents, JUDGE_SEEDS).double()
    print(f"{samples} samples, {steps} Euler steps, cfg {cfg:g}: right attributes {right.mean():.1%}, of them")
    for name, share in zip(ATTRIBUTES, right.mean(dim=0), strict=True):
        print(f"  {name}: {share:.1%}")
    print(f"every attribute of a picture: {right.prod(dim=1).mean():.1%}")
    rows = [row for row in backend.pictures(latents).split(12) if len(row) == min(samples, 12)]
    save_image_rows(picture, [(f"samples from {12 * i + 1}", row) for i, row in enumerate(rows)])


if __name__ == "__main__":
    try:
        app()
    except FlexiError as error:
        sys.exit(str(error))
