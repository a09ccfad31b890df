"""What a training of stages leaves: a stage file, and a file of the base where its encoder trained."""

from __future__ import annotations

import copy
from pathlib import Path

from ..demo.model import DemoModel
from ..networks.fingerprint import architecture_fingerprint, weights_fingerprint
from ..runtime.file_model import FileModel
from ..runtime.unet import UNet
from .network import save_stages
from .training import StageTrainer

STAGES, BASE = "stages.safetensors", "base.safetensors"


def base_stage(trainer: StageTrainer) -> int | None:
    """Return the stage whose decoder a trained base has: of the base's width, with the most noise levels; None without one."""
    width = trainer.model.unet.model_channels
    fitting = [i for i, each in enumerate(trainer.settings.widths) if each == width]
    return max(fitting, key=lambda i: len(trainer.levels[i]), default=None)


def trained_base(trainer: StageTrainer) -> UNet:
    """Return the U-Net that the trained decoders are for, averaged weights.

    Where the encoder trained, its decoder is that of `base_stage`, or, without one, what the training began with.
    """
    unet = copy.deepcopy(trainer.averaged.unet).cpu()
    stage = base_stage(trainer)
    if trainer.settings.encoder and stage is not None:
        for name, part in copy.deepcopy(trainer.averaged.decoders[stage]).cpu().named_children():
            setattr(unet, name, part)
    return unet.eval()


def write_trained(base: DemoModel | FileModel, trainer: StageTrainer, folder: Path, licence: str) -> list[Path]:
    """Write what was trained, averaged weights; return the files.

    Args:
        base: of the training.
        trainer: after it.
        folder: for the files.
        licence: of them, in words.
    """
    unet, written = trained_base(trainer), [folder / STAGES]
    if trainer.settings.encoder:
        written.append(folder / BASE)
        base.save(folder / BASE, unet, licence=licence, iterations=str(trainer.done))
    decoders = [copy.deepcopy(decoder).cpu() for decoder in trainer.averaged.decoders]
    prints = {"architecture": architecture_fingerprint(unet), "weights": weights_fingerprint(unet)}
    save_stages(folder / STAGES, trainer.settings.stages, decoders, base.unet_config, prints, licence)
    return written
