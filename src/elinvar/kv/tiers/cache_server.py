"""CacheServer: keeps contents of KV blocks in memory for engines on other machines.

A thread a connection. It trusts nothing that arrives: sizes are checked before anything is
allocated, every transfer has a deadline, and what is kept lies within one mapping (PagedLRU). What
the bytes mean it does not know; that they are the right ones, clients check themselves.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass

from elinvar.base.errors import InputError
from elinvar.kv.tiers import wire
from elinvar.kv.tiers.line import Line, WireError
from elinvar.kv.tiers.pages import PAGE_BYTES, PagedLRU
from elinvar.kv.tiers.wire import Answer, Request

log = logging.getLogger(__name__)

_SCRATCH_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class Limits:
    max_bytes: int
    """Of memory for contents."""
    max_value: int = 64 << 20
    """Bytes of one."""
    max_connections: int = 256
    greeting_seconds: float = 5.0
    """A client's time to say who it is."""
    transfer_seconds: float = 5.0
    """For a message, and a second more for each MiB of it: a slower client is cut off."""
    idle_seconds: float = 600.0

    def __post_init__(self) -> None:
        if self.max_bytes < PAGE_BYTES:
            raise InputError("memory", f"The memory must be {PAGE_BYTES} bytes or more.")
        if self.max_value > min(self.max_bytes, 2**32 - 1):
            raise InputError(
                "max_value",
                f"A content of {self.max_value} bytes does not fit into the memory of "
                f"{self.max_bytes} bytes, choose a smaller max_value or more memory.",
            )


