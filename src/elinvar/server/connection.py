"""One connection of a client: how long it may take to ask and to read, and how it is written to.

Owns what keeps a client from holding much for long: the time and size of a request's head, and the time
in which an answer must be read. What requests mean is the application's.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_S = 20.0
"""How long a client may take to send a request's head."""
MAX_HEAD_BYTES = 2**16
UNREAD_S = 60.0
"""How long a client may leave what was sent to it unread, when the system holds no more of it."""
_MAX_CORKED = 2**16


class Corked:
    """A transport that sends what is written within one turn of the event loop at once: each send is a
    system call, which costs more than all else about a token. A head goes with its body, and what the
    choices of an answer get in one step goes together."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._parts: list[bytes] = []
        self._size = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)
        self._size += len(data)
        # Not for long: it is the transport that knows when a client does not read.
        if self._size > _MAX_CORKED:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._transport.close()
        if self._transport.get_write_buffer_size():  # it waits for a reader
            self._loop.call_later(UNREAD_S, self._transport.abort)

    def _flush(self) -> None:
        if self._parts:
            parts, self._parts, self._size = self._parts, [], 0
            self._transport.write(parts[0] if len(parts) == 1 else b"".join(parts))


class Impatient(HttpToolsProtocol):
    """A connection whose client must send a whole head in time, or it is closed: those that send a
    byte now and then (slow loris) hold nothing for long. The same for those that do not read."""

    _head_timer: asyncio.TimerHandle | None = None
    _unread_timer: asyncio.TimerHandle | None = None
    _head_open = False
    _head_bytes = 0
    """Of an open head, without what came with its beginning."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(Corked(transport, self.loop))  # type: ignore[arg-type]
        self._await_head()

    def data_received(self, data: bytes) -> None:
        was_open = self._head_open
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        else:
            self._await_head()
        if was_open and self._head_open:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("The request's head is too large.")

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_unread()
        super().connection_lost(exc)

    # ---- what the parser finds --------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._head_open, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_open = False
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEAD_BYTES:
            raise ValueError("The request's head is too large.")  # the parser makes it a 400
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        # An answer that is being sent is not interrupted by another.
        if self.cycle is None or self.cycle.response_complete:
            super().send_400_response(msg)
        else:
            self.transport.close()

    # ---- time -------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_unread()
        self._unread_timer = self.loop.call_later(UNREAD_S, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_unread()
        super().resume_writing()

    def _stop_unread(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def _await_head(self) -> None:
        # Not later than the first byte: more bytes give no more time.
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_S, self._give_up)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        # An answer may have ended, and the connection been kept, since.
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
