"""The command line: `flexi demo | search | evaluate | show | train-demo`.

Results go to stdout (`--json` for programs), progress and messages to stderr; bad input ends with one line and exit code 2.
"""

from __future__ import annotations

import typer

from .commands.demo import demo
from .commands.evaluate import evaluate
from .commands.search import search
from .commands.show import show
from .commands.train import train_demo

COMMANDS = {"demo": demo, "search": search, "evaluate": evaluate, "show": show, "train-demo": train_demo}


def make_app() -> typer.Typer:
    """Return the command line with every command."""
    made = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
    for name, command in COMMANDS.items():
        made.command(name)(command)
    return made


app = make_app()
