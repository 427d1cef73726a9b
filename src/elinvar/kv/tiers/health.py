"""How a tier does: Health says whether to ask anything of it, Cost what a read of it takes."""

from __future__ import annotations

import logging
from collections.abc import Callable

_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 60.0
_MEMORY = 0.9
"""What an observation still weighs when the next has come."""

_log = logging.getLogger(__name__)


class Health:
    """A circuit breaker for one kind of work of one tier: after a failure it is left alone for a
    pause, which doubles while it fails, then tried once. Trouble is logged when it begins and when
    it has ended, not in between, and not each time that it comes and goes.

    what: of which the log speaks, as "disk: writing". Not locked; the lane's lock is held.
    """

    def __init__(self, what: str, limit_s: float, clock: Callable[[], float]) -> None:
        self.num_errors = 0
        self.retry_at: float | None = None
        """When to try it again; None while it is well."""
        self._what, self._limit_s, self._clock = what, limit_s, clock
        self._pause = _FIRST_PAUSE
        self._failed_at = -_LONGEST_PAUSE
        self._is_logged = False
        self._since: dict[int, float] = {}
        """When the work in progress began, by thread."""

    @property
    def is_well(self) -> bool:
        """Whether others may rely on it."""
        if self.retry_at is None and self._since:
            oldest = min(self._since.values())
            if self._clock() - oldest > self._limit_s:
                self._fail(f"no answer in {self._limit_s:g} s")
        return self.retry_at is None

    @property
    def may_try(self) -> bool:
        """It is well, or it is time to see whether it is again."""
        if self.is_well:
            return True
        assert self.retry_at is not None
        return not self._since and self._clock() >= self.retry_at

    def begin(self, thread: int) -> None:
        self._since[thread] = self._clock()

    @property
    def is_busy(self) -> bool:
        return bool(self._since)

    def end(self, thread: int, trouble: str | None, heals: bool = True) -> None:
        """The work that `thread` began, if any, has ended, well or with this trouble. heals: if well,
        it shows that all is well again."""
        began = self._since.pop(thread, None)
        if began is None:
            return
        if trouble is not None:
            self._fail(trouble)
        elif heals and self.retry_at is not None and began >= self._failed_at:
            self.retry_at = None
            if self._is_logged:
                _log.warning("%s works again", self._what)
                self._is_logged = False

    def _fail(self, trouble: str) -> None:
        now = self._clock()
        self.num_errors += 1
        if now - self._failed_at > 2 * _LONGEST_PAUSE:
            self._pause = _FIRST_PAUSE
        if self.retry_at is None and self._pause == _FIRST_PAUSE:
            _log.warning("%s fails, requests go on without it: %s", self._what, trouble)
            self._is_logged = True
        self.retry_at = now + self._pause
        self._failed_at = now
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)


class Cost:
    """What moving bytes takes, from what it took: a latency and seconds a byte, both of the recent
    past. Not locked."""

    def __init__(self) -> None:
        self.latency = 0.0
        """Of the first answer, in seconds."""
        self._seconds = self._bytes = 0.0
        self._last = float("-inf")

    def observe(self, num_bytes: int, began: float, ended: float) -> None:
        """A move took from `began` to `ended`. Where several go on at once, each counts from the end
        of the one before: their sum is the time that they took together."""
        self._seconds = _MEMORY * self._seconds + ended - max(began, self._last)
        self._bytes = _MEMORY * self._bytes + num_bytes
        self._last = ended

    def observe_latency(self, seconds: float) -> None:
        self.latency = seconds if not self.latency else 0.8 * self.latency + 0.2 * seconds

    @property
    def is_known(self) -> bool:
        return self._bytes > 0

    @property
    def last(self) -> float:
        """When the last move ended."""
        return self._last

    def seconds(self, num_bytes: int) -> float:
        """Infinity before anything was observed."""
        if not self._bytes:
            return float("inf") if num_bytes else 0.0
        return self.latency + num_bytes * self._seconds / self._bytes
