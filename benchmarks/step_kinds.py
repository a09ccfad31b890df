"""What each kind of step is worth: how nulls are predicted, one step more or less of each kind, moved noise levels.

    python benchmarks/step_kinds.py                # some 25 minutes on one core
    python benchmarks/step_kinds.py --only beside  # one kind of measurement; the others' rows stay

On the embedded model. Every row changes one thing of a schedule of few full steps, whose blends are fitted anew on the first
samples of each batch; the others, unseen, are judged in the same run. The tables are written to
docs/results/step-kinds.{csv,md}.
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import asdict, dataclass, fields
from itertools import pairwise, product
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from step_trials import FIT, JUDGED, Bench, Rule

from flexi_core import FlexiError, Schedule, load_schedule
from flexi_core.files import replace_file
from flexi_core.metrics import bootstrap_interval
from search_tools.backends.teacher import TeacherSettings

RESULTS = Path(__file__).parents[1] / "docs" / "results"
TESTBEDS = {
    "euler": (TeacherSettings("euler", "normal", 50), "4*(FXXX)|FXXXX|FXXXXXXX|FXXXXXXXXX|FXXXXXXX|FX|F"),
    "dpmpp_2m": (TeacherSettings("dpmpp_2m", "normal", 25), "FXX|FXX|FXXX|FXXXX|FXXXX|FXX|F|F"),
}
BUNDLED = Path(__file__).parents[1] / "flexi_core" / "schedules"
SEARCHED = {"euler": "demo-euler-5x.json", "dpmpp_2m": "demo-dpmpp_2m-3x.json"}
DEPTHS = (1, 2, 3)
GAPS = 2  # the widest, in which one more step is tried
FRACTIONS = (0.5, 0.25)  # of the way to the next noise level, by which steps are moved in rounds
FITTED = "d in the step, fitted, 3 terms"
MANY = 96  # judged where what is gained is little
THREE, THERE = "the 3 terms alone", "the 3 terms alone, there"
LINEAR = "d, linear in the step"
TABLES = {
    "nulls": ("How the steps between are predicted", LINEAR),
    "beside": (f"Terms of other things fitted beside the three, on {MANY} unseen samples", THREE),
    "searched": (f"The same terms at the places that a search found, on {MANY} unseen samples", THERE),
    "places": ("The same with the full steps elsewhere", LINEAR),
    "guidance": ("One full step more, one half more, one half less", FITTED),
    "partials": ("One partial step more", FITTED),
    "moved": ("Moved noise levels", FITTED),
}
_err = Console(stderr=True)


@dataclass(frozen=True)
class Row:
    """One line of a table: cost in full steps, PSNR and the paired gain over the table's reference with 95 % intervals."""

    teacher: str
    table: str
    name: str
    cost: float
    psnr_db: float
    psnr_low: float
    psnr_high: float
    gain_db: float
    gain_low: float
    gain_high: float
    gain_per_full_step: float
    letters: str


def main(
    only: Annotated[str | None, typer.Option(help="One of product, beside, partials, guidance, moved, nulls.")] = None,
) -> None:
    """Measure, and write the tables after each measurement; rows that are not measured anew stay as they are."""
    measures = {
        "product": measure_product,
        "beside": measure_beside,
        "partials": measure_partials,
        "guidance": measure_guidance,
        "moved": measure_moved,
        "nulls": measure_nulls,
    }
    if only is not None and only not in measures:
        raise typer.BadParameter(f"known measurements: {', '.join(measures)}", param_hint="--only")
    known, studies = read_rows(RESULTS / "step-kinds.csv"), [Study(teacher) for teacher in TESTBEDS]
    # Of the product itself are the rows that the others are compared with.
    for measure in [measure for name, measure in measures.items() if only in (None, name) or name == "product"]:
        for study in studies:
            measure(study)
            known |= {(row.teacher, row.table, row.name): row for each in studies for row in each.rows()}
            rows = sorted(known.values(), key=lambda row: list(TESTBEDS).index(row.teacher))
            table = io.StringIO()
            writer = csv.DictWriter(table, fieldnames=[field.name for field in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
            for name, text in (("step-kinds.csv", table.getvalue()), ("step-kinds.md", markdown(rows))):
                with replace_file(RESULTS / name) as temporary:
                    temporary.write_text(text, encoding="utf-8")


def read_rows(path: Path) -> dict[tuple[str, str, str], Row]:
    """Return the rows of a table that was written, by teacher, table and name."""
    if not path.exists():
        return {}
    types = [{"str": str, "float": float}[field.type] for field in fields(Row)]
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file))[1:]
    found = [Row(*(read(text) for read, text in zip(types, line, strict=True))) for line in lines]
    return {(row.teacher, row.table, row.name): row for row in found}


