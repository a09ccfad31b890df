"""Which strategy finds more with the same number of candidates, and what the cheap evaluations save.

    python benchmarks/search.py                             # every strategy with three seeds, over an hour on two cores
    python benchmarks/search.py --only evolution,random     # two of them

On the embedded model, Euler, 50 steps, at a fifth of the MACs. Every strategy starts from the space's known good points; the
row "from guesses" first from the schedules of least predicted error (`search_tools/strategies/guesses.py`), whose
measurement counts towards its MACs, not its candidates. The best schedule of every search is judged on samples that no search
has seen. The curves and tables are written to docs/results/search-*; the searches are studies in --folder, so an
interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import csv
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from optuna.trial import FrozenTrial
from rich.console import Console

from flexi_core import FlexiError
from flexi_core.files import replace_file, write_text
from flexi_core.run.replay import PredictionStore
from search_tools.backends.embedded import EmbeddedBackend
from search_tools.backends.teacher import TeacherSettings
from search_tools.fitness import Fitness
from search_tools.measures.judge import Judge, Row
from search_tools.settings import SearchSettings
from search_tools.strategies.evolution import FINISHED, near_best
from search_tools.strategies.guesses import measuring_macs, with_guesses
from search_tools.strategies.strategies import STRATEGIES
from search_tools.study.candidate import schedule_of
from search_tools.study.study import open_study, run_search

RESULTS = Path(__file__).parents[1] / "docs" / "results"
TEACHER, SPEEDUP = TeacherSettings("euler", "normal", 50), 5.0
GUESSES = 6
FROM_GUESSES = f"{STRATEGIES[0]} from guesses"
ROWS = (FROM_GUESSES, *STRATEGIES)
# What makes evaluations cheap, each switched off alone, and all together.
SAVINGS = {
    "everything on": (True, True),
    "no prefix reuse": (False, True),
    "no early stopping": (True, False),
    "everything off": (False, False),
}
_err = Console(stderr=True)


@dataclass(frozen=True)
class Searched:
    """One finished search: its best-so-far curves, its cost, and its best schedule as judged."""

    psnr_db: list[float]
    rfid: list[float]
    macs: float
    seconds: float
    row: Row


def main(
    only: Annotated[str | None, typer.Option(help=f"Of {', '.join(ROWS)}, or all strategies, or savings, by commas.")] = None,
    evaluations: Annotated[int, typer.Option(help="Candidates of each search.")] = 100,
    seeds: Annotated[int, typer.Option(help="Searches of each strategy.")] = 3,
    samples: Annotated[int, typer.Option(help="To search with.")] = 32,
    judged: Annotated[int, typer.Option(help="Samples to judge on.")] = 64,
    fit: Annotated[bool, typer.Option("--fit/--no-fit", help="Fit the blends of every candidate, as the search does.")] = True,
    folder: Annotated[Path, typer.Option(help="Where the studies are kept.")] = Path("flexi_benchmark"),
) -> None:
    """Search, judge, and write the tables."""
    wanted = ["strategies", "savings"] if only is None else [part.strip() for part in only.split(",")]
    if unknown := set(wanted) - {*ROWS, "strategies", "savings"}:
        known = ", ".join((*ROWS, "strategies", "savings"))
        raise typer.BadParameter(f"unknown: {', '.join(sorted(unknown))}; known: {known}", param_hint="--only")
    folder.mkdir(parents=True, exist_ok=True)
    RESULTS.mkdir(exist_ok=True)
    backend = EmbeddedBackend(TEACHER)
    judge = Judge(backend, judged, progress=lambda row, done, total: None)
    bench = Bench(backend, judge, f"sqlite:///{folder / 'search.db'}", evaluations, samples, fit)
    if rows := [row for row in ROWS if row in wanted or "strategies" in wanted]:
        found = {row: [bench.search(row, seed) for seed in range(seeds)] for row in rows}
        guided = 2 * TEACHER.steps * backend.cost.full_macs  # with and without the prompt
        write_strategies(found, evaluations, samples, judged, guided)
    if "savings" in wanted:
        write_savings({name: bench.search("evolution", 0, *switches) for name, switches in SAVINGS.items()}, samples)


class Bench:
    """Runs searches with everything alike but what is compared."""

    def __init__(self, backend: EmbeddedBackend, judge: Judge, storage: str, evaluations: int, samples: int, fit: bool) -> None:
        self._backend, self._judge, self._storage = backend, judge, storage
        self._evaluations, self._samples, self._fit = evaluations, samples, fit

    def search(self, row: str, seed: int, reuse: bool = True, stopping: bool = True) -> Searched:
        """Return a search of one of `ROWS` with a seed, run or read from its study."""
        off = {"no fit": self._fit, "no reuse": reuse, "no stopping": stopping}
        name = ", ".join([row, f"{self._samples} samples", f"seed {seed}", *(text for text, on in off.items() if not on)])
        strategy, guesses = (STRATEGIES[0], GUESSES) if row == FROM_GUESSES else (row, 0)
        how = {"strategy": strategy, "seed": seed, "finalists": 0, "fit": self._fit, "guesses": guesses, "move": False}
        wanted = SearchSettings.of(self._backend, SPEEDUP, self._samples, **how)
        study = open_study(self._storage, name, wanted)
        stages = wanted.stages if stopping else wanted.stages[-1:]
        fitness = Fitness(self._backend, stages, predictions=PredictionStore() if reuse else None, fit=wanted.fit)

        def say(state) -> None:
            _err.print(f"{name}: {state.finished} of {self._evaluations}, {state.seconds_left:.0f} s left")

        space = wanted.space(self._backend.cost, self._backend.identity["sigmas"], self._backend.traits)
        space = with_guesses(study, self._backend, space, wanted.guesses)
        result = run_search(study, space, fitness, evaluations=self._evaluations, on_progress=say)
        if result.interrupted:
            raise typer.Exit(130)
        # A study that an earlier call took further is read up to here.
        trials = study.get_trials(deepcopy=False, states=FINISHED)[: self._evaluations]
        bests = best_so_far(trials)
        judged, _ = self._judge.judge(name, schedule_of(bests[-1]))
        macs, seconds = (sum(trial.user_attrs[key] for trial in trials) for key in ("macs", "seconds"))
        psnr, rfid = ([trial.user_attrs["evaluation"][key] for trial in bests] for key in ("psnr_db", "rfid"))
        macs += measuring_macs(study, 2 * TEACHER.steps * self._backend.cost.full_macs)  # with and without the prompt
        return Searched(psnr, rfid, macs, seconds, judged)


def best_so_far(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return, for each candidate, what a search that ends with it would take."""
    bests = []
    for count in range(1, len(trials) + 1):
        judged = near_best([trial for trial in trials[:count] if "evaluation" in trial.user_attrs])
        bests.append(min(judged, key=lambda trial: trial.user_attrs["evaluation"]["rfid"]))
    return bests


