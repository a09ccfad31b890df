"""`flexi stages`: which noise levels belong together."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexi_core.errors import FlexiError

from .. import console
from .options import Json, Scheduler, Seed, UNetFile

if TYPE_CHECKING:
    from flexi_core.stages.clustering import Predictions

    from ..noise_stages import NoiseLevels

_PUBLISHED = (
    "as published, the sum of the stages' mean similarities is largest with slivers at the ends of the grid; leave out "
    "--published, or give --least"
)


class By(str, Enum):
    """What decides how alike two noise levels are."""

    data = "data"
    network = "network"
    run = "run"


@console.one_line_errors
def stages(
    source: Annotated[str, typer.Argument(help="scenes, or a folder of pictures or latents; with --by data.")] = "scenes",
    by: Annotated[
        By,
        typer.Option(help="The optimal denoiser of data; a network's predictions in its own samples; or along its full runs."),
    ] = By.data,
    unet: UNetFile = None,
    count: Annotated[int, typer.Option("--stages", min=2, help="How many stages.")] = 3,
    levels: Annotated[int, typer.Option(min=2, max=400, help="Noise levels that are compared, even in the model's time.")] = 41,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Pictures that are noised. [default: 96 of data, 8 of a network's own]")
    ] = None,
    data: Annotated[int, typer.Option(min=2, help="Most pictures of the source.")] = 20_000,
    size: Annotated[int, typer.Option(min=1, help="Side to which a folder's pictures are brought.")] = 32,
    flow: Annotated[
        float | None, typer.Option(min=0.01, help="Noise levels of a flow model with this shift. [default: of the U-Net]")
    ] = None,
    published: Annotated[
        bool, typer.Option(help="The objective as published: stages are not weighted by their width.")
    ] = False,
    least: Annotated[int, typer.Option(min=1, help="Levels in a stage.")] = 1,
    thresholds: Annotated[
        tuple[float, float], typer.Option(help="Of the two-threshold form: at low noise, at high noise; with --by data.")
    ] = (0.9, 0.5),
    steps: Annotated[int, typer.Option(min=2, help="Of the run that boundaries are shares of.")] = 20,
    scheduler: Annotated[Scheduler, typer.Option(help="Of that run; a flow model's is simple.")] = Scheduler.normal,
    picture: Annotated[Path | None, typer.Option(help="Picture of the similarities with the cuts, .png or .svg.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Find the noise levels at which one network should give way to another (multi-stage framework, arXiv 2312.09181)."""
    from flexi_core.demo.model import DemoModel
    from flexi_core.runtime.file_model import FileModel
    from flexi_core.stages.clustering import cluster, threshold_boundaries

    from ..noise_stages import NoiseLevels, by_data, by_network, by_run, data_of

    if picture is not None and picture.suffix not in (".png", ".svg"):
        raise FlexiError(f"--picture is {picture}; expected a name that ends in .png or .svg")
    if flow is not None and by is not By.data:
        raise FlexiError("--flow goes with --by data: the networks here are no flow models")
    model = FileModel.load(unet) if unet else DemoModel.load()
    noise = NoiseLevels(model.sigmas) if flow is None else NoiseLevels(shift=flow)
    if by is By.data:
        found = by_data(data_of(source, data, (size, size), seed), noise, levels, samples or 96, seed)
    else:
        found = (by_network if by is By.network else by_run)(model, levels, samples or 8, seed)
    similarity = found.similarity()
    clusters = cluster(similarity, found.sigmas, count, not published, least)
    rows = [_row("levels most alike", level, noise, scheduler.value, steps) for level in clusters.boundaries]
    if by is By.data:
        for name, level in zip(
            ("as from the mean above", "recognised below"), threshold_boundaries(found, thresholds[::-1]), strict=True
        ):
            rows.append(_row(name, level, noise, scheduler.value, steps))
    if picture is not None:
        from ..report.pictures import save_similarity

        own = [noise.counted(level)[0] for level in found.sigmas]
        save_similarity(picture, similarity, own, clusters.starts, _title(by, source, found))
    result = {
        "by": by.value,
        "stages": count,
        "boundaries": [row for row in rows if row["by"] == "levels most alike"],
        "thresholds": [row for row in rows if row["by"] != "levels most alike"],
        "score": clusters.score,
        "sigmas": [noise.counted(level)[0] for level in found.sigmas],
        "similarity": similarity.tolist(),
    }
    if as_json:
        console.print_json(result)
        return
    cells = [
        [row["by"], *(["not within the levels"] if row["sigma"] is None else _cells(row)), *[""] * (3 * (row["sigma"] is None))]
        for row in rows
    ]
    headings = ["", "sigma", "timestep", "of the run", "after step"]
    console.print_columns(headings, cells, f"{count} stages: {_title(by, source, found)}; {steps} steps, {scheduler.value}")
    widths = [stop - start for start, stop in zip((0, *clusters.starts), (*clusters.starts, levels), strict=True)]
    if published and min(widths) == 1:
        console.err.print(f"flexi: {_PUBLISHED}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def _title(by: By, source: str, found: Predictions) -> str:
    of = {By.data: f"optimal denoiser of {source}", By.network: "the network's own predictions", By.run: "full runs"}[by]
    return f"{of}, {len(found.sigmas)} levels, {found.eps.shape[1]} samples"


def _row(by: str, level: float | None, noise: NoiseLevels, scheduler: str, steps: int) -> dict[str, Any]:
    """Return a boundary as the model's sigma, as a share of its time, and in steps of a run."""
    if level is None:
        return {"by": by, "sigma": None, "timestep": None, "steps": None, "share": None}
    sigma, timestep = noise.counted(level)
    above = sum(start > level for start in noise.run(scheduler, steps))
    return {"by": by, "sigma": sigma, "timestep": timestep, "steps": above, "share": above / steps}


def _cells(row: dict[str, Any]) -> list[str]:
    return [f"{row['sigma']:.4g}", f"{row['timestep']:.3f}", f"{row['share']:.2f}", str(row["steps"])]
