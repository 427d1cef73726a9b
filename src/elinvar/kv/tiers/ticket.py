"""Ticket: contents on their way into host memory, seen by the one who asked for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elinvar.kv.tiers.host import Content, HostTier


class Ticket:
    """Asked for by `Tiers.fetch` and `Tiers.ask`. Every ticket is done some day, at its deadline at
    the latest, and stays as it is then until it is released."""

    __slots__ = (
        "_clock",
        "_deadline",
        "_done",
        "_end",
        "_held",
        "_host",
        "_lock",
        "_pending",
        "num_ready",
    )

    def __init__(
        self,
        host: HostTier,
        lock: Lock,
        num_keys: int,
        pending: int,
        deadline: float,
        clock: Callable[[], float],
    ) -> None:
        self.num_ready = 0
        """Leading keys that are in host memory now, and stay there until `release`."""
        self._host = host
        self._lock = lock
        self._held: list[Content | None] = [None] * num_keys
        self._end = num_keys
        """Keys from here on will not come, or would be of no use."""
        self._pending = pending
        """Answers awaited before it is done; for a fetch the keys that may still come."""
        self._deadline = deadline
        self._clock = clock
        self._done = not (num_keys or pending)

    @property
    def done(self) -> bool:
        """Nothing more will come."""
        if not self._done and self._clock() >= self._deadline:
            with self._lock:
                self._finish()
        return self._done

    def release(self) -> None:
        """The keys may be evicted again, and those that have not come need not. May be repeated."""
        with self._lock:
            self._end = self.num_ready = 0
            self._finish()

    # ---- for Tiers, which holds the lock ----------------------------------------------------

    def wants(self, index: int) -> bool:
        return not self._done and index < self._end

    def came(self, index: int, content: Content) -> None:
        """Key `index`, which is wanted, is there and pinned for this ticket."""
        self._held[index] = content
        while self.num_ready < self._end and self._held[self.num_ready] is not None:
            self.num_ready += 1
        self._settle()

    def gave_up_last(self, index: int) -> bool:
        """There is no room for key `index`: the last key behind it that is held will not come, and
        makes some. False: it is not wanted, or none is held behind it."""
        if not self.wants(index):
            return False
        for last in range(self._end - 1, index, -1):
            if self._held[last] is not None:
                self._end = last
                self._unpin([self._held[last]])
                self._held[last] = None
                return True
        return False

    def failed(self, index: int) -> None:
        """Key `index` will not come, so that those after it are of no use."""
        self._end = min(self._end, index)
        self._settle()

    def answered(self) -> None:
        """One of `pending` answers of an `ask`."""
        self._pending -= 1
        self._settle()

    def _settle(self) -> None:
        if self.num_ready == self._end and (self._held or not self._pending):
            self._finish()

    def _finish(self) -> None:
        self._done = True
        self._unpin(self._held[self.num_ready :])
        self._held = self._held[: self.num_ready]

    def _unpin(self, contents: Sequence[Content | None]) -> None:
        for content in contents:
            if content is not None:
                self._host.unpin(content)
