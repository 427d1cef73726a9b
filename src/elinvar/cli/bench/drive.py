"""Sends each request of a load when it is due, and stops early when asked to."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from elinvar.base.errors import ElinvarError
from elinvar.cli.bench.clients import Client
from elinvar.cli.bench.latency import Record, RequestError
from elinvar.cli.bench.talk import Conversation, conversations, warm_up
from elinvar.cli.bench.workload import Arrival, Content
from elinvar.cli.terminal import bar, note


@dataclass(frozen=True, slots=True)
class Pace:
    """How requests follow each other besides their own times."""

    most: int | None = None
    """That are under way at once."""
    closed: bool = False
    """Each one is due when there is room for it, rather than at a time of its own."""
    turns: int = 1
    """Of each conversation: the next one is due when an answer is there."""


@dataclass(slots=True)
class Driven:
    records: list[Record]
    interrupted: bool
    cpu_s: float = 0.0
    """That this process took while requests were under way."""


async def drive(
    client: Client, arrivals: Sequence[Arrival], seed: int, pace: Pace, chat: bool = False
) -> Driven:
    """A record of each turn of each request. chat: their prompts are messages. Raises ElinvarError
    where not even a first request, which is not measured, can be made."""
    asks = conversations(arrivals, seed, client.vocab_size, chat)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop.set)
    await client.start()
    try:
        warm = client.ask(warm_up(seed, client.vocab_size, chat), 2, Record(arrivals[0], 0.0))
        warmed = await _ended(asyncio.create_task(warm), stop)
        load = _Load(client, arrivals, asks, pace)
        if not warmed:
            return Driven(load.records, True)
        note(f"sending {len(load.records)} requests{_span(arrivals, pace)}")
        before = time.process_time()
        finished = await _ended(asyncio.ensure_future(load.run()), stop)
        return Driven(load.records, not finished, time.process_time() - before)
    finally:
        await client.stop()


def _span(arrivals: Sequence[Arrival], pace: Pace) -> str:
    return f", {pace.most} at once" if pace.closed else f" over {arrivals[-1].at:,.0f} s"


class _Load:
    def __init__(
        self,
        client: Client,
        arrivals: Sequence[Arrival],
        asks: Sequence[Conversation],
        pace: Pace,
    ) -> None:
        self._client, self._asks, self._pace = client, asks, pace
        self._begins = time.perf_counter()
        self._of = [
            [Record(one, self._begins + one.at, turn=turn) for turn in range(pace.turns)]
            for one in arrivals
        ]
        self._num_done = 0
        self._room = None if pace.most is None else asyncio.Semaphore(pace.most)

    @property
    def records(self) -> list[Record]:
        return [record for several in self._of for record in several]

    async def run(self) -> None:
        with bar("requests", len(self.records)) as self._update:
            await asyncio.gather(*map(self._converse, self._of, self._asks))

    async def _converse(self, records: Sequence[Record], ask: Conversation) -> None:
        first = records[0]
        await asyncio.sleep(max(0.0, first.due - time.perf_counter()))
        async with self._room or contextlib.nullcontext():
            if self._pace.closed:
                first.due = time.perf_counter()
            answer: str | None = None
            for record in records:
                if record.turn:
                    record.due = time.perf_counter()
                answer = await self._ask(record, ask.ask(record.turn, answer))
                if answer is None:
                    break

    async def _ask(self, record: Record, content: Content) -> str | None:
        """The answer; None: there is none."""
        record.sent = time.perf_counter()
        try:
            answer = await self._client.ask(content, record.arrival.output_tokens, record)
        except RequestError as error:
            record.kind, record.error = error.kind, str(error)
        except ElinvarError as error:
            record.kind, record.error = "refused", str(error)
        else:
            record.done = bool(record.times)
            if record.done:
                self._num_done += 1
                self._update(self._num_done, f"{self._num_done} answered")
                return answer
            record.kind, record.error = "no text", "The answer held no text."
        return None


async def _ended(task: asyncio.Future[Any], stop: asyncio.Event) -> bool:
    """Waits for the task, and raises what it raises; at `stop` cancels it and returns False."""
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if task.done():
        task.result()
        return True
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return False
