"""What Prometheus reads of engines: one exposition of all, told apart by the label `model_name`.

Names that begin with `elinvar_` are ours. Those that begin with `vllm:` are what dashboards made for
vLLM ask for; they are here where they mean the same, and only there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from elinvar.base.metrics import EngineMetrics, Histogram, TenantCounts, TierStats

if TYPE_CHECKING:
    from prometheus_client.core import Metric

Number = Callable[[EngineMetrics], float]
Numbers = Callable[[EngineMetrics], Mapping[str, float]]

_GAUGES: tuple[tuple[str, str, Number], ...] = (
    ("elinvar_requests_running", "Requests that hold a row.", lambda m: m.load.num_running),
    (
        "elinvar_requests_waiting",
        "Requests waiting for a row or memory.",
        lambda m: m.load.num_waiting,
    ),
    ("elinvar_adapters", "LoRA adapters that requests may ask for.", lambda m: m.adapters),
    ("elinvar_asleep", "1: the model sleeps, and takes no requests.", lambda m: m.asleep),
    ("elinvar_kv_usage", "Share of the KV blocks that requests use.", lambda m: m.load.kv_usage),
    (
        "elinvar_sessions",
        "Sessions that are remembered.",
        lambda m: m.load.sessions.num_sessions,
    ),
    (
        "elinvar_leased_tokens",
        "Cached tokens kept for sessions.",
        lambda m: m.load.sessions.leased_tokens,
    ),
    ("vllm:num_requests_running", "Requests that hold a row.", lambda m: m.load.num_running),
    ("vllm:num_requests_waiting", "Requests that wait for one.", lambda m: m.load.num_waiting),
    (
        "vllm:kv_cache_usage_perc",
        "Share of the KV blocks in use; 1: all.",
        lambda m: m.load.kv_usage,
    ),
)
_COUNTERS: tuple[tuple[str, str, Number], ...] = (
    ("elinvar_steps", "Steps executed.", lambda m: m.steps),
    ("elinvar_prompt_tokens", "Prompt tokens of requests that began.", lambda m: m.prompt_tokens),
    ("elinvar_cached_tokens", "Prompt tokens that were cached.", lambda m: m.cached_tokens),
    (
        "elinvar_computed_tokens",
        "Tokens computed, prompts' and answers'.",
        lambda m: m.computed_tokens,
    ),
    ("elinvar_generated_tokens", "Tokens sampled.", lambda m: m.generated_tokens),
    (
        "elinvar_budget_waits",
        "Times that a tenant's budget held it up.",
        lambda m: m.load.num_held_up,
    ),
    ("vllm:prompt_tokens", "Prompt tokens of requests that began.", lambda m: m.prompt_tokens),
    ("vllm:generation_tokens", "Tokens sampled.", lambda m: m.generated_tokens),
    ("vllm:prefix_cache_queries", "Prompt tokens looked for in it.", lambda m: m.prompt_tokens),
    ("vllm:prefix_cache_hits", "Prompt tokens found in it.", lambda m: m.cached_tokens),
    ("vllm:num_preemptions", "Requests put back to wait.", lambda m: m.preemptions),
    (
        "vllm:spec_decode_num_drafts",
        "Chains of drafts that were verified.",
        lambda m: sum(d.num_drafts for d in m.drafters),
    ),
    (
        "vllm:spec_decode_num_draft_tokens",
        "Drafts that were verified.",
        lambda m: sum(d.num_drafted for d in m.drafters),
    ),
    (
        "vllm:spec_decode_num_accepted_tokens",
        "Drafts that were right.",
        lambda m: sum(d.num_accepted for d in m.drafters),
    ),
)
_BY_LABEL: tuple[tuple[str, str, str, Numbers], ...] = (
    (
        "elinvar_preemptions",
        "Requests put back to wait, by cause.",
        "cause",
        lambda m: m.load.preemptions,
    ),
    (
        "elinvar_session_returns",
        "Turns of sessions that came back, by how much of what they left was still cached.",
        "result",
        lambda m: m.load.sessions.returns,
    ),
    ("elinvar_requests_finished", "Requests by how they ended.", "reason", lambda m: m.finished),
    (
        "elinvar_drafts",
        "Drafts that were verified.",
        "drafter",
        lambda m: {d.name: d.num_drafted for d in m.drafters},
    ),
    (
        "elinvar_accepted_drafts",
        "Those that were right.",
        "drafter",
        lambda m: {d.name: d.num_accepted for d in m.drafters},
    ),
    (
        "elinvar_drafting_seconds",
        "Time that guessing took.",
        "drafter",
        lambda m: {d.name: d.seconds for d in m.drafters},
    ),
    (
        "vllm:spec_decode_num_accepted_tokens_per_pos",
        "Drafts that were right, by their place in a chain.",
        "position",
        lambda m: {
            str(place): count
            for place, count in enumerate(
                map(sum, zip(*(d.by_place for d in m.drafters), strict=True))
            )
        },
    ),
    (
        "elinvar_request_state_seconds",
        "Time of requests that ended, by the state they were in.",
        "state",
        lambda m: {state: spent / 1e9 for state, spent in m.state_ns.items()},
    ),
    ("vllm:request_success", "Requests that ended.", "finished_reason", lambda m: m.finished),
)
_HISTOGRAMS: tuple[tuple[str, str, Callable[[EngineMetrics], Histogram]], ...] = (
    ("elinvar_step_seconds", "Time of one step.", lambda m: m.step_seconds),
    ("elinvar_ttft_seconds", "Arrival to first token.", lambda m: m.ttft_seconds),
    ("elinvar_itl_seconds", "Between tokens of a request.", lambda m: m.itl_seconds),
    ("elinvar_e2e_seconds", "Arrival to the last token.", lambda m: m.e2e_seconds),
    ("vllm:time_to_first_token_seconds", "Arrival to first token.", lambda m: m.ttft_seconds),
    ("vllm:inter_token_latency_seconds", "Between tokens.", lambda m: m.itl_seconds),
    ("vllm:time_per_output_token_seconds", "Its earlier name.", lambda m: m.itl_seconds),
    (
        "vllm:request_time_per_output_token_seconds",
        "First token to last, over the tokens after the first.",
        lambda m: m.of_requests.per_token,
    ),
    ("vllm:e2e_request_latency_seconds", "Arrival to the last token.", lambda m: m.e2e_seconds),
    ("vllm:request_queue_time_seconds", "Arrival to a row.", lambda m: m.of_requests.queue),
    ("vllm:request_prefill_time_seconds", "Row to first token.", lambda m: m.of_requests.prefill),
    ("vllm:request_decode_time_seconds", "First token to last.", lambda m: m.of_requests.decode),
    ("vllm:request_prompt_tokens", "Of a request.", lambda m: m.of_requests.prompt_tokens),
    ("vllm:request_generation_tokens", "Of a request.", lambda m: m.of_requests.generated_tokens),
    ("vllm:iteration_tokens_total", "Tokens computed in a step.", lambda m: m.step_tokens),
)
_OF_TENANTS: tuple[tuple[str, str, Callable[[TenantCounts], float]], ...] = (
    (
        "prompt_tokens",
        "Prompt tokens of a tenant's requests that ended.",
        lambda t: t.prompt_tokens,
    ),
    ("cached_tokens", "Those of them that were cached.", lambda t: t.cached_tokens),
    ("generated_tokens", "Tokens sampled for a tenant.", lambda t: t.generated_tokens),
    ("queued_seconds", "Time that its requests were in the queue.", lambda t: t.queued_ns / 1e9),
)
_OF_TIERS = (
    ("hits", "Contents of blocks that a tier gave."),
    ("misses", "Contents that it was asked for and did not have."),
    ("bytes_in", "Bytes written to it."),
    ("bytes_out", "Bytes read from it."),
    ("errors", "Times that it failed."),
    ("damaged", "Contents that were not what had been written."),
    ("lost", "Contents that it was to keep and could not."),
)


def expose(engines: Mapping[str, EngineMetrics], tenants: bool = True) -> bytes:
    """The text that /metrics answers, of engines by the names of their models. tenants: tell what
    each tenant asked for."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(_Collector(engines, tenants))
    return generate_latest(registry)


