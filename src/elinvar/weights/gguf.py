"""Reads GGUF files (versions 2 and 3, little-endian): metadata and tensors, without a copy.

The format is described in ggml's docs/gguf.md. The file is mapped; every count and offset is
checked against its size before it is used, so a truncated or corrupt file is a ModelError and
nothing else. Arrays of strings (vocabularies) are walked once and decoded only when asked for.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, overload

import numpy as np

from elinvar.base.digest import blake2b
from elinvar.base.errors import ModelError
from elinvar.weights.quants import SUPPORTED
from elinvar.weights.tensor import BLOCKS, HostTensor, MappedFile

MAGIC = b"GGUF"
MAX_DIMS = 4
DEFAULT_ALIGNMENT = 32

TENSOR_TYPES: dict[int, str] = {
    **{0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1"},
    **{10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K"},
    **{16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S"},
    **{22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"},
    **{29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"},
}

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: dict[int, np.dtype[Any]] = {
    code: np.dtype(name)
    for code, name in {
        **{0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"},
        **{10: "<u8", 11: "<i8", 12: "<f8"},
    }.items()
}


class StringArray(Sequence[str]):
    """An array of strings in a GGUF file, decoded as a whole at the first access.

    It keeps the file mapped while it lives. Raises ModelError at the first access when a string
    is not UTF-8.
    """

    def __init__(self, name: str, view: memoryview, count: int) -> None:
        self._name, self._view, self._count = name, view, count
        self._items: list[str] | None = None

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self._decoded()[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._decoded())

    def __repr__(self) -> str:
        return f"StringArray({self._name!r}, {self._count} strings)"

    def _decoded(self) -> list[str]:
        if self._items is None:
            raw, u64, at, items = bytes(self._view), _U64.unpack_from, 0, []
            try:
                for _ in range(self._count):
                    start = at + 8
                    at = start + u64(raw, at)[0]
                    items.append(raw[start:at].decode())
            except UnicodeDecodeError as error:
                raise ModelError(
                    f"The model file is corrupt (a text of {self._name} is not UTF-8); "
                    "download it again."
                ) from error
            self._items = items
        return self._items


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """What a GGUF file holds. Numeric arrays of the metadata are numpy arrays, arrays of
    strings are StringArray, the rest is int, float, bool or str."""

    file: MappedFile
    metadata: dict[str, Any]
    tensors: dict[str, HostTensor]
    header_hash: str
    """Of all the bytes before the first tensor."""


def read_gguf(path: Path) -> GGUFFile:
    """Parses the header and maps the tensors. Raises ModelError for anything but a whole,
    well-formed file whose tensor types are known."""
    file = MappedFile(path)
    try:
        return _parse(file)
    except ModelError:
        file.close()
        raise


def _parse(file: MappedFile) -> GGUFFile:
    cursor = _Cursor(file)
    if bytes(file.view[:4]) != MAGIC:
        raise ModelError(f"{file.path} is not a GGUF file (it does not begin with 'GGUF').")
    cursor.take(4, "the magic number")
    version = cursor.u32("the version")
    if version in (2 << 24, 3 << 24):
        raise ModelError(f"{file.path} is a big-endian GGUF file; convert it to little-endian.")
    if version not in (2, 3):
        raise ModelError(
            f"{file.path} is GGUF version {version}, and only 2 and 3 can be read; "
            "convert the model again with a current tool."
        )
    num_tensors = cursor.count("the number of tensors", smallest=32)
    num_keys = cursor.count("the number of metadata keys", smallest=13)
    metadata = _read_metadata(cursor, num_keys)
    split = metadata.get("split.count", 0)
    if isinstance(split, int) and split > 1:
        raise ModelError(
            f"{file.path} is one of {split} parts; join them with llama-gguf-split --merge first."
        )
    tensors, start = _read_tensors(cursor, num_tensors, metadata)
    digest = blake2b(file.view[:start], digest_size=32).hexdigest()
    return GGUFFile(file, metadata, tensors, digest)


def _read_metadata(cursor: _Cursor, num_keys: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string("a metadata key")
        if key in metadata:
            cursor.fail(f"the metadata key {key!r} appears twice")
        metadata[key] = cursor.value(key, cursor.u32(f"the type of {key}"))
    return metadata


def _read_tensors(
    cursor: _Cursor, num_tensors: int, metadata: dict[str, Any]
) -> tuple[dict[str, HostTensor], int]:
    """The tensors, and where their data begins."""
    infos: dict[str, tuple[tuple[int, ...], str, int]] = {}
    for _ in range(num_tensors):
        name = cursor.string("a tensor name")
        if name in infos:
            cursor.fail(f"the tensor {name!r} appears twice")
        num_dims = cursor.u32(f"the dimensions of {name}")
        if not 1 <= num_dims <= MAX_DIMS:
            cursor.fail(f"tensor {name!r} has {num_dims} dimensions")
        # GGUF lists the contiguous dimension first.
        dims = [cursor.u64(f"the shape of {name}") for _ in range(num_dims)]
        dtype = _tensor_type(name, cursor.u32(f"the type of {name}"), cursor)
        infos[name] = (tuple(reversed(dims)), dtype, cursor.u64(f"the offset of {name}"))

    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        cursor.fail(f"an alignment of {alignment!r}")
    start = min(-(-cursor.pos // alignment) * alignment, cursor.size)
    tensors = {
        name: _map_tensor(cursor, start, alignment, name, *info) for name, info in infos.items()
    }
    return tensors, start


def _tensor_type(name: str, code: int, cursor: _Cursor) -> str:
    dtype = TENSOR_TYPES.get(code, f"number {code}")
    if dtype not in BLOCKS:
        raise ModelError(
            f"Tensor {name!r} of {cursor.file.path} has type {dtype}, which is not supported; "
            f"use a file with {', '.join(SUPPORTED)}."
        )
    return dtype


def _map_tensor(
    cursor: _Cursor,
    start: int,
    alignment: int,
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    offset: int,
) -> HostTensor:
    elements, block_bytes = BLOCKS[dtype]
    if min(shape) < 1 or shape[-1] % elements:
        cursor.fail(f"tensor {name!r} of type {dtype} has shape {list(shape)}")
    rows = 1
    for dim in shape[:-1]:
        rows *= dim
    row_bytes = shape[-1] // elements * block_bytes
    if offset % alignment or start + offset + rows * row_bytes > cursor.size:
        cursor.fail(f"tensor {name!r} lies outside the file")
    data = cursor.file.array(start + offset, rows * row_bytes).reshape(rows, row_bytes)
    return HostTensor(name, shape, dtype, data)


class _Cursor:
    """Reads values one after the other; every read is checked against the end of the file."""

    def __init__(self, file: MappedFile) -> None:
        self.file, self.view, self.size, self.pos = file, file.view, file.size, 0

    def fail(self, what: str) -> NoReturn:
        raise ModelError(
            f"{self.file.path} is truncated or corrupt ({what}, near byte {self.pos} of "
            f"{self.size}); download it again."
        )

    def take(self, num_bytes: int, what: str) -> int:
        """Steps over num_bytes and returns where they begin."""
        start = self.pos
        if num_bytes > self.size - start:
            self.fail(f"it ends within {what}")
        self.pos = start + num_bytes
        return start

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self.view, self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self.view, self.take(8, what))[0])

    def count(self, what: str, smallest: int) -> int:
        """A number of things that take at least `smallest` bytes each."""
        count = self.u64(what)
        if count * smallest > self.size - self.pos:
            self.fail(f"{what} is {count}, more than fit in the file")
        return count

    def string(self, what: str) -> str:
        length = self.u64(what)
        start = self.take(length, what)
        try:
            return str(self.view[start : self.pos], "utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8")

    def value(self, key: str, code: int) -> Any:
        if code == _STRING:
            return self.string(f"the value of {key}")
        if code == _ARRAY:
            return self.array(key)
        return self.numbers(key, code, 1).item()

    def array(self, key: str) -> Any:
        code = self.u32(f"the type of {key}")
        if code == _STRING:
            return self.strings(key, self.count(f"the length of {key}", smallest=8))
        return self.numbers(key, code, self.count(f"the length of {key}", smallest=1))

    def numbers(self, key: str, code: int, count: int) -> np.ndarray[Any, np.dtype[Any]]:
        dtype = _SCALARS.get(code)
        if dtype is None:
            self.fail(f"{key} has the unknown value type {code}")
        start = self.take(count * dtype.itemsize, f"the value of {key}")
        if code == _BOOL:
            return np.frombuffer(self.view, np.uint8, count, start) != 0
        # A copy: metadata outlives the mapping.
        return np.frombuffer(self.view, dtype, count, start).copy()

    def strings(self, key: str, count: int) -> StringArray:
        view, u64, start, at = self.view, _U64.unpack_from, self.pos, self.pos
        try:
            for _ in range(count):
                at += 8 + u64(view, at)[0]
        except (struct.error, OverflowError, IndexError):
            at = self.size + 1
        self.take(at - start, f"the value of {key}")
        return StringArray(key, view[start:at], count)
