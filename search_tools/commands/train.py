"""`flexi train-demo`: the embedded model and its classifier anew."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import console
from .options import Json, Seed


@console.one_line_errors
def train_demo(
    folder: Annotated[Path, typer.Option(help="Where checkpoint and weights go; a checkpoint in it is continued.")] = Path(
        "flexi_training"
    ),
    images: Annotated[int, typer.Option(min=64, help="Scenes to train the U-Net on.")] = 150_000,
    classifier_images: Annotated[int, typer.Option(min=256, help="Scenes to train the classifier on.")] = 307_200,
    seed: Seed = 1,
    as_json: Json = False,
) -> None:
    """Train the embedded model and its classifier anew, from procedural scenes, and judge them as they were accepted."""
    from flexi_core.demo.train import accept, train_classifier, train_unet

    console.make_folder(folder)
    with console.progress_bar("scenes") as bar:
        files = [
            train_classifier(folder, images=classifier_images, seed=seed, progress=lambda *a: bar("classifier", *a[:2])),
            train_unet(folder, images=images, seed=seed, progress=lambda *a: bar(f"U-Net, loss {a[2]:.4f}", *a[:2])),
        ]
    with console.progress_bar("samples") as bar:
        accepted = accept(*files, progress=bar)
    if as_json:
        console.print_json({"files": [str(f) for f in files], **accepted})
        return
    for key, value in accepted.items():
        console.out.print(f"{key:<28} {value:.4f}", highlight=False)
    console.out.print(f"written    {', '.join(map(str, files))}", highlight=False)
