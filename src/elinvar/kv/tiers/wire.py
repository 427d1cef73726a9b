"""The protocol between a remote tier and the cache server: its messages, and what proves and
checks. docs/design/019-remote-tiers.md describes it."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from elinvar.base.digest import blake2b
from elinvar.base.errors import InputError, ModelError
from elinvar.kv.tiers.line import WireError
from elinvar.kv.tiers.tier import MAX_KEY_BYTES

VERSION = 1
MAGIC = b"EKVB"
MAX_BATCH = 1024
"""Keys of one HAS."""
MAX_STATS_BYTES = 1 << 16

HAS, GET, PUT, DROP, STATS = range(1, 6)
OK, MISSING, FULL, LARGER, REFUSED = range(5)

WANTS_SECRET, NO_ROOM = 1, 2
"""Flags of a server's hello."""
_HELLO = struct.Struct("<4sBBxxI16s")
_PROOF = struct.Struct("<4s16s32s")
_REQUEST = struct.Struct("<BBHIQ")
_ANSWER = struct.Struct("<BxxxIQ")
HELLO_BYTES, PROOF_BYTES = _HELLO.size, _PROOF.size
REQUEST_BYTES, ANSWER_BYTES = _REQUEST.size, _ANSWER.size
NONCE_BYTES, DIGEST_BYTES = 16, 32

_MIN_SECRET_BYTES = 16
_SECRET_VARIABLE = "ELINVAR_KV_SECRET"


class Hello(NamedTuple):
    """A server's first words."""

    flags: int
    max_value: int
    """Bytes of the largest content it takes."""
    nonce: bytes

    def pack(self) -> bytes:
        return _HELLO.pack(MAGIC, VERSION, *self)

    @staticmethod
    def parse(data: bytes) -> Hello:
        magic, version, *rest = _HELLO.unpack(data)
        if magic != MAGIC:
            raise WireError("it is no 'elinvar kv-server'")
        if version != VERSION:
            raise WireError(f"it speaks version {version} of the protocol, not {VERSION}")
        return Hello(*rest)


class Proof(NamedTuple):
    """A client's first words: that it knows the secret, if there is one."""

    nonce: bytes
    digest: bytes

    def pack(self) -> bytes:
        return _PROOF.pack(MAGIC, *self)

    @staticmethod
    def parse(data: bytes) -> Proof:
        magic, *rest = _PROOF.unpack(data)
        if magic != MAGIC:
            raise WireError("the client speaks another protocol")
        return Proof(*rest)


class Request(NamedTuple):
    """Its key follows (of HAS: `num_keys` keys, each after its length, `size` bytes), then the `size`
    bytes of a PUT."""

    op: int
    key_bytes: int = 0
    num_keys: int = 0
    size: int = 0
    """Of a GET: the most bytes that the client takes."""
    tag: int = 0

    def pack(self) -> bytes:
        return _REQUEST.pack(*self)

    @staticmethod
    def parse(data: bytes | bytearray) -> Request:
        return Request(*_REQUEST.unpack(data))


class Answer(NamedTuple):
    """`size` bytes follow."""

    status: int
    size: int = 0
    tag: int = 0

    def pack(self) -> bytes:
        return _ANSWER.pack(*self)

    @staticmethod
    def parse(data: bytes | bytearray) -> Answer:
        return Answer(*_ANSWER.unpack(data))


def content_tag(key: bytes, data: bytes | bytearray | memoryview) -> int:
    """What a content is recognised by, made by who writes it and compared by who reads it: its
    length and a CRC-32 over key and content. Finds accidents, not forgery."""
    return zlib.crc32(data, zlib.crc32(key)) | len(data) << 32


def prove(secret: bytes | None, side: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
    """That `side` ("client" or "server") of this connection knows the secret."""
    if secret is None:
        return bytes(DIGEST_BYTES)
    key = blake2b(secret, digest_size=32).digest()
    text = side + server_nonce + client_nonce
    return blake2b(text, key=key, digest_size=DIGEST_BYTES).digest()


def same(one: bytes, other: bytes) -> bool:
    """In a time that does not depend on where they differ."""
    from hmac import compare_digest  # which loads OpenSSL: see base/digest.py

    return compare_digest(one, other)


def read_secret(path: Path | None = None) -> bytes | None:
    """From the file, or from the environment; None where neither says one. Raises ModelError where
    the file cannot be read, InputError where the secret is too short to be one."""
    if path is None:
        where = f"The secret in {_SECRET_VARIABLE}"
        secret = os.environ.get(_SECRET_VARIABLE, "").encode()
        if not secret:
            return None
    else:
        where = f"The secret in {path}"
        try:
            secret = path.read_bytes().strip()
        except OSError as error:
            raise ModelError(f"{where} cannot be read: {error.strerror}.") from None
    if len(secret) < _MIN_SECRET_BYTES:
        raise InputError(
            "secret",
            f"{where} has fewer than {_MIN_SECRET_BYTES} bytes, make one with 'openssl rand -hex 32'.",
        )
    return secret


def pack_keys(keys: Sequence[bytes]) -> bytes:
    return b"".join(bytes([len(key)]) + key for key in keys)


def parse_keys(data: bytes | bytearray, count: int) -> list[bytes]:
    """Raises WireError where these are not just so many keys."""
    keys: list[bytes] = []
    at = 0
    while at < len(data) and len(keys) < count:
        end = at + 1 + data[at]
        keys.append(bytes(data[at + 1 : end]))
        at = end
    if at != len(data) or len(keys) != count or any(bad_key(key) for key in keys):
        raise WireError("the client sent keys that are none")
    return keys


def bad_key(key: bytes) -> bool:
    return not 1 <= len(key) <= MAX_KEY_BYTES
