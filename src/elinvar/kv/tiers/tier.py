"""Tier: one place for contents of KV blocks. Keys say all that a content depends on, so it is never
out of date; it may only be gone, or damaged."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

from elinvar.base.errors import ElinvarError

MAX_KEY_BYTES = 64
_USER_INFO = re.compile(r"(?<=://)[^/\s]*@")


class TierError(ElinvarError):
    """A tier cannot do what was asked, now or for good: full, unreachable, not what it says."""


class Tier(Protocol):
    """Called by threads that do nothing else, so it may wait for a device or a network, but never
    without a limit. Raises TierError."""

    name: str
    """By kind, as "disk": metrics and traces show it to everybody, so that it tells no address."""

    def has(self, keys: Sequence[bytes]) -> list[bool]: ...

    def read(self, key: bytes, into: memoryview) -> bool:
        """Fill `into` with the content, of just that many bytes. False, when it is not there, or not
        what was written; then it is forgotten."""
        ...

    def write(self, key: bytes, data: memoryview) -> None:
        """Keep it, perhaps in place of others. Until this has returned nothing of it is found, and
        never a part of it, whatever happens in between."""
        ...

    def close(self) -> None: ...


def without_user(text: str) -> str:
    """The text, its URLs without user and password: logs and errors repeat it."""
    return _USER_INFO.sub("", text)
