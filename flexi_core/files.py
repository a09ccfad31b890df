"""Files read within bounds, and written whole or not at all, under names that every file system takes."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LONGEST_STEM = 50  # characters; file systems bear 255 bytes, and more is added to it
_ABANDONED = 3600.0  # seconds since the last write, after which a temporary file is a killed process's


def file_stem(name: str) -> str:
    """Return a name for files: letters of any script and a few signs; where others are left out, a digest keeps it apart."""
    stem = re.sub(r"[^\w .+=-]+", "_", name)[:_LONGEST_STEM].encode(errors="replace").decode()
    return stem if stem == name else f"{stem}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:6]}"


def read_bounded(path: str | os.PathLike[str], most: int) -> bytes:
    """Return the content of a file, which is never waited for.

    Args:
        path: of a file.
        most: bytes.

    Raises:
        OSError: it cannot be opened, is a folder, a pipe, or a device, or is larger.
        ValueError: its name has a NUL.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is no file, but a folder, a pipe or a device")
        content = file.read(most + 1) if found.st_size <= most else b""
        if max(found.st_size, len(content)) > most:
            size = max(found.st_size, len(content)) / 2**20
            raise OSError(errno.EFBIG, f"{size:.1f} MiB; at most {most / 2**20:g} MiB are read")
        return content


@contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the same folder; rename it to `path` when the block ends well, remove it when not.

    What a killed process left of an earlier try at the same file goes when one ends well.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files; a shared schedule should be as readable as any new file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
        _remove_left(path)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_left(path: Path) -> None:
    """Remove the temporary files of a file just written that nobody has written to for a long time."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with suppress(OSError):  # another's, or gone by now
            if path.stat().st_mtime - left.stat().st_mtime > _ABANDONED:  # the disk's own clock
                left.unlink()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file whole or not at all; its folder is made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