class CacheServer:
    """Listens from its construction on (raises OSError; InputError where there is not so much
    memory), answers within `run`."""

    def __init__(self, host: str, port: int, limits: Limits, secret: bytes | None = None) -> None:
        self.limits, self._secret = limits, secret
        self._kept = _room(limits.max_bytes)
        self._lines: dict[Line, bool] = {}
        """Those open, and whether each waits for a request."""
        self._counts: Counter[str] = Counter()
        self._closing = False
        self._started = time.monotonic()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=128)
        host, port = self._listener.getsockname()[:2]
        self.address = f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"

    def run(self) -> None:
        """Until `stop`, or an exception that a signal raises here."""
        while not self._closing:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if self._closing:
                    return
                log.warning("A connection cannot be accepted: %s.", error.strerror)
                time.sleep(0.1)  # no file descriptor is left, say
                continue
            self._admit(Line(sock))

    def stop(self, grace_seconds: float = 5.0) -> None:
        """Requests in progress have so long to end; idle connections end at once."""
        self._closing = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that is in accept()
        self._listener.close()
        end = time.monotonic() + grace_seconds
        while self._lines:
            late = time.monotonic() > end
            for line, idle in list(self._lines.items()):
                if idle or late:
                    line.shut()
            if late:
                return
            time.sleep(0.01)

    def stats(self) -> dict[str, int | float]:
        kept = self._kept
        return {
            "contents": len(kept),
            "bytes_in_use": (kept.num_pages - kept.num_free_pages) * PAGE_BYTES,
            "max_bytes": self.limits.max_bytes,
            "connections": len(self._lines),
            "evicted": kept.num_evicted,
            "hits": self._counts["hits"],
            "misses": self._counts["misses"],
            "writes": self._counts["writes"],
            "full": self._counts["full"],
            "refused": self._counts["refused"],
            "uptime_s": round(time.monotonic() - self._started, 3),
        }

    def _admit(self, line: Line) -> None:
        if len(self._lines) < self.limits.max_connections:
            self._lines[line] = False
            thread = threading.Thread(target=self._serve, args=(line,), daemon=True)
            with suppress(RuntimeError):  # the system gives no more threads
                thread.start()
                return
            del self._lines[line]
        self._counts["refused"] += 1
        with suppress(WireError):
            # So few bytes fit into the socket's buffer: this does not wait.
            line.send([self._hello(wire.NO_ROOM).pack()], time.monotonic() + 1)
        line.close()

    def _hello(self, flags: int) -> wire.Hello:
        return wire.Hello(flags, self.limits.max_value, os.urandom(wire.NONCE_BYTES))

    def _serve(self, line: Line) -> None:
        try:
            self._greet(line)
            self._answer_all(line)
        except WireError as error:
            self._counts["refused"] += 1
            log.info("A client is cut off: %s.", error)
        except Exception:
            self._counts["refused"] += 1
            log.exception("Unexpected error at a connection, which is closed.")
        finally:
            del self._lines[line]
            line.close()

    def _greet(self, line: Line) -> None:
        """Returns when the client may ask. Either side proves that it knows the secret, and none
        tells it: the proofs hold for this connection's nonces only."""
        deadline = time.monotonic() + self.limits.greeting_seconds
        hello = self._hello(0 if self._secret is None else wire.WANTS_SECRET)
        line.send([hello.pack()], deadline)
        proof = wire.Proof.parse(bytes(line.receive(wire.PROOF_BYTES, deadline)))
        nonces = hello.nonce, proof.nonce
        if not wire.same(proof.digest, wire.prove(self._secret, b"client", *nonces)):
            line.send([Answer(wire.REFUSED).pack(), bytes(wire.DIGEST_BYTES)], deadline)
            raise WireError("it does not know the secret")
        own = wire.prove(self._secret, b"server", *nonces)
        line.send([Answer(wire.OK).pack(), own], deadline)

    def _answer_all(self, line: Line) -> None:
        header = bytearray(wire.REQUEST_BYTES)
        into = [memoryview(header)]
        answers = {wire.HAS: self._has, wire.STATS: self._stats}
        of_key = {wire.GET: self._get, wire.PUT: self._put, wire.DROP: self._drop}
        while not self._closing:
            self._lines[line] = True
            try:
                line.receive_into(into, time.monotonic() + self.limits.idle_seconds)
            except WireError:
                return  # the client has no more to ask
            self._lines[line] = False
            request = Request.parse(header)
            if request.op in answers:
                answers[request.op](line, request)
            elif request.op in of_key:
                key = bytes(line.receive(request.key_bytes, self._deadline()))
                if wire.bad_key(key):
                    raise WireError("the client sent a key that is none")
                of_key[request.op](line, request, key)
            else:
                raise WireError("the client asks for what there is not")

    def _deadline(self, num_bytes: int = 0) -> float:
        return time.monotonic() + self.limits.transfer_seconds + num_bytes / (1 << 20)

    def _has(self, line: Line, request: Request) -> None:
        largest = request.num_keys * (1 + wire.MAX_KEY_BYTES)
        if not (1 <= request.num_keys <= wire.MAX_BATCH and request.size <= largest):
            raise WireError("the client asks for too many keys at once")
        body = line.receive(request.size, self._deadline(request.size))
        found = bytes(map(self._kept.has, wire.parse_keys(body, request.num_keys)))
        line.send([Answer(wire.OK, len(found)).pack(), found], self._deadline())

    def _get(self, line: Line, request: Request, key: bytes) -> None:
        with self._kept.reading(key) as content:
            self._counts["misses" if content is None else "hits"] += 1
            if content is None:
                line.send([Answer(wire.MISSING).pack()], self._deadline())
            elif content.size > request.size:
                line.send([Answer(wire.LARGER).pack()], self._deadline())
            else:
                answer = Answer(wire.OK, content.size, content.tag)
                line.send([answer.pack(), *content.views], self._deadline(content.size))

    def _put(self, line: Line, request: Request, key: bytes) -> None:
        if request.size > self.limits.max_value:
            raise WireError("the client sends more than a content may have")
        if request.size < 1:  # takes no page, so that there might be ever more of them
            raise WireError("the client sends a content of no bytes")
        deadline = self._deadline(request.size)
        with self._kept.writing(key, request.size, request.tag) as views:
            if views is not None:
                line.receive_into(views, deadline)
        if views is None:
            self._counts["full"] += 1
            _skip(line, request.size, deadline)
        else:
            self._counts["writes"] += 1
        line.send([Answer(wire.FULL if views is None else wire.OK).pack()], self._deadline())

    def _drop(self, line: Line, request: Request, key: bytes) -> None:
        there = self._kept.drop(key)
        line.send([Answer(wire.OK if there else wire.MISSING).pack()], self._deadline())

    def _stats(self, line: Line, request: Request) -> None:
        body = json.dumps(self.stats()).encode()
        line.send([Answer(wire.OK, len(body)).pack(), body], self._deadline())


def _room(max_bytes: int) -> PagedLRU:
    try:
        return PagedLRU(max_bytes)
    except (OSError, OverflowError, MemoryError):
        raise InputError(
            "memory", f"This machine has no {max_bytes:,} bytes of memory: give --memory less."
        ) from None


def _skip(line: Line, num_bytes: int, deadline: float) -> None:
    scratch = memoryview(bytearray(min(num_bytes, _SCRATCH_BYTES)))
    while num_bytes:
        part = scratch[:num_bytes]
        line.receive_into([part], deadline)
        num_bytes -= len(part)
