"""How good the schedules are that single-stretch sensitivities plan, and how much of a search they save.

    python benchmarks/sensitivity.py               # every testbed, about a quarter of an hour on one core
    python benchmarks/sensitivity.py --only euler  # one of them

On the embedded model, with fitted blends as a search has them. The additive model is compared with the true errors of random
schedules; its guesses with the known good points that a search starts from, with a search of a few evaluations, and with the
searched schedule that the pack ships. The tables are written to docs/results/sensitivity-*.md; searches are studies in
--folder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from scipy.stats import kendalltau

from flexi_core import FlexiError, Schedule, load_schedule
from flexi_core.files import replace_file
from flexi_core.run.replay import PredictionStore
from search_tools.backends.embedded import EmbeddedBackend
from search_tools.backends.teacher import TeacherSettings
from search_tools.fitness import Fitness
from search_tools.measures.judge import Judge
from search_tools.settings import SearchSettings
from search_tools.space.space import Space
from search_tools.strategies.evolution import FINISHED
from search_tools.strategies.sensitivity import Sensitivities, measure_sensitivities
from search_tools.study.candidate import schedule_of
from search_tools.study.study import open_study, run_search

RESULTS = Path(__file__).parents[1] / "docs" / "results"
SCHEDULES = Path(__file__).parents[1] / "flexi_core" / "schedules"
TESTBEDS = {
    "euler": (TeacherSettings("euler", "normal", 50), 5.0, "demo-euler-5x.json"),
    "dpmpp_2m": (TeacherSettings("dpmpp_2m", "normal", 25), 3.0, "demo-dpmpp_2m-3x.json"),
}
_err = Console(stderr=True)


def main(
    only: Annotated[str | None, typer.Option(help=f"One testbed: {', '.join(TESTBEDS)}.")] = None,
    evaluations: Annotated[int, typer.Option(help="Candidates of the search that is compared with.")] = 40,
    samples: Annotated[int, typer.Option(help="To search and to compare errors with.")] = 8,
    schedules: Annotated[int, typer.Option(help="Random schedules to compare errors on.")] = 20,
    judged: Annotated[int, typer.Option(help="Unseen samples to judge on.")] = 32,
    guesses: Annotated[int, typer.Option(help="Schedules to plan.")] = 6,
    folder: Annotated[Path, typer.Option(help="Where the studies are kept.")] = Path("flexi_benchmark"),
) -> None:
    """Measure, plan, search, judge, and write the tables."""
    if only is not None and only not in TESTBEDS:
        raise typer.BadParameter(f"known: {', '.join(TESTBEDS)}", param_hint="--only")
    folder.mkdir(parents=True, exist_ok=True)
    RESULTS.mkdir(exist_ok=True)
    for name in [only] if only else TESTBEDS:
        bench = Bench(name, samples)
        _err.print(f"{name}: sensitivities")
        model = bench.sensitivities(folder)
        _err.print(f"{name}: {guesses} guesses")
        planned = [bench.fitted(schedule) for schedule in model.plan(bench.space, guesses)]
        searched = bench.search(evaluations, folder)
        _err.print(f"{name}: {schedules} random schedules")
        random = bench.random(schedules)
        _err.print(f"{name}: judging")
        lines = table(name, bench, model, random, planned, searched, judged)
        with replace_file(RESULTS / f"sensitivity-{name}.md") as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print("\n".join(lines))


Errors = list[tuple[Schedule, float]]  # schedules with their paired errors on the search's samples


@dataclass
class Bench:
    """The true errors of one testbed's schedules."""

    name: str
    samples: int

    def __post_init__(self) -> None:
        settings, self.speedup, file = TESTBEDS[self.name]
        self.backend = EmbeddedBackend(settings)
        self.space = Space(settings.steps, self.speedup, self.backend.cost)
        self.shipped = load_schedule(SCHEDULES / file)
        self.fitness = Fitness(self.backend, (self.samples,), predictions=PredictionStore())

    def sensitivities(self, folder: Path) -> Sensitivities:
        """Return the sensitivities, measured or from an earlier call."""
        path = folder / f"sensitivity-{self.name}.json"
        if not path.exists():
            with replace_file(path) as temporary:
                temporary.write_text(json.dumps(measure_sensitivities(self.backend).as_dict()), encoding="utf-8")
        return Sensitivities.from_dict(json.loads(path.read_text(encoding="utf-8")))

    def fitted(self, schedule: Schedule) -> tuple[Schedule, float]:
        """Return a schedule with its blends fitted, and its mean paired error on the search's samples."""
        fitted = self.fitness.fitted(schedule)
        return fitted, self.error(fitted)

    def error(self, schedule: Schedule) -> float:
        """Return the mean paired error of a schedule as it is, on the search's samples."""
        return self.fitness.error(self.fitness.sample(schedule, self.samples))

    def random(self, count: int) -> list[tuple[Schedule, float, float]]:
        """Return random schedules of full and linearly extrapolated steps, with the errors as they are and fitted."""
        rng, free, found = np.random.default_rng(0), Space(self.space.steps, self.speedup, self.space.cost, ("free",)), []
        while len(found) < count:
            text = free.random(rng).letters.replace("N", "X")
            if "P" not in text:
                schedule = Schedule.parse(text)
                found.append((schedule, self.error(schedule), self.fitted(schedule)[1]))
        return found

    def search(self, evaluations: int, folder: Path) -> Errors:
        """Return the candidates of an evolution from the space's own seeds, in order."""
        settings = SearchSettings.of(self.backend, self.speedup, self.samples, finalists=0, move=False)
        study = open_study(f"sqlite:///{folder / 'sensitivity.db'}", f"{self.name}, {self.samples} samples", settings)
        fitness = Fitness(self.backend, (self.samples,), predictions=PredictionStore())

        def say(state) -> None:
            _err.print(f"{self.name}: {state.finished} of {evaluations}, {state.seconds_left:.0f} s left")

        if run_search(study, self.space, fitness, evaluations=evaluations, on_progress=say, finals=False).interrupted:
            raise typer.Exit(130)
        trials = study.get_trials(deepcopy=False, states=FINISHED)[:evaluations]
        return [(schedule_of(trial), trial.user_attrs["errors"][0]) for trial in trials]


