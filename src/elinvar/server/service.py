"""Running the choices of one HTTP request on the engine: admission, merging, accounting.

Owns the bound on the waiting queue and the life of the engine's requests: whatever happens to the
HTTP request, leaving `run` ends them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from elinvar.base.sampling import SamplingParams
from elinvar.server.errors import ApiError, invalid_value, overloaded, unavailable

if TYPE_CHECKING:
    from elinvar.engine.aio import AsyncEngine
    from elinvar.engine.output import Delta


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the answers that a request asked for."""

    index: int
    prompt_index: int
    prompt_ids: list[int]
    params: SamplingParams


Event = tuple[Choice, "Delta"]


class Usage:
    """Token counts of one HTTP request. A prompt counts once, however many choices it has."""

    def __init__(self) -> None:
        self._prompts: dict[int, tuple[int, int]] = {}
        self.completion_tokens = 0

    def push(self, choice: Choice, delta: Delta) -> None:
        counts = (delta.num_prompt_tokens, delta.num_cached_tokens)
        self._prompts.setdefault(choice.prompt_index, counts)
        self.completion_tokens += len(delta.token_ids)

    def as_json(self) -> dict[str, Any]:
        prompt = sum(count for count, _ in self._prompts.values())
        cached = sum(count for _, count in self._prompts.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


class Service:
    """The engine as the endpoints see it. Lives in one event loop."""

    def __init__(self, engine: AsyncEngine, max_live: int) -> None:
        self._engine = engine
        self._max_live = max_live
        self.num_live = 0
        """Engine requests that run or wait for this server."""

    @asynccontextmanager
    async def run(
        self, response_id: str, choices: Sequence[Choice]
    ) -> AsyncIterator[AsyncIterator[Event]]:
        """The deltas of all choices as they come. Leaving the context aborts what still runs.

        Raises ApiError 429 when the waiting queue is full, InputError for what the engine cannot
        serve, EngineError when it stopped.
        """
        self._admit(len(choices))
        try:
            streams = [self._start(f"{response_id}-{c.index}", c) for c in choices]
            events = streams[0] if len(streams) == 1 else _merge(streams)
            async with aclosing(events):
                yield events
        finally:
            self.num_live -= len(choices)

    def check_count(self, count: int, field: str) -> None:
        """Refuses a request that could never be admitted, before it is given memory."""
        if count > self._max_live:
            message = f"The request asks for {count} answers; this server takes {self._max_live}."
            raise invalid_value(field, message)

    def _admit(self, count: int) -> None:
        if self.num_live + count > self._max_live:
            raise overloaded(self.num_live, "answers")
        self.num_live += count

    def _start(self, request_id: str, choice: Choice) -> AsyncGenerator[Event, None]:
        # The engine refuses bad parameters in this call, before anything is sent to the client.
        return _checked(choice, self._engine.generate(choice.prompt_ids, choice.params, request_id))


async def _checked(
    choice: Choice, stream: AsyncGenerator[Delta, None]
) -> AsyncGenerator[Event, None]:
    """One choice's deltas; raises where the engine gave it up."""
    async with aclosing(stream) as deltas:
        async for delta in deltas:
            if delta.finish_reason == "error":
                raise ApiError(
                    500, f"A step failed: {delta.error}", None, "internal_error", "server_error"
                )
            if delta.finish_reason == "abort":
                raise unavailable("The server ended this request before it was finished.")
            yield choice, delta


async def _merge(streams: Sequence[AsyncGenerator[Event, None]]) -> AsyncGenerator[Event, None]:
    """Events of several choices in the order in which they come."""
    queue: asyncio.Queue[Event | Exception | None] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[Event, None]) -> None:
        try:
            async with aclosing(stream) as events:
                async for item in events:
                    queue.put_nowait(item)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
