"""The command line of the project; `flexi --help` lists its commands.

Results go to stdout (`--json` for programs), progress and messages to stderr; bad input ends with one line and exit code 2.
"""

from __future__ import annotations

import typer

from .commands.correlate import correlate
from .commands.demo import demo
from .commands.evaluate import evaluate
from .commands.pareto import pareto
from .commands.report import report
from .commands.search import search
from .commands.show import show
from .commands.stages import stages
from .commands.storage_server import storage_server
from .commands.train import train_demo
from .commands.train_stages import train_stages
from .commands.tune import tune
from .commands.worker import worker

COMMANDS = {
    "demo": demo,
    "search": search,
    "tune": tune,
    "worker": worker,
    "storage-server": storage_server,
    "evaluate": evaluate,
    "correlate": correlate,
    "report": report,
    "pareto": pareto,
    "show": show,
    "stages": stages,
    "train-stages": train_stages,
    "train-demo": train_demo,
}


def make_app() -> typer.Typer:
    """Return the command line with every command."""
    made = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
    for name, command in COMMANDS.items():
        made.command(name)(command)
    return made


app = make_app()
