"""A lock against two runs on one SQLite study by mistake; it ends with its process, however that ends."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from flexi_core.errors import FlexiError

from .storage import FOR_MANY, shown, sqlite_file, storage_errors


@contextmanager
def study_lock(storage: str, name: str) -> Iterator[None]:
    """Hold the study of an SQLite file; on other storages, which several workers share, do nothing.

    Raises:
        FlexiError: another process holds the study or serves the file.
    """
    database = sqlite_file(storage)
    if database is None:
        yield
        return
    lock, server = _lock(database, hashlib.sha256(name.encode()).hexdigest()[:12]), _lock(database, "server")
    with storage_errors(f"the study storage {shown(storage)!r} cannot be used"):
        if not _acquire(lock):
            raise FlexiError(
                f"another process searches the study {name!r} of {database} (it holds {lock.lock_file}); wait for it, stop it, "
                f"or give another --study. For several at once use {FOR_MANY}"
            )
    try:
        if not _acquire(server):
            raise FlexiError(f"a storage server serves {database}; give --storage grpc://HOST:PORT with its address")
        server.release()
        yield
    finally:
        lock.release()


@contextmanager
def server_lock(storage: str) -> Iterator[None]:
    """Hold all studies of an SQLite file for a storage server; on other storages do nothing.

    Raises:
        FlexiError: another server serves the file, or a search holds one of its studies.
    """
    database = sqlite_file(storage)
    if database is None:
        yield
        return
    server = _lock(database, "server")
    with storage_errors(f"the study storage {shown(storage)!r} cannot be used"):
        if not _acquire(server):
            raise FlexiError(f"another storage server serves {database}; use that one")
        for path in database.parent.glob(f"{database.name}.*.lock"):
            other = FileLock(path)
            if path != Path(server.lock_file) and not _acquire(other):
                server.release()
                raise FlexiError(f"a search holds a study of {database} ({path}); wait for it or stop it")
            other.release()
    try:
        yield
    finally:
        server.release()


def _lock(database: Path, what: str) -> FileLock:
    if not database.parent.is_dir():  # the lock would make it
        raise FlexiError(f"the study storage {database} cannot be used: there is no folder {database.parent}")
    return FileLock(database.with_name(f"{database.name}.{what}.lock"))


def _acquire(lock: FileLock) -> bool:
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if not Path(lock.lock_file).exists():  # to filelock, a folder where no file can be made looks like one that is busy
            raise FlexiError(f"{lock.lock_file} cannot be made; use a folder that can be written to") from None
        return False
    return True
