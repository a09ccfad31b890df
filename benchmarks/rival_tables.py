"""What `rivals.py` makes of its rows: speed at equal quality, tables, and plots."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from rival_runs import DEEPCACHE, SAME_SOLVER

from flexi_core.files import replace_file
from search_tools.measures.measures import Measure

OURS = ("ours, paper's space", "ours, wider space")
TEACHER, CONVERGED = "teacher", "converged solution"
MEASURED = ("psnr_db", "ssim", "rfid", "fid", "caption_accuracy")
GROUPS: dict[str, Callable[[Row], bool]] = {
    "best DeepCache": lambda row: row.family == DEEPCACHE,
    "same solver": lambda row: row.family == SAME_SOLVER,
    "best other rival": lambda row: row.family not in (DEEPCACHE, SAME_SOLVER),
}
ACCEPTED = 0.01  # of caption accuracy below the teacher's: what people would accept

IDENTICAL = 1e-6  # rFID below which pictures are the teacher's


@dataclass(frozen=True)
class Row:
    """One rival at one setting, against the teacher on the judging samples.

    Args:
        family, knob, schedule: as the rival's.
        speedup_macs: the teacher's MACs over its own.
        measures: by name, of `MEASURED`.
        converged_psnr_db: to the converged solution, mean.
        speedup_time: the teacher's seconds over its own, median of the timed batches; nan where it is not timed.
        time_low, time_high: the least and the most of the batches.
    """

    family: str
    knob: str
    schedule: str
    speedup_macs: float
    measures: dict[str, Measure]
    converged_psnr_db: float
    speedup_time: float = math.nan
    time_low: float = math.nan
    time_high: float = math.nan

    @classmethod
    def from_dict(cls, values: dict) -> Row:
        return cls(**{**values, "measures": {name: Measure(**measure) for name, measure in values["measures"].items()}})

    def value(self, measure: str) -> float:
        return self.measures[measure].value

    def timed(self, ratios: Sequence[float]) -> Row:
        """Return the row with its speed-ups in time, one of each timed batch."""
        return replace(self, speedup_time=float(np.median(ratios)), time_low=min(ratios), time_high=max(ratios))


@dataclass(frozen=True)
class Testbed:
    """The rows of one testbed; the teacher's is among them, and so is its converged solution's."""

    name: str
    about: str
    rows: Sequence[Row] = field(default_factory=tuple)

    def of(self, *families: str) -> list[Row]:
        return [row for row in self.rows if row.family in families]

    @property
    def rivals(self) -> list[Row]:
        return [row for row in self.rows if row.family not in (*OURS, TEACHER, CONVERGED)]

    @property
    def converged(self) -> Row:
        """The teacher's own distance to its converged solution."""
        return self.of(CONVERGED)[0]

    def accepts(self, row: Row) -> bool:
        """Return whether a row's caption accuracy is within a point of the teacher's."""
        least = self.of(TEACHER)[0].value("caption_accuracy") - ACCEPTED
        return row.value("caption_accuracy") >= least - 1e-9

    def is_as_good(self, row: Row, measure: str) -> bool:
        """Return whether a row is no farther from the teacher than the teacher is from its converged solution."""
        return _quality(row, measure) >= _quality(self.converged, measure)


def speed_at(rows: Iterable[Row], measure: str, quality: float) -> float:
    """Return the speed-up in time at a quality, interpolated on the front of rows (log of the speed-up).

    A quality that no row reaches faster is the teacher's own, at 1; one below all rows has the fastest of them.
    """
    front, best = [], 0.0
    for row in sorted(rows, key=lambda row: -row.speedup_time):
        if (value := _quality(row, measure)) > best or not front:
            front.append((value, math.log(row.speedup_time)))
            best = value
    if not front:
        return 1.0
    values, speeds = zip(*front, strict=True)
    return math.exp(max(0.0, np.interp(quality, values, speeds, right=0.0)))


def write(folder: Path, beds: Sequence[Testbed], command: str) -> None:
    """Write one table for each testbed and one of all, the rows as CSV, and the two plots; print the testbeds' tables."""
    for bed in beds:
        text = "\n".join([f"# {bed.name}: {bed.about}", "", f"Made by `{command}`.", "", *_goals(bed), "", *_all_rows(bed), ""])
        with replace_file(folder / f"rivals-{bed.name}.md") as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(text)
    lines = ["# Ours against the best of every kind of rival", "", f"Made by `{command}`.", "", *_summary(beds), ""]
    with replace_file(folder / "rivals.md") as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")
    with replace_file(folder / "rivals.csv") as temporary:
        temporary.write_text(_csv(beds), encoding="utf-8", newline="")
    _draw(folder / "rivals-psnr.png", beds, "psnr_db", "PSNR to the teacher, dB")
    _draw(folder / "rivals-rfid.png", beds, "rfid", "rFID to the teacher")


