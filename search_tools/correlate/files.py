"""The files of `flexi correlate`: table, candidates and scatter plots."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

from flexi_core.files import replace_file

from .agreement import Agreement, Correlation

_QUESTION = "Whether cheap fitnesses rank schedules as true FID does"


def save_correlation(folder: Path, found: Correlation, title: str) -> list[Path]:
    """Write correlate.md, correlate.csv and correlate.png; return their paths."""
    paths = [folder / f"correlate{suffix}" for suffix in (".md", ".csv", ".png")]
    cost = f"True FID costs {found.fid_macs / 1e9:.1f} GMACs for each candidate, the mean."
    _write(paths[0], f"# {_QUESTION}\n\n{title}\n\n{markdown(found)}\n{cost}\n")
    _write(paths[1], _csv(found))
    _save_scatter(paths[2], found, title)
    return paths


def markdown(found: Correlation) -> str:
    """Return the table of agreements: tau with its 95 % interval, and what one candidate costs against true FID."""
    lines = ["| fitness | samples | tau (95 %) | within budgets (95 %) | MACs against true FID |", "|-|-|-|-|-|"]
    for row in [*found.agreements, found.halves]:
        lines.append(
            f"| {row.fitness} | {row.samples or ''} | {interval(row.tau, row.low, row.high)} "
            f"| {interval(row.tau_within, row.low_within, row.high_within)} | {share(row, found)} |"
        )
    return "\n".join(lines) + "\n"


def interval(value: float, low: float, high: float) -> str:
    """Return a tau with its interval as text."""
    return "" if math.isnan(value) else f"{value:.2f} ({low:.2f} to {high:.2f})"


def share(row: Agreement, found: Correlation) -> str:
    """Return what one candidate costs of what true FID costs, the teacher's samples shared among the candidates."""
    return f"{(row.macs + row.teacher_macs / len(found.candidates)) / found.fid_macs:.1%}"


def _csv(found: Correlation) -> str:
    text = io.StringIO()
    rows = found.as_dict()["candidates"]
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows)
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _save_scatter(path: Path, found: Correlation, title: str) -> None:
    """Draw true FID over each fitness at its fewest and its most samples, a colour for each budget."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    names = list(dict.fromkeys(row.fitness for row in found.agreements if row.samples))
    counts = sorted({row.samples for row in found.agreements if row.samples})
    rows = {(row.fitness, row.samples): row for row in found.agreements}
    panels = [[(name, n) for name in names] for n in dict.fromkeys((counts[0], counts[-1]))]
    panels[0].append(("cost alone", 0))
    lines, columns = len(panels), len(panels[0])
    figure, axes = pyplot.subplots(lines, columns, figsize=(3.2 * columns, 2.9 * lines), squeeze=False, layout="constrained")
    for axis, key in ((axes[i, j], key) for i, line in enumerate(panels) for j, key in enumerate(line)):
        name, samples = key
        shown = -1 if name in ("PSNR", "cost alone") else 1  # these are better where they are higher, kept with a minus
        points = axis.scatter(
            [shown * c.fitness[key] for c in found.candidates],
            [c.fid for c in found.candidates],
            c=[c.speedup for c in found.candidates],
            s=18, cmap="viridis",
        )  # fmt: skip
        axis.set_yscale("log")
        if name in ("latent MSE", "rFID"):
            axis.set_xscale("log")
        else:
            axis.xaxis.set_major_locator(MaxNLocator(5))
        label = {"PSNR": "PSNR, dB", "cost alone": "cost, full steps"}.get(name, name)
        axis.set_xlabel(label + (f", {samples} samples" if samples else ""), fontsize=8)
        axis.set_title(f"tau {interval(rows[key].tau, rows[key].low, rows[key].high)}", fontsize=8)
        axis.tick_params(labelsize=7, which="both")
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel(f"true FID, {found.fid_samples} samples", fontsize=8)
    for axis in axes[1:, -1]:
        axis.axis("off")
    figure.colorbar(points, ax=axes, label="budget: speed-up in MACs", shrink=0.6, aspect=30)
    figure.suptitle(title, fontsize=9)
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)
