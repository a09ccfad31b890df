"""The files that a user can pick: schedules in models/flexi_schedules and those of the pack, stages in models/flexi_stages."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import folder_paths

from ..flexi_core import FlexiError, Schedule, ScheduleError, load_schedule, save_schedule
from ..flexi_core.networks.fingerprint import identity_digest
from ..flexi_core.schedule.file import to_dict

FOLDER = "flexi_schedules"
STAGES = "flexi_stages"
TUNED = "tuned"  # folder in it, for what Flexi Tune made
MOST_TUNED = 200  # files there, a few KiB each; the oldest go
BUNDLED = Path(__file__).parent.parent / "flexi_core" / "schedules"
_BUNDLED_MARK = " (bundled)"  # behind the suffix .json, so no file of the user's has such a name
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_ .,()+=-]{0,99}")
# Windows opens a device for these, whatever their suffix.
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}


def register() -> None:
    """Make models/flexi_schedules known to the host, for .json files, and models/flexi_stages, for .safetensors."""
    for folder, suffix in ((FOLDER, ".json"), (STAGES, ".safetensors")):
        folder_paths.add_model_folder_path(folder, os.path.join(folder_paths.models_dir, folder))
        # A new folder starts with no suffix at all, which the host reads as any.
        folder_paths.folder_names_and_paths[folder][1].add(suffix)


def names() -> list[str]:
    """Return what the user picks from: own files first, then those in folders (such as tuned ones), then the pack's."""
    own = sorted(folder_paths.get_filename_list(FOLDER), key=lambda name: (len(Path(name).parts), name))
    bundled = sorted(path.name + _BUNDLED_MARK for path in BUNDLED.glob("*.json"))
    return [*own, *bundled]


def find(name: str) -> Path:
    """Return the path of a picked name.

    Raises:
        ScheduleError: there is no such file.
    """
    if name.endswith(_BUNDLED_MARK):
        path = BUNDLED / Path(name.removesuffix(_BUNDLED_MARK)).name
    else:
        path = Path(folder_paths.get_full_path(FOLDER, name) or "")
    if not path.is_file():
        raise ScheduleError(f"there is no schedule file {name!r}; put it into models/{FOLDER} and refresh the page")
    return path


def stage_names() -> list[str]:
    """Return the stage files that the user picks from."""
    return folder_paths.get_filename_list(STAGES)


def find_stages(name: str) -> Path:
    """Return the path of a picked stage file.

    Raises:
        FlexiError: there is no such file.
    """
    path = Path(folder_paths.get_full_path(STAGES, name) or "")
    if not path.is_file():
        raise FlexiError(f"there is no stage file {name!r}; put it into models/{STAGES} and refresh the page")
    return path


def checked_stem(name: str) -> str:
    """Return a file name without its suffix, if it is a plain one.

    Raises:
        ScheduleError: it names a folder, a device, or has characters that some system refuses.
    """
    stem = name.strip().removesuffix(".json").rstrip(" .")
    if not _SAFE_NAME.fullmatch(stem) or stem.split(".")[0].strip().lower() in _DEVICES:
        raise ScheduleError(
            f"{name!r} is not a plain file name; use up to 100 letters, digits, spaces and _ - . , ( ) + =, without a folder"
        )
    return stem


def path_to_save(name: str) -> Path:
    """Return the path in models/flexi_schedules to which a file of this name is written; the folder is made.

    Raises:
        ScheduleError: the name is not a plain file name; see `checked_stem`.
    """
    stem = checked_stem(name)
    folder = Path(folder_paths.get_folder_paths(FOLDER)[0])
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{stem}.json"


def keep(schedule: Schedule, name: str, overwrite: bool) -> Path:
    """Write a schedule into models/flexi_schedules and return its file.

    Raises:
        ScheduleError: the name is not a plain one, or a file of this name holds another schedule and may not be replaced.
    """
    path = path_to_save(name)
    if path.exists() and not overwrite and to_dict(load_schedule(path)) != to_dict(schedule):
        raise ScheduleError(f"{path.name} holds another schedule; choose another name, or turn overwrite on")
    save_schedule(schedule, path)
    return path


def tuned_path(identity: dict[str, Any], wanted: str, effort: str) -> Path:
    """Return the file of a schedule tuned to a run.

    Args:
        identity: of the run: JSON values by name.
        wanted: speed-up or quality.
        effort: that was made.
    """
    digest = identity_digest(identity)[:16]
    name = checked_stem(f"{identity['sampler']}_{identity['steps']}_{wanted}_{effort}_{digest}")
    return Path(folder_paths.get_folder_paths(FOLDER)[0]) / TUNED / f"{name}.json"


def make_room(folder: Path) -> None:
    """Make the folder of tuned schedules, with room for one more: the oldest files beyond `MOST_TUNED` go."""
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
    for path in files[: max(len(files) - MOST_TUNED + 1, 0)]:
        path.unlink(missing_ok=True)
