"""Options that several commands share."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from flexi_core.demo.sampling import SAMPLERS, SCHEDULERS

Sampler = Enum("Sampler", {name: name for name in SAMPLERS})
Scheduler = Enum("Scheduler", {name: name for name in SCHEDULERS})
SpaceChoice = Enum("SpaceChoice", {"all": "all", "paper": "paper", "paper-x": "paper-x", "free": "free"})
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Seed = Annotated[int, typer.Option(help="Seed of the search.")]
Samples = Annotated[int, typer.Option(min=2, help="Samples to judge on; compare rFID of equal counts only.")]