class Study:
    """The measured rows of one teacher."""

    def __init__(self, teacher: str) -> None:
        self.teacher, (settings, text) = teacher, TESTBEDS[teacher]
        self.bench, self.base = Bench(settings), Schedule.parse(text).letters
        self._found: list[tuple[str, str, str, float, torch.Tensor]] = []

    def note(
        self, table: str, name: str, letters: str, latents: torch.Tensor, depth: int = 0, bench: Bench | None = None
    ) -> None:
        """Keep a row; its latents are of the samples of a bench, by default the study's."""
        share = self.bench.backend.cost.share(depth) if depth else 0.0
        cost = letters.count("F") + 0.5 * letters.count("f") + share * letters.count("P")
        self._found.append((table, name, letters, cost, (bench or self.bench).psnr(latents)))
        _err.print(f"{self.teacher}: {name}: {float(self._found[-1][-1].mean()):.2f} dB", highlight=False)

    def rows(self) -> list[Row]:
        """Return the rows, each beside its table's reference."""
        by_name, rows = {name: (cost, psnr) for _, name, _, cost, psnr in self._found}, []
        for table, name, letters, cost, psnr in self._found:
            reference_cost, reference = by_name[TABLES[table][1]]
            gain, more = psnr - reference, cost - reference_cost
            numbers = [float(psnr.mean()), *bootstrap_interval(psnr), float(gain.mean()), *bootstrap_interval(gain)]
            per_step = float(gain.mean()) / more if more else float("nan")
            rows.append(Row(self.teacher, table, name, cost, *map(float, numbers), per_step, letters))
        return rows


def measure_product(study: Study) -> None:
    """Measure what the product predicts the steps between the same full steps with."""
    bench = study.bench
    study.note("nulls", "removed", removed := study.base.replace("X", "N"), bench.run(removed, 1))
    for order, name in enumerate(("held", "linear", "quadratic", "cubic")):
        study.note("nulls", LINEAR if name == "linear" else f"d, {name} in the step", study.base, bench.run(study.base, order))
    study.note("nulls", FITTED, study.base, bench.run(study.base))


def measure_beside(study: Study) -> None:
    """Measure terms beside the derivative's three: of the guidance difference, of low frequencies, of the last full state."""
    bench = Bench(study.bench.backend.settings, MANY)
    searched = load_schedule(BUNDLED / SEARCHED[study.teacher])
    levels = bench.sigmas if searched.sigmas is None else bench.sigmas.new_tensor(searched.sigmas)
    for name, rule in {
        THREE: Rule(),
        "guidance difference, held": Rule(beside=1),
        "guidance difference, held and linear": Rule(beside=2),
        "guidance difference, held to quadratic": Rule(beside=3),
        "their low spatial frequencies": Rule(low=True),
        "state of the last full step": Rule(state=True),
        "guidance difference, held and linear, and the state": Rule(beside=2, state=True),
    }.items():
        study.note("beside", name, study.base, bench.explore(study.base, rule), bench=bench)
        latents = bench.explore(searched.letters, rule, levels)
        study.note("searched", f"{name}, there", searched.letters, latents, bench=bench)


