"""Counts: books requests into the engine's metrics when they end, from what their ledgers say."""

from __future__ import annotations

from elinvar.base.metrics import EngineMetrics
from elinvar.engine.output import FinishReason
from elinvar.sched.request import Request


class Counts:
    """A Watcher. All requests count; times are of those that were answered to the end, since one that
    its client left is neither quick nor slow."""

    def __init__(self, metrics: EngineMetrics) -> None:
        self._metrics = metrics

    def began(self, request: Request) -> None:
        pass

    def ended(self, request: Request, reason: FinishReason) -> None:
        metrics, handling = self._metrics, request.handling
        parts = request.ledger.parts(request.finished or 0.0)
        totals = metrics.state_ns
        for state, spent in parts.items():
            totals[state] = totals.get(state, 0) + spent
        tenant = metrics.of_tenant(handling.tenant)
        tenant.finished[reason] += 1
        tenant.prompt_tokens += request.num_prompt_tokens
        tenant.cached_tokens += request.num_cached_tokens
        tenant.generated_tokens += request.num_tokens - request.num_prompt_tokens
        tenant.queued_ns += parts["queued"]
        if reason in ("stop", "length"):
            self._time(request)

    def _time(self, request: Request) -> None:
        times = self._metrics.of_requests
        num_generated = request.num_tokens - request.num_prompt_tokens
        times.prompt_tokens.observe(request.num_prompt_tokens)
        times.generated_tokens.observe(num_generated)
        began, first, ended = request.first_scheduled, request.first_token, request.finished
        if began is None or first is None or ended is None:
            return
        times.queue.observe(began - request.arrival)
        times.prefill.observe(first - began)
        times.decode.observe(ended - first)
        if num_generated > 1:
            times.per_token.observe((ended - first) / (num_generated - 1))
