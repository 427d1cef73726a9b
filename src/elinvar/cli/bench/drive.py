"""Sends each request of a load when it is due, and stops early when asked to."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Sequence
from typing import Any

from elinvar.base.errors import ElinvarError
from elinvar.cli.bench.clients import Client
from elinvar.cli.bench.latency import Record
from elinvar.cli.bench.workload import Arrival, prompts
from elinvar.cli.terminal import bar, note


async def drive(
    client: Client, arrivals: Sequence[Arrival], seed: int
) -> tuple[list[Record], bool]:
    """A record of each request, and whether Ctrl-C came. Raises ElinvarError where not even a first
    request, which is not measured, can be made."""
    all_ids = prompts(arrivals, seed, client.vocab_size)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop.set)
    await client.start()
    try:
        # Other tokens than any prompt's: what is cached of them must not help.
        warm = prompts([Arrival(0.0, 16, 2)], seed + 1, client.vocab_size)[0].tolist()
        warm_up = asyncio.create_task(client.ask(warm, 2, Record(arrivals[0], 0.0)))
        warmed = await _ended(warm_up, stop)
        start = time.perf_counter()
        records = [Record(one, start + one.at) for one in arrivals]
        if not warmed:
            return records, True

        note(f"sending {len(records)} requests over {arrivals[-1].at:,.0f} s")
        with bar("requests", len(records)) as update:

            async def one(record: Record, index: int) -> None:
                await asyncio.sleep(max(0.0, record.due - time.perf_counter()))
                record.sent = True
                ids = all_ids[index].tolist()
                try:
                    await client.ask(ids, record.arrival.output_tokens, record)
                    record.done = bool(record.times)
                    if not record.done:
                        record.error = "The answer held no text."
                except ElinvarError as error:
                    record.error = str(error)
                ended = sum(r.done for r in records)
                update(ended, f"{ended} answered")

            everything = asyncio.gather(*(one(r, i) for i, r in enumerate(records)))
            return records, not await _ended(everything, stop)
    finally:
        await client.stop()


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
