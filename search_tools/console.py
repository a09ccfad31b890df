"""What the commands share at the terminal: results to stdout, progress and messages to stderr, one-line errors."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from flexi_core import FlexiError
from flexi_core.words import visible

if TYPE_CHECKING:
    from .measures.judge import Row


_FIRST_LINE = 10.0  # seconds
_RARER = 1.1  # times as late comes the next line


class _Plain(Console):
    """A console to which no text of a stranger's file can speak in control characters."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)


out, err = _Plain(), _Plain(stderr=True)


def one_line_errors(command: Callable) -> Callable:
    """Let a command end with one line on stderr and exit code 2 where its input is bad, 130 where it is interrupted."""

    @wraps(command)
    def wrapped(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except FlexiError as error:
            err.print(f"flexi: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2) from error
        except BrokenPipeError:
            raise
        except OSError as error:  # a disk, a folder, a file that no command's own words are about
            err.print(f"flexi: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            err.print("flexi: interrupted")
            raise typer.Exit(130) from error
        except Exception as error:  # a damaged file of studies shows itself wherever it is read
            if (words := _of_a_storage(error)) is None:
                raise
            err.print(f"flexi: {words}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2) from error

    return wrapped


def _of_a_storage(error: Exception) -> str | None:
    """Return in words what a storage's driver raised; None of any other error."""
    if "optuna" not in sys.modules:  # nothing was stored or read
        return None
    from .study.storage import storage_errors

    try:
        with storage_errors("the study storage failed", "If its file is damaged, take a copy of it from before"):
            raise error
    except FlexiError as said:
        return str(said)
    except Exception:
        return None


def make_folder(folder: Path) -> None:
    """Make a folder for results, or say in one line why that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FlexiError(f"{folder}: cannot be made ({error.strerror or error}); give another --folder") from error


class ProgressLines:
    """Progress where nobody watches a bar: a line on stderr now and then, after 10 s, and less often the longer it takes.

    Args:
        clock: in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began, self._next = clock, clock(), _FIRST_LINE

    def say(self, line: Callable[[], str]) -> None:
        """Write a line, made only then, if the last one is long enough ago."""
        past = self._clock() - self._began
        if past >= self._next:
            self._next = past * _RARER + _FIRST_LINE
            err.print(f"{past:.0f} s: {line()}", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress_bar(unit: str, lines: ProgressLines | None = None) -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function of (name, done, total) that draws one bar with the time left on stderr.

    Args:
        unit: of what is done.
        lines: that go on where stderr is no terminal.
    """
    if not err.is_terminal:
        lines = lines or ProgressLines()
        yield lambda name, done, total: lines.say(lambda: f"{name}: {done / max(total, 1):.0%}")
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        tasks: dict[str, int] = {}

        def update(name: str, done: int, total: int) -> None:
            key = name.split(",")[0]
            if key not in tasks:
                for task in tasks.values():
                    progress.update(task, visible=False)
                tasks[key] = progress.add_task(name, total=total)
            progress.update(tasks[key], description=name, completed=done, total=total)

        yield update


def print_table(rows: Sequence[Row], title: str) -> None:
    """Print judged schedules."""
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading in ("", "MACs", "time", "PSNR, dB", "SSIM", "rFID", "captions"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row in rows:
        same = row.psnr_db == float("inf")
        table.add_row(
            row.name,
            f"{row.speedup_macs:.2f}x",
            f"{row.speedup_time:.2f}x",
            # Half the 95 % interval: both ends would not fit into 80 columns.
            "same" if same else f"{row.psnr_db:.1f} ±{(row.psnr_high - row.psnr_low) / 2:.1f}",
            f"{row.ssim:.4f}",
            "0" if same else f"{row.rfid:.3g}",
            "" if row.caption_accuracy is None else f"{row.caption_accuracy:.1%}",
        )
    out.print(table)


def print_measures(rows: Sequence[Row], not_measured: Mapping[str, str]) -> None:
    """Print what judged schedules were measured on beside the first table, with half of each 95 % interval."""
    headings = {"fid": "FID", "precision": "precision", "recall": "recall", "inception_score": "IS", "lpips": "LPIPS"}
    shown = [name for name in headings if name in rows[0].measures]

    def cell(row: Row, name: str) -> str:
        measure = row.measures[name]
        digits = 4 if name == "lpips" else 0 if measure.value >= 100 else 2
        return f"{measure.value:.{digits}f}±{(measure.high - measure.low) / 2:.{digits}f}"

    cells = [[row.name, *(cell(row, name) for name in shown)] for row in rows]
    print_columns(["", *(headings[name] for name in shown)], cells, "as sets, half the 95 % interval")
    for by in dict.fromkeys(rows[0].measures[name].by for name in shown):
        names = ", ".join(headings[name] for name in shown if rows[0].measures[name].by == by)
        out.print(f"{names}: {by}", highlight=False, markup=False, soft_wrap=True)
    for name, reason in not_measured.items():
        out.print(f"{name}: not measured: {reason}", highlight=False, markup=False, soft_wrap=True)


def print_columns(headings: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> None:
    """Print a table whose first column is text and whose others are figures."""
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    out.print(table)


def print_json(value: object) -> None:
    """Print a result for programs."""
    print(json.dumps(value, indent=2))
