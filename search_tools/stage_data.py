"""What stage models are trained on: scenes, a folder of pictures or latents, a folder with a sub-folder for each class."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from flexi_core.demo.model import DemoModel
from flexi_core.demo.scenes import IMAGE_SIZE
from flexi_core.demo.train import NOISE_SPREAD, draw_scenes, loss_weight
from flexi_core.errors import FlexiError
from flexi_core.runtime.file_model import FileModel
from flexi_core.stages.training import Draw, Objective

from .measures.references import SCENES
from .noise_stages import data_of

_DROP = 0.1  # of classes, for classifier-free guidance (Ho and Salimans, 2021)


def objective_of(base: DemoModel | FileModel) -> Objective:
    """Return what a base is trained on with: as the embedded model was, or as published."""
    if isinstance(base, DemoModel):
        return Objective(base.prediction, NOISE_SPREAD, loss_weight)
    return Objective(base.prediction)


def draw_of(base: DemoModel | FileModel, source: str, count: int, seed: int) -> Draw:
    """Return what draws the data of a base.

    Args:
        base: that is trained.
        source: `scenes`, or a folder: of pictures or latents, or of a sub-folder of them for each class of the base, in the
            order of their names.
        count: most data of a folder, or of each sub-folder; scenes that are not the embedded model's own size.
        seed: of scenes.

    Raises:
        FlexiError: the data do not fit the base.
    """
    if isinstance(base, DemoModel):
        if source != SCENES:
            raise FlexiError(
                "the embedded model is conditioned on captions, which a folder has none of; give --unet or --scratch, or scenes"
            )

        def of_captions(rows: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
            x0, tokens = draw_scenes(rows, rng)
            return x0, base.token_table[tokens]

        return of_captions
    data, labels = _labelled(base, source, count, seed)

    def of_data(rows: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor | None]:
        at = torch.randint(len(data), (rows,), generator=rng)
        if labels is None:
            return data[at], None
        dropped = torch.rand(rows, generator=rng) < _DROP
        return data[at], base.class_table[labels[at].masked_fill(dropped, base.classes)][:, None]

    return of_data


def scenes_of(count: int, size: int, seed: int) -> torch.Tensor:
    """Return scenes [count, 3, size, size], each pixel the mean of those that it covers.

    Raises:
        FlexiError: the size does not divide the scenes' own.
    """
    if IMAGE_SIZE % size:
        raise FlexiError(f"scenes have {IMAGE_SIZE} pixels a side, which {size} does not divide; give 4, 8, 16 or 32")
    return F.avg_pool2d(data_of(SCENES, count, (IMAGE_SIZE, IMAGE_SIZE), seed), IMAGE_SIZE // size)


def _labelled(base: FileModel, source: str, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return data [N, C, H, W] and their classes [N], where the base has some."""
    size = base.latent_shape[1:]
    if not base.classes:
        square = source == SCENES and size[0] == size[1]
        data = scenes_of(count, size[0], seed) if square else data_of(source, count, size, seed)
        return _fitting(base, source, data), None
    folders = sorted(path for path in Path(source).iterdir() if path.is_dir()) if Path(source).is_dir() else []
    if len(folders) != base.classes:
        raise FlexiError(
            f"{base.path} knows {base.classes} classes, {source} has {len(folders)} sub-folders; give one with as many"
        )
    parts = [_fitting(base, str(path), data_of(str(path), count, size, seed)) for path in folders]
    return torch.cat(parts), torch.cat([torch.full((len(part),), i) for i, part in enumerate(parts)])


def _fitting(base: FileModel, source: str, data: torch.Tensor) -> torch.Tensor:
    if tuple(data.shape[1:]) != tuple(base.latent_shape):
        raise FlexiError(
            f"{source} has data of shape {list(data.shape[1:])}, the network takes {list(base.latent_shape)}; give data, or a "
            "network, of the other's shape"
        )
    return data
