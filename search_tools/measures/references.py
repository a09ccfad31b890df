"""Images that a run is compared with beside its own teacher's: fresh procedural scenes, or a folder of pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from flexi_core.demo.scenes import random_attributes, render
from flexi_core.errors import FlexiError

SCENES = "scenes"  # in place of a folder: fresh scenes of the embedded model's own kind
SCENE_SEED = 40_000_000
SUFFIXES = (".png", ".jpg", ".jpeg")
_BATCH = 256


def scenes(count: int, seed: int = SCENE_SEED) -> torch.Tensor:
    """Return fresh procedural scenes [count, 3, 32, 32], -1..1, captions drawn as the embedded model's are."""
    generator = torch.Generator().manual_seed(seed)
    parts = [min(_BATCH, count - at) for at in range(0, count, _BATCH)]
    return torch.cat([render(random_attributes(part, generator), generator) for part in parts])


def folder_images(folder: Path, height: int, width: int, most: int | None = None) -> torch.Tensor:
    """Return the pictures of a folder [N, 3, height, width], -1..1, in the order of their names.

    A picture of another shape is cropped in its middle to the shape asked for, then resized (Lanczos). No more than `most`
    are read, the first ones.

    Raises:
        FlexiError: the folder has fewer than two pictures, or one cannot be read.
    """
    if not folder.is_dir():
        raise FlexiError(f"{folder}: no such folder; give a folder of {', '.join(SUFFIXES)} files")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if len(files) < 2:
        raise FlexiError(f"{folder}: {len(files)} pictures ({', '.join(SUFFIXES)}); a comparison of sets needs at least 2")
    found = []
    for path in files[:most]:
        try:
            with Image.open(path) as image:
                fitted = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise FlexiError(f"{path}: cannot be read as a picture ({error}); repair it or take it out") from error
        found.append(torch.from_numpy(np.array(fitted, dtype=np.float32)))
    return torch.stack(found).permute(0, 3, 1, 2) / 127.5 - 1


def features_of(features, images: torch.Tensor) -> torch.Tensor:
    """Return the features [N, D] of many images, a batch at a time."""
    return torch.cat([features(batch) for batch in images.split(_BATCH)])
