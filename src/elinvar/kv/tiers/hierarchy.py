"""Tiers: host memory and the tiers below it as one store of KV blocks.

The step thread talks to host memory alone: `put` and `get` are copies. Everything else moves in
threads beside compute: what is put is written to the tiers below when they have time, what is asked
for is brought up. Nothing here raises, and nothing waits for a tier: what does not come in time is
computed again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from threading import Lock, Thread

from elinvar.base.metrics import TierStats
from elinvar.kv.tiers.guard import Guarded
from elinvar.kv.tiers.health import Cost
from elinvar.kv.tiers.host import HostTier
from elinvar.kv.tiers.lane import Lane, Want
from elinvar.kv.tiers.ticket import Ticket
from elinvar.kv.tiers.tier import Tier

HOST = 0
UNKNOWN = -1
"""Some tier was not asked for this key yet: `ask`."""
NOWHERE = -2

_CLOSE_S = 2.0


class Tiers:
    """host: the memory between steps and the rest; lower: tiers 1, 2, .. in the order in which they
    are preferred. timeout_s: a ticket is done after so long, and a tier that takes longer to answer
    counts as failing. Tiers are closed with it."""

    def __init__(
        self,
        host: HostTier,
        lower: Sequence[Tier] = (),
        num_threads: int = 3,
        timeout_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.names = [host.name, *(tier.name for tier in lower)]
        self._host, self._timeout_s, self._clock = host, timeout_s, clock
        self._lock = Lock()
        self._wants: dict[bytes, Want] = {}
        self._closed = False
        self._cost = Cost()
        self._hits = self._misses = self._refused = self._bytes_in = self._bytes_out = 0
        self._lanes = [
            Lane(
                Guarded(tier, timeout_s, clock),
                host,
                self._settle,
                self._answered,
                num_threads,
                clock,
            )
            for tier in lower
        ]
        for key, num_bytes in host.contents():
            self._save(key, num_bytes)

    # ---- where contents are -----------------------------------------------------------------

    def where(self, keys: Sequence[bytes]) -> list[int]:
        """For each key the first tier known to have it, HOST or 1, 2, ..; UNKNOWN while some tier
        that works has not been asked; else NOWHERE. From memory: what a tier below has is known from
        writing it there and from asking."""
        levels = [HOST if self._host.holds(key) else NOWHERE for key in keys]
        for level, lane in enumerate(self._lanes, 1):
            for index, there in enumerate(lane.tier.knows(keys)):
                if there and levels[index] < 0:
                    levels[index] = level
                elif there is None and levels[index] == NOWHERE:
                    levels[index] = UNKNOWN
        return levels

    def ask(self, keys: Sequence[bytes], sizes: Sequence[int]) -> Ticket:
        """Ask the tiers below for these keys, of contents of `sizes` bytes. When the ticket is done,
        `where` knows what they said. It need not be released."""
        with self._lock:
            ticket = self._ticket(0, len(self._lanes))
        for lane in self._lanes:
            unknown = [i for i, there in enumerate(lane.tier.knows(keys)) if there is None]
            if not unknown or not lane.ask(
                [keys[i] for i in unknown], [sizes[i] for i in unknown], ticket
            ):
                self._answered(ticket)
        return ticket

    @property
    def ask_s(self) -> float:
        """Seconds until an `ask` should be answered, from what recent ones took."""
        return max((lane.tier.ask_s for lane in self._lanes), default=0.0)

    def predict(self, levels: Sequence[int], sizes: Sequence[int]) -> float:
        """Seconds until contents that are at `levels`, as of `where`, could be read by `get`, and to
        read them: from what recent moves took, and what is queued. Infinity where a level is
        negative, or a tier that has not been measured yet."""
        by_level = [0] * len(self.names)
        for level, num_bytes in zip(levels, sizes, strict=True):
            if level < 0:
                return float("inf")
            by_level[level] += num_bytes
        # Tiers work beside each other, the copies come after them.
        fetch = [
            lane.predict(num_bytes)
            for lane, num_bytes in zip(self._lanes, by_level[1:], strict=True)
            if num_bytes
        ]
        copy = self._cost.seconds(sum(sizes)) if self._cost.is_known else 0.0
        return max(fetch, default=0.0) + copy

    # ---- contents come up -------------------------------------------------------------------

    def fetch(self, keys: Sequence[bytes], sizes: Sequence[int]) -> Ticket:
        """Bring contents of `sizes` bytes into host memory, in this order, and pin them until the
        ticket is released. It ends at the first that does not come: those after it are of no use.
        Where it is not known who has a key, tiers are tried in turn."""
        with self._lock:
            ticket = self._ticket(len(keys), 0)
            for index, (key, num_bytes) in enumerate(zip(keys, sizes, strict=True)):
                if not ticket.wants(index):
                    break
                if (content := self._host.pin(key)) is not None:
                    ticket.came(index, content)
                else:
                    self._want(key, num_bytes, ticket, index)
        return ticket

    def _ticket(self, num_keys: int, pending: int) -> Ticket:
        deadline = self._clock() + self._timeout_s
        return Ticket(self._host, self._lock, num_keys, pending, deadline, self._clock)

    def _want(self, key: bytes, num_bytes: int, ticket: Ticket, index: int) -> None:
        want = self._wants.get(key)
        if want is not None and self._lanes[want.level - 1].tier.is_well:
            want.waiters.append((ticket, index))
            return
        answers = [(level, lane.tier.knows([key])[0]) for level, lane in enumerate(self._lanes, 1)]
        levels = [level for level, there in answers if there]
        levels += [level for level, there in answers if there is None]
        want = self._wants[key] = Want(key, num_bytes, levels, waiters=[(ticket, index)])
        self._pass_on(want)

    def _pass_on(self, want: Want) -> None:
        """To the next tier that takes it; with none left, it will not come."""
        while want.levels and want.is_wanted and not self._closed:
            want.level = want.levels.pop(0)
            if self._lanes[want.level - 1].want(want):
                return
        self._end(want)
        for ticket, index in want.waiters:
            ticket.failed(index)

    def _end(self, want: Want) -> None:
        if self._wants.get(want.key) is want:
            del self._wants[want.key]

    def _settle(self, want: Want) -> None:
        """A thread has read it, or not."""
        with self._lock:
            content, want.content = want.content or self._host.pin(want.key), None
            lacks_room, want.lacks_room = want.lacks_room, False
            if content is None:
                # Those behind it may have come before it and taken its room.
                if lacks_room and [t for t, index in want.waiters if t.gave_up_last(index)]:
                    want.levels.insert(0, want.level)
                self._pass_on(want)
                return
            self._end(want)
            for ticket, index in want.waiters:
                if ticket.wants(index):
                    ticket.came(index, self._host.share(content))
        self._host.unpin(content)
        self._save(want.key, want.num_bytes)

    def _answered(self, ticket: Ticket) -> None:
        with self._lock:
            ticket.answered()

    # ---- host memory, for the step thread ---------------------------------------------------

    def put(self, key: bytes, data: memoryview) -> bool:
        """Copy a content (format B, contiguous) into host memory, and let the tiers below have it
        when they have time. False when host memory has no room that is not pinned."""
        if not self._host.put(key, data):
            self._refused += 1
            return False
        self._bytes_in += len(data)
        self._save(key, len(data))
        return True

    def _save(self, key: bytes, num_bytes: int) -> None:
        for lane in self._lanes:
            lane.save(key, num_bytes)

    def get(self, key: bytes, into: memoryview) -> bool:
        """Copy a content of len(into) bytes out of host memory. False when it is not there, or
        damaged; then `into` is worthless."""
        began = self._clock()
        if not self._host.get(key, into):
            self._misses += 1
            return False
        self._cost.observe(len(into), began, self._clock())
        self._hits += 1
        self._bytes_out += len(into)
        return True

    @property
    def host_share(self) -> float:
        """How much of host memory is in use, 0 to 1."""
        return self._host.share_used

    def host_keys(self) -> list[bytes]:
        """What is there, the one not used for longest first."""
        return [key for key, _ in self._host.contents()]

    def forget(self, key: bytes) -> None:
        """Host memory need not keep it. What tiers below have they keep."""
        self._host.forget(key)

    # ---- the end ----------------------------------------------------------------------------

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until the tiers below that work have what is in host memory; False: not in time."""
        until = self._clock() + timeout_s
        while any(lane.num_unsaved for lane in self._lanes):
            if self._clock() >= until:
                return False
            time.sleep(0.002)
        return True

    def close(self) -> None:
        """Ends the threads and closes all tiers; what is not written below yet is not (see `flush`).
        A tier that hangs is left behind after 2 s. May be repeated."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            wants = list(self._wants.values())
        until = self._clock() + _CLOSE_S
        for lane in self._lanes:
            lane.close()
        for lane in self._lanes:
            lane.join(until)
        for want in wants:
            self._settle(want)
        closers = [Thread(target=lane.tier.close, daemon=True) for lane in self._lanes]
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join(max(0.0, until - self._clock()))
        self._host.close()

    def stats(self) -> list[TierStats]:
        """Of host memory and each tier below."""
        host = self._host
        first = TierStats(
            name=host.name,
            hits=self._hits,
            misses=self._misses,
            bytes_in=self._bytes_in,
            bytes_out=self._bytes_out,
            bytes_held=host.num_bytes,
            errors=0,
            damaged=host.num_damaged,
            lost=self._refused,
        )
        return [first, *(lane.stats() for lane in self._lanes)]
