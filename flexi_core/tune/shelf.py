"""What was recorded and planned of runs, kept in a folder by what the runs were; small, and of no worth to anyone else."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import FlexiError
from ..files import read_bounded, write_text
from ..networks.fingerprint import identity_digest
from ..schedule.schedule import Schedule
from .placement import Planned
from .trajectories import Recording

log = logging.getLogger(__name__)

MOST_RUNS = 100  # that are kept; the oldest go
MOST_BYTES = 64 * 2**20  # of all files
_MOST_FRONT = 2**20  # bytes of a front's file
_FORMAT = "flexiffusion-front-1"


class Shelf:
    """Recordings of full runs and the fronts that were planned from them.

    Nothing here raises: a broken file, or a disk that takes nothing, costs what was learned and no more.

    Args:
        folder: made when something is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def recording(self, identity: Mapping[str, Any]) -> Recording | None:
        """Return what was recorded of a run; None where nothing usable was."""
        path = self._path(identity, ".safetensors")
        try:
            if not path.is_file():
                return None
            found = Recording.load(path)
        except (FlexiError, OSError) as error:
            log.warning("Flexiffusion: %s; the run is recorded again", error)
            return None
        return found if found.identity == dict(identity) else None

    def keep_recording(self, recording: Recording) -> None:
        """Keep a recording, and drop the front that was planned from less."""
        self._keep(recording.identity, lambda: recording.save(self._path(recording.identity, ".safetensors")))

    def front(self, identity: Mapping[str, Any]) -> list[Planned] | None:
        """Return the front that was planned for a run; None where none usable was."""
        path = self._path(identity, ".json")
        try:
            if not path.is_file():
                return None
            said = json.loads(read_bounded(path, _MOST_FRONT))
            if said["format"] != _FORMAT or said["identity"] != dict(identity):
                return None
            return [Planned(Schedule.parse(text), int(full), float(db)) for full, db, text in said["front"]]
        except (FlexiError, OSError, ValueError, KeyError, TypeError) as error:
            log.warning("Flexiffusion: %s is broken and is made again: %s", path.name, error)
            return None

    def keep_front(self, identity: Mapping[str, Any], front: Sequence[Planned]) -> None:
        """Keep a front."""
        said = {
            "format": _FORMAT,
            "identity": dict(identity),
            "front": [[planned.full, planned.predicted_db, str(planned.schedule)] for planned in front],
        }
        self._keep(identity, lambda: write_text(self._path(identity, ".json"), json.dumps(said)))

    def forget(self, identity: Mapping[str, Any]) -> None:
        """Drop what is kept of a run."""
        for suffix in (".safetensors", ".json"):
            try:
                self._path(identity, suffix).unlink(missing_ok=True)
            except OSError as error:
                log.warning("Flexiffusion: what was learned could not be dropped: %s", error)

    def nearest(self, identity: Mapping[str, Any]) -> list[str] | None:
        """Return the names of what differs from the run most like this one that is kept; None where none is."""
        found = []
        for path in self._files("*.safetensors"):
            try:
                other = Recording.identity_of(path)
            except FlexiError:
                continue
            found.append([name for name in {**other, **identity} if other.get(name) != identity.get(name)])
        return min(found, key=len, default=None)

    def _keep(self, identity: Mapping[str, Any], write: Any) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write()
            self._make_room()
        except OSError as error:
            log.warning("Flexiffusion: what was learned of a run could not be kept: %s", error)

    def _make_room(self) -> None:
        """Drop the oldest files beyond what is kept."""
        files = sorted(self._files("*"), key=lambda path: path.stat().st_mtime, reverse=True)
        total = 0
        for number, path in enumerate(files):
            total += path.stat().st_size
            if number >= 2 * MOST_RUNS or total > MOST_BYTES:
                path.unlink(missing_ok=True)

    def _files(self, pattern: str) -> list[Path]:
        try:
            return [path for path in self.folder.glob(pattern) if path.is_file()]
        except OSError:
            return []

    def _path(self, identity: Mapping[str, Any], suffix: str) -> Path:
        return self.folder / f"{identity_digest(identity)[:24]}{suffix}"
