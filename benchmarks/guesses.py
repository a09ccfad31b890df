"""What a search starts from: schedules tuned on full runs, from sensitivities, or known good points alone.

    python benchmarks/guesses.py    # about 20 minutes on one core; goes on where it was stopped

On the embedded model: the same evolution from each of the three, on the same samples; the best after some candidates, and what
the network spent, the measuring included. The page is docs/results/guesses.md; searches are studies in --folder.
"""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Annotated

import optuna
import typer
from rich.console import Console

from flexi_core import FlexiError
from flexi_core.files import write_text
from flexi_core.run.replay import PredictionStore
from search_tools.backends.embedded import EmbeddedBackend
from search_tools.backends.teacher import TeacherSettings
from search_tools.fitness import Fitness
from search_tools.measures.judge import Judge
from search_tools.settings import SearchSettings
from search_tools.strategies.evolution import FINISHED
from search_tools.strategies.guesses import TunedFront, measuring_macs, with_guesses
from search_tools.strategies.sensitivity import measure_sensitivities
from search_tools.study.study import best_of, open_study, run_search

PAGE = Path(__file__).parents[1] / "docs" / "results" / "guesses.md"
TESTBEDS = ((TeacherSettings("euler", "normal", 50), 5.0), (TeacherSettings("dpmpp_2m", "normal", 25), 3.0))
STARTS = {"tuned on full runs": "tuned", "from sensitivities": "sensitivities", "known good points alone": ""}
GUESSES = 6
SHOWN = (1, 2, 4, 8, 16, 32, 64)  # candidates
_SCREENED = {"psnr_db": 0.0}  # of a candidate that is clearly worse than one before it
_err = Console(stderr=True)


def main(
    evaluations: Annotated[int, typer.Option(help="Candidates of each search.")] = 16,
    samples: Annotated[int, typer.Option(help="To search on.")] = 8,
    judged: Annotated[int, typer.Option(help="Unseen samples to judge on.")] = 24,
    folder: Annotated[Path, typer.Option(help="Where the studies are kept.")] = Path("flexi_benchmark"),
) -> None:
    """Search from each start, judge, and write the page."""
    folder.mkdir(parents=True, exist_ok=True)
    command = f"`python benchmarks/guesses.py --evaluations {evaluations} --samples {samples} --judged {judged}`"
    lines = ["# What a search starts from", "", f"Made by {command} on the embedded model, cfg 3."]
    for settings, speedup in TESTBEDS:
        backend, judge = EmbeddedBackend(settings), None
        title = f"{settings.steps} {settings.sampler} steps, {speedup:g}x"
        counts = [count for count in SHOWN if count <= evaluations]
        lines += ["", f"## {title}", "", "| guesses | measured, full runs | " +
                  " | ".join(f"best after {count}" for count in counts) + f" | full runs in all | unseen, {judged} |",
                  "|-|-|" + "-|" * (len(counts) + 2)]  # fmt: skip
        for name, start in STARTS.items():
            _err.print(f"{title}: {name}")
            study, measured = searched(backend, speedup, samples, start, evaluations, folder)
            trials = study.get_trials(deepcopy=False, states=FINISHED)[:evaluations]
            bests = list(accumulate((trial.user_attrs.get("evaluation", _SCREENED)["psnr_db"] for trial in trials), max))
            spent = measured + sum(trial.user_attrs["macs"] for trial in trials) / full_run(backend)
            judge = judge or Judge(backend, judged)
            row, _ = judge.judge(name, best_of(study).schedule)
            cells = [name, f"{measured:.0f}", *(f"{bests[count - 1]:.1f}" for count in counts), f"{spent:.0f}"]
            lines.append("| " + " | ".join([*cells, f"{row.psnr_db:.1f}"]) + " |")
        write_text(PAGE, "\n".join([*lines, "", WORDS]) + "\n")
    print("\n".join(lines))


WORDS = (
    "PSNR in dB to the teacher, the mean of the search's samples; in the last column that of the best candidate on seeds that\n"
    "no search saw. What the network did, for measuring and in all, is in full runs of one sample. "
    "Without moved noise levels and finals."
)


def full_run(backend: EmbeddedBackend) -> float:
    """Return the MACs of a full run of one sample, with and without the prompt."""
    return 2 * backend.settings.steps * backend.cost.full_macs


def searched(
    backend: EmbeddedBackend, speedup: float, samples: int, start: str, evaluations: int, folder: Path
) -> tuple[optuna.Study, float]:
    """Return the study of a search from one of `STARTS`, run or read, and the full runs that measuring took."""
    wanted = SearchSettings.of(backend, speedup, samples, finalists=0, move=False, guesses=GUESSES)
    settings = backend.settings
    name = f"guesses, {settings.sampler} {settings.steps}, {start or 'none'}, {samples} samples"
    study = open_study(f"sqlite:///{folder / 'guesses.db'}", name, wanted)
    known = {key for key in study.user_attrs if key in ("flexi:tuned", "flexi:sensitivities")}
    if start == "sensitivities" and not known:
        study.set_user_attr("flexi:sensitivities", measure_sensitivities(backend).as_dict())
    if not start and not known:
        study.set_user_attr("flexi:tuned", TunedFront(()).as_dict())
    space = wanted.space(backend.cost, backend.identity["sigmas"], backend.traits)
    space = with_guesses(study, backend, space, GUESSES, samples=samples)
    fitness = Fitness(backend, (samples,), predictions=PredictionStore())

    def say(state) -> None:
        _err.print(f"{name}: {state.finished} of {evaluations}, {state.seconds_left:.0f} s left")

    if run_search(study, space, fitness, evaluations=evaluations, on_progress=say, finals=False).interrupted:
        raise typer.Exit(130)
    return study, measuring_macs(study, full_run(backend)) / full_run(backend)


if __name__ == "__main__":
    try:
        typer.run(main)
    except FlexiError as error:
        raise SystemExit(str(error)) from error
