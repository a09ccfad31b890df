"""`flexi show`: what a schedule file says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from flexi_core import StepKind, load_schedule

from .. import console
from .options import Json


@console.one_line_errors
def show(
    file: Annotated[Path, typer.Argument(help="A schedule file.")],
    as_json: Json = False,
) -> None:
    """Show what a schedule file says: the steps, the run it was made for, what was measured."""
    from flexi_core.schedule.file import to_dict

    schedule = load_schedule(file)
    if as_json:
        console.print_json(to_dict(schedule))
        return
    console.out.print(str(schedule), highlight=False, soft_wrap=True)
    for at in range(0, len(schedule), 50):
        line = "".join(f"[{StepKind(letter).style}]{letter}[/]" for letter in schedule.letters[at : at + 50])
        console.out.print(f"{at + 1:>5}  {line}")
    for part in ("teacher", "measured", "provenance"):
        table = Table(title=part, title_justify="left", show_header=False)
        for key, value in schedule.info.get(part, {}).items():
            if isinstance(value, list) and len(value) > 4:
                shown = f"{value[0]} ... {value[-1]} ({len(value)} values)"
            else:
                shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            table.add_row(escape(key), escape(shown))
        if table.row_count:
            console.out.print(table)
