"""AsyncEngine: the step loop in one thread, its deltas handed to asyncio.

Only the thread touches the engine; everybody else leaves a note for it. A step's deltas cross
to each event loop in one call. Nothing here knows text, models or HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import traceback
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from numpy.typing import NDArray

from elinvar.base.errors import EngineError
from elinvar.base.grammar import Grammar
from elinvar.base.handling import NO_WISHES, Handling
from elinvar.base.sampling import SamplingParams
from elinvar.engine.core import Engine
from elinvar.engine.output import Delta
from elinvar.engine.watch import Record
from elinvar.kv.sessions import Sessions

log = logging.getLogger(__name__)

Got = TypeVar("Got")

LONGEST_SLEEP_S = 60.0
"""Where all wait for their tenants' rates."""
HUNG_SECONDS = 60.0
"""No step takes longer: what does not end within it at shutdown is given up."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What is asked of the engine: one sequence to continue."""

    prompt_ids: Sequence[int]
    params: SamplingParams
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    handling: Handling = NO_WISHES
    arrival: float = field(default_factory=time.monotonic)
    whole: bool = False
    """Nobody reads before it has ended: its deltas come together, and wake nobody before."""


Arrival = tuple[int, Delta | Exception]
"""Which of the requests that were asked together got something, and what."""


class _Inbox:
    """What arrives for those who wait in one event loop. A queue of asyncio's does as much with three times
    the calls, for each token of each stream."""

    __slots__ = ("_arrived", "_waiter")

    def __init__(self) -> None:
        self._arrived: list[Arrival] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, arrival: Arrival) -> None:
        self._arrived.append(arrival)
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():  # whoever waited may be cancelled
            waiter.set_result(None)

    async def take(self) -> list[Arrival]:
        """All that is there, at least one."""
        if not self._arrived:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        arrived, self._arrived = self._arrived, []
        return arrived


@dataclass(frozen=True, slots=True, eq=False)
class _Stream:
    """One request, and where those who wait for it get what arrives."""

    ask: Ask
    index: int
    """Among those asked together."""
    inbox: _Inbox
    """Theirs together, so that they come in the order in which the engine gave them."""
    loop: asyncio.AbstractEventLoop
    held: list[Delta] = field(default_factory=list)
    """Of one that is asked for whole, what the step thread has so far."""


