"""HostTier: contents in host memory, found by key, evicted when not used for longest.

Owns the index, the pins and the division of slots; the bytes are kv/tiers/segment.py's. Any thread
may call it: the lock is held for the index only, never while bytes are copied.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from elinvar.kv.tiers.segment import Segment, slot_size
from elinvar.kv.tiers.tier import MAX_KEY_BYTES

SHARED_MEMORY = Path("/dev/shm")
"""Where a file is memory, and outlives the process."""

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Content:
    """Where a content lies. Its slots are given back when it is no longer found nor pinned."""

    key: bytes
    num_bytes: int
    checksum: int
    slots: list[int]
    pins: int = 0
    found: bool = True


class HostTier:
    """`num_bytes` bytes of host memory for contents of the sizes `block_sizes`, and others.

    path: the file, best in /dev/shm, that keeps them when the engine ends, however it ends; None:
    they end with it. fingerprint: what is found there was written with the same one. field: the
    option that a refusal names. Raises InputError when another engine has the file, or it cannot be
    used.
    """

    name = "host"

    def __init__(
        self,
        path: Path | None,
        num_bytes: int,
        block_sizes: Sequence[int],
        fingerprint: bytes = b"",
        field: str = "kv_host_path",
    ) -> None:
        self._segment = Segment(path, num_bytes, slot_size(block_sizes), fingerprint, field)
        if self._segment.was_dropped:
            _log.info("%s held other blocks, or another amount: it begins empty", path)
        self._lock = Lock()
        self._by_key: dict[bytes, Content] = {}
        self._idle: OrderedDict[bytes, Content] = OrderedDict()
        """Those that may be evicted, the one not used for longest first."""
        self._writing: set[bytes] = set()
        # A stack, so that a light load touches little memory; beyond it, slots never used.
        self._free: list[int] = []
        self._num_fresh = 0
        self._sequence = 0
        self._closed = False
        self.num_bytes = 0
        """Of the contents that are held."""
        self.num_evicted = 0
        self.num_damaged = 0
        self._attach()

    def _attach(self) -> None:
        records = self._segment.records()
        taken: set[int] = set()
        # Two that claim one slot: the later one was written after the earlier one was given up.
        for record in reversed(records):
            slots = set(record.slots)
            if (
                len(slots) < len(record.slots)
                or slots & taken
                or record.key in self._by_key
                or len(record.key) > MAX_KEY_BYTES
            ):
                self._segment.erase(record.slots[0])
                continue
            taken |= slots
            self._add(Content(record.key, record.num_bytes, record.checksum, record.slots))
        for content in reversed(self._by_key.values()):
            self._idle[content.key] = content
        self._sequence = max((record.sequence for record in records), default=0)
        self._num_fresh = max(taken, default=-1) + 1
        self._free = [slot for slot in range(self._num_fresh) if slot not in taken]

    # ---- contents ---------------------------------------------------------------------------

    def put(self, key: bytes, data: memoryview) -> bool:
        """Keep a copy, in place of what was not used for longest. False when everything else is
        pinned, or there is too little memory."""
        content = self._put(key, data)
        if content is not None:
            self.unpin(content)
        return content is not None or self.holds(key)

    def put_pinned(self, key: bytes, data: memoryview) -> Content | None:
        """As `put`, and pinned; None where it was not put, or another thread is amid of it."""
        return self._put(key, data)

    def _put(self, key: bytes, data: memoryview) -> Content | None:
        with self._lock:
            if self._closed or key in self._writing:
                return None
            if (held := self._by_key.get(key)) is not None:
                return self._pinned(held)
            slots = self._allocate(-(-len(data) // self._segment.slot_bytes))
            if not slots:
                return None
            self._writing.add(key)
            self._sequence = sequence = self._sequence + 1
        content = None
        try:
            checksum = self._segment.write(slots, key, data, sequence)
            content = Content(key, len(data), checksum, slots, pins=1)
        finally:
            with self._lock:
                self._writing.discard(key)
                if content is not None:
                    self._add(content)
                else:
                    self._free += reversed(slots)
        return content

    def get(self, key: bytes, into: memoryview) -> bool:
        """Fill `into` with the content. False when it is not there, not of that size, or damaged;
        then `into` is worthless."""
        content = self.pin(key)
        if content is None:
            return False
        try:
            if content.num_bytes != len(into):
                return False
            if self._segment.read(content.slots, key, into) == content.checksum:
                return True
            if not self.num_damaged:
                _log.warning("a block in host memory is damaged, it is computed again, as others")
            self.num_damaged += 1
            self._drop(content)
            return False
        finally:
            self.unpin(content)

    def holds(self, key: bytes) -> bool:
        return key in self._by_key

    @property
    def share_used(self) -> float:
        """Of its memory, 0 to 1."""
        return (self._num_fresh - len(self._free)) / max(1, self._segment.num_slots)

    def contents(self) -> list[tuple[bytes, int]]:
        """Keys and sizes of all contents, the one not used for longest first."""
        with self._lock:
            pinned = [c for c in self._by_key.values() if c.pins]
            return [(c.key, c.num_bytes) for c in (*self._idle.values(), *pinned)]

    def forget(self, key: bytes) -> None:
        """It is no longer found; where it is pinned, its memory is free when it no longer is."""
        if (content := self.pin(key)) is not None:
            self._drop(content)
            self.unpin(content)

    # ---- pins -------------------------------------------------------------------------------

    def pin(self, key: bytes) -> Content | None:
        """The content stays until `unpin`, and was now used. None: it is not there."""
        with self._lock:
            content = self._by_key.get(key)
            return None if content is None or self._closed else self._pinned(content)

    def share(self, content: Content) -> Content:
        """One more pin on a content that is pinned."""
        with self._lock:
            return self._pinned(content)

    def _pinned(self, content: Content) -> Content:
        content.pins += 1
        self._idle.pop(content.key, None)
        return content

    def unpin(self, content: Content) -> None:
        with self._lock:
            content.pins -= 1
            if content.pins:
                return
            if content.found:
                self._idle[content.key] = content
            else:
                self._free += reversed(content.slots)

    # ---- for those who hold the lock --------------------------------------------------------

    def _add(self, content: Content) -> None:
        self._by_key[content.key] = content
        self.num_bytes += content.num_bytes

    def _drop(self, content: Content) -> None:
        """Pinned, so its slots come back with the last unpin."""
        with self._lock:
            if content.found:
                self._remove(content)

    def _remove(self, content: Content) -> None:
        content.found = False
        del self._by_key[content.key]
        self.num_bytes -= content.num_bytes
        self._segment.erase(content.slots[0])

    def _allocate(self, count: int) -> list[int]:
        """`count` slots, or none: then nothing is evicted."""
        fresh = self._segment.num_slots - self._num_fresh
        idle = 0
        for content in self._idle.values():
            if len(self._free) + fresh + idle >= count:
                break
            idle += len(content.slots)
        if len(self._free) + fresh + idle < count:
            return []
        while len(self._free) < count and self._num_fresh < self._segment.num_slots:
            if not self._segment.reserve(self._num_fresh):
                break
            self._free.append(self._num_fresh)
            self._num_fresh += 1
        while len(self._free) < count and self._idle:
            _, content = self._idle.popitem(last=False)
            self._remove(content)
            self._free += reversed(content.slots)
            self.num_evicted += 1
        if len(self._free) < count:
            return []
        taken = self._free[-count:]
        del self._free[-count:]
        return taken[::-1]

    def check(self) -> None:
        """Assert all invariants; nobody may be amid of a call."""
        with self._lock:
            held = [slot for content in self._by_key.values() for slot in content.slots]
            everything = held + self._free
            assert len(set(everything)) == len(everything), "a slot has two owners"
            assert set(everything) <= set(range(self._num_fresh)), "a slot that was never given out"
            pinned = [c for c in self._by_key.values() if c.pins]
            assert len(pinned) + len(self._idle) == len(self._by_key), "a content in no state"
            assert self.num_bytes == sum(c.num_bytes for c in self._by_key.values())
            assert not self._writing, "a write that never ended"

    def num_pinned(self) -> int:
        return len(self._by_key) - len(self._idle)

    def close(self) -> None:
        """The segment can be attached again, by this process or another."""
        with self._lock:
            self._closed = True
        self._segment.close()
