"""Lane: one tier below host memory with the threads that work for it, beside compute.

Owns what is known of the tier's contents, the queues, and how well the tier does. Whatever the tier
does, raising, lying or hanging, callers never wait for it and the threads go on.
"""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Lock, Thread, get_ident
from typing import TypeVar

from elinvar.kv.tiers.health import Cost, Health
from elinvar.kv.tiers.host import Content, HostTier
from elinvar.kv.tiers.known import Known
from elinvar.kv.tiers.stats import TierStats
from elinvar.kv.tiers.ticket import Ticket
from elinvar.kv.tiers.tier import Tier, TierError

_MOST_WANTED = 4096
_MOST_UNSAVED = 1 << 18
_BATCH = 16
_EXPLORE_S = 30.0
"""A price that somebody asks for and nothing has confirmed for so long is measured again."""
_NO_KEY = bytes(32)

_log = logging.getLogger(__name__)

T = TypeVar("T")


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
    keys were asked for. limit_s: an answer that takes longer counts as none."""

    def __init__(
        self,
        tier: Tier,
        host: HostTier,
        settle: Callable[[Want, Content | None], None],
        answered: Callable[[Ticket], None],
        num_threads: int,
        limit_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.tier = tier
        self.reading = Health(f"{tier.name}: reading", limit_s, clock)
        self.writing = Health(f"{tier.name}: writing", limit_s, clock)
        self.cost = Cost()
        self.hits = self.misses = self.lost = 0
        self.bytes_in = self.bytes_out = 0
        self._host, self._settle, self._answered, self._clock = host, settle, answered, clock
        self._lock = Lock()
        self._known = Known()
        self._reads: deque[Want] = deque()
        self._queued_bytes = 0
        self._asks: deque[tuple[Sequence[bytes], Sequence[int], Ticket]] = deque()
        self._unsaved: OrderedDict[bytes, int] = OrderedDict()
        """In host memory and perhaps not here, oldest first. The bytes stay where they are until a
        thread has time."""
        self._num_saving = 0
        self._is_priced = False
        self._closed = False
        # A queue, not a condition: a thread that waits for it holds nothing, however it ends.
        self._bell: SimpleQueue[None] = SimpleQueue()
        self._num_threads = num_threads
        self._threads = [self._start() for _ in range(num_threads)]

    # ---- for anybody: never waits for the tier ----------------------------------------------

    @property
    def is_well(self) -> bool:
        with self._lock:
            return self.reading.is_well and not self._closed

    def knows(self, keys: Sequence[bytes]) -> list[bool | None]:
        """Whether each is there; None where that is not known. All False, when the tier is not to be
        asked for anything."""
        with self._lock:
            if self._closed or not self.reading.is_well:
                return [False] * len(keys)
            now = self._clock()
            return [self._known.answer(key, now) for key in keys]

    def predict(self, num_bytes: int) -> float:
        """Seconds until so many bytes more would be here."""
        with self._lock:
            self._is_priced = True
            return self.cost.seconds(self._queued_bytes + num_bytes)

    def want(self, want: Want) -> bool:
        """Read it when its turn comes; False: the tier is unwell, or has too much to do."""
        with self._lock:
            if self._closed or not self.reading.is_well or len(self._reads) >= _MOST_WANTED:
                return False
            self._reads.append(want)
            self._queued_bytes += want.num_bytes
        self._ring()
        return True

    def ask(self, keys: Sequence[bytes], sizes: Sequence[int], ticket: Ticket) -> bool:
        with self._lock:
            if self._closed or not self.reading.is_well:
                return False
            self._asks.append((keys, sizes, ticket))
        self._ring()
        return True

    def save(self, key: bytes, num_bytes: int) -> None:
        """It is in host memory: write it here when there is time, unless it is here."""
        with self._lock:
            if self._known.answer(key, self._clock()):
                return
            self._unsaved[key] = num_bytes
            if len(self._unsaved) > _MOST_UNSAVED:
                self._unsaved.popitem(last=False)
                self.lost += 1
        self._ring()

    @property
    def num_unsaved(self) -> int:
        """Contents that a tier that works will have soon; 0 where it does not."""
        with self._lock:
            busy = len(self._unsaved) + self._num_saving
            return busy if self.writing.is_well and not self._closed else 0

    def close(self) -> None:
        """Threads end after what they are amid of; `join` waits for them."""
        with self._lock:
            self._closed = True
        for _ in self._threads:
            self._bell.put(None)

    def close_tier(self) -> None:
        try:
            self.tier.close()
        except Exception as error:
            _log.warning("%s did not close: %s", self.tier.name, error)

    def stats(self) -> TierStats:
        with self._lock:
            return TierStats(
                name=self.tier.name,
                hits=self.hits,
                misses=self.misses,
                bytes_in=self.bytes_in,
                bytes_out=self.bytes_out,
                bytes_held=getattr(self.tier, "num_bytes", 0),
                errors=self.reading.num_errors + self.writing.num_errors,
                damaged=getattr(self.tier, "num_damaged", 0),
                lost=self.lost,
            )

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
                self._threads[index] = self._start()
                with self._lock:
                    for health in (self.reading, self.writing):
                        health.end(thread.ident or 0, "its thread died")
        if self._bell.qsize() < 2 * self._num_threads:
            self._bell.put(None)

    def _run(self) -> None:
        buffer = _Buffer()
        while not self._closed:
            with contextlib.suppress(Empty):
                self._bell.get(timeout=self._rest())
            while not self._closed and (work := self._next()) is not None:
                work(buffer)

    def _rest(self) -> float | None:
        """Seconds until something is to be done that nobody rings for."""
        with self._lock:
            due = [h.retry_at for h in (self.reading, self.writing) if h.retry_at is not None]
            if self._is_priced and self._known.example():
                due.append(self.cost.last + _EXPLORE_S)
            # A trial may be due but not allowed yet, beside a call that hangs: hence not 0.
            return max(0.05, min(due) - self._clock()) if due else None

    def _next(self) -> Callable[[_Buffer], None] | None:
        """What is most urgent: what tickets wait for, then trials, then writes, of which one thread
        keeps away."""
        with self._lock:
            if self._reads:
                want = self._reads.popleft()
                self._queued_bytes -= want.num_bytes
                return lambda buffer: self._read(want, buffer)
            if self._asks:
                keys, sizes, ticket = self._asks.popleft()
                return lambda buffer: self._ask(keys, sizes, ticket)
            if self._is_trial_due():
                self.reading.begin(get_ident())
                known = self._known.example()
                return lambda buffer: self._try(known, buffer)
            if (
                self._unsaved
                and self.writing.may_try
                and self._num_saving < max(1, self._num_threads - 1)
            ):
                self._num_saving += 1
                count = min(_BATCH if self.writing.is_well else 1, len(self._unsaved))
                batch = [self._unsaved.popitem(last=False) for _ in range(count)]
                return lambda buffer: self._save(batch, buffer)
            return None

    def _is_trial_due(self) -> bool:
        if self.reading.is_busy:
            return False
        if not self.reading.is_well:
            return self.reading.may_try
        since = self._clock() - self.cost.last
        return self._known.example() is not None and (
            not self.cost.is_known or (self._is_priced and since > _EXPLORE_S)
        )

    def _read(self, want: Want, buffer: _Buffer) -> None:
        content = None
        try:
            if want.is_wanted and self.is_well:
                view = self._load(want.key, want.num_bytes, buffer)
                if view is not None:
                    content = self._host.put_pinned(want.key, view)
        finally:
            self._settle(want, content)

    def _load(self, key: bytes, num_bytes: int, buffer: _Buffer) -> memoryview | None:
        view = buffer.view(num_bytes)
        began = self._clock()
        found = self._call(self.reading, lambda: self.tier.read(key, view))
        if found is None:
            return None
        with self._lock:
            self._known.learn(key, num_bytes if found else None, self._clock())
            if not found:
                self.misses += 1
                return None
            self.hits += 1
            self.bytes_out += num_bytes
            self.cost.observe(num_bytes, began, self._clock())
            self._is_priced = False
            return view

    def _ask(self, keys: Sequence[bytes], sizes: Sequence[int], ticket: Ticket) -> None:
        try:
            if not ticket.done and self.is_well:
                self._has(self.reading, keys, sizes)
        finally:
            self._answered(ticket)

    def _has(
        self, health: Health, keys: Sequence[bytes], sizes: Sequence[int]
    ) -> list[bool] | None:
        began = self._clock()
        found = self._call(
            health, lambda: [there for _, there in zip(keys, self.tier.has(keys), strict=True)]
        )
        if found is None:
            return None
        with self._lock:
            now = self._clock()
            self.cost.observe_latency(now - began)
            for key, num_bytes, there in zip(keys, sizes, found, strict=True):
                self._known.learn(key, num_bytes if there else None, now)
        return found

    def _try(self, known: tuple[bytes, int] | None, buffer: _Buffer) -> None:
        """See whether the tier works, and what it takes."""
        if known is None:
            self._has(self.reading, [_NO_KEY], [0])
        else:
            self._load(*known, buffer)

    def _save(self, batch: list[tuple[bytes, int]], buffer: _Buffer) -> None:
        try:
            keys, sizes = zip(*batch, strict=True)
            found = self._has(self.writing, keys, sizes)
            for there in found or ():
                # Somebody waits for what is read, nobody for what is written.
                if self._reads or not (there or self._write(*batch[0], buffer)):
                    break
                del batch[0]
        finally:
            with self._lock:
                for key, num_bytes in reversed(batch):
                    self._unsaved[key] = num_bytes
                    self._unsaved.move_to_end(key, last=False)
                self._num_saving -= 1

    def _write(self, key: bytes, num_bytes: int, buffer: _Buffer) -> bool:
        """False: it is to be tried again."""
        view = buffer.view(num_bytes)
        if not self._host.get(key, view):
            with self._lock:
                self.lost += 1
            return True

        def write() -> bool:
            self.tier.write(key, view)
            return True

        if not self._call(self.writing, write):
            return False
        with self._lock:
            self._known.learn(key, num_bytes, self._clock())
            self.bytes_in += num_bytes
        return True

    def _call(self, health: Health, work: Callable[[], T]) -> T | None:
        """What the tier says, or None if it fails, in whatever way."""
        thread = get_ident()
        with self._lock:
            health.begin(thread)
        trouble: str | None = "its thread was killed"
        try:
            result = work()
            trouble = None
            return result
        except TierError as error:
            trouble = str(error)
        except BaseException as error:
            trouble = f"{type(error).__name__}: {error}"
        finally:
            with self._lock:
                health.end(thread, trouble)
        return None
