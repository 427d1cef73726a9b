"""Lane: the threads that move contents between host memory and one tier below it, beside compute.

Owns the queues: what is wanted from the tier, asked of it, and to be written to it. Whatever the tier
does, raising, lying or hanging, callers never wait for it and the threads go on.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from threading import Lock, Thread

from elinvar.base.metrics import TierStats
from elinvar.kv.tiers.guard import Guarded
from elinvar.kv.tiers.host import Content, HostTier
from elinvar.kv.tiers.ticket import Ticket

_MOST_WANTED = 4096
_MOST_UNSAVED = 1 << 18
_BATCH = 16


@dataclass(slots=True, eq=False)
class Want:
    """A content on its way into host memory, and who waits for it: tickets, and which of their keys."""

    key: bytes
    num_bytes: int
    levels: list[int]
    """Tiers still to be tried after the present one."""
    level: int = 0
    waiters: list[tuple[Ticket, int]] = field(default_factory=list)
    content: Content | None = None
    """What was read, pinned once."""
    lacks_room: bool = False
    """It was read, and host memory had no room that is not pinned."""

    @property
    def is_wanted(self) -> bool:
        return any(ticket.wants(index) for ticket, index in self.waiters)


class _Buffer:
    """Room of one thread for a content on its way."""

    def __init__(self) -> None:
        self._room = bytearray()

    def view(self, num_bytes: int) -> memoryview:
        if len(self._room) < num_bytes:
            self._room = bytearray(num_bytes)
        return memoryview(self._room)[:num_bytes]


@dataclass(slots=True, eq=False)
class _Job:
    work: Callable[[_Buffer], None]
    end: Callable[[], None]
    """Called once, however the work ended."""


def _nothing() -> None:
    pass


class Lane:
    """settle: called with a want that was read, or not; answered: with a ticket whose keys were asked
    for, or not."""

    def __init__(
        self,
        tier: Guarded,
        host: HostTier,
        settle: Callable[[Want], None],
        answered: Callable[[Ticket], None],
        num_threads: int,
        clock: Callable[[], float],
    ) -> None:
        self.tier = tier
        self._host, self._settle, self._answered, self._clock = host, settle, answered, clock
        self._lock = Lock()
        self._reads: deque[Want] = deque()
        self._queued_bytes = 0
        self._asks: deque[tuple[Sequence[bytes], Sequence[int], Ticket]] = deque()
        self._unsaved: OrderedDict[bytes, int] = OrderedDict()
        """In host memory and perhaps not here, oldest first. The bytes stay where they are until a
        thread has time."""
        self._lost = 0
        self._num_saving = 0
        self._most_saving = max(1, num_threads - 1)
        """One thread keeps away from writing, so that what is wanted never waits for it."""
        self._in_hand: list[_Job | None] = [None] * num_threads
        self._closed = False
        # A queue, not a condition: a thread that waits for it holds nothing, however it ends.
        self._bell: SimpleQueue[None] = SimpleQueue()
        self._threads: list[Thread] = []
        self._threads = [self._start(index) for index in range(num_threads)]

    # ---- for anybody: never waits for the tier ----------------------------------------------

    def want(self, want: Want) -> bool:
        """Read it when its turn comes; False: the tier is unwell, or has too much to do."""
        with self._lock:
            if self._closed or not self.tier.is_well or len(self._reads) >= _MOST_WANTED:
                return False
            self._reads.append(want)
            self._queued_bytes += want.num_bytes
        self._ring()
        return True

    def ask(self, keys: Sequence[bytes], sizes: Sequence[int], ticket: Ticket) -> bool:
        with self._lock:
            if self._closed or not self.tier.is_well:
                return False
            self._asks.append((keys, sizes, ticket))
        self._ring()
        return True

    def save(self, key: bytes, num_bytes: int) -> None:
        """It is in host memory: write it here when there is time, unless it is here."""
        if self.tier.knows([key])[0]:
            return
        with self._lock:
            self._unsaved[key] = num_bytes
            if len(self._unsaved) > _MOST_UNSAVED:
                self._unsaved.popitem(last=False)
                self._lost += 1
        self._ring()

    def predict(self, num_bytes: int) -> float:
        """Seconds until so many bytes more would be here."""
        return self.tier.predict(self._queued_bytes + num_bytes)

    @property
    def num_unsaved(self) -> int:
        """Contents that the tier will have soon; 0 where it does not work."""
        with self._lock:
            busy = len(self._unsaved) + self._num_saving
            return busy if self.tier.takes_writes and not self._closed else 0

    def stats(self) -> TierStats:
        return self.tier.stats(self._lost)

    def close(self) -> None:
        """Threads end after what they are amid of; `join` waits for them."""
        with self._lock:
            self._closed = True
        for _ in self._threads:
            self._bell.put(None)

    def join(self, until: float) -> None:
        for thread in self._threads:
            thread.join(max(0.0, until - self._clock()))

    # ---- the threads ------------------------------------------------------------------------

    def _start(self, index: int, before: int = 0) -> Thread:
        thread = Thread(
            target=self._run, args=(index, before), name=f"elinvar-{self.tier.name}", daemon=True
        )
        thread.start()
        return thread

    def _ring(self) -> None:
        if not all(thread.is_alive() for thread in self._threads):
            self._replace_dead()
        if self._bell.qsize() < 2 * len(self._threads):
            self._bell.put(None)

    def _replace_dead(self) -> None:
        with self._lock:
            for index, thread in enumerate(self._threads):
                if not thread.is_alive() and not self._closed:
                    with contextlib.suppress(RuntimeError):  # no more threads: another time
                        self._threads[index] = self._start(index, thread.ident or 0)

    def _run(self, index: int, before: int) -> None:
        """before: the thread that had this place and died, perhaps with something in hand."""
        buffer = _Buffer()
        self.tier.left(before)
        self._end(index)
        while not self._closed:
            while not self._closed and (job := self._next(index)) is not None:
                try:
                    job.work(buffer)
                finally:
                    self._end(index)
            with contextlib.suppress(Empty):
                self._bell.get(timeout=self.tier.rest(bool(self._unsaved)))

    def _end(self, index: int) -> None:
        with self._lock:
            job, self._in_hand[index] = self._in_hand[index], None
        if job is not None:
            job.end()

    def _next(self, index: int) -> _Job | None:
        with self._lock:
            self._in_hand[index] = job = self._most_urgent()
            return job

    def _most_urgent(self) -> _Job | None:
        """What tickets wait for, the quicker answers first, then trials, then writes."""
        if self._asks:
            keys, sizes, ticket = self._asks.popleft()
            return _Job(partial(self._ask, keys, sizes, ticket), partial(self._answered, ticket))
        if self._reads:
            want = self._reads.popleft()
            self._queued_bytes -= want.num_bytes
            return _Job(partial(self._read, want), partial(self._settle, want))
        if (trial := self.tier.begin_trial()) is not None:
            return _Job(partial(self._try, *trial), _nothing)
        may_save = self._unsaved and self._num_saving < self._most_saving
        if may_save and self.tier.may_try_to_write:
            self._num_saving += 1
            count = min(_BATCH if self.tier.takes_writes else 1, len(self._unsaved))
            batch = [self._unsaved.popitem(last=False) for _ in range(count)]
            return _Job(partial(self._save, batch), partial(self._put_back, batch))
        return None

    def _read(self, want: Want, buffer: _Buffer) -> None:
        if want.is_wanted and self.tier.is_well:
            view, began = buffer.view(want.num_bytes), self._clock()
            if self.tier.read(want.key, view):
                want.content = self._host.put_pinned(want.key, view)
                want.lacks_room = want.content is None
                self.tier.took(want.num_bytes, began)

    def _ask(
        self, keys: Sequence[bytes], sizes: Sequence[int], ticket: Ticket, buffer: _Buffer
    ) -> None:
        if not ticket.done and self.tier.is_well:
            self.tier.has(keys, sizes)

    def _try(self, key: bytes, num_bytes: int, buffer: _Buffer) -> None:
        began = self._clock()
        if not num_bytes:
            self.tier.has([key], [0])
        elif self.tier.read(key, buffer.view(num_bytes)):
            self.tier.took(num_bytes, began)

    def _save(self, batch: list[tuple[bytes, int]], buffer: _Buffer) -> None:
        keys, sizes = zip(*batch, strict=True)
        for there in self.tier.has(keys, sizes, to_write=True) or ():
            # Somebody waits for what is read, nobody for what is written.
            if self._reads:
                break
            saved = batch.pop(0)
            if not (there or self._write(*saved, buffer)):
                break

    def _put_back(self, batch: list[tuple[bytes, int]]) -> None:
        """What is left of it is the next to be written."""
        with self._lock:
            for key, num_bytes in reversed(batch):
                self._unsaved[key] = num_bytes
                self._unsaved.move_to_end(key, last=False)
            self._num_saving -= 1

    def _write(self, key: bytes, num_bytes: int, buffer: _Buffer) -> bool:
        """False: the tier failed. Its content is not tried again, it may be what the tier fails of."""
        view = buffer.view(num_bytes)
        is_held = self._host.get(key, view)
        if is_held and self.tier.write(key, view):
            return True
        with self._lock:
            self._lost += 1
        return not is_held
