"""The live picture and cancelling, over a real socket."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from elinvar.base.config import EngineConfig
from elinvar.base.limits import TenantLimits
from elinvar.server.tenants import Tenants, hash_key
from serving import Serving, eventually, serving

LONG: dict[str, Any] = {
    "model": "tiny",
    "prompt": "For ever and ever",
    "max_tokens": 1900,
    "seed": 1,
}
NO_END = {"ignore_eos": True}


@pytest.fixture(scope="module")
def tiny(tiny_gguf: Path) -> Iterator[Serving]:
    with serving(tiny_gguf, "tiny") as running:
        yield running


def look(tiny: Serving, query: str = "", **options: Any) -> dict[str, Any]:
    response = httpx.get(f"{tiny.url}/live{query}", timeout=30, **options)
    assert response.status_code == 200, response.text
    assert response.headers["cache-control"] == "no-store"
    found: dict[str, Any] = response.json()
    return found


def test_the_shape(tiny: Serving) -> None:
    tiny.post("/v1/completions", LONG | NO_END | {"max_tokens": 64})
    tiny.post("/v1/completions", LONG | NO_END | {"max_tokens": 4})
    assert eventually(lambda: look(tiny, "?history=1")["models"][0]["rows"]["running"] == 0)
    live = look(tiny, "?history=1")
    assert {"time", "uptime_s", "version", "models", "memory"} == live.keys()
    assert live["memory"]["rss"] > live["memory"]["kv"] == tiny.core.kv_bytes
    (model,) = live["models"]
    assert (model["name"], model["state"], model["requests"]) == ("tiny", "ready", [])
    assert model["rows"] == {"running": 0, "waiting": 0, "max": tiny.core.config.max_rows}
    blocks = model["kv"]["blocks"]
    assert blocks["total"] == sum(blocks[s] for s in ("free", "held", "cached", "leased"))
    assert blocks["cached"] > 0 == blocks["held"] and model["kv"]["tokens"] > 0
    assert 0 < model["prefix_hit_rate"] < 1  # the second prompt was found but for a token
    for name in ("ttft_ms", "itl_ms", "step_ms"):
        times = model[name]
        assert 0 < times["p50"] <= times["p95"] <= times["p99"]
    history = model["history"]
    assert {len(column) for column in history.values()} == {300}
    assert eventually(lambda: sum(look(tiny, "?history=1")["models"][0]["history"]["output"]) == 68)


def test_a_request_that_runs_is_listed_and_can_be_cancelled(tiny: Serving) -> None:
    client = tiny.client()
    headers = {"x-request-id": "mine"}
    stream = client.completions.create(
        **LONG, stream=True, extra_body={"session_id": "s", **NO_END}, extra_headers=headers
    )
    answer = next(iter(stream)).id
    (shown,) = look(tiny, "?history=1")["models"][0]["requests"]
    assert shown["id"] == answer and shown["session"] == "s" and shown["tenant"] == ""
    assert shown["state"] == "decode" and shown["output_tokens"] > 0 and shown["age_s"] > 0
    response = tiny.post("/v1/requests/mine/cancel")
    assert response.json() == {"id": answer, "object": "request.cancelled", "cancelled": 1}
    with pytest.raises(openai.APIError) as error:
        list(stream)
    assert error.value.code == "request_cancelled"
    assert eventually(tiny.idle)
    again = tiny.post(f"/v1/requests/{answer}/cancel")
    assert again.status_code == 200 and again.json()["cancelled"] == 0


def test_a_whole_answer_that_is_cancelled_is_not_tried_again(tiny: Serving) -> None:
    """Clients repeat what failed with 409, 429 or 5xx."""
    seen: list[int] = []
    with httpx.Client(event_hooks={"response": [lambda r: seen.append(r.status_code)]}) as http:
        client = openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="x", http_client=http)

        def cancel() -> bool:
            # Not the snapshot of this second, which may be older than the request.
            requests = look(tiny, "?history=1")["models"][0]["requests"]
            return any(tiny.post(f"/v1/requests/{r['id']}/cancel").is_success for r in requests)

        thread = threading.Thread(target=lambda: eventually(cancel))
        thread.start()
        with pytest.raises(openai.APIStatusError) as error:
            client.completions.create(**LONG, n=2, extra_body=NO_END)
        thread.join()
    assert error.value.code == "request_cancelled" and seen == [499]


def test_what_cannot_be_cancelled(tiny: Serving) -> None:
    response = tiny.post("/v1/requests/nobody/cancel")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "request_not_found"


@pytest.mark.parametrize("flag", ["stream", "history"])
def test_flags_are_0_or_1(tiny: Serving, flag: str) -> None:
    response = httpx.get(f"{tiny.url}/live?{flag}=yes")
    assert response.status_code == 400 and response.json()["error"]["param"] == flag


def test_all_who_watch_see_one_computation(tiny: Serving, monkeypatch: Any) -> None:
    import elinvar.server.live as live

    made: list[float] = []
    model = live._model
    monkeypatch.setattr(live, "_model", lambda *a: made.append(a[2]) or model(*a))
    streams = [httpx.stream("GET", f"{tiny.url}/live?stream=1", timeout=30) for _ in range(4)]
    lines = [stream.__enter__().iter_lines() for stream in streams]
    seen = set()
    for _ in range(3):
        seen |= {json.loads(next(one).removeprefix("data: "))["time"] for one in lines}
        assert [next(one) for one in lines] == [""] * 4
    for stream in streams:
        stream.__exit__(None, None, None)
    assert len({int(at) for at in made}) == len(made) >= len(seen) - 1  # one a second


def test_who_watches_does_not_hold_up_the_end(tiny_gguf: Path) -> None:
    with (
        serving(tiny_gguf, "tiny", grace=600) as tiny,
        httpx.stream("GET", f"{tiny.url}/live?stream=1", timeout=30) as stream,
    ):
        lines = stream.iter_lines()
        assert next(lines).startswith("data: ")
        tiny.server.handle_exit(signal.SIGTERM, None)
        assert all(line == "" or line.startswith("data: ") for line in lines)


def test_an_administrator_sees_and_cancels_what_others_asked(tiny_gguf: Path) -> None:
    limits = {name: TenantLimits() for name in ("alice", "root")}
    keys = tuple((bytes.fromhex(hash_key(name)), name) for name in limits)
    tenants = Tenants(limits, keys, admins=frozenset({"root"}))
    config = EngineConfig(kv_memory=64 * 2**20, num_threads=2, tenants=limits)
    root = {"Authorization": "Bearer root"}
    with serving(tiny_gguf, "tiny", config, tenants=tenants) as tiny:
        client = openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="alice", max_retries=0)
        stream = client.completions.create(
            **LONG, stream=True, extra_body=NO_END, extra_headers={"x-request-id": "hers"}
        )
        answer = next(iter(stream)).id
        (shown,) = look(tiny, "?history=1", headers=root)["models"][0]["requests"]
        assert (shown["id"], shown["tenant"]) == (answer, "alice")
        cancelled = tiny.post("/v1/requests/hers/cancel", headers=root).json()
        assert cancelled == {"id": answer, "object": "request.cancelled", "cancelled": 1}


def test_tenants_see_and_cancel_their_own(tiny_gguf: Path) -> None:
    limits = {name: TenantLimits() for name in ("alice", "bob")}
    keys = tuple((bytes.fromhex(hash_key(name)), name) for name in limits)
    config = EngineConfig(kv_memory=64 * 2**20, num_threads=2, tenants=limits)
    alice, bob = ({"Authorization": f"Bearer {name}"} for name in limits)
    with serving(tiny_gguf, "tiny", config, tenants=Tenants(limits, keys)) as tiny:
        assert httpx.get(f"{tiny.url}/live").status_code == 401
        client = openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="alice", max_retries=0)
        stream = client.completions.create(**LONG, stream=True, extra_body=NO_END)
        answer = next(iter(stream)).id
        (model,) = look(tiny, "?history=1", headers=bob)["models"]
        assert model["rows"]["running"] == 1 and model["requests"] == []
        assert tiny.post(f"/v1/requests/{answer}/cancel", headers=bob).status_code == 404
        (shown,) = look(tiny, "?history=1", headers=alice)["models"][0]["requests"]
        assert (shown["id"], shown["tenant"]) == (answer, "alice")
        assert tiny.post(f"/v1/requests/{answer}/cancel", headers=alice).json()["cancelled"] == 1
