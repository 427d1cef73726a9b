"""RemoteTier: contents of KV blocks at an `elinvar kv-server`."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

from elinvar.base.errors import InputError
from elinvar.kv.tiers import wire
from elinvar.kv.tiers.connection import Connection
from elinvar.kv.tiers.line import WireError
from elinvar.kv.tiers.tier import TierError, without_user

T = TypeVar("T")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 30.0


class RemoteTier:
    """address: `tcp://host:port`. secret: the server's; one that does not know it is not talked to.
    connections: calls that go on at once; more wait for them.

    A call ends within `timeout` seconds (and one more for each MiB it moves), whatever the server
    does; where there is no right answer by then, TierError. For a while after that calls fail at
    once, so a server that is gone costs no time: 0.25 s, doubled by each failure, at most 30 s."""

    def __init__(
        self,
        address: str,
        *,
        secret: bytes | None = None,
        connections: int = 4,
        timeout: float = 5.0,
    ) -> None:
        """Connects at the first call. Raises InputError for an address that is none."""
        self.name, self._address = "remote", address
        self._host, self._port = parse_address(address)
        self._secret, self._timeout = secret, timeout
        self._slots = threading.BoundedSemaphore(connections)
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._closed = False
        self._failures, self._quiet_until, self._why = 0, 0.0, ""

    def has(self, keys: Sequence[bytes]) -> list[bool]:
        found: list[bool] = []
        for at in range(0, len(keys), wire.MAX_BATCH):
            found += self._call(partial(Connection.has, keys=keys[at : at + wire.MAX_BATCH]))
        return found

    def read(self, key: bytes, into: memoryview) -> bool:
        size = self.read_up_to(key, into)
        if size is not None and size < len(into):
            self.drop(key)
        return size == len(into)

    def read_up_to(self, key: bytes, into: memoryview) -> int | None:
        """`read` of a content whose size is not known: how many bytes of `into` it fills."""
        return self._call(partial(Connection.get, key=key, into=into), len(into))

    def write(self, key: bytes, data: memoryview) -> None:
        self._call(partial(Connection.put, key=key, data=data), len(data))

    def drop(self, key: bytes) -> None:
        self._call(partial(Connection.drop, key=key))

    def stats(self) -> dict[str, Any]:
        """What the server says of itself: contents, bytes_in_use, hits, misses and so on."""
        return self._call(Connection.stats)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _call(self, ask: Callable[..., T], num_bytes: int = 0) -> T:
        deadline = time.monotonic() + self._timeout + num_bytes / (1 << 20)
        self._refuse_while_quiet()
        if not self._slots.acquire(timeout=deadline - time.monotonic()):
            raise self._error("all connections to it were busy")
        try:
            result = self._ask(ask, deadline)
        except WireError as error:
            self._failed(str(error))
            raise self._error(str(error)) from None
        except TierError as error:
            raise self._error(str(error)) from None
        finally:
            self._slots.release()
        self._failures = 0
        return result

    def _ask(self, ask: Callable[..., T], deadline: float) -> T:
        connection = self._take(deadline)
        known = False
        """Whether the connection's state is."""
        try:
            result = ask(connection, deadline=deadline)
            known = True
        except TierError:
            known = True
            raise
        finally:
            with self._lock:
                kept = known and not self._closed
                if kept:
                    self._idle.append(connection)
            if not kept:
                connection.close()
        return result

    def _take(self, deadline: float) -> Connection:
        """One that is idle, if the server has not closed it, or a new one."""
        while True:
            with self._lock:
                if self._closed:
                    raise TierError("it was closed here")
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                return Connection(self._host, self._port, self._secret, deadline)
            if connection.usable:
                return connection
            connection.close()

    def _refuse_while_quiet(self) -> None:
        if time.monotonic() < self._quiet_until:
            raise self._error(f"{self._why}; it is tried again in a while")

    def _failed(self, why: str) -> None:
        with self._lock:
            if time.monotonic() < self._quiet_until:
                return  # another call has just found the same
            pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**self._failures)
            self._failures = min(self._failures + 1, 10)
            # Not all engines at once at a server that has just come back.
            self._quiet_until = time.monotonic() + pause * random.uniform(0.5, 1)
            self._why = why

    def _error(self, why: str) -> TierError:
        return TierError(f"{self._address} cannot be used: {why}.")


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of `tcp://host:port`. Raises InputError."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port or address not in (f"tcp://{host}:{port}", f"tcp://[{host}]:{port}"):
        raise InputError(
            "tier",
            f"{without_user(address)!r} is no address of a cache server, write it as "
            "tcp://host:port.",
        )
    return host, port
