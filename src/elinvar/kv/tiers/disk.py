"""DiskTier: contents as files named by their keys, in a folder that processes may share.

The folder is the truth: a content is there if its file is. In memory there is only what eviction
needs, the files in the order of their last use, read from the folder before the first write and now
and then after. A file appears whole (written under another name, then renamed) and says of itself
what it should be. Nothing is flushed to the device: what a power failure loses is computed again, and
what it leaves half written its checksum tells.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import os
import re
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Lock
from zlib import crc32

from elinvar.base.errors import InputError
from elinvar.kv.tiers.tier import TierError

_FORMAT = "v1"
_HEADER = struct.Struct("<8sQI")
"""Magic, bytes of the content, checksum of key and content."""
_MAGIC = b"ELVBLK1\n"
_NAME = re.compile(r"[0-9a-f]{2,128}\.kv")
_CLUSTER = 4096
_STALE_SECONDS = 2
"""A file so young may not be locked by its writer yet."""
_RESCAN = 8
"""The folder is read again when this part of its bound was written: others may write, too."""

_log = logging.getLogger(__name__)

Exist = Callable[[Sequence[str]], list[bool]]


def exist_each(paths: Sequence[str]) -> list[bool]:
    return [os.path.exists(path) for path in paths]


class DiskTier:
    """At most `num_bytes` bytes of files below `folder`, which is made if it is not there; the file
    not used for longest goes first. Files of other names are left alone. Processes that share a
    folder should give it the same bound; each may exceed it by an eighth. A content larger than the
    bound is not kept. field: the option that a
    refusal names. exist: whether there are files of these names, where one who asks for many at once
    is quicker. Raises InputError when the folder cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        num_bytes: int,
        name: str = "disk",
        field: str = "kv_disk",
        exist: Exist = exist_each,
    ) -> None:
        self.name = name
        self._exist = exist
        self.num_damaged = 0
        self._folder = folder / _FORMAT
        self._new = self._folder / "new"
        self._bound = num_bytes
        self._lock = Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()
        """By name, of the files not used for longest first."""
        self._held = self._coming = 0
        self._since_scan = num_bytes
        """Bytes written; the first write reads the folder."""
        self._making_room = Lock()
        self._numbers = itertools.count()
        try:
            self._make_folder(self._new)
            for place in (self._folder, self._new):
                _claim(place, field)
            self._remove_leftovers()
        except OSError as error:
            raise InputError(
                field,
                f"{folder} cannot keep KV blocks ({error.strerror}): give {field} a folder that "
                "this user may write to.",
            ) from error

    @property
    def num_bytes(self) -> int:
        """Of the files, as far as the folder was read."""
        return self._held

    # ---- the protocol -----------------------------------------------------------------------

    def has(self, keys: Sequence[bytes]) -> list[bool]:
        return self._exist([self._path(key) for key in keys])

    def read(self, key: bytes, into: memoryview) -> bool:
        path = self._path(key)
        with self._os_errors():
            try:
                # A pipe of this name must not be waited for.
                file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            except FileNotFoundError:
                return False
            try:
                if _read_content(file, key, into):
                    with contextlib.suppress(OSError):  # a folder that may only be read
                        # The kernel's own time of it is some milliseconds coarse.
                        os.utime(file, ns=(now := time.time_ns(), now))
                    self._used(path)
                    return True
            finally:
                os.close(file)
            if not self.num_damaged:
                _log.warning("%s is damaged and is removed, as others will be", path)
            self.num_damaged += 1
            self._remove(path)
            return False

    def write(self, key: bytes, data: memoryview) -> None:
        path = self._path(key)
        size = _on_disk(_HEADER.size + len(data))
        with self._os_errors():
            if size > self._bound or os.path.exists(path):
                return
            self._make_room(size)
            try:
                self._write(path, key, data)
            finally:
                with self._lock:
                    self._coming -= size
            with self._lock:
                self._held += size - self._sizes.pop(_name(path), 0)
                self._sizes[_name(path)] = size
                self._since_scan += size

    def close(self) -> None:
        """Nothing to give back: no file stays open."""

    # ---- files ------------------------------------------------------------------------------

    def _path(self, key: bytes) -> str:
        name = key.hex()
        return f"{self._folder}/{name[:2]}/{name}.kv"

    def _write(self, path: str, key: bytes, data: memoryview) -> None:
        temporary = f"{self._new}/{os.getpid()}-{next(self._numbers)}-{os.urandom(4).hex()}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            file = os.open(temporary, flags, 0o600)
        except FileNotFoundError:  # somebody emptied the folder
            self._make_folder(self._new)
            file = os.open(temporary, flags, 0o600)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            header = _HEADER.pack(_MAGIC, len(data), crc32(data, crc32(key)))
            written = os.writev(file, [header, data])
            while written < len(header) + len(data):
                written += os.write(file, data[written - len(header) :])
            try:
                os.rename(temporary, path)
            except FileNotFoundError:
                self._make_folder(Path(path).parent)
                os.rename(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        finally:
            os.close(file)

    def _make_folder(self, folder: Path) -> None:
        # What people say to a model is nobody else's to read.
        self._folder.mkdir(0o700, parents=True, exist_ok=True)
        folder.mkdir(0o700, exist_ok=True)

    def _remove(self, path: str) -> None:
        with contextlib.suppress(OSError):  # gone already, or not ours to remove
            os.unlink(path)
        with self._lock:
            self._held -= self._sizes.pop(_name(path), 0)

    def _used(self, path: str) -> None:
        with self._lock:
            if _name(path) in self._sizes:
                self._sizes.move_to_end(_name(path))

    # ---- the bound --------------------------------------------------------------------------

    def _make_room(self, size: int) -> None:
        """Promise `size` bytes of the bound to a file that is to come."""
        with self._making_room:
            if self._since_scan * _RESCAN >= self._bound:
                self._scan()
            while True:
                with self._lock:
                    if self._held + self._coming + size <= self._bound or not self._sizes:
                        self._coming += size
                        return
                    oldest = next(iter(self._sizes))
                self._remove(f"{self._folder}/{oldest[:2]}/{oldest}")

    def _scan(self) -> None:
        self._remove_leftovers()
        found = []
        with os.scandir(self._folder) as folders:
            for folder in folders:
                if len(folder.name) == 2 and folder.is_dir(follow_symlinks=False):
                    found += list(_files(folder.path))
        found.sort()
        with self._lock:
            self._sizes = OrderedDict((name, size) for _, name, size in found)
            self._held = sum(self._sizes.values())
            self._since_scan = 0

    def _remove_leftovers(self) -> None:
        """Of processes that were killed: the lock on a file died with its writer."""
        with os.scandir(self._new) as files:
            for entry in files:
                with contextlib.suppress(OSError):
                    if time.time() - entry.stat().st_mtime > _STALE_SECONDS:
                        file = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                        try:
                            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                            os.unlink(entry.path)
                        finally:
                            os.close(file)

    @contextlib.contextmanager
    def _os_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TierError(f"{self._folder}: {error.strerror}") from error


def _claim(folder: Path, field: str) -> None:
    """Nobody else may read a folder that was there already. Raises InputError for another's."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        status = os.fstat(file)
        if status.st_uid != os.geteuid():
            raise InputError(
                field,
                f"{folder} belongs to another user: give {field} a folder of this user's own.",
            )
        if status.st_mode & 0o077:
            os.fchmod(file, 0o700)
    finally:
        os.close(file)


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _on_disk(num_bytes: int) -> int:
    return -(-num_bytes // _CLUSTER) * _CLUSTER


def _files(folder: str) -> Iterator[tuple[int, str, int]]:
    """Time of the last use, name and bytes of each content's file."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if _NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(FileNotFoundError):  # evicted by another process
                    status = entry.stat(follow_symlinks=False)
                    yield status.st_mtime_ns, entry.name, _on_disk(status.st_size)


def _read_content(file: int, key: bytes, into: memoryview) -> bool:
    header = bytearray(_HEADER.size)
    whole = len(header) + len(into)
    if os.fstat(file).st_size != whole:
        return False
    count = os.preadv(file, [header, into], 0)
    while len(header) <= count < whole:
        more = os.preadv(file, [into[count - len(header) :]], count)
        if not more:
            return False
        count += more
    if count < whole:
        return False
    return _HEADER.unpack(header) == (_MAGIC, len(into), crc32(into, crc32(key)))
