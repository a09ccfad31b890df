"""What training in stages is worth (multi-stage framework, arXiv 2312.09181): one network against decoders for stages.

    python benchmarks/stage_training.py train --folder flexi_stage_benchmark          # goes on where it was
    python benchmarks/stage_training.py train --folder flexi_stage_benchmark --part warm
    python benchmarks/stage_training.py report --folder flexi_stage_benchmark

`--part scratch`: scenes at 8x8 from scratch, four arms, some seeds each, the same number of iterations; `--part warm`: decoders
from the embedded model, against as many more iterations of its one decoder. Arms take turns, so that there is a comparison at
any time.
`report` writes docs/results/stage-training.md and .png of what has been trained so far.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from flexi_core.demo.model import DemoModel, SmallModel
from flexi_core.demo.train import draw_scenes
from flexi_core.files import write_text
from flexi_core.metrics import frechet_distance
from flexi_core.networks.unet import NetworkCall
from flexi_core.run.cost import count_macs
from flexi_core.runtime.file_model import FileModel
from flexi_core.runtime.sampling import make_noise, sample, sigmas_normal
from flexi_core.schedule.presets import all_full
from flexi_core.stages.bounds import Stages
from flexi_core.stages.clustering import cluster
from flexi_core.stages.training import StageTrainer, StageTraining, held_out_loss, levels_of
from search_tools.noise_stages import NoiseLevels, by_data
from search_tools.report.pictures import save_figure
from search_tools.stage_data import draw_of, objective_of, scenes_of

NAMES = ("high", "middle", "low")
SIZE, DATA, ITERATIONS = 8, 20_000, 35_000
HELD_OUT_SEED, NOISE_SEED, SAMPLE_SEED = 50_000_000, 7, 9_000_000  # far from those of training
STEPS, SAMPLES, REFERENCE = 20, 1024, 4096
CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 64,
    "channel_mult": [1, 1],
    "num_res_blocks": [0, 1],
    "transformer_depth": [0],
    "transformer_depth_output": [0, 0, 0],
    "transformer_depth_middle": -1,
    "use_scale_shift_norm": True,
}
WARM_CUTS = (6.07, 2.18)  # docs/results/stages.md

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Arm:
    """One way to train: stages with widths, each on a shared encoder or in a network of its own."""

    name: str
    widths: tuple[int, ...]
    separate: bool = False
    encoder: bool = True


SCRATCH = (
    Arm("unified", (64,)),
    Arm("stages, equal widths", (64, 64, 64)),
    Arm("stages, widths 32/64/96", (32, 64, 96)),
    Arm("separate networks", (64, 64, 64), separate=True),
)
WARM = (
    Arm("unified", (64,)),
    Arm("unified, encoder frozen", (64,), encoder=False),
    Arm("stages, equal widths", (64, 64, 64), encoder=False),
    Arm("stages, widths 32/64/96", (32, 64, 96), encoder=False),
)


class Part:
    """From scratch or from the embedded model: what all arms have in common."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder, scratch = name, folder / name, name == "scratch"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.arms = SCRATCH if scratch else WARM
        self.base = FileModel.untrained(CONFIG, (SIZE, SIZE), self.folder) if scratch else DemoModel.load()
        self.cuts = self._cuts() if scratch else WARM_CUTS
        self.levels = levels_of(Stages(self.cuts, NAMES), self.base.sigmas)
        self.objective = objective_of(self.base)
        self.settings = {"batch": 16, "learning_rate": 5e-4, "warmup": 1000, "ema": 0.999}
        if not scratch:
            self.settings = {"batch": 32, "learning_rate": 1e-4, "warmup": 50, "ema": 0.995}

    def _cuts(self) -> tuple[float, ...]:
        kept = self.folder / "cuts.json"
        if not kept.exists():
            found = by_data(scenes_of(DATA, SIZE, 0), NoiseLevels(self.base.sigmas), 41, 96, 0)
            write_text(kept, json.dumps(cluster(found.similarity(), found.sigmas, 3).boundaries))
        return tuple(json.loads(kept.read_text(encoding="utf-8")))

    def trainers(self, arm: Arm, seed: int, draw: Any) -> list[StageTrainer]:
        """Return the trainers of an arm: one, or one for each stage."""
        stages = Stages((), ("all",)) if len(arm.widths) == 1 else Stages(self.cuts, NAMES)
        common = {"scratch": self.name == "scratch", "encoder": arm.encoder, **self.settings}
        densities = [tuple(float(i == of) for i in range(3)) for of in range(3)] if arm.separate else [()]
        made = []
        for i, density in enumerate(densities):
            settings = StageTraining(stages, arm.widths, density=density, seed=len(densities) * seed + i, **common)
            checkpoint = self.folder / f"{_file(arm)}-{seed}-{i}.checkpoint"
            made.append(StageTrainer(self.base, settings, draw, self.objective, checkpoint))
        return made

    def held_out(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return data that is not trained on."""
        if self.name == "scratch":
            return scenes_of(1024, SIZE, HELD_OUT_SEED), None
        x0, tokens = draw_scenes(256, torch.Generator().manual_seed(HELD_OUT_SEED))
        return x0, self.base.token_table[tokens]


class Trained(SmallModel):
    """What an arm has trained so far, to be sampled."""

    def __init__(self, base: SmallModel, cuts: tuple[float, ...], networks: Sequence[nn.Module]) -> None:
        super().__init__(base.unet, base.sigmas, base.prediction, base.latent_shape)
        self._base, self.networks, self.stages = base, list(networks), Stages(cuts, NAMES)

    def network(self, sigma: float) -> nn.Module:
        return self.networks[self.stages.at(sigma)]

    def conditioning(self, prompts: Any, count: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return self._base.conditioning(prompts, count)

    def macs(self) -> list[float]:
        """Return the MACs of one row in each stage."""
        context, _ = self.conditioning(None, 1)
        call = NetworkCall(torch.zeros(1, *self.latent_shape), torch.zeros(1), context)
        return [count_macs(network, call).full_macs for network in self.networks]


def _file(arm: Arm) -> str:
    return arm.name.replace(", ", "-").replace(" ", "-").replace("/", "-")


def _networks(trainers: Sequence[StageTrainer]) -> list[nn.Module]:
    """Return the averaged network of each stage."""
    if len(trainers) > 1:
        return [trainer.averaged.network(i) for i, trainer in enumerate(trainers)]
    count = len(trainers[0].levels)
    return [trainers[0].averaged.network(min(i, count - 1)) for i in range(len(NAMES))]


def _frechet(model: Trained) -> float:
    """Return the Frechet distance between samples and held-out scenes, on the pixels."""
    noise, sigmas = make_noise(SAMPLE_SEED, SAMPLES, model.latent_shape), sigmas_normal(model, STEPS)
    made = [sample(model, all_full(STEPS), sigmas, part, cfg=1.0)[0] for part in noise.split(128)]
    truth = scenes_of(REFERENCE, model.latent_shape[1], HELD_OUT_SEED + 1)
    return frechet_distance(torch.cat(made).clamp(-1, 1).flatten(1), truth.flatten(1))


@app.command()
def train(
    folder: Annotated[Path, typer.Option(help="Of checkpoints and curves.")] = Path("flexi_stage_benchmark"),
    part: Annotated[str, typer.Option(help="scratch or warm.")] = "scratch",
    iterations: Annotated[int, typer.Option(help="In all. [default: 35000, or 600 warm]")] = 0,
    every: Annotated[int, typer.Option(help="Iterations between two points of a curve. [default: 1000, or 100 warm]")] = 0,
    turn: Annotated[int, typer.Option(help="Iterations of an arm before the next one's. [default: 5000, or 200 warm]")] = 0,
    seeds: Annotated[int, typer.Option(help="[default: 3, or 1 warm]")] = 0,
) -> None:
    """Train all arms in turns; a stopped one goes on."""
    torch.set_num_threads(1)
    scratch, kind = part == "scratch", Part(part, folder)
    iterations, every = iterations or (ITERATIONS if scratch else 600), every or (1000 if scratch else 100)
    turn, seeds = turn or (5000 if scratch else 200), seeds or (3 if scratch else 1)
    draw, data = draw_of(kind.base, "scenes", DATA, 0), kind.held_out()
    for until in [*range(turn, iterations, turn), iterations]:
        for seed in range(seeds):
            for arm in kind.arms:
                _go_on(kind, arm, seed, until, every, draw, data)


def _go_on(kind: Part, arm: Arm, seed: int, until: int, every: int, draw: Any, data: Any) -> None:
    """Train an arm until it has so many iterations in all, and write points of its curve."""
    path = kind.folder / f"{_file(arm)}-{seed}.json"
    curve = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    if curve and curve[-1]["iterations"] >= until:
        return
    trainers = kind.trainers(arm, seed, draw)
    model = Trained(kind.base, kind.cuts, _networks(trainers))
    for done in range((curve[-1]["iterations"] if curve else -every) + every, until + 1, every):
        for trainer in trainers:
            trainer.run(round(done / len(trainers)))
        losses = held_out_loss(model.networks.__getitem__, kind.levels, kind.base.sigmas, kind.objective, data, NOISE_SEED)
        point = {"iterations": done, "losses": [float(of.mean()) for of in losses], "macs": model.macs()}
        if kind.name == "scratch" and done == until:
            point["frechet"] = _frechet(model)
        curve.append(point)
        write_text(path, json.dumps(curve))
        print(f"{kind.name}, {arm.name}, seed {seed}: {point}", flush=True)


def _curves(kind: Part) -> dict[Arm, list[list[dict[str, Any]]]]:
    """Return the curves of each arm's seeds."""
    return {
        arm: [json.loads(path.read_text(encoding="utf-8")) for path in sorted(kind.folder.glob(f"{_file(arm)}-[0-9].json"))]
        for arm in kind.arms
    }


class Comparison:
    """The arms of a part at the same iterations, as far as all of them have come."""

    def __init__(self, kind: Part) -> None:
        self.kind, curves = kind, _curves(kind)
        self.seeds = min(len(of) for of in curves.values())
        self.curves = {arm: of[: self.seeds] for arm, of in curves.items()}
        self.done = min((curve[-1]["iterations"] for of in self.curves.values() for curve in of), default=0)
        shares = [len(levels) for levels in kind.levels]
        self.weights = [share / sum(shares) for share in shares]

    def loss(self, point: dict[str, Any], stage: int | None) -> float:
        """Return a stage's loss, or that of all levels."""
        if stage is not None:
            return point["losses"][stage]
        return sum(weight * loss for weight, loss in zip(self.weights, point["losses"], strict=True))

    def points(self, arm: Arm, stage: int | None) -> dict[int, list[float]]:
        """Return the losses of all seeds, by iterations."""
        found: dict[int, list[float]] = {}
        for curve in self.curves[arm]:
            for point in curve:
                if point["iterations"] <= self.done:
                    found.setdefault(point["iterations"], []).append(self.loss(point, stage))
        return found

    def crossover(self, arm: Arm, stage: int | None) -> str:
        """Say from where on an arm's mean loss stays below that of the unified network."""
        own, unified = self.points(arm, stage), self.points(self.kind.arms[0], stage)
        behind = [at for at in own if at and statistics.mean(own[at]) >= statistics.mean(unified[at])]
        after = [at for at in own if at > max(behind, default=0)]
        return f"{min(after):,}" if after else "not reached"

    def difference(self, arm: Arm, stage: int | None) -> str:
        """Return how an arm's loss differs from the unified network's, in percent, seed by seed."""
        own, unified = self.points(arm, stage)[self.done], self.points(self.kind.arms[0], stage)[self.done]
        percent = [100 * (a / b - 1) for a, b in zip(own, unified, strict=True)]
        spread = f" ±{statistics.stdev(percent):.1f}" if len(percent) > 1 else ""
        return f"{statistics.mean(percent):+.1f}{spread} %"

    def macs(self, arm: Arm) -> float:
        """Return the mean MACs of a call over a run."""
        levels = Stages(self.kind.cuts, NAMES)
        macs = self.curves[arm][0][-1]["macs"]
        return statistics.mean(macs[levels.at(float(sigma))] for sigma in sigmas_normal(self.kind.base, STEPS)[:-1])

    def rows(self) -> list[str]:
        """Return the table."""
        frechet = self.kind.name == "scratch"
        heads = ["all levels", *(f"{name} noise" for name in NAMES), *["Frechet"] * frechet, "MMACs a call", "crossover"]
        lines = [f"| | {' | '.join(heads)} |", "|-" * (len(heads) + 1) + "|"]
        for arm in self.kind.arms:
            stages = (None, *range(len(NAMES)))
            cells = []
            for stage in stages:
                mean = statistics.mean(self.points(arm, stage)[self.done])
                own = "" if arm is self.kind.arms[0] else f" ({self.difference(arm, stage)})"
                cells.append(f"{mean:.4f}{own}")
            if frechet:
                found = [
                    point.get("frechet") for curve in self.curves[arm] for point in curve if point["iterations"] == self.done
                ]
                cells.append("" if None in found else f"{statistics.mean(found):.2f} ({min(found):.2f}-{max(found):.2f})")
            cells.append(f"{self.macs(arm) / 1e6:.2f}")
            cells.append("" if arm is self.kind.arms[0] else self.crossover(arm, None))
            lines.append(f"| {arm.name} | {' | '.join(cells)} |")
        return lines


@app.command()
def report(
    folder: Annotated[Path, typer.Option(help="Of checkpoints and curves.")] = Path("flexi_stage_benchmark"),
    out: Annotated[Path, typer.Option(help="Folder of the page and the picture.")] = Path("docs/results"),
) -> None:
    """Write the page of what has been trained so far."""
    kinds = [Part(name, folder) for name in ("scratch", "warm") if (folder / name).is_dir()]
    found = [each for each in map(Comparison, kinds) if each.seeds]
    lines = ["# Training in stages", "", *_INTRODUCTION]
    for each in found:
        lines += ["", *_words(each), "", *each.rows()]
    lines += ["", "![held-out loss over iterations](stage-training.png)", ""]
    save_figure(_picture(found), out / "stage-training.png")
    write_text(out / "stage-training.md", "\n".join(lines))


_INTRODUCTION = (
    "Made by `python benchmarks/stage_training.py` (`train`, `train --part warm`, `report`). Losses are of the same held-out",
    "scenes, noise levels and noise for every arm, averaged weights, mean of the seeds; in brackets how they differ from the",
    "unified network's at the same seed, with the standard deviation over seeds. Less is better in every column. The crossover",
    "is the iteration from which on an arm's loss over all levels stays below the unified network's.",
)


def _words(each: Comparison) -> list[str]:
    cuts = " and ".join(f"{cut:.3g}" for cut in each.kind.cuts)
    seeds = f"{each.seeds} seed{'s' * (each.seeds > 1)}"
    if each.kind.name == "scratch":
        return [
            f"## From scratch: {each.done:,} of {ITERATIONS:,} iterations{' so far' * (each.done < ITERATIONS)}, {seeds}",
            "",
            f"Scenes of {SIZE}x{SIZE} pixels, a U-Net of 64 channels, cuts at sigma {cuts} (`flexi stages` on these scenes).",
            f"{each.kind.settings['batch']} scenes a batch, one stage in each, all stages drawn alike; separate networks have",
            f"a third of the iterations each. Frechet: distance on the pixels of {SAMPLES:,} samples ({STEPS} Euler steps)",
            f"to {REFERENCE:,} held-out scenes, with the range over seeds.",
        ]
    return [
        f"## From the embedded model: {each.done:,} more iterations, {seeds}",
        "",
        f"Cuts at sigma {cuts}, {each.kind.settings['batch']} scenes of 32x32 pixels a batch; losses are weighted as the",
        "embedded model was trained. Decoders on the frozen encoder, against as many more iterations of the one decoder, with",
        "the encoder and without.",
    ]


def _picture(found: Sequence[Comparison]) -> Any:
    """Return the curves: one row for each part, one column for all levels and each stage."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = (None, *range(len(NAMES)))
    figure, axes = pyplot.subplots(len(found), len(columns), figsize=(13, 3.4 * len(found)), squeeze=False)
    for row, each in zip(axes, found, strict=True):
        for axis, stage in zip(row, columns, strict=True):
            for arm in each.kind.arms:
                points = each.points(arm, stage)
                at = [done for done in points if done or each.kind.name == "warm"]
                means = [statistics.mean(points[done]) for done in at]
                (line,) = axis.plot(at, means, label=arm.name, linewidth=1.4, marker=".", markersize=4)
                low, high = ([of(points[done]) for done in at] for of in (min, max))
                axis.fill_between(at, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
            axis.set_yscale("log")
            axis.set_title(f"{each.kind.name}, {'all levels' if stage is None else NAMES[stage] + ' noise'}", fontsize=9)
            axis.tick_params(labelsize=7, which="both")
            axis.set_xlabel("iterations", fontsize=8)
        row[0].set_ylabel("held-out loss", fontsize=8)
        row[0].legend(fontsize=7)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    app()
