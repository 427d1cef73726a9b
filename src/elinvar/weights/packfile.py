"""Packed weights of one model in one file, which a warm start maps.

Layout, little-endian: an 88-byte header (magic, version, key, sizes, checksum of the table), a
JSON table of the entries, then 64-byte aligned payloads in the table's order. The file is
written beside its place and renamed, so one that is there is whole. It is a cache: whatever
does not fit is StalePack, and the caller packs again.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from elinvar.base.errors import ModelError
from elinvar.ops.layout import ALIGN, Weight, WeightKind, packed_bytes
from elinvar.weights.atomic import atomic_file
from elinvar.weights.tensor import MappedFile

PACK_VERSION = 3
"""Raised whenever ops.layout, quants or this file change what the bytes mean."""

_MAGIC = b"ELINVARW"
_HEADER = struct.Struct("<8sIIQ32s32s")
"""magic, version, bytes of the table, bytes of the file, key, sha256 of the table."""


class StalePack(Exception):  # noqa: N818 (not an error: the cache is behind)
    """A packed file that cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class Entry:
    name: str
    kind: WeightKind | Literal["vector"]
    """A vector is float32."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        if self.kind == "vector":
            return math.prod(self.shape) * 4
        return packed_bytes(self.kind, (self.shape[0], self.shape[1]))


@dataclass(frozen=True, slots=True)
class Pack:
    """What a packed file holds. Arrays are read-only views of the mapped file."""

    state: dict[str, Weight | NDArray[np.float32]]
    notes: list[str]


def pack_key(*parts: object) -> bytes:
    """32 bytes that stand for everything a pack depends on."""
    return hashlib.sha256(repr((PACK_VERSION, *parts)).encode()).digest()


def write_pack(
    path: Path,
    key: bytes,
    entries: Sequence[Entry],
    notes: Sequence[str],
    chunks: Callable[[Entry], Iterable[NDArray[np.uint8]]],
) -> None:
    """Writes the packed file; `chunks(entry)` gives the entry's bytes piece by piece.

    Raises ModelError naming the folder and the bytes needed when the disk is full; nothing is
    left behind then.
    """
    rows = [[e.name, e.kind, list(e.shape)] for e in entries]
    table = json.dumps({"entries": rows, "notes": list(notes)}).encode()
    total = _offsets(len(table), entries)[-1]
    digest = hashlib.sha256(table).digest()
    header = _HEADER.pack(_MAGIC, PACK_VERSION, len(table), total, key, digest)
    with atomic_file(path, total) as file:
        file.write(header + table)
        file.write(bytes(_pad(len(header) + len(table))))
        for entry in entries:
            for chunk in chunks(entry):
                file.write(chunk.data)
            file.write(bytes(_pad(entry.nbytes)))


def read_pack(path: Path, key: bytes) -> Pack:
    """Maps a packed file. Raises StalePack when it is absent, damaged, of another version or
    packed from something else."""
    if not path.exists():
        raise StalePack("there is none")
    try:
        file = MappedFile(path)
    except ModelError as error:
        raise StalePack(str(error)) from error
    try:
        return _read(file, key)
    except StalePack:
        file.close()
        raise


def _read(file: MappedFile, key: bytes) -> Pack:
    if file.size < _HEADER.size:
        raise StalePack("it is truncated")
    magic, version, table_bytes, total, found, digest = _HEADER.unpack_from(file.view)
    if magic != _MAGIC or version != PACK_VERSION:
        raise StalePack("it is of another version")
    if found != key:
        raise StalePack("it was packed from another file or by other rules")
    if total != file.size or table_bytes > file.size - _HEADER.size:
        raise StalePack("it is truncated")
    table = bytes(file.view[_HEADER.size : _HEADER.size + table_bytes])
    if hashlib.sha256(table).digest() != digest:
        raise StalePack("its table is damaged")
    content = json.loads(table)
    entries = [Entry(name, kind, tuple(shape)) for name, kind, shape in content["entries"]]
    state: dict[str, Weight | NDArray[np.float32]] = {}
    for entry, start in zip(entries, _offsets(table_bytes, entries), strict=False):
        data = file.array(start, entry.nbytes)
        state[entry.name] = as_value(entry, data)
    file.will_need()
    return Pack(state, content["notes"])


def as_value(entry: Entry, data: NDArray[np.uint8]) -> Weight | NDArray[np.float32]:
    """The weight or vector that the entry's bytes stand for."""
    if entry.kind == "vector":
        return data.view("<f4").reshape(entry.shape)
    return Weight(entry.kind, (entry.shape[0], entry.shape[1]), data)


def _offsets(table_bytes: int, entries: Sequence[Entry]) -> list[int]:
    """Where each entry begins, and the size of the file."""
    at = _HEADER.size + table_bytes
    offsets = [at + _pad(at)]
    for entry in entries:
        offsets.append(offsets[-1] + entry.nbytes + _pad(entry.nbytes))
    return offsets


def _pad(size: int) -> int:
    return -size % ALIGN
