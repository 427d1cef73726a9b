"""Guarded: a tier that never raises, is measured, and of which is remembered what it has."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from threading import Lock, get_ident
from typing import TypeVar

from elinvar.base.metrics import TierStats
from elinvar.kv.tiers.health import Cost, Health
from elinvar.kv.tiers.known import Known
from elinvar.kv.tiers.tier import Tier, TierError

EXPLORE_S = 30.0
"""A price that somebody asks for and nothing has confirmed for so long is measured again."""

_NO_KEY = bytes(32)

_log = logging.getLogger(__name__)

T = TypeVar("T")


class Guarded:
    """`tier`, asked by several threads. limit_s: an answer that takes longer counts as none."""

    def __init__(self, tier: Tier, limit_s: float, clock: Callable[[], float]) -> None:
        self.name = tier.name
        self._tier, self._clock = tier, clock
        self._lock = Lock()
        self._reading = Health(f"{tier.name}: reading", limit_s, clock)
        self._writing = Health(f"{tier.name}: writing", limit_s, clock)
        self._cost = Cost()
        self._known = Known()
        self._is_priced = False
        """Somebody asked for the price since the last read."""
        self._hits = self._misses = self._bytes_in = self._bytes_out = 0

    # ---- what is known: never waits for the tier --------------------------------------------

    @property
    def is_well(self) -> bool:
        """Whether what is asked of it has a prospect."""
        with self._lock:
            return self._reading.is_well

    @property
    def takes_writes(self) -> bool:
        with self._lock:
            return self._writing.is_well

    @property
    def may_try_to_write(self) -> bool:
        with self._lock:
            return self._writing.may_try

    def knows(self, keys: Sequence[bytes]) -> list[bool | None]:
        """Whether each is there; None where that is not known. All False, when the tier is not to be
        asked for anything."""
        with self._lock:
            if not self._reading.is_well:
                return [False] * len(keys)
            now = self._clock()
            return [self._known.answer(key, now) for key in keys]

    def predict(self, num_bytes: int) -> float:
        """Seconds that reading so many bytes takes."""
        with self._lock:
            self._is_priced = True
            return self._cost.seconds(num_bytes)

    @property
    def ask_s(self) -> float:
        """Seconds that an answer to `has` takes; 0 before there was one, or where it is unwell."""
        with self._lock:
            return self._cost.latency if self._reading.is_well else 0.0

    def rest(self, is_to_write: bool) -> float | None:
        """Seconds until it is time for a trial, or to try to write again; None: nothing is to come."""
        with self._lock:
            due = []
            if self._reading.retry_at is not None:
                due.append(self._reading.retry_at)
            elif self._is_priced and self._known.example():
                due.append(self._cost.last + EXPLORE_S)
            if is_to_write and self._writing.retry_at is not None:
                due.append(self._writing.retry_at)
            # A trial may be due but not allowed yet, beside a call that hangs: hence not 0.
            return max(0.05, min(due) - self._clock()) if due else None

    def stats(self, lost: int) -> TierStats:
        with self._lock:
            return TierStats(
                name=self.name,
                hits=self._hits,
                misses=self._misses,
                bytes_in=self._bytes_in,
                bytes_out=self._bytes_out,
                bytes_held=getattr(self._tier, "num_bytes", 0),
                errors=self._reading.num_errors + self._writing.num_errors,
                damaged=getattr(self._tier, "num_damaged", 0),
                lost=lost,
            )

    # ---- what it does: None, when it fails --------------------------------------------------

    def read(self, key: bytes, into: memoryview) -> bool | None:
        found = self._call(self._reading, lambda: self._tier.read(key, into))
        if found is None:
            return None
        with self._lock:
            self._known.learn(key, len(into) if found else None, self._clock())
            if found:
                self._hits += 1
                self._bytes_out += len(into)
            else:
                self._misses += 1
        return found

    def took(self, num_bytes: int, began: float) -> None:
        """A read and what belongs to it are over."""
        with self._lock:
            self._cost.observe(num_bytes, began, self._clock())
            self._is_priced = False

    def has(
        self, keys: Sequence[bytes], sizes: Sequence[int], to_write: bool = False
    ) -> list[bool] | None:
        began = self._clock()
        found = self._call(
            self._writing if to_write else self._reading,
            lambda: [there for _, there in zip(keys, self._tier.has(keys), strict=True)],
            heals=not to_write,
        )
        if found is None:
            return None
        with self._lock:
            now = self._clock()
            self._cost.observe_latency(now - began)
            for key, num_bytes, there in zip(keys, sizes, found, strict=True):
                self._known.learn(key, num_bytes if there else None, now)
        return found

    def write(self, key: bytes, data: memoryview) -> bool | None:
        def write() -> bool:
            self._tier.write(key, data)
            return True

        done = self._call(self._writing, write)
        if done:
            with self._lock:
                self._known.learn(key, len(data), self._clock())
                self._bytes_in += len(data)
        return done

    def begin_trial(self) -> tuple[bytes, int] | None:
        """It is time to see whether it works again, or what it takes now: a key to read, and the
        size of its content, 0 if none is known. The caller is to read it, or to ask for it."""
        with self._lock:
            if self._reading.is_busy:
                return None
            example = self._known.example()
            if not self._reading.is_well:
                if not self._reading.may_try:
                    return None
            elif example is None or not (
                not self._cost.is_known
                or (self._is_priced and self._clock() - self._cost.last > EXPLORE_S)
            ):
                return None
            self._reading.begin(get_ident())
            return example or (_NO_KEY, 0)

    def left(self, thread: int) -> None:
        """A thread has died, perhaps amid of a call."""
        with self._lock:
            self._reading.end(thread, "its thread died")
            self._writing.end(thread, "its thread died")

    def close(self) -> None:
        try:
            self._tier.close()
        except Exception as error:
            _log.warning("%s did not close: %s", self.name, error)

    def _call(self, health: Health, work: Callable[[], T], heals: bool = True) -> T | None:
        """heals: when it goes well, so does what failed before: a full disk still answers."""
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
                health.end(thread, trouble, heals)
        return None