def table(
    name: str,
    bench: Bench,
    model: Sensitivities,
    random: list[tuple[Schedule, float, float]],
    planned: Errors,
    searched: Errors,
    judged: int,
) -> list[str]:
    """Return the lines of one testbed's tables."""
    settings, steps = bench.backend.settings, bench.space.steps
    teacher_macs = 2 * steps * bench.backend.cost.full_macs  # of one sample, with and without the prompt
    plain, fitted = (kendalltau([model.predict(r[0]) for r in random], [r[i] for r in random])[0] for i in (1, 2))
    best_guess = min(planned, key=lambda pair: pair[1])
    seeds = searched[: len(bench.space.seeds())]  # an evolution begins with them
    bests = np.minimum.accumulate([error for _, error in searched])

    def reached(error: float) -> str:
        at = np.flatnonzero(bests <= error)
        return str(at[0] + 1) if len(at) else f"not in {len(searched)}"

    rows = {
        "first guess": planned[0],
        f"best of {len(planned)} guesses": best_guess,
        f"best of {len(seeds)} seeds": min(seeds, key=lambda pair: pair[1]),
        f"searched, {len(searched)} evaluations": min(searched, key=lambda pair: pair[1]),
        "searched, as shipped": (bench.shipped, bench.error(bench.shipped)),
        "the same, fitted": bench.fitted(bench.shipped),
    }
    judge = Judge(bench.backend, judged)
    lines = [
        f"# Guesses from sensitivities: {steps} {settings.sampler} steps, {bench.speedup:g}x, {bench.samples} samples",
        "",
        f"Made by `python benchmarks/sensitivity.py --only {name}`. PSNR on {judged} unseen seeds, mse on the search's.",
        "",
        "| | PSNR dB | mse | a search from the seeds is as good at evaluation | schedule |",
        "|-|-|-|-|-|",
    ]
    for row, (schedule, error) in rows.items():
        psnr = judge.judge(row, schedule)[0].psnr_db
        lines.append(f"| {row} | {psnr:.1f} | {error:.2e} | {reached(error)} | {_text(schedule)} |")
    lines += [
        "",
        f"The measurement: {len(model.stretches)} runs, the MACs of {model.macs / teacher_macs:.0f} teacher samples, or of "
        f"{model.macs / teacher_macs * bench.speedup / bench.samples:.0f} evaluations without shared steps.",
        f"Kendall's tau of predicted and true errors of {len(random)} random schedules: {plain:.2f} as they are, "
        f"{fitted:.2f} with their blends fitted.",
    ]
    return lines


def _text(schedule: Schedule) -> str:
    """Return a schedule without its blends, as a cell of a table."""
    plain = Schedule(tuple(replace(segment, blend=None) for segment in schedule.segments), schedule.order)
    return "`" + str(plain).replace("|", "\\|") + "`"


if __name__ == "__main__":
    try:
        typer.run(main)
    except FlexiError as error:
        raise SystemExit(str(error)) from error
