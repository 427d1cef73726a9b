"""PackedTier: a tier that keeps contents smaller, and gives back every bit of them.

Of floating-point numbers the low bytes are noise, while the bytes with sign and exponent repeat. So
these alone are compressed, apart from the others (byte planes: Zip-NN, Hershcovitch et al., 2024).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol

from elinvar.base.errors import InputError
from elinvar.kv.tiers.tier import Tier

_HEADER = struct.Struct("<BBxxI")
"""Kind, bytes a number, bytes of the content."""
_AS_IT_IS, _PLANES = 1, 2
_LEVEL = 1
"""Of zstd: the next ones take longer for less than a percent."""


class SizedTier(Tier, Protocol):
    """A tier that knows the sizes of its contents."""

    def read_up_to(self, key: bytes, into: memoryview) -> int | None:
        """`read` of a content of at most len(into) bytes: how many it has; None: False."""
        ...

    def drop(self, key: bytes) -> None:
        """Forget it."""
        ...


class PackedTier:
    """item_bytes: of a number in the contents. It pays where `tier` is slower than packing:
    docs/design/019-remote-tiers.md has the figures."""

    def __init__(self, tier: SizedTier, item_bytes: int) -> None:
        """Raises InputError where the package that compresses is missing."""
        self.name = tier.name
        self._tier, self._item_bytes = tier, item_bytes
        self._zstd = _import_zstd()

    def has(self, keys: Sequence[bytes]) -> list[bool]:
        return self._tier.has(keys)

    def read(self, key: bytes, into: memoryview) -> bool:
        packed = memoryview(bytearray(_HEADER.size + len(into)))
        size = self._tier.read_up_to(key, packed)
        if size is None:
            return False
        if self._unpack(packed[:size], into):
            return True
        self._tier.drop(key)
        return False

    def write(self, key: bytes, data: memoryview) -> None:
        self._tier.write(key, memoryview(self._pack(data)))

    def drop(self, key: bytes) -> None:
        self._tier.drop(key)

    def close(self) -> None:
        self._tier.close()

    def _pack(self, data: memoryview) -> bytes:
        width = self._item_bytes
        if len(data) % width == 0:
            content = bytes(data)  # a slice with a step is 10 times quicker of bytes
            high = self._zstd.compress(content[width - 1 :: width], _LEVEL)
            if len(high) < len(data) // width:
                planes = [content[i::width] for i in range(width - 1)]
                return b"".join([_HEADER.pack(_PLANES, width, len(data)), *planes, high])
        return _HEADER.pack(_AS_IT_IS, 1, len(data)) + data

    def _unpack(self, packed: memoryview, into: memoryview) -> bool:
        if len(packed) < _HEADER.size:
            return False
        kind, width, size = _HEADER.unpack(packed[: _HEADER.size])
        body = packed[_HEADER.size :]
        if size != len(into):
            return False
        if kind == _AS_IT_IS and len(body) == size:
            into[:] = body
            return True
        if kind != _PLANES or width == 0 or size % width:
            return False
        length = size // width
        high = self._decompress(body[(width - 1) * length :], length)
        if high is None:
            return False
        content = bytearray(size)
        for i in range(width - 1):
            content[i::width] = body[i * length : (i + 1) * length]
        content[width - 1 :: width] = high
        into[:] = content
        return True

    def _decompress(self, packed: memoryview, size: int) -> bytes | None:
        """Just so many bytes, whatever `packed` claims to hold."""
        decompressor = self._zstd.ZstdDecompressor()
        try:
            data: bytes = decompressor.decompress(packed, max_length=size + 1)
        except self._zstd.ZstdError:
            return None
        whole = decompressor.eof and not decompressor.unused_data
        return data if whole and len(data) == size else None


def _import_zstd() -> Any:
    for name in ("compression.zstd", "backports.zstd"):  # Python has it from 3.14 on
        try:
            return import_module(name)
        except ImportError:
            continue
    raise InputError(
        "tier", "A packed tier needs the package backports.zstd: pip install 'elinvar[packed]'."
    )
