"""Metrics of one engine, in Prometheus' terms.

The step loop adds to plain numbers; they become metric families only when somebody scrapes, and
the library that makes them is imported only then. Each engine has metrics of its own, so that two
in one process do not mix.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from elinvar.base.recent import Quantiles, Sample, Timeline

if TYPE_CHECKING:
    from prometheus_client.core import HistogramMetricFamily, Metric

STEP_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
LATENCY_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
REQUEST_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0)


class Histogram:
    """Counts per bucket; `bounds` are upper limits in ascending order, in seconds."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def family(self, name: str, text: str) -> HistogramMetricFamily:
        from prometheus_client.core import HistogramMetricFamily

        buckets: list[tuple[str, float]] = []
        seen = 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            seen += count
            buckets.append((bound, seen))
        return HistogramMetricFamily(name, text, buckets=buckets, sum_value=self.total)


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


class EngineMetrics:
    """Counters (since the engine started), gauges (of `load`) and histograms."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.tiers: Callable[[], Sequence[TierStats]] = lambda: ()
        """Of what lies below the KV cache."""
        self.steps = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.computed_tokens = 0
        self.generated_tokens = 0
        self.adapters = 0
        self.finished: dict[str, int] = {"stop": 0, "length": 0, "abort": 0, "error": 0}
        self.step_seconds = Histogram(STEP_SECONDS)
        self.ttft_seconds = Histogram(LATENCY_SECONDS)
        self.itl_seconds = Histogram(LATENCY_SECONDS)
        self.e2e_seconds = Histogram(REQUEST_SECONDS)
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

    def collect(self) -> Iterator[Metric]:
        """What a scrape reads (the collector protocol of prometheus-client)."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for name, value, text in (
            ("requests_running", self.load.num_running, "Requests that hold a row."),
            ("requests_waiting", self.load.num_waiting, "Requests waiting for a row or memory."),
            ("adapters", self.adapters, "LoRA adapters that requests may ask for."),
            ("kv_usage", self.load.kv_usage, "Share of the KV blocks in use by requests, 0 to 1."),
            ("sessions", self.load.sessions.num_sessions, "Sessions that are remembered."),
            ("leased_tokens", self.load.sessions.leased_tokens, "Cached tokens kept for sessions."),
        ):
            yield GaugeMetricFamily(f"elinvar_{name}", text, value=value)
        for name, count, text in (
            ("steps", self.steps, "Steps executed."),
            ("prompt_tokens", self.prompt_tokens, "Prompt tokens of the requests that began."),
            ("cached_tokens", self.cached_tokens, "Prompt tokens found in the prefix cache."),
            ("computed_tokens", self.computed_tokens, "Tokens computed, prompts' and answers'."),
            ("generated_tokens", self.generated_tokens, "Tokens sampled."),
            ("budget_waits", self.load.num_held_up, "Times that a tenant's budget held it up."),
        ):
            yield CounterMetricFamily(f"elinvar_{name}", text, value=count)
        preemptions = CounterMetricFamily(
            "elinvar_preemptions", "Requests put back to wait, by cause.", labels=["cause"]
        )
        for cause, count in self.load.preemptions.items():
            preemptions.add_metric([cause], count)
        yield preemptions
        returns = CounterMetricFamily(
            "elinvar_session_returns",
            "Turns of sessions that came back, by how much of what they left was still cached.",
            labels=["result"],
        )
        for result, count in self.load.sessions.returns.items():
            returns.add_metric([result], count)
        yield returns
        finished = CounterMetricFamily(
            "elinvar_requests_finished", "Requests by how they ended.", labels=["reason"]
        )
        for reason, count in self.finished.items():
            finished.add_metric([reason], count)
        yield finished
        yield from self._of_tiers()
        yield self.step_seconds.family("elinvar_step_seconds", "Time of one step.")
        yield self.ttft_seconds.family("elinvar_ttft_seconds", "Arrival to first token.")
        yield self.itl_seconds.family("elinvar_itl_seconds", "Between tokens of a request.")
        yield self.e2e_seconds.family("elinvar_e2e_seconds", "Arrival to the last token.")

    def _of_tiers(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        tiers = self.tiers()
        if not tiers:
            return
        held = GaugeMetricFamily(
            "elinvar_kv_tier_bytes_held", "Bytes that a tier holds.", labels=["tier"]
        )
        for tier in tiers:
            held.add_metric([tier.name], tier.bytes_held)
        yield held
        for name, text in (
            ("hits", "Contents of blocks that a tier gave."),
            ("misses", "Contents that it was asked for and did not have."),
            ("bytes_in", "Bytes written to it."),
            ("bytes_out", "Bytes read from it."),
            ("errors", "Times that it failed."),
            ("damaged", "Contents that were not what had been written."),
            ("lost", "Contents that it was to keep and could not."),
        ):
            family = CounterMetricFamily(f"elinvar_kv_tier_{name}", text, labels=["tier"])
            for tier in tiers:
                family.add_metric([tier.name], getattr(tier, name))
            yield family

    def expose(self) -> bytes:
        """The text that /metrics answers."""
        from prometheus_client import CollectorRegistry, generate_latest

        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry)