def write_strategies(found: dict[str, list[Searched]], evaluations: int, samples: int, judged: int, sample_macs: float) -> None:
    """Write the table of strategies, every search's row, and the curves; `sample_macs` are those of one teacher sample."""
    lines = [
        f"# Strategies at {evaluations} candidates: {TEACHER.steps} {TEACHER.sampler} steps, {SPEEDUP:g}x, {samples} samples",
        "",
        f"Made by `{_command()}`. Each search's best schedule, judged on {judged} unseen seeds: median over the searches' "
        "seeds (least to most).",
        "",
        "| strategy | PSNR dB | rFID | MACs spent, in thousands of teacher samples |",
        "|-|-|-|-|",
    ]
    ranked = sorted(found.items(), key=lambda item: -statistics.median(s.row.psnr_db for s in item[1]))
    for strategy, searches in ranked:
        psnr, rfid = [s.row.psnr_db for s in searches], [s.row.rfid for s in searches]
        spent = [s.macs / sample_macs / 1000 for s in searches]
        lines.append(
            f"| {strategy} | {statistics.median(psnr):.1f} ({min(psnr):.1f} to {max(psnr):.1f}) "
            f"| {statistics.median(rfid):.3g} ({min(rfid):.3g} to {max(rfid):.3g}) | {statistics.median(spent):.2f} |"
        )
    name = f"search-strategies-{evaluations}"
    write_text(RESULTS / f"{name}.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    with replace_file(RESULTS / f"{name}.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["strategy", "seed", "psnr_db", "rfid", "ssim", "macs", "schedule"])
        for strategy, searches in found.items():
            for seed, s in enumerate(searches):
                writer.writerow([strategy, seed, s.row.psnr_db, s.row.rfid, s.row.ssim, s.macs, s.row.schedule])
    _draw(found, RESULTS / f"{name}.png")


def write_savings(found: dict[str, Searched], samples: int) -> None:
    """Write what the search costs with each saving switched off."""
    all_on = found["everything on"].macs
    lines = [
        f"# What makes candidates cheap: evolution, seed 0, {len(found['everything on'].rfid)} candidates, {samples} samples",
        "",
        f"Made by `{_command()}`. MACs of the network spent on candidates; the best schedule judged on unseen seeds.",
        "",
        "| | GMAC spent | against everything on | PSNR dB | rFID |",
        "|-|-|-|-|-|",
    ]
    for name, s in found.items():
        lines.append(f"| {name} | {s.macs / 1e9:,.0f} | {s.macs / all_on:.2f}x | {s.row.psnr_db:.1f} | {s.row.rfid:.3g} |")
    write_text(RESULTS / "search-savings.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


def _command() -> str:
    return shlex.join(["python", "benchmarks/search.py", *sys.argv[1:]])


def _draw(found: dict[str, list[Searched]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for number, (strategy, searches) in enumerate(found.items()):
        for s in searches:
            left.plot(s.psnr_db, color=f"C{number}", alpha=0.35, linewidth=0.8)
            right.plot(s.rfid, color=f"C{number}", alpha=0.35, linewidth=0.8)
        left.plot(
            [statistics.median(v) for v in zip(*(s.psnr_db for s in searches), strict=True)], f"C{number}", label=strategy
        )
        right.plot([statistics.median(v) for v in zip(*(s.rfid for s in searches), strict=True)], f"C{number}", label=strategy)
    left.set(xlabel="candidates", ylabel="PSNR of the best so far, dB", title="thick: median, thin: each seed")
    right.set(xlabel="candidates", ylabel="rFID of the best so far", yscale="log", title="on the search's own samples")
    left.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=140, format="png")
    pyplot.close(figure)


if __name__ == "__main__":
    try:
        typer.run(main)
    except FlexiError as error:
        raise SystemExit(str(error)) from error
