"""Sending one answer: whole, or as server-sent events while it is generated.

Owns the HTTP side of a running request: a client that goes away ends the work, an error in the
middle of a stream becomes an event of the stream.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.types import Receive, Scope, Send

from elinvar.base.errors import QueueFullError
from elinvar.server.asked import Asked, Collector, Step, Usage
from elinvar.server.errors import INTERNAL, ClientGoneError, as_api_error, unavailable
from elinvar.server.seen import BEYOND_START
from elinvar.server.service import Service
from elinvar.server.wire import Wire

log = logging.getLogger(__name__)

_JSON_HEADERS = [(b"content-type", b"application/json")]
SSE_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    # nginx collects an answer before it passes it on, unless told otherwise.
    "x-accel-buffering": "no",
}
_STREAM_HEADERS = [
    (name.encode(), value.encode()) for name, value in SSE_HEADERS.items() if name != "content-type"
]


@dataclass(slots=True)
class Answer:
    """An ASGI application that runs what was asked and sends what comes of it."""

    asked: Asked
    wire: Wire
    stream: bool
    keep: Callable[[], Awaitable[None]] | None = None
    """Called when all is known, before the client is told of the end."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._send(scope, receive, send)
        except QueueFullError as error:
            refusal = as_api_error(error)
            assert refusal is not None
            refusal.headers |= self._service.limits_of(self.asked.handling.tenant)
            raise refusal from None

    @property
    def _service(self) -> Service:
        return self.asked.served.service

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with cancelled_when_client_leaves(receive):
            # A token wakes up all frames of its task: in one of its own they are few.
            await asyncio.create_task(self._run(scope, send))

    async def _run(self, scope: Scope, send: Send) -> None:
        usage = Usage()
        run = self.asked.run(self.wire.id, scope["elinvar.request_id"], usage, not self.stream)
        async with run as steps:
            if self.stream:
                await self._send_stream(steps, usage, send, scope.get(BEYOND_START, send))
            else:
                await self._send_whole(steps, usage, send)

    async def _send_whole(
        self, steps: AsyncGenerator[Step, None], usage: Usage, send: Send
    ) -> None:
        collector = Collector([choice.index for choice in self.asked.choices])
        async for step in steps:
            collector.push(step)
            self.wire.see(step)
        body = self.wire.whole(self.asked.best(collector.finish()), usage)
        if self.keep is not None:
            await self.keep()
        length = (b"content-length", b"%d" % len(body))
        timing = self._service.explanations.timing_of_all(self.wire.id)
        await _start(send, [*_JSON_HEADERS, length, *timing, *self._limits()])
        await _last(send, body)

    async def _send_stream(
        self, steps: AsyncGenerator[Step, None], usage: Usage, send: Send, more: Send
    ) -> None:
        """more: takes what follows the start."""
        wire = self.wire
        # What fails before the first token has a status of its own, and how long that took is known.
        step = await anext(steps)
        timing = self._service.explanations.timing_of_first(wire.id, step.index)
        kind = (b"content-type", wire.stream_type)
        await _start(send, [kind, *_STREAM_HEADERS, *timing, *self._limits()])
        try:
            opening = wire.opening([choice.index for choice in self.asked.choices], usage)
            await _more(more, opening + wire.chunk(step))
            async for step in steps:
                await _more(more, wire.chunk(step))
            end = wire.ending(usage)
            if self.keep is not None:
                await self.keep()
        except asyncio.CancelledError:
            # The client left, or the server's grace is over: whoever still listens is told.
            await _last(send, wire.error(unavailable("The server is shutting down.")))
            raise
        except Exception as error:
            answer = as_api_error(error)
            if answer is None:
                log.exception("Unexpected error in the middle of a stream.")
                answer = INTERNAL
            end = wire.error(answer)
        await _last(send, end)

    def _limits(self) -> list[tuple[bytes, bytes]]:
        limits = self._service.limits_of(self.asked.handling.tenant)
        return [(name.encode(), value.encode()) for name, value in limits.items()]


async def _start(send: Send, headers: list[tuple[bytes, bytes]]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _more(send: Send, body: bytes) -> None:
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def _last(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body})


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
