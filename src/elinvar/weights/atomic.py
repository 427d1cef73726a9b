"""Files that appear whole or not at all, and full disks that end in one sentence."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from elinvar.base.errors import ModelError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_STALE_SECONDS = 2
"""A file so young may not be locked by its writer yet."""


@contextlib.contextmanager
def atomic_file(path: Path, num_bytes: int) -> Iterator[BinaryIO]:
    """A new file of about num_bytes that replaces `path` when the block ends without an error.

    It is written beside `path`, flushed to the disk and renamed; on any error it is removed.
    Raises ModelError naming the folder when the disk is full or the file cannot be written.
    """
    folder = path.parent
    _remove_stale(folder)
    temporary = folder / f".{path.name}.{os.urandom(6).hex()}.tmp"
    try:
        if shutil.disk_usage(folder).free < num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with temporary.open("xb") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno in _FULL:
            message = (
                f"{folder} has too little free space: {num_bytes:,} bytes are needed; "
                "free some and try again."
            )
        else:
            message = f"{path} cannot be written: {error.strerror}."
        raise ModelError(message) from error
    finally:
        temporary.unlink(missing_ok=True)


def _remove_stale(folder: Path) -> None:
    """Removes what killed processes left behind: the lock on it died with its writer."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                with path.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
