"""Pictures of a search: image rows of teacher and candidate, and the Pareto plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from einops import rearrange

from flexi_core.files import replace_file

from .judge import Row
from .study import Candidate


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
    _save(figure, path)


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
    _save(figure, path)


def _front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other beats in both coordinates, from left to right."""
    return sorted(p for p in points if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points))


def _save(figure, path: Path) -> None:
    from matplotlib import pyplot

    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=140, format=path.suffix.lstrip("."))
    pyplot.close(figure)
