"""/metrics: parsed as Prometheus does, compared with the ledgers, of several models and tenants."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from elinvar.base.config import EngineConfig
from elinvar.base.exposition import expose
from elinvar.base.limits import TenantLimits
from elinvar.base.metrics import MAX_TENANTS, OTHERS
from elinvar.engine.aio import AsyncEngine
from elinvar.engine.core import Engine
from elinvar.server.app import Settings, create_models_app
from elinvar.server.models import Entry, Models
from elinvar.server.served import Served
from elinvar.server.tenants import Tenants, hash_key
from engines import tiny_engine
from serving import TEMPLATE, Serving, eventually, running, serving

CONFIG = EngineConfig(kv_memory=16 * 2**20, num_threads=1)
BODY: dict[str, Any] = {"prompt": "For ever and ever " * 8, "max_tokens": 6, "ignore_eos": True}
VLLM = {
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"),
    *("prefix_cache_queries", "prefix_cache_hits", "prompt_tokens", "generation_tokens"),
    *("request_success", "time_to_first_token_seconds", "inter_token_latency_seconds"),
    *("time_per_output_token_seconds", "e2e_request_latency_seconds", "num_preemptions"),
    *("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"),
    *("request_prompt_tokens", "request_generation_tokens", "iteration_tokens_total"),
    *("cache_config_info", "request_time_per_output_token_seconds"),
}
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parse(text: str) -> Samples:
    """Every family once, every sample once."""
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(set(names)) == len(names)
    assert text.count("# TYPE ") == text.count("# HELP ") == len(names)
    found: Samples = {}
    for sample in (sample for family in families for sample in family.samples):
        key = sample.name, frozenset(sample.labels.items())
        assert key not in found
        found[key] = sample.value
    return found


def get(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


@pytest.fixture(scope="module")
def two(tiny_gguf: Path) -> Iterator[tuple[str, list[Served]]]:
    def made(name: str) -> Served:
        core = Engine.load(str(tiny_gguf), CONFIG)
        core.tokenizer.use_chat_template(TEMPLATE)
        return Served.of(name, AsyncEngine(core), 100)

    served = [made("a"), made("b")]
    models = Models([Entry.loaded(one) for one in served])
    with running(create_models_app(models, Settings())) as (port, _):
        yield f"http://127.0.0.1:{port}", served


def test_each_model_has_its_numbers(two: tuple[str, list[Served]]) -> None:
    url, served = two
    records = []
    for model, count in (("a", 3), ("b", 1)):
        for _ in range(count):
            name = httpx.post(f"{url}/v1/completions", json={"model": model, **BODY}).json()["id"]
            found = httpx.get(f"{url}/v1/requests/{name}/explain").json()
            records += [(model, one) for one in found["choices"]]
    samples = parse(httpx.get(f"{url}/metrics").text)
    for model in ("a", "b"):
        own = [one for whose, one in records if whose == model]
        by_vllm = {"model_name": model, "engine": "0"}
        prompts = sum(one["prompt_tokens"] for one in own)
        assert get(samples, "vllm:prompt_tokens_total", **by_vllm) == prompts
        assert get(samples, "vllm:prefix_cache_queries_total", **by_vllm) == prompts
        cached = sum(sum(one["cached_tokens"].values()) for one in own)
        assert get(samples, "vllm:prefix_cache_hits_total", **by_vllm) == cached
        assert get(samples, "vllm:generation_tokens_total", **by_vllm) == 6 * len(own)
        ended = get(samples, "vllm:request_success_total", finished_reason="length", **by_vllm)
        assert ended == len(own) == get(samples, "vllm:request_prompt_tokens_count", **by_vllm)
        assert get(samples, "vllm:request_generation_tokens_sum", **by_vllm) == 6 * len(own)
        # The parts of the ledgers, in seconds.
        for part, state in (("queue", "queued"), ("prefill", "prefill"), ("decode", "decode")):
            spent = sum(one["parts_ns"][state] for one in own) / 1e9
            of_state = get(
                samples, "elinvar_request_state_seconds_total", model_name=model, state=state
            )
            assert of_state == pytest.approx(spent, abs=1e-9)
            summed = get(samples, f"vllm:request_{part}_time_seconds_sum", **by_vllm)
            assert summed == pytest.approx(spent, abs=2e-6)
        wall = sum(one["wall_ns"] for one in own) / 1e9
        seen = get(samples, "vllm:e2e_request_latency_seconds_sum", **by_vllm)
        # It counts until the text was cut off the tokens.
        assert seen == pytest.approx(wall, abs=0.05)
    metrics = served[0].core.metrics
    tokens = get(samples, "vllm:iteration_tokens_total_sum", model_name="a", engine="0")
    assert tokens == metrics.computed_tokens == metrics.step_tokens.total


def test_the_names_that_dashboards_ask_for(two: tuple[str, list[Served]]) -> None:
    text = httpx.get(f"{two[0]}/metrics").text
    names = {family.name for family in text_string_to_metric_families(text)}
    assert {f"vllm:{name}" for name in VLLM} <= names
    (info,) = (
        sample.labels
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "vllm:cache_config_info" and sample.labels["model_name"] == "a"
    )
    assert info["block_size"] == "32" and info["enable_prefix_caching"] == "True"


def _tenant_series(text: str) -> set[str]:
    return {dict(labels)["tenant"] for _, labels in parse(text) if "tenant" in dict(labels)}


def test_tenants_are_told_to_administrators(tiny_gguf: Path) -> None:
    limits = {"alice": TenantLimits(), "boss": TenantLimits()}
    digests = tuple((bytes.fromhex(hash_key(f"sk-{name}")), name) for name in limits)
    tenants = Tenants(limits, digests, {}, frozenset({"boss"}))
    config = EngineConfig(kv_memory=16 * 2**20, num_threads=1, tenants=limits)
    with serving(tiny_gguf, "tiny", config, tenants=tenants) as server:
        headers = {"Authorization": "Bearer sk-alice"}
        assert server.post("/v1/completions", BODY | {"model": "tiny"}, headers=headers).is_success
        assert _tenant_series(server.get_metrics()) == set()
        seen = httpx.get(f"{server.url}/metrics", headers=headers).text
        assert _tenant_series(seen) == set()
        headers = {"Authorization": "Bearer sk-boss"}
        samples = parse(httpx.get(f"{server.url}/metrics", headers=headers).text)
    of_alice = {"model_name": "tiny", "tenant": "alice"}
    assert get(samples, "elinvar_tenant_generated_tokens_total", **of_alice) == 6
    assert get(samples, "elinvar_tenant_requests_total", reason="length", **of_alice) == 1


def test_without_tenants_there_is_nothing_to_hide(two: tuple[str, list[Served]]) -> None:
    assert _tenant_series(httpx.get(f"{two[0]}/metrics").text) == {""}


def test_so_many_tenants_and_no_more() -> None:
    metrics = tiny_engine().metrics
    for i in range(3 * MAX_TENANTS):
        metrics.of_tenant(f"t{i}").prompt_tokens += 1
    assert len(metrics.tenants) == MAX_TENANTS + 1
    samples = parse(expose({"m": metrics}).decode())
    rest = get(samples, "elinvar_tenant_prompt_tokens_total", model_name="m", tenant=OTHERS)
    assert rest == 2 * MAX_TENANTS


def test_a_client_that_left_is_no_quick_answer(tiny_gguf: Path) -> None:
    with serving(tiny_gguf, "tiny") as server:
        _leave(server)
        assert eventually(server.idle)
        of_requests = server.core.metrics.of_requests
        assert server.core.metrics.finished["abort"] == 1 and of_requests.decode.count == 0


def _leave(server: Serving) -> None:
    body = BODY | {"model": "tiny", "stream": True, "max_tokens": 1500}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as response:
        next(response.iter_lines())
