"""The training loop of the small models: AdamW, averaged weights, a checkpoint that is continued."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..files import replace_file

BATCH = 32
COOLDOWN = 0.35  # last share of the images, over which the learning rate falls to zero
_AVERAGED = 16 * BATCH  # images over which the averaged weights forget early in the training
_SAVE_S = 60

Model = TypeVar("Model", bound=nn.Module)
Progress = Callable[[int, int, float, float], None]  # images done, images in all, loss, images per second


def fit(
    make: Callable[[], Model],
    loss: Callable[[Model, torch.Generator], torch.Tensor],
    checkpoint: Path,
    *,
    images: int,
    seed: int,
    learning_rate: float,
    warmup_images: int,
    progress: Progress,
) -> tuple[Model, int]:
    """Train a model to `images` images; return its averaged weights as a model, and the images that they saw.

    A checkpoint is continued; a larger or smaller `images` than before moves the cooldown.

    Args:
        make: returns a fresh model.
        loss: of a model on a batch of `BATCH` images drawn with the generator.
        checkpoint: file to go on from and to write once a minute.
        images: to train on, in all.
        seed: of the weights and the images.
        learning_rate: its highest value.
        warmup_images: over which it rises.
        progress: called now and then.
    """
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    model, ema = make(), make().requires_grad_(False)
    ema.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    done = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for part, name in ((model, "model"), (ema, "ema"), (optimizer, "optimizer")):
            part.load_state_dict(state[name])
        rng.set_state(state["rng"])
        done = state["images"]

    def save() -> None:
        state = {"images": done, "model": model.state_dict(), "ema": ema.state_dict(), "rng": rng.get_state()}
        with replace_file(checkpoint) as temporary:
            torch.save(state | {"optimizer": optimizer.state_dict()}, temporary)

    began, at_start, saved, running = time.monotonic(), done, time.monotonic(), 1.0
    while done < images:
        left = (images - done) / (COOLDOWN * images)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (done + BATCH) / warmup_images, left)
        optimizer.zero_grad(set_to_none=True)
        # The fused CPU attention's backward is several times slower than plain matrix products at 64 tokens.
        with sdpa_kernel(SDPBackend.MATH):
            value = loss(model, rng)
            value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done += BATCH
        _average(ema, model, max(0.0005, _AVERAGED / (done + _AVERAGED)))
        running = 0.98 * running + 0.02 * value.item()
        if time.monotonic() - saved > _SAVE_S:
            save()
            saved = time.monotonic()
        if done % (BATCH * 20) == 0:
            progress(done, images, running, (done - at_start) / (time.monotonic() - began))
    save()
    return ema, done


@torch.no_grad()
def _average(ema: nn.Module, model: nn.Module, share: float) -> None:
    for averaged, value in zip(ema.parameters(), model.parameters(), strict=True):
        averaged.lerp_(value, share)