class AsyncEngine:
    """Serves many consumers at once. `start` before use; `shutdown` when done."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._thread: threading.Thread | None = None
        # Shared, under the lock of `_wake`.
        self._wake = threading.Condition()
        self._arrived: list[_Stream] = []
        self._gone: list[_Stream] = []
        self._tasks: list[tuple[Callable[[], None], Future[None]]] = []
        self._at_rest: list[tuple[Callable[[], None], Future[None]]] = []
        """Tasks for when no request is there."""
        self._stopping = False
        self._abort_all = False
        self._error: BaseException | None = None
        # Only the step thread reads and writes this.
        self._streams: dict[str, _Stream] = {}
        self._step_began: float | None = None

    def start(self) -> None:
        """Start the step thread. It is a daemon and sleeps when there is nothing to do."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="elinvar-step", daemon=True)
            self._thread.start()

    async def shutdown(self, timeout: float | None = None) -> None:
        """Refuse new requests, finish those that run, stop the thread and close the engine.

        What still runs after `timeout` seconds (None: however long it takes) is aborted; its
        consumers get a last delta with finish_reason `abort`.
        """
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, timeout)
            with self._wake:
                self._abort_all = True
                self._wake.notify()
            await asyncio.to_thread(self._thread.join, HUNG_SECONDS)
            if self._thread.is_alive():  # a daemon: it does not keep the process
                log.error("A step hangs; the engine is left behind.")
                return
        self.engine.close()

    def check_alive(self) -> None:
        """Raises EngineError when the engine failed, is shut down or never started."""
        if self._error is not None:
            raise _stopped(self._error)
        if self._stopping:
            raise EngineError("The engine is shutting down; send the request to another one.")
        if self._thread is None:
            raise EngineError("The engine is not running; call start() first.")

    @property
    def step_s(self) -> float:
        """Seconds that the step in progress has taken so far; 0.0 between steps."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    def stack(self) -> str:
        """Where the step thread is now, for the log."""
        frame = sys._current_frames().get(self._thread.ident or 0) if self._thread else None
        return "" if frame is None else "".join(traceback.format_stack(frame))

    async def load_adapter(self, name: str, path: str) -> None:
        """As Engine.load_adapter; answers go on meanwhile."""
        self.check_alive()
        adapters = self.engine.adapters
        adapters.check_new(name)
        adapter = await asyncio.to_thread(adapters.read, path)
        await self._between_steps(lambda: self.engine.add_adapter(name, adapter))

    async def unload_adapter(self, name: str) -> None:
        """As Engine.unload_adapter."""
        await self._between_steps(lambda: self.engine.unload_adapter(name))

    async def compile(self, grammar: Grammar) -> None:
        """Makes ready what a request will ask for. Raises InputError (`grammar`) as Grammars.compile;
        without this call `generate` does, and holds up the event loop meanwhile."""
        self.check_alive()
        grammars = self.engine.grammars
        if grammars.find(grammar) is None:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(grammars.worker, grammars.compile, grammar)

    async def explain(self, request_ids: Sequence[str]) -> dict[str, Record]:
        """Engine.explain of those that have not ended. It waits for the step in progress."""
        found: dict[str, Record] = {}

        def look() -> None:
            for request_id in request_ids:
                if (one := self.engine.explain(request_id)) is not None:
                    found[request_id] = one

        await self._between_steps(look)
        return found

    async def cancel(self, request_ids: Sequence[str], why: str) -> int:
        """End requests: whoever reads them gets a last delta with finish_reason `abort` and `why`.
        Returns how many had not ended. It waits for the step in progress."""
        found: list[bool] = []
        abort = self.engine.abort
        await self._between_steps(lambda: found.extend([abort(one, why) for one in request_ids]))
        return sum(found)

    async def with_sessions(self, ask: Callable[[Sessions], Got]) -> Got:
        """What `ask` does with Engine.sessions, between steps. Raises what it raises."""
        found: list[Got] = []
        await self._between_steps(lambda: found.append(ask(self.engine.sessions)))
        return found[0]

    async def sleep(self, abort: bool = False) -> None:
        """As Engine.sleep, when those requests have ended that are there; with `abort` they are ended
        now. New ones are refused from this call on."""
        future: Future[None] = Future()
        with self._wake:
            self.check_alive()
            self._at_rest.append((self.engine.sleep, future))
            self._wake.notify()
        if abort:
            await self._between_steps(self._end_all)
        await asyncio.wrap_future(future)

    async def wake(self) -> None:
        """As Engine.wake."""
        await self._between_steps(self.engine.wake)

    async def update_weights(self, parts: Iterable[Mapping[str, NDArray[Any]]]) -> int:
        """As Engine.update_weights, in the step thread, which iterates over the parts."""
        found: list[int] = []
        await self._between_steps(lambda: found.append(self.engine.update_weights(parts)))
        return found[0]

    async def _between_steps(self, task: Callable[[], None]) -> None:
        future: Future[None] = Future()
        with self._wake:
            self.check_alive()
            self._tasks.append((task, future))
            self._wake.notify()
        await asyncio.wrap_future(future)

    def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        request_id: str | None = None,
        handling: Handling = NO_WISHES,
    ) -> AsyncGenerator[Delta, None]:
        """The deltas of one request; the last has a finish_reason (`error`: its step failed).

        Closing the iterator, or cancelling the task that reads it, aborts the request: its
        blocks are free after the step in progress. Raises InputError at once for a prompt or
        parameters that this engine cannot serve, EngineError when the engine stopped.
        """
        ask = Ask(prompt_ids, params, request_id or uuid.uuid4().hex, handling)
        return _only(self.generate_all([ask]))

    def generate_all(self, asks: Sequence[Ask]) -> AsyncGenerator[tuple[int, Delta], None]:
        """As `generate`, for several requests that arrive together: (index in `asks`, delta), step
        after step."""
        self._check_takes()
        for ask in asks:
            self.engine.check(ask.prompt_ids, ask.params)
        return self._generate(asks)

    async def _generate(self, asks: Sequence[Ask]) -> AsyncGenerator[tuple[int, Delta], None]:
        inbox = _Inbox()
        loop = asyncio.get_running_loop()
        open_ = {i: _Stream(ask, i, inbox, loop) for i, ask in enumerate(asks)}
        with self._wake:
            self._check_takes()
            self._arrived += open_.values()
            self._wake.notify()
        try:
            while open_:
                for index, got in await inbox.take():
                    if isinstance(got, Exception):
                        del open_[index]
                        raise got
                    if got.finish_reason is not None:
                        del open_[index]
                    yield index, got
        finally:
            if open_:
                with self._wake:
                    self._gone += open_.values()
                    self._wake.notify()

    def _check_takes(self) -> None:
        self.check_alive()
        if any(not future.cancelled() for _, future in self._at_rest):
            raise EngineError("The model is about to sleep: wake it up then, before you ask.")

    # What follows runs in the step thread.

    def _run(self) -> None:
        try:
            while self._take():
                self._step_began = time.monotonic()
                deltas = self.engine.step()
                self._step_began = None
                self._deliver(deltas)
        except BaseException as error:  # what a library's panic is: nobody else would hear of it
            log.exception("The engine stopped.")
            self._fail(error)

    def _take(self) -> bool:
        """Sleep until there is something to do; let requests in and out. False: stop."""
        with self._wake:
            while not (self._notes or self.engine.has_work):
                if self._stopping:
                    return False
                self._wake.wait()
            # Those that are there may all wait for their tenants' rates.
            if not self._notes and (idle := self.engine.idle_s):
                self._wake.wait(min(idle, LONGEST_SLEEP_S))
            arrived, self._arrived = self._arrived, []
            gone, self._gone = self._gone, []
            tasks, self._tasks = self._tasks, []
            if self._at_rest and not (arrived or self.engine.running()):
                tasks += self._at_rest
                self._at_rest = []
            abort_all = self._abort_all
        for stream in arrived:
            self._add(stream)
        for stream in gone:
            self._abort(stream)
        for task, future in tasks:
            _settle(task, future)
        if abort_all:
            self._end_all()
        return True

    @property
    def _notes(self) -> bool:
        """Whether there is something to do besides steps."""
        rests = self._at_rest and not self.engine.running()
        return bool(self._arrived or self._gone or self._tasks or rests)

    def _end_all(self) -> None:
        for request_id in self._streams:
            self.engine.abort(request_id)

    def _add(self, stream: _Stream) -> None:
        try:
            ask, add = stream.ask, self.engine.add
            add(ask.prompt_ids, ask.params, ask.request_id, ask.handling, ask.arrival)
        except Exception as error:
            self._send(stream.loop, [(stream, error)])
        else:
            self._streams[stream.ask.request_id] = stream

    def _abort(self, stream: _Stream) -> None:
        # A refused request may carry the id of one that lives: the stream tells them apart.
        if self._streams.get(stream.ask.request_id) is stream:
            del self._streams[stream.ask.request_id]
            self.engine.abort(stream.ask.request_id)

    def _deliver(self, deltas: Sequence[Delta]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, Delta | Exception]]] = {}
        for delta in deltas:
            stream = self._streams.get(delta.request_id)
            if stream is None:
                continue
            if delta.finish_reason is not None:
                del self._streams[delta.request_id]
            elif stream.ask.whole:
                stream.held.append(delta)
                continue
            arrived = by_loop.setdefault(stream.loop, [])
            arrived += [(stream, one) for one in (*stream.held, delta)]
        for loop, items in by_loop.items():
            self._send(loop, items)

    def _send(
        self,
        loop: asyncio.AbstractEventLoop,
        items: Sequence[tuple[_Stream, Delta | Exception]],
    ) -> None:
        try:
            loop.call_soon_threadsafe(_put_all, items)
        except RuntimeError:
            # The loop is closed: nobody reads its streams any more.
            for stream in [s for s in self._streams.values() if s.loop is loop]:
                self._abort(stream)

    def _fail(self, error: BaseException) -> None:
        """Tell everybody who waits, also those whom the thread had not let in yet."""
        with self._wake:
            self._error = error
            waiting = [*self._streams.values(), *self._arrived]
            self._streams.clear()
            tasks = self._tasks + self._at_rest
        for _, future in tasks:
            if future.set_running_or_notify_cancel():
                future.set_exception(_stopped(error))
        for stream in waiting:
            self._send(stream.loop, [(stream, _stopped(error))])


def _settle(task: Callable[[], None], future: Future[None]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            task()
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(None)


def _put_all(items: Sequence[tuple[_Stream, Delta | Exception]]) -> None:
    for stream, got in items:
        stream.inbox.put((stream.index, got))


async def _only(deltas: AsyncGenerator[tuple[int, Delta], None]) -> AsyncGenerator[Delta, None]:
    async with aclosing(deltas):
        async for _, delta in deltas:
            yield delta


def _stopped(cause: BaseException) -> EngineError:
    error = EngineError(f"The engine stopped: {cause}")
    error.__cause__ = cause
    return error
