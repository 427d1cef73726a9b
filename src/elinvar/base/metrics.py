"""Metrics of one engine, in Prometheus' terms.

The step loop adds to plain numbers; base.exposition makes metric families of them, only when somebody
scrapes. Each engine has metrics of its own, so that two in one process do not mix.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

from elinvar.base.drafts import DraftStats
from elinvar.base.recent import Quantiles, Sample, Timeline

STEP_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
LATENCY_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
REQUEST_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0)
PART_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, *REQUEST_SECONDS)
"""Of a part of a request's time."""
TOKENS = tuple(float(2**i) for i in range(18))
"""Of a request, or of a step."""
MAX_TENANTS = 100
"""That are counted by name: each one makes a dozen series."""
OTHERS = "*"
"""All further ones together; no tenant has this name."""


class Histogram:
    """Counts per bucket; `bounds` are upper limits in ascending order."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        return sum(self.counts)

    def buckets(self) -> list[tuple[str, float]]:
        """(upper limit, how many did not exceed it), as Prometheus has them."""
        bounds = (*map(str, map(float, self.bounds)), "+Inf")
        return list(zip(bounds, accumulate(self.counts), strict=True))


REASONS = "stop", "length", "abort", "error"


class SessionLoad(Protocol):
    """What sessions say of theirs."""

    num_sessions: int

    @property
    def returns(self) -> Mapping[str, int]: ...
    @property
    def leased_tokens(self) -> int: ...


class Load(Protocol):
    """What a scheduler says of its state, asked when somebody scrapes."""

    @property
    def preemptions(self) -> Mapping[str, int]: ...
    @property
    def num_held_up(self) -> int: ...
    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def kv_usage(self) -> float: ...
    @property
    def sessions(self) -> SessionLoad: ...


@dataclass(slots=True)
class TierStats:
    """What a tier below the KV cache did since the start."""

    name: str
    hits: int
    misses: int
    bytes_in: int
    bytes_out: int
    bytes_held: int
    errors: int
    damaged: int
    lost: int
    """Contents that were gone from host memory before this tier had them; for host memory, those it
    had no room for."""


@dataclass(slots=True)
class TenantCounts:
    """Of requests that ended, for whatever reason."""

    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    queued_ns: int = 0


class RequestTimes:
    """Of requests that were answered to the end, by whatever name Prometheus has for a part."""

    def __init__(self) -> None:
        self.queue, self.prefill = Histogram(PART_SECONDS), Histogram(PART_SECONDS)
        """Until it first got a row; from then to the first token."""
        self.decode, self.per_token = Histogram(PART_SECONDS), Histogram(LATENCY_SECONDS)
        """From the first token to the last; the same over the tokens after the first."""
        self.prompt_tokens, self.generated_tokens = Histogram(TOKENS), Histogram(TOKENS)


class EngineMetrics:
    """Counters (since the engine started), gauges (of `load`) and histograms."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.tiers: Callable[[], Sequence[TierStats]] = lambda: ()
        """Of what lies below the KV cache."""
        self.drafters: Sequence[DraftStats] = ()
        self.steps = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.computed_tokens = 0
        self.generated_tokens = 0
        self.adapters = 0
        self.asleep = 0
        """1: its weights and its cache take no memory."""
        self.finished = dict.fromkeys(REASONS, 0)
        self.state_ns: dict[str, int] = {}
        """Of all requests that ended, by the ledger's states."""
        self.tenants: dict[str, TenantCounts] = {}
        self.cache: Mapping[str, object] = {}
        """What the KV cache is like."""
        self.step_seconds = Histogram(STEP_SECONDS)
        self.ttft_seconds = Histogram(LATENCY_SECONDS)
        self.itl_seconds = Histogram(LATENCY_SECONDS)
        self.e2e_seconds = Histogram(REQUEST_SECONDS)
        self.step_tokens = Histogram(TOKENS)
        self.of_requests = RequestTimes()
        # The same of late (base.recent).
        self.recent_steps, self.recent_ttft, self.recent_itl = Quantiles(), Quantiles(), Quantiles()
        self.timeline = Timeline(self.sample)

    def sample(self, at: float) -> Sample:
        """The counts of now. A request computes its prompt, and all tokens of its answer but the
        last one."""
        begun = sum(self.ttft_seconds.counts)
        prompts = self.computed_tokens - self.generated_tokens + begun
        counts = prompts, self.generated_tokens, self.prompt_tokens, self.cached_tokens
        load = self.load
        return Sample(at, *counts, load.num_running, load.num_waiting, load.kv_usage)

    @property
    def preemptions(self) -> int:
        return sum(self.load.preemptions.values())

    def of_tenant(self, name: str) -> TenantCounts:
        """Where requests of this tenant are counted."""
        if name not in self.tenants and len(self.tenants) >= MAX_TENANTS:
            name = OTHERS
        return self.tenants.setdefault(name, TenantCounts())
