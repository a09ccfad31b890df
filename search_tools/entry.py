"""What `flexi` begins with: settings that count only before torch is loaded."""

from __future__ import annotations

import os


def main() -> None:
    """Run the command line, with threads that sleep while they wait unless the user wants otherwise.

    Threads that spin make everything several times slower as soon as anything else runs on the machine.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from .cli import app

    app()