class _Collector:
    """See the collector protocol of prometheus-client."""

    def __init__(self, engines: Mapping[str, EngineMetrics], tenants: bool) -> None:
        self._engines, self._tenants = engines, tenants

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily as Counter
        from prometheus_client.core import GaugeMetricFamily as Gauge

        for kind, rows in ((Gauge, _GAUGES), (Counter, _COUNTERS)):
            for name, text, pick in rows:
                family = kind(name, text, labels=_names(name))
                for model, metrics in self._engines.items():
                    family.add_metric(_values(name, model), pick(metrics))
                yield family
        for name, text, label, several in _BY_LABEL:
            family = Counter(name, text, labels=_names(name, label))
            for model, metrics in self._engines.items():
                for value, count in several(metrics).items():
                    family.add_metric(_values(name, model, value), count)
            yield family
        yield from self._histograms()
        yield from self._tiers()
        if self._tenants:
            yield from self._of_tenants()
        yield self._cache()

    def _histograms(self) -> Iterator[Metric]:
        from prometheus_client.core import HistogramMetricFamily

        for name, text, pick in _HISTOGRAMS:
            family = HistogramMetricFamily(name, text, labels=_names(name))
            for model, metrics in self._engines.items():
                found = pick(metrics)
                family.add_metric(_values(name, model), found.buckets(), found.total)
            yield family

    def _tiers(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        tiers: list[tuple[str, TierStats]] = [
            (model, tier) for model, metrics in self._engines.items() for tier in metrics.tiers()
        ]
        if not tiers:
            return
        labels = ["model_name", "tier"]
        held = GaugeMetricFamily(
            "elinvar_kv_tier_bytes_held", "Bytes that a tier holds.", labels=labels
        )
        for model, tier in tiers:
            held.add_metric([model, tier.name], tier.bytes_held)
        yield held
        for name, text in _OF_TIERS:
            family = CounterMetricFamily(f"elinvar_kv_tier_{name}", text, labels=labels)
            for model, tier in tiers:
                family.add_metric([model, tier.name], getattr(tier, name))
            yield family

    def _of_tenants(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily

        labels, found = ["model_name", "tenant"], list(self._of_each_tenant())
        for name, text, pick in _OF_TENANTS:
            family = CounterMetricFamily(f"elinvar_tenant_{name}", text, labels=labels)
            for model, tenant, counts in found:
                family.add_metric([model, tenant], pick(counts))
            yield family
        ended = CounterMetricFamily(
            "elinvar_tenant_requests", "A tenant's requests that ended.", labels=[*labels, "reason"]
        )
        for model, tenant, counts in found:
            for reason, count in counts.finished.items():
                ended.add_metric([model, tenant, reason], count)
        yield ended

    def _of_each_tenant(self) -> Iterator[tuple[str, str, TenantCounts]]:
        for model, metrics in self._engines.items():
            for tenant, counts in metrics.tenants.copy().items():
                yield model, tenant, counts

    def _cache(self) -> Metric:
        from prometheus_client.core import GaugeMetricFamily

        name = "vllm:cache_config_info"
        fields = sorted({field for metrics in self._engines.values() for field in metrics.cache})
        family = GaugeMetricFamily(
            name, "What the KV cache is like; always 1.", labels=_names(name, *fields)
        )
        for model, metrics in self._engines.items():
            values = (str(metrics.cache.get(field, "")) for field in fields)
            family.add_metric(_values(name, model, *values), 1)
        return family


def _names(name: str, *more: str) -> Sequence[str]:
    return ["model_name", *(["engine"] if name.startswith("vllm:") else []), *more]


def _values(name: str, model: str, *more: str) -> Sequence[str]:
    """vLLM numbers the engines of a server that are replicas of each other; here there is one."""
    return [model, *(["0"] if name.startswith("vllm:") else []), *more]