def measure_nulls(study: Study) -> None:
    """Measure other ways to predict the same steps; and the product's with the full steps elsewhere."""
    bench = study.bench
    steps, count = len(study.base), study.base.count("F")
    for name, rule in {
        "d, linear in log sigma": Rule(2, False, log_sigma=True),
        "d, quadratic in log sigma": Rule(3, False, log_sigma=True),
        "denoised, held": Rule(1, False, denoised=True),
        "denoised, linear in the step": Rule(2, False, denoised=True),
        "denoised, linear in log sigma": Rule(2, False, denoised=True, log_sigma=True),
        "d in the step, fitted, 1 term": Rule(1),
        "d in the step, fitted, 2 terms": Rule(2),
        "d in the step, fitted, 4 terms": Rule(4),
        "d in log sigma, fitted, 3 terms": Rule(log_sigma=True),
    }.items():
        study.note("nulls", name, study.base, bench.explore(study.base, rule))
    for name, places in {
        "even, to the last step": {round(i * (steps - 1) / (count - 1)) for i in range(count)},
        "even, the end not computed": {i * steps // count for i in range(count)},
    }.items():
        letters = "".join("F" if i in places else "X" for i in range(steps))
        study.note("places", f"{name}: linear", letters, bench.run(letters, 1))
        study.note("places", f"{name}: fitted", letters, bench.run(letters))


def measure_guidance(study: Study) -> None:
    """Measure one full or conditional step more in the widest gaps, and every second full step without its other half."""
    bench = study.bench
    for at in _gaps(study.base):
        for letter in "Ff":
            study.note("guidance", f"{letter} more at {at}", more := _with(study.base, at, letter), bench.explore(more, Rule()))
    by_loss = []
    for at in _full(study.base)[1::2]:
        less = _with(study.base, at, "f")
        study.note("guidance", f"f for F at {at}, difference held", less, latents := bench.explore(less, Rule()))
        by_loss.append((float(bench.psnr(latents).mean()), at))
    by_loss.sort()
    for _, at in (by_loss[0], by_loss[len(by_loss) // 2], by_loss[-1]):
        less = _with(study.base, at, "f")
        study.note("guidance", f"f for F at {at}, difference linear", less, bench.explore(less, Rule(guidance_terms=2)))


def measure_partials(study: Study) -> None:
    """Measure one partial step more in the widest gaps: its feature held, forecast, and as a correction."""
    bench = study.bench
    widest, *others = _gaps(study.base)
    for at, depth in [*((widest, depth) for depth in DEPTHS), *((at, DEPTHS[0]) for at in others)]:
        more = _with(study.base, at, "P")
        for name, rule in {
            "held": Rule(depth=depth),
            "linear": Rule(depth=depth, feature_terms=2),
            "quadratic": Rule(depth=depth, feature_terms=3),
            "linear, corrects": Rule(depth=depth, feature_terms=2, corrects=True),
        }.items():
            study.note("partials", f"P more at {at}, depth {depth}, feature {name}", more, bench.explore(more, rule), depth)


def measure_moved(study: Study) -> None:
    """Measure what the best places on the grid are worth, and then noise levels between its own."""
    bench = study.bench
    letters, sigmas = study.base, bench.sigmas
    best = bench.error(letters, sigmas)
    for at in _full(letters)[1:]:
        here = at
        for to in (at - 1, at + 1):
            if to < len(letters) and letters[to] == "X" and letters[here] == "F":
                tried = _with(_with(letters, here, "X"), to, "F")
                if (error := bench.error(tried, sigmas)) < best:
                    letters, best, here = tried, error, to
    study.note("moved", "places on the grid, one round", letters, bench.run(letters))
    places = [(at, share) for at in _full(letters)[1:] for share in (-FRACTIONS[0], FRACTIONS[0])]
    at, share = min(places, key=lambda place: bench.error(letters, _moved(sigmas, *place)))
    latents = bench.run(letters, sigmas=_moved(sigmas, at, share))
    study.note("moved", f"the best alone: {at} by {share:+g} of its gap", letters, latents)
    for fraction in FRACTIONS:
        for at, share in product(_full(letters)[1:], (-fraction, fraction)):
            if (error := bench.error(letters, tried := _moved(sigmas, at, share))) < best:
                sigmas, best = tried, error
    study.note("moved", "all, coordinate descent", letters, bench.run(letters, sigmas=sigmas))


def _full(letters: str) -> list[int]:
    return [i for i, letter in enumerate(letters) if letter == "F"]


def _gaps(letters: str) -> list[int]:
    """Return the middles of the widest stretches between full steps, widest first."""
    widest = sorted(pairwise(_full(letters)), key=lambda gap: gap[0] - gap[1])[:GAPS]
    return [(first + last) // 2 for first, last in widest]


def _with(letters: str, at: int, letter: str) -> str:
    return letters[:at] + letter + letters[at + 1 :]


def _moved(sigmas: torch.Tensor, at: int, share: float) -> torch.Tensor:
    """Return a grid with one noise level moved a share of the way to the next, or with a negative one to the last."""
    moved = sigmas.clone()
    moved[at] += abs(share) * (sigmas[at + (1 if share > 0 else -1)] - sigmas[at])
    return moved


def markdown(rows: list[Row]) -> str:
    """Return the tables."""
    lines = [
        "# What each kind of step is worth",
        "",
        f"Made by `python benchmarks/step_kinds.py`. Embedded model, CFG 3; blends fitted on {FIT} samples, PSNR to the "
        f"teacher on {JUDGED} unseen ones, with 95 % bootstrap intervals; gains are paired. Cost in full steps.",
    ]
    for teacher in dict.fromkeys(row.teacher for row in rows):
        settings, text = TESTBEDS[teacher]
        shown = text.replace("|", "\\|")
        lines += ["", f"## {settings.steps} {settings.sampler} steps, around `{shown}`"]
        for table, (title, reference) in TABLES.items():
            lines += ["", f"### {title}", "", f"| | cost | PSNR dB | gain over {reference}, dB | per full step |"]
            lines.append("|-|-|-|-|-|")
            for row in rows:
                if (row.teacher, row.table) == (teacher, table):
                    per_step = "" if math.isnan(row.gain_per_full_step) else f"{row.gain_per_full_step:+.2f}"
                    lines.append(
                        f"| {row.name} | {row.cost:.2f} | {row.psnr_db:.2f} ({row.psnr_low:.1f}-{row.psnr_high:.1f}) "
                        f"| {row.gain_db:+.2f} ({row.gain_low:+.2f} to {row.gain_high:+.2f}) | {per_step} |"
                    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    try:
        typer.run(main)
    except FlexiError as error:
        raise SystemExit(str(error)) from error
