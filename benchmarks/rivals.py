"""Everybody side by side in the real host: the searched schedules, and every other way to sample faster, at every speed.

    python benchmarks/scene_dit.py train scene_dit.safetensors      # once; about an hour on one core
    python benchmarks/rivals.py --dit scene_dit.safetensors --comfyui ~/comfy/ComfyUI --packs FOLDER
    python benchmarks/rivals.py --only euler-50                     # one testbed

Four testbeds: the embedded U-Net and the small transformer of `scene_dit.py`, each at 50 Euler and at 25 dpmpp_2m steps. Every
rival is turned over its own knob (`rival_runs.py`), on seeds that no search and no choice of a solver has seen. Quality and
time are of the same runs: a few rivals draw a batch between two runs of the teacher, then the next batch. The first batch is
not timed, torch's flop counter counts its MACs. What is found is kept in --folder, so that an interrupted benchmark goes on
where it was; tables and plots are written to docs/results/rivals*.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import rival_runs
import torch
import typer
from rich.console import Console
from rival_runs import TEACHER, Rival, scheduled
from rival_tables import CONVERGED, MEASURED, OURS, Row, Testbed, write
from scene_dit import SCHEDULER, scene_model
from scene_host import SceneBackend, SceneModel, embedded_model
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from flexi_core import FlexiError, Schedule
from flexi_core.files import replace_file
from flexi_core.metrics import data_range, psnr_db
from flexi_core.run.cost import NetworkCost
from flexi_core.run.replay import PredictionStore
from flexi_core.schedule.kinds import StepKind
from flexi_core.schedule.presets import from_kinds
from search_tools.backends.comfyui.host import open_host
from search_tools.backends.teacher import JUDGE_SEEDS, TeacherSettings
from search_tools.fitness import Fitness
from search_tools.measures.measures import Measures
from search_tools.settings import SearchSettings
from search_tools.space.space import FAMILIES, Space
from search_tools.strategies.guesses import with_guesses
from search_tools.study.study import open_study, run_search

RESULTS = Path(__file__).parents[1] / "docs" / "results"
SPEEDUPS = "1.5,2,3,4,5,6,8"
BEDS = {
    "euler-50": ("embedded", TeacherSettings("euler", "normal", 50)),
    "dpmpp_2m-25": ("embedded", TeacherSettings("dpmpp_2m", "normal", 25)),
    "dit-euler-50": ("dit", TeacherSettings("euler", SCHEDULER, 50)),
    "dit-dpmpp_2m-25": ("dit", TeacherSettings("dpmpp_2m", SCHEDULER, 25)),
}
MASKS = "null steps only, annealing"
SEARCHES: dict[str, dict[str, Any]] = {
    OURS[0]: {"families": ("paper",), "move": False},
    OURS[1]: {"families": FAMILIES},
    MASKS: {"families": ("free",), "strategy": "annealing", "fit": False, "move": False},
}
ALMOST_ALL = (1.05, 1.1, 1.25, 1.5)  # of the same solver besides: next to the teacher's quality its front must not be a step
BETWEEN = 12  # rivals between two runs of the teacher
_err = Console(stderr=True)


def main(
    comfyui: Annotated[str, typer.Option(help="A ComfyUI checkout.")] = "~/comfy/ComfyUI",
    dit: Annotated[Path | None, typer.Option(help="Weights of scene_dit.py; without them, its testbeds are left out.")] = None,
    packs: Annotated[Path | None, typer.Option(help="Folder with Comfy-WaveSpeed and ComfyUI-TeaCache, as they come.")] = None,
    only: Annotated[str | None, typer.Option(help=f"One testbed: {', '.join(BEDS)}.")] = None,
    rivals: Annotated[str, typer.Option(help="Only families whose name has one of these, separated by commas.")] = "",
    speedups: Annotated[str, typer.Option(help="Of fewer steps, separated by commas.")] = SPEEDUPS,
    searched: Annotated[str, typer.Option(help="Of the searches, separated by commas. [default: those of fewer steps]")] = "",
    evaluations: Annotated[int, typer.Option(min=1, help="Candidates of each search.")] = 60,
    search_samples: Annotated[int, typer.Option(help="To search with.")] = 32,
    samples: Annotated[int, typer.Option(min=2, help="To judge on.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at once; all batches but the first are timed.")] = 8,
    converged: Annotated[int, typer.Option(min=2, help="Times the teacher's steps that its solver is converged with.")] = 4,
    folder: Annotated[Path, typer.Option(help="Where studies and measured rows are kept.")] = Path("flexi_rivals"),
    results: Annotated[Path, typer.Option(help="Where tables and plots go.")] = RESULTS,
) -> None:
    """Search, judge, time, and write the tables."""
    if only is not None and only not in BEDS:
        raise FlexiError(f"unknown testbed {only!r}; known: {', '.join(BEDS)}")
    if samples % batch or samples == batch:
        raise FlexiError(f"--samples {samples} must be two or more whole batches of {batch} (--batch)")
    for each in (folder, results):
        each.mkdir(parents=True, exist_ok=True)
    open_host(comfyui)
    wanted = [name for name in BEDS if only in (None, name)]
    if dit is None:
        _err.print("the testbeds of the transformer are left out: no --dit")
        wanted = [name for name in wanted if BEDS[name][0] != "dit"]
    models: dict[str, SceneModel] = {}
    for name in wanted:
        kind, settings = BEDS[name]
        if kind not in models:
            models[kind] = embedded_model() if kind == "embedded" else scene_model(dit)
        found = SceneBackend(models[kind], settings), folder, batch
        bench = Bench(name, *found, _numbers(speedups), _numbers(searched or speedups))
        every = bench.rivals(packs, evaluations, search_samples, [part.strip() for part in rivals.split(",")])
        bench.measure(every, samples, converged)
    # A testbed that was measured before is part of the tables and plots.
    beds = []
    for name, (_, settings) in BEDS.items():
        rows = _rows(folder / f"{name}.json")
        families = list(dict.fromkeys(row.family for row in rows))
        rows.sort(key=lambda row: (families.index(row.family), row.speedup_time))
        beds.append(Testbed(name, _about(settings), rows))
    command = " ".join(["python benchmarks/rivals.py", *sys.argv[1:]])
    write(results, [bed for bed in beds if bed.of(CONVERGED)], command)


@dataclass(frozen=True)
class Bench:
    """One testbed.

    Args:
        name: of `BEDS`.
        backend: its teacher.
        folder: where everything found is kept.
        batch: pictures at once.
        speedups: of fewer steps.
        searched: speed-ups of the searches.
    """

    name: str
    backend: SceneBackend
    folder: Path
    batch: int
    speedups: Sequence[float]
    searched: Sequence[float]

    def say(self, text: str) -> None:
        _err.print(f"{self.name}: {text}", markup=False, highlight=False)

    def rivals(self, packs: Path | None, evaluations: int, search_samples: int, parts: Sequence[str]) -> list[Rival]:
        """Return every rival that runs on this testbed and whose family is asked for."""

        def wanted(family: str) -> bool:
            return any(part in family for part in parts)

        steps = self.backend.settings.steps
        counts, slower = (
            sorted({max(1, round(steps / speedup)) for speedup in of}, reverse=True) for of in (self.speedups, ALMOST_ALL)
        )
        found = [
            *rival_runs.same_solver(sorted({*slower, *counts}, reverse=True)),
            *rival_runs.deepcaches(self.backend),
            *rival_runs.tgates(self.backend),
            *rival_runs.core_caches(),
            *(rival_runs.packs(packs, self.say) if packs else ()),
        ]
        if packs is None:
            self.say("first-block cache and TeaCache are left out: no --packs")
        found = list(rival_runs.runnable(self.backend, [rival for rival in found if wanted(rival.family)], self.say))
        if wanted(rival_runs.BEST_SOLVER):
            found += [self._best_solver(count) for count in counts]
        for family in filter(wanted, SEARCHES):
            for speedup in self.searched:
                schedule = self._schedule(family, speedup, evaluations, search_samples)
                found.append(scheduled(family, f"{speedup:g}x", schedule))
        return found

    def _best_solver(self, count: int) -> Rival:
        path = self.folder / f"{self.name}-solvers.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        if str(count) not in known:
            known[str(count)] = rival_runs.best_solver(self.backend, count, self.batch, self.say)
            _keep(path, known)
        sampler, scheduler = known[str(count)]
        knob = f"{count} steps, {sampler} {scheduler}"
        return Rival(rival_runs.BEST_SOLVER, knob, sampler=sampler, scheduler=scheduler, steps=count)

    def _schedule(self, family: str, speedup: float, evaluations: int, samples: int) -> Schedule:
        """Return the best schedule of a search, run or read from its study."""
        wanted = SearchSettings.of(self.backend, speedup, samples, **SEARCHES[family])
        name = f"{self.name}, {family}, {speedup:g}x, {samples} samples"
        study = open_study(f"sqlite:///{self.folder / 'rivals.db'}", name, wanted)
        space = wanted.space(self.backend.cost, self.backend.identity["sigmas"], self.backend.traits)
        if family == MASKS:
            space = MaskSpace(space.steps, space.speedup, NetworkCost(space.cost.full_macs), space.families)
        if family == OURS[1]:
            space = with_guesses(study, self.backend, space, wanted.guesses)
        fitness = Fitness(self.backend, wanted.stages, predictions=PredictionStore(), fit=wanted.fit)
        result = run_search(study, space, fitness, evaluations=evaluations)
        if result.interrupted or result.best is None:
            raise KeyboardInterrupt
        self.say(f"{family}, {speedup:g}x: {len(result.candidates)} candidates, {result.best.schedule}")
        return result.best.schedule

    def measure(self, rivals: Sequence[Rival], samples: int, converged: int) -> None:
        """Measure those that are not measured yet, and keep their rows."""
        path = self.folder / f"{self.name}.json"
        rows = {(row.family, row.knob): row for row in _rows(path) if row.measures["psnr_db"].samples == samples}
        settings = self.backend.settings
        finer = SceneBackend(self.backend.scenes, replace(settings, steps=converged * settings.steps))
        teacher, best = self.backend.teacher(JUDGE_SEEDS, samples), finer.teacher(JUDGE_SEEDS, samples)
        measures = Measures(self.backend, teacher, images="scenes")
        solution, scale = self.backend.pictures(best), data_range(self.backend.pictures(teacher))
        whole = settings.steps * 2 * self.backend.cost.full_macs * self.batch

        def keep(rival: Rival, latents: torch.Tensor, speedup_macs: float, ratios: Sequence[float] = ()) -> None:
            found = measures(latents, JUDGE_SEEDS)
            measured = {name: found[name] for name in MEASURED}
            distance = float(psnr_db(self.backend.pictures(latents), solution, scale).mean())
            row = Row(rival.family, rival.knob, rival.schedule, speedup_macs, measured, distance)
            rows[rival.family, rival.knob] = row.timed(ratios) if ratios else row
            _keep(path, [asdict(row) for row in rows.values()])

        keep(TEACHER, teacher, 1.0, [1.0])
        keep(Rival(CONVERGED, f"{finer.settings.steps} steps"), best, 1 / converged)
        known = {(row.family, row.knob, row.schedule) for row in rows.values()}
        groups = list(_groups([each for each in rivals if (each.family, each.knob, each.schedule) not in known], self.batch))
        for number, group in enumerate(groups, 1):
            self.say(f"{number} of {len(groups)}: {'; '.join(rival.name for rival in group)}")
            for rival, run in zip(group, self.beside(group, samples), strict=True):
                keep(rival, torch.cat(run.latents), whole / run.macs, run.ratios)

    def beside(self, group: Sequence[Rival], samples: int) -> list[Run]:
        """Draw the judging samples with every rival of a group; the first batch is counted, the others are timed.

        They are timed batch by batch, beside the runs of the teacher before and after them, in this process.
        """
        runs = [Run() for _ in group]
        at_once = min(group[0].batch, self.batch)
        for at in range(0, self.batch, at_once):
            for rival, run in zip(group, runs, strict=True):
                with counted_macs() as macs:
                    run.latents.append(self.draw(rival, at, at_once)[0])
                run.macs += macs()
        _, before = self.draw(TEACHER, 0, at_once)
        for at in range(self.batch, samples, at_once):
            drawn = [self.draw(rival, at, at_once) for rival in group]
            _, after = self.draw(TEACHER, at, at_once)
            for run, (latents, took) in zip(runs, drawn, strict=True):
                run.latents.append(latents)
                run.ratios.append((before + after) / 2 / took)
            before = after
        return runs

    def draw(self, rival: Rival, at: int, count: int) -> tuple[torch.Tensor, float]:
        """Return the latents of the judging samples from one on, and the seconds that sampling them took."""
        model = rival.patch(self.backend.scenes.model)
        settings = {"sampler": rival.sampler, "scheduler": rival.scheduler, "steps": rival.steps}
        began = time.perf_counter()
        latents = self.backend.draw(model, JUDGE_SEEDS + at, count, **settings)
        return latents, time.perf_counter() - began


@dataclass
class Run:
    """What one rival's runs gave: latents of every batch, MACs of the first, the teacher's time over its own in the others."""

    latents: list[torch.Tensor] = field(default_factory=list)
    macs: float = 0.0
    ratios: list[float] = field(default_factory=list)


class MaskSpace(Space):
    """Full steps, and removed or held ones in between: what a budgeted search over masks chooses from (BudCache, 2026)."""

    def random(self, rng: np.random.Generator) -> Schedule:
        return _masked(super().random(rng))

    def mutate(self, schedule: Schedule, rng: np.random.Generator) -> Schedule:
        return _masked(super().mutate(schedule, rng))

    def seeds(self) -> list[Schedule]:
        return list({str(schedule): schedule for schedule in map(_masked, super().seeds())}.values())


def _masked(schedule: Schedule) -> Schedule:
    """Return a schedule with every step that is not full held, or removed where it is."""
    kept = (StepKind.FULL, StepKind.NULL)
    kinds = [step.kind if step.kind in kept else StepKind.EXTRAPOLATED for step in schedule.steps()]
    return from_kinds(kinds, order=0)


@contextmanager
def counted_macs() -> Iterator[Callable[[], float]]:
    """Yield a function that returns the multiply-accumulates of everything run in this block."""

    def attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    # The counter's own table lacks the attention of a CPU.
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    )
    with counter:
        yield lambda: counter.get_total_flops() / 2


def _groups(rivals: Sequence[Rival], batch: int) -> Iterator[Sequence[Rival]]:
    """Yield rivals that draw as many pictures at once, `BETWEEN` at most."""
    for at_once in sorted({min(rival.batch, batch) for rival in rivals}, reverse=True):
        alike = [rival for rival in rivals if min(rival.batch, batch) == at_once]
        yield from (alike[at : at + BETWEEN] for at in range(0, len(alike), BETWEEN))


def _about(settings: TeacherSettings) -> str:
    return f"{settings.steps} {settings.sampler} steps, {settings.scheduler}, cfg {settings.cfg:g}"


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _rows(path: Path) -> list[Row]:
    return [Row.from_dict(values) for values in json.loads(path.read_text())] if path.exists() else []


def _keep(path: Path, values: Any) -> None:
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(values), encoding="utf-8")


if __name__ == "__main__":
    try:
        typer.run(main)
    except FlexiError as error:
        raise SystemExit(str(error)) from error
