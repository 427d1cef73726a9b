"""Running the choices of one HTTP request on the engine: admission, errors, accounting.

Owns the bound on the waiting queue and the life of the engine's requests: whatever happens to the
HTTP request, leaving `run` ends them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from elinvar.base.handling import Handling
from elinvar.base.limits import ANY_TENANT
from elinvar.base.sampling import SamplingParams
from elinvar.engine.aio import Ask
from elinvar.server.beams import Beams, search
from elinvar.server.errors import (
    CANCELLED,
    ApiError,
    cancelled,
    invalid_value,
    overloaded,
    unavailable,
)
from elinvar.server.explain import Explanations, choice_id

if TYPE_CHECKING:
    from elinvar.engine.aio import AsyncEngine
    from elinvar.engine.output import Delta


@dataclass(frozen=True, slots=True)
class Echo:
    """What an answer begins with, where it repeats its prompt."""

    text: str
    num_top: int | None
    """Alternatives in its log-probs; None: it has none."""
    alone: bool
    """The prompt is all that was asked for: what is sampled is left out."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the answers that a request asked for."""

    index: int
    prompt_index: int
    prompt_ids: list[int]
    params: SamplingParams
    echo: Echo | None = None
    prompt_top: int | None = None
    """Alternatives in the log-probs of its prompt, where the client asked for them."""


Event = tuple[Choice, "Delta"]


class Service:
    """The engine as the endpoints see it. Lives in one event loop."""

    def __init__(self, engine: AsyncEngine, max_live: int) -> None:
        self.explanations = Explanations(engine)
        self._engine = engine
        self._max_live = max_live
        self.num_live = 0
        """Engine requests that run or wait for this server."""
        self._ends = deque([time.monotonic()], maxlen=64)
        """When the last of them ended, and when there began to be some."""

    @asynccontextmanager
    async def run(
        self,
        response_id: str,
        request_id: str,
        choices: Sequence[Choice],
        handling: Handling,
        beams: Beams | None = None,
        whole: bool = False,
    ) -> AsyncIterator[AsyncGenerator[Event, None]]:
        """The deltas of all choices as they come, with `whole` when a choice has ended, or with `beams`
        what a search found. Leaving the context aborts what still runs.

        Raises ApiError 429 when the waiting queue is full, InputError for what the engine cannot
        serve, EngineError when it stopped.
        """
        size = len(choices)
        if beams is not None:
            size = max(size, beams.width * len({choice.prompt_index for choice in choices}))
        self._admit(size)

        def ask(choices: Sequence[Choice]) -> AsyncGenerator[Event, None]:
            asks = [
                Ask(c.prompt_ids, c.params, choice_id(response_id, c.index), handling, whole=whole)
                for c in choices
            ]
            return _events(choices, self._engine.generate_all(asks))

        try:
            # The engine refuses bad parameters in this call, before anything is sent to the client.
            if beams is None:
                found = ask(choices)
            else:
                found = search(ask, choices, beams, self._engine.engine.tokenizer)
            with self.explanations.following(response_id, request_id, handling.tenant, size):
                async with aclosing(found) as events:
                    yield events
        finally:
            self.num_live -= size
            self._ends.extend([time.monotonic()] * size)

    def limits_of(self, tenant: str) -> dict[str, str]:
        """What the tenant may still ask for, in OpenAI's headers. `requests` are those that may run
        or wait at once, `tokens` those that it may use without a pause."""
        core = self._engine.engine
        limits, now = core.config.tenants.get(tenant), time.monotonic()
        left = None if limits is None else core.scheduler.tenants.left(tenant, now)
        if limits is None or left is None:
            return {}
        headers: dict[str, str] = {}
        if left.requests is not None:
            most = (limits.max_running or 0) + (limits.max_waiting or 0)
            headers |= {"limit-requests": str(most), "remaining-requests": str(left.requests)}
        if left.tokens is not None:
            most = int((limits.tokens_per_s or 0) * limits.burst_s)
            headers |= {"limit-tokens": str(most), "remaining-tokens": str(left.tokens)}
            headers |= {"reset-tokens": f"{left.full_s:.3f}s"}
        return {f"x-ratelimit-{name}": value for name, value in headers.items()}

    def check_count(self, count: int, field: str, tenant: str) -> None:
        """Refuses a request that could never be admitted, before it is given memory."""
        config, most = self._engine.engine.config, self._max_live
        limits = config.tenants.get(tenant) or config.tenants.get(ANY_TENANT)
        if limits is not None and limits.max_waiting is not None:
            most = min(most, (limits.max_running or config.max_rows) + limits.max_waiting)
        if count > most:
            message = f"The request asks for {count} answers at once; {most} may be there."
            raise invalid_value(field, message)

    def _admit(self, count: int) -> None:
        if self.num_live + count > self._max_live:
            raise overloaded(self.num_live, "answers", self._room_s(count))
        if not self.num_live:
            self._ends.clear()
            self._ends.append(time.monotonic())
        self.num_live += count

    def _room_s(self, count: int) -> float:
        """Seconds until so many answers should have ended, at the rate of late; at most an hour."""
        seconds = time.monotonic() - self._ends[0]
        return min(3600.0, count * seconds / max(1, len(self._ends) - 1))


async def _events(
    choices: Sequence[Choice], deltas: AsyncGenerator[tuple[int, Delta], None]
) -> AsyncGenerator[Event, None]:
    """Raises where the engine gave a choice up."""
    async with aclosing(deltas):
        async for index, delta in deltas:
            if delta.finish_reason == "error":
                raise ApiError(
                    500, f"A step failed: {delta.error}", None, "internal_error", "server_error"
                )
            if delta.finish_reason == "abort":
                if delta.error == CANCELLED:
                    raise cancelled()
                raise unavailable("The server ended this request before it was finished.")
            yield choices[index], delta
