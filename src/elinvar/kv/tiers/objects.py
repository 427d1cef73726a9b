"""ObjectTier: contents of KV blocks in a store of objects, one each: S3 and whatever fsspec knows.

It gives nothing up: what a bucket keeps, and for how long, are the bucket's own rules.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from elinvar.base.errors import InputError
from elinvar.kv.tiers.tier import TierError, without_user
from elinvar.kv.tiers.wire import content_tag

_HEADER = struct.Struct("<4sBxxxQ")
_MAGIC, _VERSION = b"EKVO", 1
_AT_ONCE = 32
"""Objects that `has` asks for."""
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


class ObjectTier:
    """url: a place for objects, as `s3://bucket/prefix`; options: fsspec's for such a place (keys,
    an endpoint, ...), which also come from its own environment variables and files. A content is
    the object `<prefix>/<2 hex digits>/<key in hex>`: its checksum, then its bytes. timeout: seconds
    of one call to the store, where fsspec talks to it asynchronously (S3, Google, Azure)."""

    def __init__(self, url: str, *, timeout: float = 30.0, **options: Any) -> None:
        """Raises InputError where a package is missing or the URL is none."""
        self.name, self._url, self._timeout = "objects", without_user(url), timeout
        self._fs, root = _open(url, options)
        self._root = root.rstrip("/")

    def has(self, keys: Sequence[bytes]) -> list[bool]:
        paths = [self._path(key) for key in keys]
        if self._fs.async_impl:
            return self._sync(self._exist, paths)
        return [self._do("info", path) is not None for path in paths]

    def read(self, key: bytes, into: memoryview) -> bool:
        size = self.read_up_to(key, into)
        if size is not None and size < len(into):
            self.drop(key)
        return size == len(into)

    def read_up_to(self, key: bytes, into: memoryview) -> int | None:
        """`read` of a content whose size is not known: how many bytes of `into` it fills."""
        # One byte more than may be there, so that a longer object is seen, and never more.
        most = _HEADER.size + len(into) + 1
        found = self._do("cat_file", self._path(key), start=0, end=most)
        if found is None:
            return None
        content = memoryview(found)[_HEADER.size :]
        if len(found) == most or found[: _HEADER.size] != _header(key, content):
            self.drop(key)
            return None
        into[: len(content)] = content
        return len(content)

    def write(self, key: bytes, data: memoryview) -> None:
        # A store shows an object once it has all of it.
        self._do("pipe_file", self._path(key), _header(key, data) + data)

    def drop(self, key: bytes) -> None:
        self._do("rm_file", self._path(key))

    def close(self) -> None:
        """fsspec shares its connections and closes them itself."""

    def _path(self, key: bytes) -> str:
        name = key.hex()
        return f"{self._root}/{name[:2]}/{name}"

    def _do(self, method: str, *arguments: Any, **options: Any) -> Any:
        """What the filesystem's method returns; None where there is no such object."""
        if self._fs.async_impl and hasattr(self._fs, f"_{method}"):
            return self._sync(getattr(self._fs, f"_{method}"), *arguments, **options)
        return self._told(getattr(self._fs, method), *arguments, **options)

    def _sync(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        from fsspec.asyn import sync

        loop = self._fs.loop
        return self._told(sync, loop, function, *arguments, timeout=self._timeout, **options)

    def _told(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except FileNotFoundError:
            return None
        except TimeoutError:
            raise TierError(
                f"{self._url} cannot be used: no answer within {self._timeout:g} s."
            ) from None
        except Exception as error:  # whatever a store's library raises
            why = without_user(str(error)).rstrip(".") or type(error).__name__
            raise TierError(f"{self._url} cannot be used: {why}.") from error

    async def _exist(self, paths: Sequence[str]) -> list[bool]:
        turns = asyncio.Semaphore(_AT_ONCE)

        async def exists(path: str) -> bool:
            async with turns:
                try:
                    await self._fs._info(path)
                except FileNotFoundError:
                    return False
                return True

        return await asyncio.gather(*map(exists, paths))


def _header(key: bytes, content: memoryview) -> bytes:
    return _HEADER.pack(_MAGIC, _VERSION, content_tag(key, content))


def _open(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    try:
        core = import_module("fsspec.core")
    except ImportError:
        raise InputError(
            "tier", f"{without_user(url)} needs the package fsspec: pip install 'elinvar[objects]'."
        ) from None
    protocol, shown = url.partition("://")[0], without_user(url)
    try:
        # A listing that is kept would go on saying what was there.
        fs, root = core.url_to_fs(url, use_listings_cache=False, **options)
    except ImportError as error:
        package = _PACKAGES.get(protocol, error.name or "the one that fsspec names for it")
        raise InputError("tier", f"{shown} needs a package: pip install {package}.") from None
    except Exception as error:  # whatever a store's library raises
        why = without_user(str(error))
        raise InputError("tier", f"{shown} is no place for objects: {why}.") from None
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    if "file" in protocols:
        # Its files would be everybody's to read, and nothing would bound them.
        raise InputError("tier", f"{shown} is a folder: give the folder itself, without 'file://'.")
    return fs, root
