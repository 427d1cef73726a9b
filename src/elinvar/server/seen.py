"""Telling of requests: what each one came to, for the log and for traces, once it has ended.

Owns what is noted of a request that runs; who is told of it is a Teller, which must be quick: it is
called in the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from elinvar.base.handling import Handling
    from elinvar.engine.watch import Record
    from elinvar.server.asked import Usage
    from elinvar.server.served import Served
    from elinvar.server.service import Choice

BEYOND_START = "elinvar.send"
"""In a request's scope, what the tokens of its answer may be sent with once the start is sent: the layers
that it leaves out want to see that alone."""
LATE_S = 0.5
"""What a client left ends with the step that runs; so long it is waited for before it is told."""


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer that a request asked a model for."""

    id: str
    served: Served
    choices: Sequence[Choice]
    handling: Handling
    usage: Usage
    """As the client is told; it grows while the answer runs."""
    records: Mapping[int, Record]
    """Of the choices that ended: the thread that steps adds them."""

    @property
    def model(self) -> str:
        """The adapter's name, where there is one."""
        return self.choices[0].params.adapter or self.served.name

    @property
    def reasons(self) -> list[str]:
        """Why its choices ended, in their order."""
        return [self.records[index]["finish_reason"] for index in sorted(self.records)]

    @property
    def used(self) -> Usage:
        """`usage`; where the client left before it was told anything, what was done for it by then."""
        return (
            self.usage
            if self.usage.completion_tokens
            else self.usage.of(self.choices, self.records)
        )

    @property
    def has_ended(self) -> bool:
        return len(self.records) >= len(self.choices)


@dataclass(slots=True, eq=False)
class Seen:
    """One HTTP request."""

    scope: Scope
    began_ns: int = field(default_factory=time.time_ns)
    """Unix time."""
    answers: list[Answered] = field(default_factory=list)
    texts: tuple[str, int] | None = None
    """The model that makes vectors or scores, and the tokens it was given, where that was asked."""
    status: int = 499
    """Of nginx: the client left before there was one."""
    seconds: float | None = None
    """How long it took; None: it has not ended."""
    _began: float = field(default_factory=time.perf_counter)

    @property
    def request_id(self) -> str:
        return str(self.scope.get("elinvar.request_id", ""))

    @property
    def tenant(self) -> str:
        return str(self.scope.get("elinvar.tenant", ""))

    @property
    def route(self) -> str:
        """The name that /metrics has for it."""
        return str(getattr(self.scope.get("endpoint"), "__name__", "unknown"))

    def end(self) -> None:
        self.seconds = time.perf_counter() - self._began


CURRENT: ContextVar[Seen | None] = ContextVar("elinvar_seen", default=None)
"""The request that this task is for."""


def note(answered: Answered) -> None:
    """A model is asked for something. What goes on after its HTTP request is not told with it."""
    seen = CURRENT.get()
    if seen is not None and seen.seconds is None:
        seen.answers.append(answered)


def note_texts(model: str, num_tokens: int) -> None:
    """The same for a model that makes vectors or scores of texts."""
    seen = CURRENT.get()
    if seen is not None and seen.seconds is None:
        seen.texts = model, num_tokens


class Teller(Protocol):
    def tell(self, seen: Seen) -> None:
        """A request has ended."""

    def close(self) -> None:
        """No more are told. May take some seconds."""


class Telling:
    """Tells tellers of each request, as soon as all of its choices have ended."""

    def __init__(self, tellers: Sequence[Teller]) -> None:
        self._tellers = tellers
        self._late: dict[Seen, asyncio.TimerHandle] = {}

    def ended(self, seen: Seen) -> None:
        if not self._tellers:
            return
        if all(one.has_ended for one in seen.answers):
            self._tell(seen)
        else:
            loop = asyncio.get_running_loop()
            self._late[seen] = loop.call_later(LATE_S, self._tell_late, seen)

    def _tell_late(self, seen: Seen) -> None:
        del self._late[seen]
        self._tell(seen)

    def _tell(self, seen: Seen) -> None:
        for teller in self._tellers:
            teller.tell(seen)

    async def close(self) -> None:
        """Tell what is left, then let tellers write what they hold."""
        for seen, timer in list(self._late.items()):
            timer.cancel()
            self._tell_late(seen)
        for teller in self._tellers:
            await asyncio.to_thread(teller.close)


class Witness:
    """The layer around all others, which sees what every client is told."""

    def __init__(self, app: ASGIApp, telling: Telling) -> None:
        self._app, self._telling = app, telling

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        seen = Seen(scope)
        scope[BEYOND_START] = send

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen.status = message["status"]
            await send(message)

        token = CURRENT.set(seen)
        try:
            await self._app(scope, receive, watched)
        finally:
            seen.end()
            with suppress(ValueError):  # of another context, where the server made one
                CURRENT.reset(token)
            self._telling.ended(seen)
