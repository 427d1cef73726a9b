"""Connection: one line to a cache server, and what can be asked over it."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from typing import Any

from elinvar.kv.tiers import wire
from elinvar.kv.tiers.line import Line, WireError
from elinvar.kv.tiers.tier import TierError
from elinvar.kv.tiers.wire import Answer, Request


class Connection:
    """Each call ends by its deadline (of time.monotonic()). After a WireError the connection is in
    no known state and has to be closed; a TierError leaves it as it was."""

    def __init__(self, host: str, port: int, secret: bytes | None, deadline: float) -> None:
        """Raises WireError."""
        try:
            sock = socket.create_connection((host, port), max(0.001, deadline - time.monotonic()))
        except OSError as error:
            why = "it does not answer" if isinstance(error, TimeoutError) else error.strerror
            raise WireError(why or str(error)) from None
        self._line = Line(sock)
        try:
            self._max_value = self._greet(secret, deadline)
        except WireError:
            self.close()
            raise
        self._header = bytearray(wire.ANSWER_BYTES)

    def _greet(self, secret: bytes | None, deadline: float) -> int:
        hello = wire.Hello.parse(bytes(self._line.receive(wire.HELLO_BYTES, deadline)))
        if hello.flags & wire.NO_ROOM:
            raise WireError("it has as many connections as it takes (--max-connections)")
        if hello.flags & wire.WANTS_SECRET and secret is None:
            raise WireError("it wants a secret, say it in ELINVAR_KV_SECRET")
        nonces = hello.nonce, os.urandom(wire.NONCE_BYTES)
        proof = wire.Proof(nonces[1], wire.prove(secret, b"client", *nonces))
        self._line.send([proof.pack()], deadline)
        data = self._line.receive(wire.ANSWER_BYTES + wire.DIGEST_BYTES, deadline)
        answer, theirs = Answer.parse(data[: wire.ANSWER_BYTES]), data[wire.ANSWER_BYTES :]
        if answer.status != wire.OK:
            raise WireError("it does not accept the secret")
        if not wire.same(bytes(theirs), wire.prove(secret, b"server", *nonces)):
            raise WireError("it does not know the secret")
        return hello.max_value

    @property
    def usable(self) -> bool:
        return self._line.quiet

    def has(self, keys: Sequence[bytes], deadline: float) -> list[bool]:
        body = wire.pack_keys(keys)
        request = Request(wire.HAS, num_keys=len(keys), size=len(body))
        answer = self._ask([request.pack(), body], deadline)
        _check(answer.status == wire.OK and answer.size == len(keys))
        return [byte == 1 for byte in self._line.receive(answer.size, deadline)]

    def get(self, key: bytes, into: memoryview, deadline: float) -> int | None:
        """Bytes of the content, at the beginning of `into`; None: it is not there, or not what was
        written, or larger."""
        request = Request(wire.GET, len(key), size=len(into))
        answer = self._ask([request.pack(), key], deadline)
        if answer.status == wire.MISSING:
            return None
        if answer.status == wire.OK and answer.size <= len(into):
            content = into[: answer.size]
            self._line.receive_into([content], deadline)
            if wire.content_tag(key, content) == answer.tag:
                return answer.size
        else:
            _check(answer.status == wire.LARGER and answer.size == 0)
        self.drop(key, deadline)
        return None

    def put(self, key: bytes, data: memoryview, deadline: float) -> None:
        if len(data) > self._max_value:
            raise TierError(
                f"the server takes contents of at most {self._max_value} bytes (--max-value), "
                f"not of {len(data)}"
            )
        request = Request(wire.PUT, len(key), 0, len(data), wire.content_tag(key, data))
        answer = self._ask([request.pack(), key, data], deadline)
        if answer.status == wire.FULL:
            raise TierError("what the server reads and writes at this moment fills its memory")
        _check(answer.status == wire.OK and answer.size == 0)

    def drop(self, key: bytes, deadline: float) -> None:
        answer = self._ask([Request(wire.DROP, len(key)).pack(), key], deadline)
        _check(answer.status in (wire.OK, wire.MISSING) and answer.size == 0)

    def stats(self, deadline: float) -> dict[str, Any]:
        answer = self._ask([Request(wire.STATS).pack()], deadline)
        _check(answer.status == wire.OK and answer.size <= wire.MAX_STATS_BYTES)
        try:
            stats = json.loads(self._line.receive(answer.size, deadline))
        except ValueError:
            stats = None
        _check(isinstance(stats, dict))
        return dict(stats)

    def close(self) -> None:
        self._line.close()

    def _ask(self, parts: Sequence[bytes | memoryview], deadline: float) -> Answer:
        self._line.send(parts, deadline)
        self._line.receive_into([memoryview(self._header)], deadline)
        return Answer.parse(self._header)


def _check(sensible: bool) -> None:
    if not sensible:
        raise WireError("its answer makes no sense")
