"""The command line of the project; `flexi --help` lists its commands.

Results go to stdout (`--json` for programs), progress and messages to stderr; bad input ends with one line and exit code 2.
"""

from __future__ import annotations

import importlib
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

# By name: the command's function, by its module in `commands`, and its own first line.
COMMANDS = {
    "demo": (
        "demo.demo",
        "Search a schedule for the embedded model and show what it is worth: a schedule file, pictures and a table.",
    ),
    "search": ("search.search", "Search a schedule for a sampling run; the same command goes on where it stopped."),
    "tune": (
        "tune.tune",
        "Make a schedule for a sampling run from a few of its full runs, in the time of some fifteen of them.",
    ),
    "worker": (
        "worker.worker",
        "Search a study together with other workers, until a budget is spent or Ctrl-C; what is needed comes from the study.",
    ),
    "storage-server": (
        "storage_server.storage_server",
        "Serve a database to workers that reach it as grpc://HOST:PORT, until Ctrl-C; for networks where everybody is trusted.",
    ),
    "evaluate": (
        "evaluate.evaluate",
        "Judge schedules on seeds that no search ever saw, beside fewer steps and DeepCache at the cost of the first.",
    ),
    "correlate": (
        "correlate.correlate",
        "Compare what ranks schedules cheaply with true FID on the embedded model; the same command goes on where it stopped.",
    ),
    "report": (
        "report.report",
        "Write one HTML file of a study, finished or not: front, progress, schedules, images; it needs no network.",
    ),
    "pareto": (
        "pareto.pareto",
        "Show the front of a study; with --speedup, write the schedule at any wanted speed-up without a new search.",
    ),
    "show": ("show.show", "Show what a schedule file says: the steps, the run it was made for, what was measured."),
    "stages": (
        "stages.stages",
        "Find the noise levels at which one network should give way to another (multi-stage framework, arXiv 2312.09181).",
    ),
    "train-stages": (
        "train_stages.train_stages",
        "Train decoders for stages of noise levels, from a base or from scratch (multi-stage framework, arXiv 2312.09181).",
    ),
    "train-demo": (
        "train.train_demo",
        "Train the embedded model and its classifier anew, from procedural scenes, and judge them as they were accepted.",
    ),
}


def command(name: str) -> TyperCommand:
    """Return a command with its options; its module is imported for that."""
    module, function = COMMANDS[name][0].split(".")
    made = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    made.command(name)(getattr(importlib.import_module(f".commands.{module}", __package__), function))
    return typer.main.get_command(made)


class _Commands(TyperGroup):
    """Every command, by its name and first line alone until it is asked for: `flexi --help` imports no torch."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = {name: TyperCommand(name, help=line) for name, (_, line) in COMMANDS.items()}

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> tuple[str | None, TyperCommand | None, list[str]]:
        """Return the command that is asked for, with its options."""
        if args and args[0] in COMMANDS:
            self.commands[args[0]] = command(args[0])
        return super().resolve_command(ctx, args)


app = typer.Typer(cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback(help=__doc__)
def _every_command() -> None:
    pass
