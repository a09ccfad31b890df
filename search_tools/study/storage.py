"""Where studies live: the Optuna storage of a URL, and the errors of its driver in words."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, GrpcStorageProxy, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from flexi_core.errors import FlexiError

FORMS = "sqlite:///FILE, postgresql://USER@HOST/DATABASE, journal:FILE or grpc://HOST:PORT"
FOR_MANY = "PostgreSQL (postgresql://), a journal file on a shared disk (journal:FILE) or a storage server (grpc://HOST:PORT)"

_JOURNAL, _PROXY = "journal:", "grpc://"
_SQLITE_WAIT = 60.0  # seconds for another writer of the file; sqlite3's own 5 are short for a slow disk
_PROXY_WAIT = 10.0
_HINTS = (
    (("is full", "no space", "file too large", "disk i/o", "quota"), "the disk is full or failing: free some space"),
    (("readonly", "read-only", "permission denied", "not permitted"), "use a folder that can be written to"),
)


def open_storage(url: str) -> BaseStorage:
    """Return the storage of a URL: a database, a journal file on a shared disk, or Optuna's gRPC proxy.

    Raises:
        FlexiError: it cannot be opened, or its driver is not installed.
    """
    with storage_errors(f"the study storage {shown(url)!r} cannot be used", anything=True), warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        if url.startswith(_JOURNAL):
            path = url.removeprefix(_JOURNAL).removeprefix("//")
            if not path:
                raise FlexiError(f"the storage {shown(url)!r} names no file; give journal:FILE")
            return JournalStorage(_JournalFile(path, lock_obj=_JournalLock(path)))
        if url.startswith(_PROXY):
            return _proxy(url)
        return _database(url)


def is_shared(url: str) -> bool:
    """Return whether several workers may use a storage at once: any but an SQLite file."""
    return not url.startswith("sqlite")


def is_database(url: str) -> bool:
    """Return whether a URL is of a database, neither of a journal file nor of a proxy."""
    return not url.startswith((_JOURNAL, _PROXY))


def sqlite_file(url: str) -> Path | None:
    """Return the database file of an SQLite URL; None for other storages, and for one in memory."""
    from sqlalchemy.engine import make_url

    database = None if is_shared(url) else make_url(url).database
    return None if database in (None, "", ":memory:") else Path(database)


def shown(url: str) -> str:
    """Return a URL as it may be printed: without its password."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return url if url.startswith(_JOURNAL) else make_url(url).render_as_string(hide_password=True)
    except (ArgumentError, ValueError):
        # Whatever stands between the kind and the host may be a password.
        return re.sub(r"(?s)(://|^)(.*)@", lambda found: f"{found[1]}***@", url)


@contextmanager
def storage_errors(failed: str, advice: str = "", anything: bool = False) -> Iterator[None]:
    """Turn what storages raise into one clear error.

    Args:
        failed: what could not be done.
        advice: the error's end.
        anything: of every exception, not only of those that a driver raises while it works.
    """
    try:
        yield
    except FlexiError:
        raise
    except Exception as error:
        if not anything and not isinstance(error, _driver_errors()):
            raise
        raise FlexiError(f"{failed}: {_reason(error)}{advice and f'. {advice}'}") from error


def _driver_errors() -> tuple[type[Exception], ...]:
    from sqlalchemy.exc import SQLAlchemyError

    grpc = sys.modules.get("grpc")
    return (OSError, SQLAlchemyError, StorageInternalError, *([grpc.RpcError] if grpc else []))


def _reason(error: BaseException) -> str:
    """Return the first line of what went wrong at the bottom, and what helps."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, ImportError):
        return f"{error}; pip install 'flexiffusion[distributed]' brings the drivers of PostgreSQL and gRPC"
    # A failed remote call prints as a page; its details are the line.
    details = error.details() if hasattr(error, "details") else None
    text = (details or str(error) or type(error).__name__).splitlines()[0]
    hints = [hint for words, hint in _HINTS if any(word in text.lower() for word in words)]
    return "; ".join([text, *hints])


def _database(url: str) -> RDBStorage:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    try:
        parsed = make_url(url)
        if parsed.drivername in ("postgresql", "postgres"):
            parsed = parsed.set(drivername="postgresql+psycopg")
        # A worker is silent for minutes between two writes: long enough for a firewall to forget its connection.
        options = {"pool_pre_ping": True} if is_shared(url) else {"connect_args": {"timeout": _SQLITE_WAIT}}
        return RDBStorage(parsed.render_as_string(hide_password=False), engine_kwargs=options)
    except (ArgumentError, NoSuchModuleError) as error:
        raise FlexiError(f"the study storage {shown(url)!r} is of no known kind; give {FORMS}") from error


def _proxy(url: str) -> GrpcStorageProxy:
    host, colon, port = url.removeprefix(_PROXY).rstrip("/").rpartition(":")
    if not (host and colon and port.isdecimal()):
        raise FlexiError(f"the storage {shown(url)!r} is not a storage server's; give grpc://HOST:PORT")
    proxy = GrpcStorageProxy(host=host, port=int(port))
    try:
        proxy.wait_server_ready(timeout=_PROXY_WAIT)
    except ConnectionError as error:
        proxy.close()
        raise FlexiError(f"no storage server answers at {host}:{port}; start one with flexi storage-server") from error
    return proxy


class _JournalFile(JournalFileBackend):
    """Optuna's journal file, of which a damaged line is named: what it meant is not guessed, for later lines build on it."""

    def __init__(self, path: str, lock_obj: JournalFileOpenLock) -> None:
        super().__init__(path, lock_obj)
        self._path = path

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        whole = log_number_from  # lines
        try:
            for log in super().read_logs(log_number_from):
                if not isinstance(log, dict) or not isinstance(log.get("op_code"), int) or "worker_id" not in log:
                    raise ValueError("it is no record of Optuna's")
                whole += 1
                yield log
        except ValueError as error:  # neither JSON nor text, included
            raise FlexiError(
                f"line {whole + 1} of the journal {self._path} is damaged ({error}); take a copy, or what is before "
                f"the line: head -n {whole} FILE > NEW"
            ) from error


class _JournalLock(JournalFileOpenLock):
    """Optuna's lock of a journal file, which also drops the unfinished last line that a full disk or a crash left.

    Optuna would append to that line, and could not read the file from there on.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._path = path

    def acquire(self) -> bool:
        super().acquire()
        try:
            with open(self._path, "rb+") as file:
                end = file.seek(0, os.SEEK_END)
                if end and file.seek(end - 1) is not None and file.read(1) != b"\n":
                    file.truncate(_end_of_last_line(file, end))
        except BaseException:
            self.release()
            raise
        return True


def _end_of_last_line(file, end: int, block: int = 1 << 16) -> int:
    """Return where the last finished line of a file ends, searched backwards from its end."""
    while end > 0:
        start = max(0, end - block)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