def _quality(row: Row, measure: str) -> float:
    """Return a measure as something that grows with quality, evenly where rows are compared."""
    value = row.value(measure)
    return value if measure != "rfid" else -math.log10(max(value, 1e-12))


def _goals(bed: Testbed) -> list[str]:
    """Return what each point of ours wins over the rivals at its own quality."""
    lines = [
        f"The teacher's own distance to its converged solution: {_figure(bed.converged, 'psnr_db')} dB, "
        f"rFID {_figure(bed.converged, 'rfid')}. Rows no farther from the teacher are as good as the teacher: marked =.",
        "",
        "Ours at its own quality against the rivals' fronts: how many times faster, at equal PSNR / at equal rFID.",
        "",
        f"| ours | over the teacher | PSNR dB | rFID | captions | {' | '.join(f'over {name}' for name in GROUPS)} |",
        "|-|-|-|-|-|" + "-|" * len(GROUPS),
    ]
    for row in sorted(bed.of(*OURS), key=lambda row: row.speedup_time):
        if not bed.accepts(row):
            continue
        figures = [_marked(bed, row, "psnr_db"), _marked(bed, row, "rfid"), f"{row.value('caption_accuracy'):.1%}"]
        lines.append(_line(f"{row.family}, {row.knob}", f"{row.speedup_time:.2f}x", *figures, *_won(bed, row)))
    return lines


def _won(bed: Testbed, row: Row) -> list[str]:
    """Return for each group of rivals how many times faster a row is at its own PSNR and at its own rFID."""
    cells = []
    for belongs in GROUPS.values():
        rivals = [rival for rival in bed.rivals if belongs(rival)]
        won = [row.speedup_time / speed_at(rivals, m, _quality(row, m)) for m in ("psnr_db", "rfid")]
        cells.append(" / ".join(f"{ratio:.2f}x" for ratio in won) if rivals else "not measured")
    return cells


def _summary(beds: Sequence[Testbed]) -> list[str]:
    """Return the points of ours on every testbed, and which of the other rivals comes nearest to each."""
    lines = [
        "Ours at its own quality against the rivals' fronts: how many times faster, at equal PSNR / at equal rFID. Marked =: "
        "no farther from the teacher than the teacher is from its converged solution. Brackets: captions over a point below "
        "the teacher's.",
        "",
        f"| | over the teacher | PSNR dB | rFID | captions | {' | '.join(f'over {name}' for name in GROUPS)} | which |",
        "|-|-|-|-|-|" + "-|" * (len(GROUPS) + 1),
    ]
    for bed in beds:
        converged = [f"{bed.converged.value('psnr_db'):.1f}", f"{bed.converged.value('rfid'):.2g}"]
        captions = f"{bed.of(TEACHER)[0].value('caption_accuracy'):.1%}"
        lines.append(
            _line(f"**{bed.about}**: the teacher", "1x", *(f"({f} to converged)" for f in converged), captions, *[""] * 4)
        )
        for row in sorted(bed.of(OURS[-1]), key=lambda row: row.speedup_time):
            figures = [f"{row.value('psnr_db'):.1f}", f"{row.value('rfid'):.2g}"]
            marks = [" =" if bed.is_as_good(row, measure) else "" for measure in ("psnr_db", "rfid")]
            captions = f"{row.value('caption_accuracy'):.1%}"
            lines.append(
                _line(
                    f"{bed.name}, {row.knob}",
                    f"{row.speedup_time:.2f}x",
                    *(figure + mark for figure, mark in zip(figures, marks, strict=True)),
                    captions if bed.accepts(row) else f"({captions})",
                    *_won(bed, row),
                    _nearest(bed, row),
                )
            )
    return lines


def _nearest(bed: Testbed, row: Row) -> str:
    """Return the family of the other rivals that is the fastest at a row's PSNR."""
    *_, belongs = GROUPS.values()
    families = dict.fromkeys(rival.family for rival in bed.rivals if belongs(rival))
    quality = _quality(row, "psnr_db")
    return max(families, key=lambda family: speed_at(bed.of(family), "psnr_db", quality), default="")


def _all_rows(bed: Testbed) -> list[str]:
    """Return every row, the rivals' with the speed-up of ours over them at their own quality."""
    ours = bed.of(*OURS)
    lines = [
        "Every row; brackets are 95 % intervals, of the time the least and the most of the batches. The last two columns: how "
        "many times faster ours is at the row's own PSNR and rFID, where its captions are within a point of the teacher's.",
        "",
        "| | time | MACs | PSNR dB | SSIM | rFID | FID | captions | PSNR to converged, dB | ours, PSNR | ours, rFID |",
        "|-|-|-|-|-|-|-|-|-|-|-|",
    ]
    for row in bed.rows:
        won = ["", ""]
        if ours and row in bed.rivals and bed.accepts(row):
            won = [f"{speed_at(ours, m, _quality(row, m)) / row.speedup_time:.2f}x" for m in ("psnr_db", "rfid")]
        time = "" if math.isnan(row.speedup_time) else f"{row.speedup_time:.2f}x ({row.time_low:.2f}-{row.time_high:.2f})"
        figures = [_marked(bed, row, "psnr_db"), _figure(row, "ssim"), _marked(bed, row, "rfid"), _figure(row, "fid")]
        figures += [f"{row.value('caption_accuracy'):.1%}"]
        figures += ["same" if math.isinf(row.converged_psnr_db) else f"{row.converged_psnr_db:.1f}"]
        lines.append(_line(f"{row.family}, {row.knob}", time, f"{row.speedup_macs:.2f}x", *figures, *won))
    schedules = [f"- {row.family}, {row.knob}: `{row.schedule}`" for row in ours]
    return [*lines, "", "Schedules:", "", *schedules]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _marked(bed: Testbed, row: Row, measure: str) -> str:
    good = row.family not in (TEACHER, CONVERGED) and bed.is_as_good(row, measure) and _figure(row, measure) != "some the same"
    return _figure(row, measure) + (" =" if good else "")


