"""Contents of KV blocks as objects: fsspec's memory and files, and a store that talks
asynchronously, as those in clouds do."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from elinvar.base.errors import InputError
from elinvar.kv.tiers.objects import ObjectTier
from elinvar.kv.tiers.tier import MAX_KEY_BYTES, TierError

STORE: dict[str, bytes] = {}


class CloudFileSystem(AsyncFileSystem):
    """What S3's is to ObjectTier, in a dict. `trouble` happens in each call."""

    protocol = "cloud"
    trouble = ""
    largest_answer = 0

    async def _begin(self) -> None:
        if self.trouble == "hangs":
            await asyncio.sleep(60)
        if self.trouble:
            raise PermissionError(self.trouble)

    async def _info(self, path: str, **options: Any) -> dict[str, Any]:
        await self._begin()
        if path not in STORE:
            raise FileNotFoundError(path)
        return {"name": path, "size": len(STORE[path]), "type": "file"}

    async def _cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **options: Any
    ) -> bytes:
        await self._begin()
        if path not in STORE:
            raise FileNotFoundError(path)
        return STORE[path][start:end]

    async def _pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        await self._begin()
        STORE[path] = value

    async def _rm_file(self, path: str, **options: Any) -> None:
        await self._begin()
        if STORE.pop(path, None) is None:
            raise FileNotFoundError(path)


fsspec.register_implementation("cloud", CloudFileSystem)


@pytest.fixture(params=["memory", "cloud"])
def tier(request: pytest.FixtureRequest) -> Iterator[ObjectTier]:
    STORE.clear()
    MemoryFileSystem.store.clear()
    tier = ObjectTier(f"{request.param}:///bucket/blocks")
    yield tier
    tier.close()


def stored(tier: ObjectTier, key: bytes) -> bytes:
    found: bytes = tier._fs.cat_file(tier._path(key))
    return found


def read(tier: ObjectTier, key: bytes, size: int) -> bytes | None:
    into = bytearray(size)
    return bytes(into) if tier.read(key, memoryview(into)) else None


def test_what_is_written_is_read_by_whoever_comes_after(tier: ObjectTier) -> None:
    keys = [bytes([i]) * MAX_KEY_BYTES for i in range(100)]
    assert tier.has(keys) == [False] * 100 and read(tier, keys[0], 10) is None
    for i in range(0, 100, 2):
        tier.write(keys[i], memoryview(bytes([i]) * (i + 1)))
    other = ObjectTier(tier._url)
    assert other.has(keys) == [i % 2 == 0 for i in range(100)]
    for i in range(100):
        assert read(other, keys[i], i + 1) == (None if i % 2 else bytes([i]) * (i + 1))
    tier.write(keys[0], memoryview(b"another"))
    assert read(other, keys[0], 7) == b"another"
    tier.drop(keys[0])
    tier.drop(keys[0])
    assert other.has(keys[:1]) == [False]


def test_an_object_that_is_not_what_was_written_is_forgotten(tier: ObjectTier) -> None:
    tier.write(b"whole", memoryview(bytes(range(200))))
    body = stored(tier, b"whole")
    bad = {
        b"empty": b"",
        b"cut": body[:-1],
        b"header": body[:16],
        b"longer": body + b"x",
        b"bit": body[:-1] + bytes([body[-1] ^ 1]),
        b"format": b"X" + body[1:],
        b"another's": body,
    }
    for key, what in bad.items():
        tier.write(key, memoryview(b"x"))
        tier._fs.pipe_file(tier._path(key), what)
        assert read(tier, key, 200) is None
        assert tier.has([key]) == [False], key
    tier.write(b"size", memoryview(bytes(200)))
    assert read(tier, b"size", 201) is None and tier.has([b"size"]) == [False]
    assert read(tier, b"whole", 200) == bytes(range(200))


def test_no_more_of_an_object_is_fetched_than_there_may_be() -> None:
    tier = ObjectTier("cloud://bucket")
    STORE[tier._path(b"k")] = bytes(10_000_000)
    asked = []
    whole = tier._fs._cat_file

    async def watched(path: str, **options: Any) -> bytes:
        found: bytes = await whole(path, **options)
        asked.append(len(found))
        return found

    tier._fs._cat_file = watched
    assert read(tier, b"k", 100) is None
    assert asked == [16 + 100 + 1]


@pytest.mark.parametrize(
    ("trouble", "words"), [("hangs", "within 0.1 s"), ("Access denied.", "Access denied")]
)
def test_a_store_in_trouble_is_an_error(
    trouble: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = ObjectTier("cloud://bucket", timeout=0.1)
    monkeypatch.setattr(CloudFileSystem, "trouble", trouble)
    into = memoryview(bytearray(10))
    for call in (
        lambda: tier.has([b"k"] * 100),
        lambda: tier.read(b"k", into),
        lambda: tier.write(b"k", into),
    ):
        with pytest.raises(TierError, match=rf"cloud://bucket cannot be used: .*{words}\.$"):
            call()


def test_what_is_missing_is_said_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InputError, match="pip install gcsfs"):
        ObjectTier("gs://bucket/prefix")
    with pytest.raises(InputError, match=r"nosuch://x is no place for objects: .*nosuch"):
        ObjectTier("nosuch://me:hidden@x")
    for url in ("file:///a", "local:///a"):
        with pytest.raises(InputError, match="give the folder itself"):
            ObjectTier(url)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(InputError, match=r"pip install 'elinvar\[objects\]'"):
        ObjectTier("s3://bucket/prefix")
