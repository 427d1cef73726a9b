"""Running batches: each line by the endpoint that clients use, as many at once as the engine has rows.

Whatever ends the process, the next one goes on: lines with a result are not run again, all others are.
Where the disk is full, results wait for room; no line is given up for it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TypeVar

import msgspec

from elinvar.server.batch_lines import Asks, Line, check, read_lines
from elinvar.server.batch_results import NO_USAGE, result_line, usage_of
from elinvar.server.batch_state import Batches, Body
from elinvar.server.errors import ApiError
from elinvar.server.file_store import Content, Files
from elinvar.server.files import MAX_AGE_S
from elinvar.server.inside import Inside

log = logging.getLogger(__name__)
Got = TypeVar("Got")

RETRY_S = 5.0
OUTPUT = "batch_output"
"""The purpose of what batches write."""
_MAX_WAIT_S = 60.0
_READ_AHEAD = 64
_LATER = {429, 503, 507}
"""What an endpoint answers where the line is not to blame."""
_NO_MODEL = b'"model_not_found"'
_ENDS = {"expired": "batch_expired", "cancelled": "batch_cancelled"}
_REASONS = {
    "expired": "The batch's time was over before this line was run.",
    "cancelled": "The batch was cancelled before this line was run.",
}


@dataclass(frozen=True, slots=True)
class Limits:
    concurrency: int
    """Lines that run at once, of all batches."""
    max_line_bytes: int
    retry_s: float = RETRY_S
    """Between attempts where a disk is full or a queue is."""


class Runner:
    def __init__(
        self,
        batches: Batches,
        files: Files,
        inside: Inside,
        has_model: Callable[[str, str], bool],
        limits: Limits,
    ) -> None:
        """has_model: whether a tenant may ask for a model of a name."""
        self._batches, self._files, self._inside = batches, files, inside
        self._has_model, self._limits = has_model, limits
        self._slots = asyncio.Semaphore(limits.concurrency)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        """The lines of a batch."""
        self._cancelled: set[str] = set()

    def begin(self, tenant: str, name: str) -> None:
        task = asyncio.create_task(self._run(tenant, name), name=name)
        self._tasks[name] = task
        task.add_done_callback(lambda _: self._forget(name))

    def _forget(self, name: str) -> None:
        del self._tasks[name]
        self._cancelled.discard(name)

    def stop_lines(self, name: str) -> None:
        """Of one that was cancelled."""
        if name in self._tasks:
            self._cancelled.add(name)
        if name in self._running:
            self._running[name].cancel()

    async def shutdown(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- a batch --------------------------------------------------------------------------------

    async def _run(self, tenant: str, name: str) -> None:
        try:
            batch = await self._patiently(lambda: self._batches.get(tenant, name))
            if batch["status"] == "validating":
                batch = await self._patiently(lambda: self._validate(tenant, batch))
            if batch["status"] == "in_progress":
                await self._run_lines(tenant, batch)
            if batch["status"] != "failed":
                await self._patiently(lambda: self._finish(tenant, name))
        except Exception:
            log.exception("Unexpected error in %s; it goes on when the server starts again.", name)

    async def _validate(self, tenant: str, batch: Body) -> Body:
        has_model = partial(self._has_model, tenant)
        path = self._files.path(batch["input_file_id"])
        most, endpoint = self._limits.max_line_bytes, batch["endpoint"]
        checked = await asyncio.to_thread(check, path, endpoint, has_model, most)

        def change(body: Body) -> None:
            if body["status"] != "validating":
                return  # it was cancelled meanwhile
            now = int(time.time())
            if checked.errors:
                body["errors"] = {"object": "list", "data": checked.errors}
                body |= {"status": "failed", "failed_at": now}
                return
            body |= {"status": "in_progress", "in_progress_at": now}
            body["request_counts"]["total"] = checked.total
            body["model"] = min(checked.models) if len(checked.models) == 1 else None

        return await self._batches.update(batch["id"], change)

    async def _run_lines(self, tenant: str, batch: Body) -> None:
        """Until all have a result, the batch's time is over, or it is cancelled."""
        name = batch["id"]
        if name in self._cancelled:
            return
        lines = self._running[name] = asyncio.create_task(self._lines(tenant, batch))
        try:
            await asyncio.wait([lines], timeout=max(0.0, batch["expires_at"] - time.time()))
        finally:
            lines.cancel()
            await asyncio.wait([lines])
            del self._running[name]
        if not lines.cancelled() and (error := lines.exception()) is not None:
            raise error

    async def _lines(self, tenant: str, batch: Body) -> None:
        done = await self._patiently(lambda: self._batches.done(batch["id"]))
        lines = read_lines(self._files.path(batch["input_file_id"]))
        # Those that wait to be run again, too: they hold no slot that others could use.
        begun = asyncio.Semaphore(self._limits.concurrency)
        async with asyncio.TaskGroup() as group:
            while some := await asyncio.to_thread(lambda: list(islice(lines, _READ_AHEAD))):
                for number, raw in some:
                    if number in done:
                        continue
                    await begun.acquire()
                    task = group.create_task(self._line(tenant, batch, number, raw))
                    task.add_done_callback(lambda _: begun.release())

    async def _line(self, tenant: str, batch: Body, number: int, raw: bytes) -> None:
        line = msgspec.json.decode(raw, type=Line)
        endpoint, request_id = batch["endpoint"], f"{batch['id']}-{number}"
        body = bytes(line.body)
        model = msgspec.json.decode(body, type=Asks).model
        while True:
            async with self._slots:
                told = await self._inside.post(endpoint, body, tenant, request_id)
            status, answer, headers = told
            # Lines are accepted for models that there are: it comes back. One that is there is of
            # another kind than the endpoint.
            is_gone = status == 404 and _NO_MODEL in answer and not self._has_model(tenant, model)
            if status not in _LATER and not is_gone:
                break
            wait = float(headers.get("Retry-After", self._limits.retry_s))
            await asyncio.sleep(min(wait, _MAX_WAIT_S))
        said = {"status_code": status, "request_id": request_id, "body": msgspec.Raw(answer)}
        result = result_line(line.custom_id, said, None)
        usage = usage_of(answer) if status == 200 else NO_USAGE
        add = self._batches.add
        await self._patiently(lambda: add(batch["id"], number, status == 200, result, usage))

    # ---- its files ------------------------------------------------------------------------------

    async def _finish(self, tenant: str, name: str) -> None:
        batch = await self._batches.update(name, _finalize)
        async with AsyncExitStack() as stack:
            good, bad = [await stack.enter_async_context(self._files.writing()) for _ in range(2)]
            last, done = 0, set()
            while some := await self._batches.results(name, last):
                for number, is_good, result in some:
                    await (good if is_good else bad).write(result + b"\n")
                    done.add(number)
                last = some[-1][0]
            end = _end(batch, len(done))
            if end != "completed" and batch["in_progress_at"] is not None:
                await self._write_unrun(batch, end, done, bad)
            await self._close(tenant, batch, end, good, bad)

    async def _write_unrun(self, batch: Body, end: str, done: set[int], bad: Content) -> None:
        error = {"code": _ENDS[end], "message": _REASONS[end]}
        lines = read_lines(self._files.path(batch["input_file_id"]))
        while some := await asyncio.to_thread(lambda: list(islice(lines, _READ_AHEAD))):
            for number, raw in some:
                if number not in done:
                    line = msgspec.json.decode(raw, type=Line)
                    await bad.write(result_line(line.custom_id, None, error) + b"\n")

    async def _close(self, tenant: str, batch: Body, end: str, good: Content, bad: Content) -> None:
        now, rows, names = time.time(), [], {}
        age_s = batch["output_expires_after"] or MAX_AGE_S
        try:
            for field, content in (("output", good), ("error", bad)):
                if content.size:
                    await content.settle()
                    title = f"{batch['id']}_{field}.jsonl"
                    row = (content.id, tenant, OUTPUT, title, content.size, now, now + age_s)
                    rows.append(row)
                    names[f"{field}_file_id"] = content.id
            change = names | {"status": end, f"{end}_at": int(now)}
            await self._batches.end(batch["id"], rows, lambda body: body.update(change))
        except Exception:
            # It did not happen, and is done again with new ones.
            for content in (good, bad):
                content.path.unlink(missing_ok=True)
            raise

    # ---- patience -------------------------------------------------------------------------------

    async def _patiently(self, attempt: Callable[[], Awaitable[Got]]) -> Got:
        """What `attempt` returns, as soon as the disk lets it."""
        told = False
        while True:
            try:
                return await attempt()
            except OSError as error:
                trouble = self._files.as_told(error)
            except ApiError as error:
                if error.status not in _LATER:
                    raise
                trouble = error
            if not told:
                log.warning("Batches wait: %s", trouble.message)
            told = True
            await asyncio.sleep(self._limits.retry_s)


def _finalize(body: Body) -> None:
    if body["status"] == "in_progress":
        body |= {"status": "finalizing", "finalizing_at": int(time.time())}


def _end(batch: Body, num_done: int) -> str:
    if batch["status"] == "cancelling":
        return "cancelled"
    return "completed" if num_done == batch["request_counts"]["total"] else "expired"
