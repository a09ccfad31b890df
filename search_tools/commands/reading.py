"""Open a study that a command reads and does not change."""

from __future__ import annotations

from pathlib import Path

import optuna

from flexi_core.errors import FlexiError

from ..study.storage import open_storage, shown, sqlite_file, storage_errors

_JOURNAL = "journal:"
_NAMED = 12  # studies that a message lists


def read_study(storage: str, name: str | None) -> optuna.Study:
    """Return a study of a storage; without a name its only one.

    Raises:
        FlexiError: the storage cannot be opened, has no study of this name, or several and none is named.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    file = _file_of(storage)
    if file is not None and not file.is_file():  # opening it would make it
        raise FlexiError(f"{file}: there is no such file of studies; run flexi search, or give the --storage that it had")
    opened = open_storage(storage)
    with storage_errors(f"the study storage {shown(storage)!r} cannot be read"):
        names = sorted(optuna.get_all_study_names(opened))
        if not names:
            raise FlexiError(f"the storage {shown(storage)!r} has no study; run flexi search with it")
        known = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
        if name is None and len(names) > 1:
            raise FlexiError(f"the storage has {len(names)} studies; name one of them: {known}")
        if name is not None and name not in names:
            raise FlexiError(f"the storage has no study {name!r}; it has {known}")
        return optuna.load_study(study_name=name or names[0], storage=opened)


def _file_of(storage: str) -> Path | None:
    if storage.startswith(_JOURNAL):
        return Path(storage.removeprefix(_JOURNAL).removeprefix("//"))
    return sqlite_file(storage)