def _figure(row: Row, measure: str) -> str:
    found, digits = row.measures[measure], {"psnr_db": ".1f", "ssim": ".4f"}.get(measure, ".3g")
    if math.isinf(found.value):  # the mean, where any one picture is the teacher's
        return "same" if row.value("rfid") < IDENTICAL else "some the same"
    return f"{found.value:{digits}} ({found.low:{digits}}-{found.high:{digits}})"


def _csv(beds: Sequence[Testbed]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["testbed", "family", "knob", "speedup_time", "time_low", "time_high", "speedup_macs"]
        + [f"{name}{end}" for name in MEASURED for end in ("", "_low", "_high")]
        + ["samples", "converged_psnr_db", "schedule"]
    )
    for bed in beds:
        for row in bed.rows:
            found = [row.measures[name] for name in MEASURED]
            figures = [value for measure in found for value in (measure.value, measure.low, measure.high)]
            times = [row.speedup_time, row.time_low, row.time_high, row.speedup_macs]
            writer.writerow(
                [bed.name, row.family, row.knob, *times, *figures, found[0].samples, row.converged_psnr_db, row.schedule]
            )
    return text.getvalue()


def _draw(path: Path, beds: Sequence[Testbed], measure: str, label: str) -> None:
    """Draw a panel for each testbed: speed-up in time against a measure, a curve for each family; hollow: captions lost."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(len(beds), 2)
    count = math.ceil(len(beds) / columns)
    figure, axes = pyplot.subplots(count, columns, figsize=(7 * columns, 4.5 * count + 1), squeeze=False, layout="constrained")
    families = list({row.family: None for bed in beds for row in (*bed.rivals, *bed.of(*OURS))})
    for axis, bed in zip(axes.flat, beds, strict=False):
        for number, family in enumerate(families):
            rows = sorted(bed.of(family), key=lambda row: row.speedup_time)
            if not rows:
                continue
            ours = family in OURS
            colour = ("gray", "black")[OURS.index(family)] if ours else f"C{number % 10}"
            points = [(row.speedup_time, row.value(measure)) for row in rows]
            good = [point for point, row in zip(points, rows, strict=True) if bed.accepts(row)]
            how = {"marker": "*" if ours else "os"[number // 10], "s": 90 if ours else 16, "zorder": 3 if ours else 2}
            axis.scatter(*zip(*points, strict=True), facecolors="none", edgecolors=colour, **how)
            if good:
                axis.scatter(*zip(*good, strict=True), color=colour, **how)
            axis.plot(*zip(*_front(points, measure), strict=True), color=colour, linewidth=2 if ours else 0.9, label=family)
        axis.axhline(bed.converged.value(measure), color="gray", linestyle=":", label="teacher to its converged solution")
        axis.set(title=f"{bed.name}: {bed.about}", xlabel="speed-up in time over the teacher", ylabel=label, xscale="log")
        axis.set_xticks([1, 1.5, 2, 3, 4, 6, 8], ["1", "1.5", "2", "3", "4", "6", "8"])
        axis.minorticks_off()
        # What is far from ours, or the teacher's to the last bits, would flatten the rest.
        shown = [row.value(measure) for row in (*bed.of(*OURS), bed.converged)]
        if measure == "rfid":
            axis.set(yscale="log", ylim=(min(shown) / 5, max(shown) * 5))
        else:
            axis.set_ylim(min(shown) - 8, max(shown) + 8)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(beds) :]:
        axis.axis("off")
    handles = {text: handle for axis in axes.flat for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2 * columns, fontsize=8)
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=140, format="png")
    pyplot.close(figure)


def _front(points: Sequence[tuple[float, float]], measure: str) -> list[tuple[float, float]]:
    """Return the points that no faster one beats, from the slowest to the fastest."""
    sign = -1 if measure == "rfid" else 1
    front: list[tuple[float, float]] = []
    for speed, value in sorted(points, reverse=True):
        if not front or sign * value > sign * front[-1][1]:
            front.append((speed, value))
    return front[::-1]
