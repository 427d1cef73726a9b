"""Counters and histograms of one server, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.http = Counter(
            "elinvar_http_requests",
            "Answers by route and status.",
            ["route", "status"],
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "elinvar_prompt_tokens", "Prompt tokens of started requests.", registry=registry
        )
        self.cached_tokens = Counter(
            "elinvar_cached_prompt_tokens",
            "Prompt tokens found in the prefix cache.",
            registry=registry,
        )
        self.generated_tokens = Counter(
            "elinvar_generated_tokens", "Tokens sampled.", registry=registry
        )
        self.ttft = Histogram(
            "elinvar_time_to_first_token_seconds",
            "From the parsed request to its first token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.itl = Histogram(
            "elinvar_inter_token_latency_seconds",
            "Between two deltas of one choice.",
            buckets=_GAPS,
            registry=registry,
        )
        self.duration = Histogram(
            "elinvar_request_duration_seconds",
            "From the parsed request to its last token.",
            buckets=_SECONDS,
            registry=registry,
        )

    def gauge(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """A value that is read when somebody asks for the metrics."""
        Gauge(name, help_text, registry=self.registry).set_function(read)

    def text(self) -> bytes:
        return generate_latest(self.registry)
