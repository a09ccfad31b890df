"""The final check on a U-Net that the project was not tuned on: trained here, searched, judged on unseen seeds.

    python benchmarks/held_back.py train FILE.safetensors     # about 20 minutes on one core; goes on where it was stopped
    python benchmarks/held_back.py measure FILE.safetensors   # a 10-minute search, then the table
    python benchmarks/held_back.py measure FILE.safetensors --comfyui ~/comfy/ComfyUI   # the same through the host
    python benchmarks/held_back.py draw-samples FILE.safetensors PICTURE.png

The network has another layout, size, data, conditioning and prediction than the embedded one: 12x16x16 latents of
`emblems`, two levels, residual blocks without scale, v prediction, one token for a class.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from emblems import CLASSES, LATENT_SHAPE, draw, fold, unfold
from safetensors.torch import save_file
from torch import nn

from flexi_core import FlexiError, save_schedule
from flexi_core.demo.model import training_sigmas
from flexi_core.demo.trainer import BATCH, fit
from flexi_core.files import replace_file
from flexi_core.runtime.unet import UNet
from search_tools.backends.protocol import Backend
from search_tools.backends.teacher import JUDGE_SEEDS
from search_tools.commands.options import open_chosen_backend
from search_tools.commands.running import run
from search_tools.deadline import Deadline
from search_tools.measures.judge import Judge, Row, baselines
from search_tools.report.pictures import save_image_rows
from search_tools.settings import SearchSettings
from search_tools.study.study import with_results

RESULTS = Path(__file__).parents[1] / "docs" / "results"
UNET_CONFIG = {
    "image_size": LATENT_SHAPE[1],
    "in_channels": LATENT_SHAPE[0],
    "out_channels": LATENT_SHAPE[0],
    "model_channels": 64,
    "channel_mult": [1, 2],
    "num_res_blocks": [2, 1],
    "transformer_depth": [0, 0, 1],
    "transformer_depth_output": [0, 0, 0, 0, 1],
    "transformer_depth_middle": 1,
    "num_heads": 4,
    "context_dim": 48,
    "use_scale_shift_norm": False,
    "use_linear_in_transformer": True,
}
BETA_SCHEDULE = "linear 0.00085 0.012"
METADATA = {"unet_config": json.dumps(UNET_CONFIG), "prediction": "v", "beta_schedule": BETA_SCHEDULE}
LEARNING_RATE = 1.0e-3
WARMUP_IMAGES = 10_000
DROP_CLASS = 0.12  # for classifier-free guidance

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


class _Trainee(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet(**{name: value for name, value in UNET_CONFIG.items() if name != "image_size"})
        self.classes = nn.Embedding(len(CLASSES) + 1, UNET_CONFIG["context_dim"])

    def loss(self, sigmas: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        """Return the mean squared error of v on a fresh batch (Salimans and Ho, 2022)."""
        labels = torch.randint(len(CLASSES), (BATCH,), generator=rng)
        x0 = unfold(draw(labels, rng))
        labels = torch.where(torch.rand(BATCH, generator=rng) < DROP_CLASS, len(CLASSES), labels)
        t = ((torch.arange(BATCH) + torch.rand(BATCH, generator=rng)) * (1000 / BATCH)).long()
        sigma = sigmas[t].view(-1, 1, 1, 1)
        noise, size = torch.randn(x0.shape, generator=rng), (sigma**2 + 1).sqrt()
        with torch.autocast("cpu", torch.bfloat16):
            v = self.unet((x0 + sigma * noise) / size, t, self.classes(labels)[:, None])
        return (v.float() - (noise - sigma * x0) / size).square().mean()


@app.command()
def train(
    file: Annotated[Path, typer.Argument(help="Weights to write, in the format of flexi search --unet.")],
    images: Annotated[int, typer.Option(help="Pictures to train on.")] = 110_000,
    seed: Annotated[int, typer.Option(help="Of the weights and the pictures.")] = 0,
) -> None:
    """Train the U-Net; a checkpoint beside the file is continued."""
    sigmas = training_sigmas(BETA_SCHEDULE)

    def progress(done: int, total: int, loss: float, rate: float) -> None:
        if done % (BATCH * 100) == 0:
            print(f"{done} of {total} pictures, loss {loss:.4f}", flush=True)

    model, done = fit(
        _Trainee,
        lambda trainee, rng: trainee.loss(sigmas, rng),
        file.with_suffix(".checkpoint"),
        images=images,
        seed=seed,
        learning_rate=LEARNING_RATE,
        warmup_images=WARMUP_IMAGES,
        progress=progress,
    )
    weights = {name: value.half().contiguous() for name, value in model.unet.state_dict().items()}
    weights["class_embedding.weight"] = model.classes.weight.detach().half()
    with replace_file(file) as temporary:
        save_file(weights, temporary, metadata=METADATA | {"images": str(done), "seed": str(seed)})
    print(f"written {file}: {file.stat().st_size / 1e6:.1f} MB")


@app.command()
def measure(
    file: Annotated[Path, typer.Argument(help="Weights that train wrote.")],
    minutes: Annotated[float, typer.Option(help="Of the search.")] = 10.0,
    speedup: Annotated[float, typer.Option(help="In MACs, of everything but the teacher.")] = 4.0,
    cfg: Annotated[float, typer.Option(help="Guidance scale of the teacher.")] = 2.5,
    samples: Annotated[int, typer.Option(help="Unseen ones, to judge on.")] = 128,
    search_samples: Annotated[int, typer.Option(help="To search with.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    comfyui: Annotated[Path | None, typer.Option(help="A ComfyUI checkout, to do all of it in the host.")] = None,
    folder: Annotated[Path, typer.Option(help="Where the table and the pictures go.")] = RESULTS,
) -> None:
    """Search at a fraction of the teacher's MACs, judge beside plain choices of the same cost, and write the table."""
    folder.mkdir(parents=True, exist_ok=True)
    where = "held-back" if comfyui is None else "held-back-host"
    if comfyui is None:
        backend = open_chosen_backend("euler", "normal", 50, cfg, unet=file)
    else:
        backend = _in_the_host(comfyui, file.resolve(), cfg)
    wanted = SearchSettings.of(backend, speedup, search_samples, seed=seed)
    began = time.monotonic()
    study, space, result = run(backend, wanted, f"sqlite:///{file.with_name(where + '.db')}", deadline=Deadline(minutes))
    if result.interrupted or result.best is None:
        raise typer.Exit(130)
    seconds = time.monotonic() - began
    judge = Judge(backend, samples, JUDGE_SEEDS)
    searched, pictures = judge.judge("searched", result.best.schedule)
    shown = [("teacher, 50 steps", judge.teacher_pictures), (f"searched, {searched.speedup_macs:.1f}x fewer MACs", pictures)]
    rows = [searched, judge.judge_fewer_steps(space.full_steps)]
    for name, schedule in baselines(space):
        row, pictures = judge.judge(name, schedule)
        rows.append(row)
        shown.append((name, pictures))
    save_schedule(
        with_results(result.best.schedule, backend.identity, searched, samples, study, seed), file.with_name(f"{where}.json")
    )
    save_image_rows(folder / f"{where}_images.png", [(name, fold(images)) for name, images in shown[:4]])
    run_as = f"{backend.settings.steps} euler steps, cfg {cfg:g}"
    searched_in = f"{len(result.candidates)} candidates on {search_samples} samples in {seconds / 60:.1f} minutes"
    text = (
        f"# A model that nothing was tuned on{', in ComfyUI' if comfyui else ''}\n\n"
        f"A U-Net that was not tuned on ({backend.identity['weights']}, v prediction)"
        f"{' through the host' if comfyui else ''}; {run_as}; {searched_in}; "
        f"judged on {samples} unseen seeds. rFID on {backend.features.name}.\n\n"
        f"{_table(rows)}\n`{result.best.schedule}`\n\n{_verdict(rows)}\n"
    )
    with replace_file(folder / f"{where}.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(text)


def _in_the_host(comfyui: Path, file: Path, cfg: float) -> Backend:
    """Return the back end of a workflow with this U-Net; the host's own folders stay as they are."""
    from search_tools.backends.comfyui.backend import ComfyBackend

    base = Path(tempfile.mkdtemp())
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "held_back").symlink_to(Path(__file__).parent / "held_back_pack", target_is_directory=True)
    inputs = {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0]}
    sampling = {"seed": 0, "steps": 50, "cfg": cfg, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    nodes = {
        "1": ("HeldBackModel", {"file": str(file)}),
        "2": ("HeldBackClass", {"file": str(file), "text": "0"}),
        "3": ("HeldBackClass", {"file": str(file), "text": ""}),
        "4": ("HeldBackLatent", {}),
        "5": (
            "KSampler",
            {**inputs, **sampling},
        ),
    }
    graph = {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}
    return ComfyBackend(str(comfyui), graph, prompts=[str(i) for i in range(len(CLASSES))], base_directory=str(base))


def _table(rows: list[Row]) -> str:
    lines = ["| | MACs | PSNR dB (95 %) | SSIM | rFID |", "|-|-|-|-|-|"]
    for row in rows:
        psnr = f"{row.psnr_db:.1f} ({row.psnr_low:.1f}-{row.psnr_high:.1f})"
        lines.append(f"| {row.name} | {row.speedup_macs:.2f}x | {psnr} | {row.ssim:.4f} | {row.rfid:.3g} |")
    return "\n".join(lines) + "\n"


def _verdict(rows: list[Row]) -> str:
    """Say by how much the searched schedule beats fewer steps, and the best DeepCache by each measure."""
    searched, fewer, *others = rows
    caches = [row for row in others if row.name.startswith("DeepCache")]
    said = [f"over {fewer.name}: {searched.psnr_db - fewer.psnr_db:+.1f} dB, rFID {searched.rfid:.3g} against {fewer.rfid:.3g}"]
    if caches:
        psnr, rfid = max(row.psnr_db for row in caches), min(row.rfid for row in caches)
        said.append(f"over the best DeepCache: {searched.psnr_db - psnr:+.1f} dB, rFID {searched.rfid:.3g} against {rfid:.3g}")
    return "Searched " + "; ".join(said) + "."


@app.command()
def draw_samples(
    file: Annotated[Path, typer.Argument(help="Weights that train wrote.")],
    picture: Annotated[Path, typer.Argument(help="PNG to write: a row of real emblems, then samples of the same classes.")],
    cfg: Annotated[float, typer.Option(help="Guidance scale.")] = 2.5,
    seed: Annotated[int, typer.Option(help="Of the first sample.")] = JUDGE_SEEDS,
) -> None:
    """Show what the network draws."""
    backend = open_chosen_backend("euler", "normal", 50, cfg, unet=file)
    made = fold(backend.teacher(seed, 24))
    real = draw(torch.tensor(backend.prompts(seed, 24)), torch.Generator().manual_seed(seed))
    rows = [("real", real[:12]), ("drawn", made[:12]), ("real", real[12:]), ("drawn", made[12:])]
    save_image_rows(picture, rows)


if __name__ == "__main__":
    try:
        app()
    except FlexiError as error:
        raise SystemExit(str(error)) from error
