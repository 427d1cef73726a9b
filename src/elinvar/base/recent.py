"""What an engine did of late: rates and percentiles over the last minutes, in memory that is bounded.

The thread that steps writes, any thread may read: what a reader walks over is replaced, not changed.
An observation costs a search among 100 bounds; a step costs one comparison.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import NamedTuple

WINDOW_S = 300.0
"""How far back is looked."""
_SLICE_S = 15.0
"""What is older than the window leaves it in slices of this size."""
_PAUSE_S = 0.05
"""Less than this between two steps is no pause."""
_PER_DOUBLING = 6
BOUNDS = tuple(2.0 ** (i / _PER_DOUBLING) * 1e-4 for i in range(20 * _PER_DOUBLING + 1))
"""Upper limits of the buckets, in seconds: from 0.1 ms to 105 s, each 12 % above the last."""

Counts = list[int]


class Quantiles:
    """Times of the window, as counts per bucket."""

    def __init__(self) -> None:
        self._slices: list[tuple[float, Counts]] = []
        """(when it ends, counts), the oldest first."""

    def observe(self, seconds: float, now: float) -> None:
        slices = self._slices
        if not slices or now >= slices[-1][0]:
            kept = [one for one in slices if one[0] > now - WINDOW_S]
            self._slices = slices = [*kept, (now + _SLICE_S, [0] * (len(BOUNDS) + 1))]
        slices[-1][1][bisect_left(BOUNDS, seconds)] += 1

    def at(self, shares: Sequence[float], now: float) -> list[float | None]:
        """The seconds that so large a share of the times does not exceed, for each of `shares`, which
        ascend; interpolated within a bucket. None where there are no times."""
        recent = [counts for end, counts in self._slices if end > now - WINDOW_S]
        counts = [sum(column) for column in zip(*recent, strict=True)]
        total = sum(counts)
        if not total:
            return [None] * len(shares)
        found: list[float | None] = []
        bucket, seen = 0, 0
        for share in shares:
            rank = share * total
            while seen + counts[bucket] < rank:
                seen += counts[bucket]
                bucket += 1
            low = BOUNDS[bucket - 1] if bucket else 0.0
            high = BOUNDS[min(bucket, len(BOUNDS) - 1)]
            inside = (rank - seen) / counts[bucket] if counts[bucket] else 0.0
            found.append(low + max(0.0, high - low) * inside)
        return found


class Sample(NamedTuple):
    """Counts since the start at one moment, and how many there were of what comes and goes."""

    at: float
    prompt_tokens: int
    """Of prompts, that were computed."""
    output_tokens: int
    asked_tokens: int
    """Of the prompts of requests that began, computed or not."""
    cached_tokens: int
    running: int
    waiting: int
    kv_usage: float


class Timeline:
    """Samples of the window, at most about two a second. Between two of them counts grow evenly."""

    def __init__(self, take: Callable[[float], Sample]) -> None:
        self._take = take
        self._samples: list[Sample] = [take(0.0)]
        self._due = 0.0
        self._ended: float | None = 0.0
        """When the last step did; None: one is in progress."""

    def begin(self, now: float) -> None:
        """A step begins."""
        if now >= self._due:
            sample = self._take(now)
            samples = [*self._samples, *self._pause(sample), sample]
            # Replaced, not changed: a reader may be at the old one.
            self._samples = samples[_last_before(samples, now - WINDOW_S - 1.0) :]
            self._due = now + 1.0
        self._ended = None

    def end(self, now: float) -> None:
        self._ended = now

    def _pause(self, sample: Sample) -> list[Sample]:
        """Between steps nothing grew: what was the same at the end of the last one."""
        ended = self._ended
        if ended is None or sample.at - ended < _PAUSE_S:
            return []
        return [sample._replace(at=ended, running=0, waiting=0, kv_usage=0.0)]

    def _until(self, now: float) -> list[Sample]:
        last = self._take(now)
        return [*self._samples, *self._pause(last), last]

    def growth(self, seconds: float, now: float) -> Sample:
        """How much the counts grew in the last `seconds`; the rest is as it is now."""
        samples = self._until(now)
        return _grown(samples, now - seconds, now)

    def seconds(self, count: int, now: float) -> list[Sample]:
        """The last `count` whole seconds, the oldest first: counts are those of each second."""
        samples, last = self._until(now), float(int(now))
        return [_grown(samples, last - i - 1, last - i) for i in range(count - 1, -1, -1)]


def _last_before(samples: Sequence[Sample], at: float) -> int:
    return max(0, bisect_left(samples, at, key=itemgetter(0)) - 1)


def _grown(samples: Sequence[Sample], start: float, end: float) -> Sample:
    first, last = _counts(samples, start), _counts(samples, end)
    prompt, output, asked, cached = (max(0, round(b - a)) for a, b in zip(first, last, strict=True))
    there = samples[_last_before(samples, end)]
    gauges = there.running, there.waiting, there.kv_usage
    return Sample(end, prompt, output, asked, cached, *gauges)


def _counts(samples: Sequence[Sample], at: float) -> tuple[float, ...]:
    """The four counts at a moment."""
    after = bisect_left(samples, at, key=itemgetter(0))
    if after == 0 or after == len(samples):
        return samples[min(after, len(samples) - 1)][1:5]
    a, b = samples[after - 1], samples[after]
    share = (at - a.at) / (b.at - a.at)
    return tuple(x + (y - x) * share for x, y in zip(a[1:5], b[1:5], strict=True))
