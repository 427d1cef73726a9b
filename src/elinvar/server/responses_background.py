"""Responses that run without a client, and those who follow them.

A run keeps its events while it goes on: whoever follows it begins where he likes. What had not ended
when the server did runs again when it is back, with the seed that it had: to the same answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

from elinvar.server.asked import Asked, Usage
from elinvar.server.errors import INTERNAL, ApiError, as_api_error, overloaded
from elinvar.server.responses_items import Item
from elinvar.server.responses_state import Kept, Responses
from elinvar.server.responses_wire import ResponseWire

log = logging.getLogger(__name__)

MAX_RUNS = 256
"""Of a tenant; more get a 429."""
RETRY_S = 1.0
"""Between attempts where the engine's queue or the disk is full."""


@dataclass(slots=True, eq=False)
class Run:
    """One of them."""

    tenant: str
    request_id: str
    wire: ResponseWire
    ask: Callable[[], AbstractAsyncContextManager[Asked]]
    """What is run, while its model is there."""
    given: list[Item]
    request: bytes
    events: list[bytes] = field(default_factory=list)
    cancelled: bool = False
    settled: bool = False
    """What it came to is known; then it is stored, and then it has ended."""
    ended: bool = False
    grown: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when there are more events, or it has ended; and replaced."""
    task: asyncio.Task[None] | None = None

    @property
    def shown(self) -> dict[str, Any]:
        """The response: it has not ended before it is stored."""
        return self.wire.running() if self.settled else self.wire.result

    def add(self, events: list[bytes]) -> None:
        self.events += events
        self.wake()

    def wake(self) -> None:
        self.grown.set()
        self.grown = asyncio.Event()

    async def follow(self, position: int) -> AsyncIterator[bytes]:
        """Its events from the one of this number on, as they come."""
        while True:
            if position < len(self.events):
                events = self.events[position:]
                position += len(events)
                yield b"".join(events)
            elif self.ended:
                return
            else:
                await self.grown.wait()


class Background:
    def __init__(self, responses: Responses, retry_s: float = RETRY_S) -> None:
        self.runs: dict[str, Run] = {}
        self._responses, self._retry_s = responses, retry_s

    def check_room(self, tenant: str) -> None:
        count = sum(run.tenant == tenant for run in self.runs.values())
        if count >= MAX_RUNS:
            raise overloaded(count, "responses in the background")

    async def begin(self, run: Run) -> None:
        """It is stored when this returns."""
        run.add(run.wire.begin(queued=True))
        await self._responses.save(Kept(run.tenant, run.wire.result, run.given, run.request))
        self.go(run)

    def go(self, run: Run) -> None:
        self.runs[run.wire.id] = run
        run.task = asyncio.create_task(self._run(run), name=run.wire.id)

    def of(self, tenant: str, name: str) -> Run | None:
        run = self.runs.get(name)
        return run if run is not None and run.tenant == tenant else None

    async def cancel(self, run: Run) -> None:
        """It has ended and is stored when this returns."""
        assert run.task is not None
        if not run.settled:
            run.cancelled = True
            run.task.cancel()
        await asyncio.wait([run.task])

    async def shutdown(self) -> None:
        """What runs is left to the next start."""
        tasks = [run.task for run in self.runs.values() if run.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for run in self.runs.values():
            run.ended = True
            run.wake()

    async def _run(self, run: Run) -> None:
        usage = Usage()
        try:
            while not await self._try(run, usage):
                await asyncio.sleep(self._retry_s)
            ending = run.wire.end(usage)
        except asyncio.CancelledError:
            if not run.cancelled:
                raise
            ending = run.wire.cancel()
        except Exception as error:
            known = as_api_error(error)
            if known is None:
                log.exception("Unexpected error in the response %s.", run.wire.id)
            ending = run.wire.fail(known or INTERNAL)
        run.settled = True
        await self._keep(run, ending)

    async def _try(self, run: Run, usage: Usage) -> bool:
        """Whether it came to its end: false where the queue was full, before anything was said."""
        try:
            async with (
                run.ask() as asked,
                asked.run(run.wire.id, run.request_id, usage) as steps,
            ):
                async for step in steps:
                    run.add(run.wire.advance(step))
        except Exception as error:
            known = as_api_error(error)
            if known is not None and known.status == 429:
                return False
            raise
        return True

    async def _keep(self, run: Run, ending: list[bytes]) -> None:
        """Stores what it came to, as soon as there is room, and tells those who follow."""
        events = [*run.events, *ending]
        kept = Kept(run.tenant, run.wire.result, run.given, events=events)
        told = False
        while True:
            try:
                await self._responses.save(kept)
                break
            except ApiError as error:
                if not told:
                    log.warning("%s The response %s waits for it.", error.message, run.wire.id)
                told = True
                await asyncio.sleep(self._retry_s)
        del self.runs[run.wire.id]
        run.ended = True
        run.add(ending)
