"""Train the embedded model, from checkpoints, and its classifier on fresh procedural scenes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..runtime.sampling import make_noise, sample, sigmas_normal
from ..runtime.unet import UNet
from ..schedule.presets import all_full
from ..tensor_files import save_tensors
from .captions import TABLE_ROWS, token_rows
from .classifier import SceneClassifier, load_classifier
from .model import BETA_SCHEDULE, DEFAULT_CFG, TOKEN_TABLE, DemoModel, training_sigmas
from .scenes import ATTRIBUTES, FREE, captions_of, random_attributes, render
from .trainer import BATCH, Progress, fit

# 64 channels at the least: the layout normalises in 32 groups, and a group of one channel is blind to the picture's mean.
UNET_CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 64,
    "channel_mult": [1, 1, 2],
    "num_res_blocks": [1, 1, 1],
    "transformer_depth": [0, 0, 1],
    "transformer_depth_output": [0, 0, 0, 0, 1, 1],
    "transformer_depth_middle": 1,
    "num_head_channels": 32,
    "context_dim": 64,
    "use_scale_shift_norm": True,
}
METADATA = {"unet_config": json.dumps(UNET_CONFIG), "prediction": "eps", "beta_schedule": BETA_SCHEDULE}

LEARNING_RATE = 1.0e-3
WARMUP_IMAGES = 20_000
DROP_ALL = 0.10  # captions dropped whole, for classifier-free guidance (Ho and Salimans, 2021)
DROP_ONE = 0.08  # and each part alone, so that a part may be left out
SIGMA_DATA = 0.6  # of the scenes; sets the weight of Karras et al. (2022), Table 1
MAX_WEIGHT = 100.0
NOISE_SPREAD = 0.15  # standard deviation of the log of the noise's size

JUDGE_SEED = 2_000_000  # far from the seeds of training, search and evaluation


class _Trainee(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet(**UNET_CONFIG)
        self.tokens = nn.Embedding(TABLE_ROWS, UNET_CONFIG["context_dim"])


def train_unet(folder: Path, *, images: int, seed: int, progress: Progress) -> Path:
    """Train the U-Net to `images` scenes and write `folder/unet.safetensors` (fp16, the averaged weights).

    A checkpoint in `folder` is continued; a larger or smaller `images` than before moves the cooldown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = training_sigmas(BETA_SCHEDULE)
    model, done = fit(
        _Trainee,
        lambda trainee, rng: _unet_loss(trainee, table, rng),
        folder / "unet.checkpoint",
        images=images,
        seed=seed,
        learning_rate=LEARNING_RATE,
        warmup_images=WARMUP_IMAGES,
        progress=progress,
    )
    weights = {name: value.half().contiguous() for name, value in model.unet.state_dict().items()}
    weights[TOKEN_TABLE] = model.tokens.weight.detach().half()
    path = folder / "unet.safetensors"
    save_tensors(weights, path, METADATA | {"images": str(done), "seed": str(seed)})
    return path


def train_classifier(folder: Path, *, images: int, seed: int, progress: Progress) -> Path:
    """Train the scene classifier and write `folder/classifier.safetensors` (fp16)."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    model = SceneClassifier()
    steps = math.ceil(images / 256)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    began = time.monotonic()
    for step in range(steps):
        attributes = random_attributes(256, rng)
        scenes = render(attributes, rng)
        # A little noise, so that a sample's last imperfections do not decide what is read in it.
        scenes = scenes + torch.rand(256, 1, 1, 1, generator=rng) * 0.12 * torch.randn(scenes.shape, generator=rng)
        logits = model(scenes)
        loss = sum(F.cross_entropy(logits[name], attributes[:, i]) for i, name in enumerate(ATTRIBUTES))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 10 == 0:
            done = (step + 1) * 256
            progress(done, steps * 256, loss.item(), done / (time.monotonic() - began))
    path = folder / "classifier.safetensors"
    save_tensors({name: value.half() for name, value in model.state_dict().items()}, path)
    return path


def draw_scenes(rows: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return fresh scenes [rows, 3, 32, 32], and rows of the token table [rows, 5] for their captions, dropped now and then."""
    attributes = random_attributes(rows, rng)
    x0 = render(attributes, rng)
    drop = torch.rand(rows, 5, generator=rng) < DROP_ONE
    drop |= torch.rand(rows, 1, generator=rng) < DROP_ALL
    return x0, token_rows(attributes.masked_fill(drop, FREE))


def loss_weight(sigma: torch.Tensor) -> torch.Tensor:
    """Return the weight of an error of eps at noise levels.

    The layout is decided at high noise, where an error of eps is small and the picture's error it stands for is not.
    """
    return ((sigma**2 + SIGMA_DATA**2) / SIGMA_DATA**2).clamp(max=MAX_WEIGHT)


def _unet_loss(model: _Trainee, table: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    x0, rows = draw_scenes(BATCH, rng)
    context = model.tokens(rows)
    # Stratified timesteps: the same marginal as uniform ones, less variance from batch to batch.
    t = ((torch.arange(BATCH) + torch.rand(BATCH, generator=rng)) * (1000 / BATCH)).long()
    sigma = table[t].view(-1, 1, 1, 1)
    # A sample's noise is never of exactly unit size, and normalisation hides its size from the network: what is not removed
    # at high noise stays in the picture. Noise of varied size makes the network measure it.
    spread = (NOISE_SPREAD * torch.randn(BATCH, 1, 1, 1, generator=rng)).exp()
    noise = spread * torch.randn(x0.shape, generator=rng)
    x = (x0 + sigma * noise) / (sigma**2 + 1).sqrt()
    with torch.autocast("cpu", torch.bfloat16):
        eps = model.unet(x, t, context)
    return (loss_weight(sigma) * (eps.float() - noise).square()).mean()


def accept(
    classifier: Path, unet: Path, *, samples: int = 512, progress: Callable[[str, int, int], None] = lambda *a: None
) -> dict[str, float]:
    """Judge trained weights as they were accepted.

    Args:
        classifier, unet: weights files.
        samples: of the teacher: 50 Euler steps at the default guidance, each with a full caption.
        progress: called with a name, the work done and the work in all.

    Returns:
        the classifier's lowest accuracy over the attributes on 10,000 real scenes; the samples' accuracy for each attribute,
        and the share of samples in which every attribute is right.
    """
    judge, model = load_classifier(classifier), DemoModel.load(unet)
    rng = torch.Generator().manual_seed(JUDGE_SEED)
    attributes = random_attributes(10_000, rng)
    right = torch.cat([judge.predict(render(part, rng)) == part for part in attributes.split(500)])
    found = {"classifier, worst attribute": float(right.double().mean(0).min())}
    attributes = random_attributes(samples, rng)
    captions, noise, sigmas = captions_of(attributes), make_noise(JUDGE_SEED, samples), sigmas_normal(model, 50)
    right = []
    for at in range(0, samples, 16):
        rows = slice(at, at + 16)
        images, _ = sample(model, all_full(50), sigmas, noise[rows], captions[rows], cfg=DEFAULT_CFG)
        right.append(judge.predict(images) == attributes[rows])
        progress("teacher", min(at + 16, samples), samples)
    right = torch.cat(right)
    found |= {f"samples, {name}": float(right[:, i].double().mean()) for i, name in enumerate(ATTRIBUTES)}
    return found | {"samples, every attribute": float(right.all(dim=1).double().mean())}
