"""Pictures of a search: images of teacher and candidates, as files and for a page, and the Pareto plot."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from flexi_core.errors import FlexiError
from flexi_core.files import replace_file

from ..measures.judge import Row
from ..study.study import Candidate

_LARGEST_SIDE = 384  # pixels of an embedded picture: no more than a page shows of it


def save_image_rows(path: Path, rows: Sequence[tuple[str, torch.Tensor]], columns: int = 12) -> None:
    """Write one labelled row of images [N, 3, H, W], -1..1, for each entry; sample i stands in column i of every row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(columns, *(len(images) for _, images in rows))
    figure, axes = pyplot.subplots(len(rows), 1, figsize=(columns * 0.9, len(rows) * 1.15), squeeze=False)
    for axis, (label, images) in zip(axes[:, 0], rows, strict=True):
        strip = rearrange(images[:columns].clamp(-1, 1), "n c h w -> h (n w) c")
        axis.imshow(((strip + 1) / 2).numpy(), interpolation="nearest")
        axis.set_title(label, loc="left", fontsize=9)
        axis.axis("off")
    figure.tight_layout(pad=0.4)
    save_figure(figure, path)


def save_pareto(
    path: Path,
    candidates: Sequence[Candidate],
    steps: int,
    rows: Sequence[Row],
    curves: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
) -> None:
    """Write the plot of speed-up in MACs against PSNR: candidates of the search, judged rows, and plain choices as curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 5))
    judged = [c for c in candidates if c.evaluation is not None]
    axis.scatter(
        [steps / c.spent for c in judged],
        [c.evaluation.psnr_db for c in judged],
        s=14, alpha=0.45, color="tab:gray", label="candidates (search samples)",
    )  # fmt: skip
    for (label, points), style in zip(curves.items(), ("--", "-"), strict=False):
        axis.plot(*zip(*points, strict=True), style, marker=".", linewidth=1, label=label)
    finite = [row for row in rows if row.psnr_db != float("inf")]
    for row in finite:
        searched = row.name.startswith("searched")
        axis.errorbar(
            row.speedup_macs, row.psnr_db,
            yerr=[[max(row.psnr_db - row.psnr_low, 0)], [max(row.psnr_high - row.psnr_db, 0)]],
            fmt="*" if searched else "o", markersize=13 if searched else 6, capsize=3, label=row.name,
        )  # fmt: skip
    front = _front([(row.speedup_macs, row.psnr_db) for row in finite] + [p for points in curves.values() for p in points])
    axis.step(*zip(*front, strict=True), where="pre", color="black", linewidth=0.6, alpha=0.5, label="Pareto front")
    axis.set_xlabel("speed-up in MACs over the teacher")
    axis.set_ylabel("PSNR to the teacher, dB")
    axis.set_title(title)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    save_figure(figure, path)


def save_similarity(path: Path, similarity: np.ndarray, sigmas: Sequence[float], starts: Sequence[int], title: str) -> None:
    """Write how alike noise levels are [L, L], with lines where stages begin.

    Args:
        path: .png or .svg.
        similarity: 0..1.
        sigmas: of the levels [L], falling.
        starts: the index at which each stage but the first begins.
        title: above it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.4, 5.6))
    shown = axis.imshow(similarity, vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    for start in starts:
        axis.axhline(start - 0.5, color="white", linewidth=1.5)
        axis.axvline(start - 0.5, color="white", linewidth=1.5)
    ticks = sorted({*range(0, len(sigmas), max(1, len(sigmas) // 8)), len(sigmas) - 1})
    labels = [f"{sigmas[i]:.2g}" for i in ticks]
    axis.set_xticks(ticks, labels, fontsize=8)
    axis.set_yticks(ticks, labels, fontsize=8)
    axis.set_xlabel("sigma")
    axis.set_ylabel("sigma")
    axis.set_title(title, fontsize=9)
    figure.colorbar(shown, label="share of values alike")
    figure.tight_layout()
    save_figure(figure, path)


def visible(teacher: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
    """Return pictures that can be looked at [N, 3, H, W], 0..1: the teacher's, then those that are compared with them.

    Three channels are colours. Others are latents: shown are the first three principal components of the teacher's, between
    the teacher's own 1st and 99th percentile, so that all of them can be compared.

    Args:
        teacher: [N, C, H, W], -1..1 where C is 3.
        others: the same, made by candidates.

    Raises:
        FlexiError: they have another number of dimensions.
    """
    if teacher.dim() != 4:
        raise FlexiError(f"samples of shape {list(teacher.shape)} cannot be shown as pictures; expected [N, C, H, W]")
    if teacher.shape[1] == 3:
        return [((pictures.float().clamp(-1, 1) + 1) / 2).cpu() for pictures in (teacher, *others)]
    values = rearrange(teacher.double().cpu(), "n c h w -> (n h w) c")
    mean = values.mean(dim=0)
    components = torch.linalg.eigh((values - mean).T @ (values - mean)).eigenvectors.flip(1)[:, :3]
    # A direction's sign is arbitrary: that of its largest part is made positive.
    components = components * components.gather(0, components.abs().argmax(dim=0, keepdim=True)).sign()
    projected = ((values - mean) @ components).sort(dim=0).values
    low, high = (projected[round(share * (len(projected) - 1))] for share in (0.01, 0.99))

    def shown(pictures: torch.Tensor) -> torch.Tensor:
        flat = rearrange(pictures.double().cpu(), "n c h w -> n h w c")
        scaled = (((flat - mean) @ components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        grey = scaled[..., :1].expand(*scaled.shape[:-1], 3 - scaled.shape[-1])  # fewer channels than colours
        return rearrange(torch.cat([scaled, grey], dim=-1), "n h w c -> n c h w").float()

    return [shown(pictures) for pictures in (teacher, *others)]


def png_uri(picture: torch.Tensor) -> str:
    """Return a picture [3, H, W], 0..1, as the data URI of a PNG; a large one is made smaller."""
    image = Image.fromarray((rearrange(picture, "c h w -> h w c") * 255).round().byte().numpy())
    image.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other beats in both coordinates, from left to right."""
    return sorted(p for p in points if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points))


def save_figure(figure, path: Path) -> None:
    """Write a figure of matplotlib whole or not at all."""
    from matplotlib import pyplot

    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=140, format=path.suffix.lstrip("."))
    pyplot.close(figure)
