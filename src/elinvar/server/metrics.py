"""What /metrics shows: the server's own counts; those of engines are base.exposition's."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class HTTPMetrics:
    def __init__(self, num_live: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "elinvar_http_requests",
            "HTTP requests by route and status; 499: the client left before an answer began.",
            ["route", "status"],
            registry=self._registry,
        )
        live = Gauge("elinvar_http_answers", "Answers running or waiting.", registry=self._registry)
        live.set_function(num_live)

    def count(self, route: str, status: int) -> None:
        self._requests.labels(route, str(status)).inc()

    def expose(self) -> bytes:
        return generate_latest(self._registry)
