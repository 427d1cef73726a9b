"""Sending one answer: whole, or as server-sent events while it is generated.

Owns the HTTP side of a running request: a client that goes away ends the work, an error in the
middle of a stream becomes an event of the stream.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.types import Receive, Scope, Send

from elinvar.base.errors import QueueFullError
from elinvar.base.handling import Handling
from elinvar.server.errors import INTERNAL, ApiError, ClientGoneError, as_api_error, unavailable
from elinvar.server.service import Choice, Event, Service, Usage
from elinvar.server.wire import DONE, Wire

if TYPE_CHECKING:
    from elinvar.engine.output import Delta

log = logging.getLogger(__name__)

_JSON_HEADERS = [(b"content-type", b"application/json")]
_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # nginx collects an answer before it passes it on, unless told otherwise.
    (b"x-accel-buffering", b"no"),
]


@dataclass(slots=True)
class _Collected:
    """What one choice has come to so far."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    end: dict[str, Any] = field(default_factory=dict)
    """finish_reason and seed."""


@dataclass(slots=True)
class Answer:
    """An ASGI application that runs the choices and sends what they give."""

    service: Service
    wire: Wire
    choices: Sequence[Choice]
    handling: Handling
    end_ids: frozenset[int]
    """The model's end tokens: they have no text and get no log-probs."""
    stream: bool
    with_usage: bool

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._send(scope, receive, send)
        except QueueFullError as error:
            refusal = as_api_error(error)
            assert refusal is not None
            refusal.headers |= self.service.limits_of(self.handling.tenant)
            raise refusal from None

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with (
            cancelled_when_client_leaves(receive),
            self.service.run(
                self.wire.id, scope["elinvar.request_id"], self.choices, self.handling
            ) as events,
        ):
            if self.stream:
                await self._send_stream(events, send)
            else:
                await self._send_whole(events, send)

    async def _send_whole(self, events: AsyncGenerator[Event, None], send: Send) -> None:
        usage = Usage()
        collected = {choice.index: _Collected() for choice in self.choices}
        async for choice, delta in events:
            usage.push(choice, delta)
            part = collected[choice.index]
            part.texts.append(delta.text)
            if (logprobs := self._logprobs(choice, delta)) is not None:
                part.logprobs.append(logprobs)
            part.end = {"finish_reason": delta.finish_reason, "seed": delta.seed}
        done = []
        for choice in self.choices:
            part = collected[choice.index]
            logprobs = None if choice.params.logprobs is None else part.logprobs
            content = self.wire.content("".join(part.texts), logprobs)
            done.append({"index": choice.index, **content, **part.end})
        body = self.wire.response(done, usage.as_json())
        length = (b"content-length", b"%d" % len(body))
        timing = self.service.explanations.timing_of_all(self.wire.id)
        await _start(send, [*_JSON_HEADERS, length, *timing, *self._limits()])
        await _last(send, body)

    async def _send_stream(self, events: AsyncGenerator[Event, None], send: Send) -> None:
        wire, usage = self.wire, Usage()
        # What fails before the first token has a status of its own, and how long that took is known.
        choice, delta = await anext(events)
        timing = self.service.explanations.timing_of_first(wire.id, choice.index)
        await _start(send, [*_SSE_HEADERS, *timing, *self._limits()])
        try:
            usage.push(choice, delta)
            opening = b"".join(wire.opening(choice.index) for choice in self.choices)
            await _more(send, opening + self._chunk(choice, delta))
            async for choice, delta in events:
                usage.push(choice, delta)
                await _more(send, self._chunk(choice, delta))
            end = wire.usage(usage.as_json()) + DONE if self.with_usage else DONE
        except asyncio.CancelledError:
            # The client left, or the server's grace is over: whoever still listens is told.
            await _last(send, _error_event(unavailable("The server is shutting down.")))
            raise
        except Exception as error:
            answer = as_api_error(error)
            if answer is None:
                log.exception("Unexpected error in the middle of a stream.")
                answer = INTERNAL
            end = _error_event(answer)
        await _last(send, end)

    def _limits(self) -> list[tuple[bytes, bytes]]:
        limits = self.service.limits_of(self.handling.tenant)
        return [(name.encode(), value.encode()) for name, value in limits.items()]

    def _chunk(self, choice: Choice, delta: Delta) -> bytes:
        logprobs = self._logprobs(choice, delta)
        chunk = b""
        if delta.text or logprobs:
            chunk = self.wire.piece(choice.index, delta.text, logprobs)
        if delta.finish_reason is not None:
            chunk += self.wire.closing(choice.index, delta.finish_reason, delta.seed)
        return chunk

    def _logprobs(self, choice: Choice, delta: Delta) -> Any:
        """The delta's log-probs as the endpoint writes them; None where there are none."""
        ids, values = delta.token_ids, delta.logprobs
        ended = delta.finish_reason == "stop" and values
        if ended and (ids[-1] in self.end_ids or ids[-1] in choice.params.stop_token_ids):
            ids, values = ids[:-1], values[:-1]
        return self.wire.logprobs(choice.index, ids, values) if values else None


async def _start(send: Send, headers: list[tuple[bytes, bytes]]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _more(send: Send, body: bytes) -> None:
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def _last(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body})


def _error_event(error: ApiError) -> bytes:
    return b"data: " + error.body() + b"\n\n"


@asynccontextmanager
async def cancelled_when_client_leaves(receive: Receive) -> AsyncIterator[None]:
    """Cancels the body of the `async with` when the connection closes; raises ClientGoneError."""
    task = asyncio.current_task()
    assert task is not None  # ASGI servers run applications in tasks
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        # Only our own cancellation ends here; the server's goes on.
        if gone and task.uncancel() == 0:
            raise ClientGoneError from None
        raise
    finally:
        watcher.cancel()
