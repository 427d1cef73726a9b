"""Segment: the bytes of the host tier, and how they can be read again by the next process.

One file, mapped by one process at a time: a header, a table with a record for each slot, the slots.
A content takes as many slots as it needs, wherever they are; its first slot's record describes it,
and each record names the next slot. A record counts from the moment its sequence number is written,
which is done last, so that a process may be killed between any two instructions.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from elinvar.base.digest import blake2b
from elinvar.base.errors import InputError
from elinvar.kv.tiers.tier import MAX_KEY_BYTES

_MAGIC = b"ELVHOST1"
"""The last character is the version of the format."""
_HEADER = struct.Struct("<8s32sQQQ")
"""Magic, digest of the fingerprint, bytes of the file, bytes of a slot, slots."""
_PAGE = 4096
_SEQUENCE = struct.Struct("<Q")
_RECORD = struct.Struct(f"<IIQI{MAX_KEY_BYTES}s")
"""After the sequence number (0: no content begins here) and the checksum of both: next slot, length
of the key, length and checksum of the content, key."""
_CHECK = struct.Struct("<I")
_RECORD_AT = _SEQUENCE.size + _CHECK.size
_RECORD_BYTES = 96
_NO_SLOT = 0xFFFFFFFF
_GROWTH = 2 << 20
_MAX_PIECES = 256
_MIN_SLOT = 16 << 10


@dataclass(slots=True)
class Record:
    """A content that a segment describes. Whether it is whole its checksum tells, when it is read."""

    key: bytes
    num_bytes: int
    checksum: int
    sequence: int
    slots: list[int]


def slot_size(block_sizes: Sequence[int]) -> int:
    """Bytes of a slot such that contents of these sizes waste least: a whole part of one of them."""
    least = min(_MIN_SLOT, *block_sizes)
    parts = {
        max(least, -(-size // count // 64) * 64)
        for size in block_sizes
        for count in range(1, _MAX_PIECES + 1)
        if size // count >= least
    }

    def waste(slot: int) -> float:
        return max(-(-size // slot) * (slot + _RECORD_BYTES) / size for size in block_sizes)

    return min(sorted(parts, reverse=True), key=waste)


class Segment:
    """A file of `num_bytes` bytes in slots of `slot_bytes`; without a path, memory that no other
    process finds. What is in the file is kept if it was written with the same fingerprint and sizes,
    and else dropped. Raises InputError when the file cannot be had."""

    def __init__(
        self, path: Path | None, num_bytes: int, slot_bytes: int, fingerprint: bytes, field: str
    ) -> None:
        self.slot_bytes = slot_bytes
        self.num_slots = (num_bytes - 2 * _PAGE) // (slot_bytes + _RECORD_BYTES)
        if self.num_slots < 1:
            raise InputError(
                "kv_host_memory",
                f"{num_bytes:,} bytes of host memory hold no block of {slot_bytes:,} bytes: give "
                "more kv_host_memory.",
            )
        table_bytes = -(-self.num_slots * _RECORD_BYTES // _PAGE) * _PAGE
        self._data_at = _PAGE + table_bytes
        self._num_bytes = self._data_at + self.num_slots * slot_bytes
        self._field, self._name = field, str(path or "host memory")
        self._reserved = 0
        """Bytes from the start of the slots for which there is memory."""
        digest = blake2b(fingerprint, digest_size=32).digest()
        header = _HEADER.pack(_MAGIC, digest, self._num_bytes, slot_bytes, self.num_slots)
        self._file = self._open(path)
        try:
            self.was_dropped = self._prepare(header)
            self._map = mmap.mmap(self._file, self._num_bytes)
        except OSError as error:
            os.close(self._file)
            raise self._refusal(error) from error
        except BaseException:
            os.close(self._file)
            raise
        self._view = memoryview(self._map)

    def _open(self, path: Path | None) -> int:
        if path is None:
            return os.memfd_create("elinvar-kv")
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            return os.open(path, flags, 0o600)
        except OSError as error:
            raise self._refusal(error) from error

    def _prepare(self, header: bytes) -> bool:
        """The file has this header, its size, and room for the table. True if it had others."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                self._field,
                f"{self._name} is in use by another engine: stop it, or give {self._field} "
                "another file.",
            ) from None
        status = os.fstat(self._file)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise InputError(
                self._field,
                f"{self._name} is not a file of this user: give {self._field} another file.",
            )
        os.fchmod(self._file, 0o600)  # one that was there may have been anybody's to read
        found = os.pread(self._file, len(header), 0)
        if status.st_size == self._num_bytes and found == header:
            return False
        # The header goes last: a file without it is made anew by whoever comes next.
        os.ftruncate(self._file, 0)
        os.ftruncate(self._file, self._num_bytes)
        os.posix_fallocate(self._file, 0, self._data_at)
        os.pwrite(self._file, header, 0)
        return bool(status.st_size)

    def _refusal(self, error: OSError) -> InputError:
        return InputError(
            self._field,
            f"{self._name} cannot be used for host memory ({error.strerror}): give {self._field} "
            "another file, or less.",
        )

    # ---- contents ---------------------------------------------------------------------------

    def reserve(self, slot: int) -> bool:
        """There is memory for this slot. False when the machine has no more: to touch a page that
        cannot be had would kill the process. Slots are to be reserved in ascending order."""
        need = (slot + 1) * self.slot_bytes
        while self._reserved < need:
            at = self._data_at + self._reserved
            count = min(_GROWTH, self._num_bytes - at)
            try:
                os.posix_fallocate(self._file, at, count)
            except OSError:
                return False
            self._reserved += count
        return True

    def write(self, slots: Sequence[int], key: bytes, data: memoryview, sequence: int) -> int:
        """Put a content into slots that hold none; returns its checksum."""
        following = [*slots[1:], _NO_SLOT]
        checksum = crc32(key)
        for index, slot in enumerate(slots):
            part = data[index * self.slot_bytes : (index + 1) * self.slot_bytes]
            at = self._data_at + slot * self.slot_bytes
            self._view[at : at + len(part)] = part
            checksum = crc32(part, checksum)
            if index:
                _CHECK.pack_into(self._map, self._record_at(slot) + _RECORD_AT, following[index])
        record = _RECORD.pack(following[0], len(key), len(data), checksum, key)
        number = _SEQUENCE.pack(sequence)
        at = self._record_at(slots[0])
        check = _CHECK.pack(crc32(record, crc32(number)))
        self._map[at + len(number) : at + _RECORD_AT + len(record)] = check + record
        self._map[at : at + len(number)] = number
        return checksum

    def read(self, slots: Sequence[int], key: bytes, into: memoryview) -> int:
        """Copy a content of len(into) bytes; returns the checksum of what was copied."""
        checksum = crc32(key)
        for index, slot in enumerate(slots):
            part = into[index * self.slot_bytes : (index + 1) * self.slot_bytes]
            at = self._data_at + slot * self.slot_bytes
            part[:] = self._view[at : at + len(part)]
            checksum = crc32(part, checksum)
        return checksum

    def erase(self, slot: int) -> None:
        """The content that begins in this slot is no more."""
        at = self._record_at(slot)
        self._map[at : at + _SEQUENCE.size] = bytes(_SEQUENCE.size)

    def records(self) -> list[Record]:
        """What the table describes, in the order in which it was written."""
        # Read, not mapped: reading a hole of a mapping would take memory for it.
        table = os.pread(self._file, self.num_slots * _RECORD_BYTES, _PAGE)
        found = [
            record
            for slot in range(self.num_slots)
            if (record := self._record(table, slot)) is not None
        ]
        found.sort(key=lambda record: record.sequence)
        self._reserved = (
            max((max(record.slots) for record in found), default=-1) + 1
        ) * self.slot_bytes
        return found

    def _record(self, table: bytes, slot: int) -> Record | None:
        at = slot * _RECORD_BYTES
        (sequence,) = _SEQUENCE.unpack_from(table, at)
        if not sequence:
            return None
        (check,) = _CHECK.unpack_from(table, at + _SEQUENCE.size)
        body = table[at + _RECORD_AT : at + _RECORD_AT + _RECORD.size]
        if check != crc32(body, crc32(table[at : at + _SEQUENCE.size])):
            return None
        following, key_bytes, num_bytes, checksum, key = _RECORD.unpack(body)
        count = -(-num_bytes // self.slot_bytes)
        slots = [slot, *self._chain(table, following, count - 1)]
        if len(slots) != count:
            return None
        return Record(key[:key_bytes], num_bytes, checksum, sequence, slots)

    def _chain(self, table: bytes, slot: int, count: int) -> Iterator[int]:
        while count and slot < self.num_slots:
            yield slot
            (slot,) = _CHECK.unpack_from(table, slot * _RECORD_BYTES + _RECORD_AT)
            count -= 1

    def _record_at(self, slot: int) -> int:
        return _PAGE + slot * _RECORD_BYTES

    def close(self) -> None:
        """The file stays, for the next process. A copy that another thread is amid of ends well:
        then the mapping goes when it has."""
        with contextlib.suppress(BufferError):
            self._view.release()
            self._map.close()
        os.close(self._file)
