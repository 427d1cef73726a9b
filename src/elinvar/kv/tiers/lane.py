"""Lane: the threads that move contents between host memory and one tier below it, beside compute.

Owns the queues: what is wanted from the tier, asked of it, and to be written to it. Whatever the tier
does, raising, lying or hanging, callers never wait for it and the threads go on.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Lock, Thread

from elinvar.kv.tiers.guard import Guarded
from elinvar.kv.tiers.host import Content, HostTier
from elinvar.kv.tiers.stats import TierStats
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


class Lane:
    """settle: called by a thread with what it read, pinned, or None; answered: with a ticket whose
    keys were asked for."""

    def __init__(
        self,
        tier: Guarded,
        host: HostTier,
        settle: Callable[[Want, Content | None], None],
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
        self._closed = False
        # A queue, not a condition: a thread that waits for it holds nothing, however it ends.
        self._bell: SimpleQueue[None] = SimpleQueue()
        self._threads: list[Thread] = []
        self._threads = [self._start() for _ in range(num_threads)]

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

    def _start(self) -> Thread:
        thread = Thread(target=self._run, name=f"elinvar-{self.tier.name}", daemon=True)
        thread.start()
        return thread

    def _ring(self) -> None:
        for index, thread in enumerate(self._threads):
            if not thread.is_alive() and not self._closed:
                self.tier.left(thread.ident or 0)
                self._threads[index] = self._start()
        if self._bell.qsize() < 2 * len(self._threads):
            self._bell.put(None)

    def _run(self) -> None:
        buffer = _Buffer()
        while not self._closed:
            with contextlib.suppress(Empty):
                self._bell.get(timeout=self.tier.rest(bool(self._unsaved)))
            while not self._closed and (work := self._next()) is not None:
                work(buffer)

    def _next(self) -> Callable[[_Buffer], None] | None:
        """What is most urgent: what tickets wait for, then trials, then writes."""
        with self._lock:
            if self._reads:
                want = self._reads.popleft()
                self._queued_bytes -= want.num_bytes
                return lambda buffer: self._read(want, buffer)
            if self._asks:
                keys, sizes, ticket = self._asks.popleft()
                return lambda _: self._ask(keys, sizes, ticket)
            if (trial := self.tier.begin_trial()) is not None:
                return lambda buffer: self._try(*trial, buffer)
            may_save = self._unsaved and self._num_saving < self._most_saving
            if may_save and self.tier.may_try_to_write:
                self._num_saving += 1
                count = min(_BATCH if self.tier.takes_writes else 1, len(self._unsaved))
                batch = [self._unsaved.popitem(last=False) for _ in range(count)]
                return lambda buffer: self._save(batch, buffer)
            return None

    def _read(self, want: Want, buffer: _Buffer) -> None:
        content = None
        try:
            if want.is_wanted and self.tier.is_well:
                view, began = buffer.view(want.num_bytes), self._clock()
                if self.tier.read(want.key, view):
                    content = self._host.put_pinned(want.key, view)
                    self.tier.took(want.num_bytes, began)
        finally:
            self._settle(want, content)

    def _ask(self, keys: Sequence[bytes], sizes: Sequence[int], ticket: Ticket) -> None:
        try:
            if not ticket.done and self.tier.is_well:
                self.tier.has(keys, sizes)
        finally:
            self._answered(ticket)

    def _try(self, key: bytes, num_bytes: int, buffer: _Buffer) -> None:
        began = self._clock()
        if not num_bytes:
            self.tier.has([key], [0])
        elif self.tier.read(key, buffer.view(num_bytes)):
            self.tier.took(num_bytes, began)

    def _save(self, batch: list[tuple[bytes, int]], buffer: _Buffer) -> None:
        try:
            keys, sizes = zip(*batch, strict=True)
            for there in self.tier.has(keys, sizes, to_write=True) or ():
                # Somebody waits for what is read, nobody for what is written.
                if self._reads:
                    break
                saved = batch.pop(0)
                if not (there or self._write(*saved, buffer)):
                    break
        finally:
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
