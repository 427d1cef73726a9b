"""Sessions over HTTP, with raw requests and with the openai client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from elinvar.base.config import EngineConfig
from elinvar.server.tenants import read_tenants
from serving import Serving, eventually, serving

TENANTS = """
[tenants.alice]
key = "sk-alice"

[tenants.bob]
key = "sk-bob"
"""
PROMPT = "What an agent has read stays with it while its tools run, so it need not read again. "


@pytest.fixture(scope="module")
def tiny(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    path = tmp_path_factory.mktemp("tenants") / "tenants.toml"
    path.write_text(TENANTS)
    tenants = read_tenants(path)
    config = EngineConfig(kv_memory=64 * 2**20, num_threads=2, tenants=tenants.limits)
    with serving(tiny_gguf, "tiny", config, tenants=tenants) as running:
        yield running


def call(tiny: Serving, method: str, path: str = "", body: Any = None, key: str = "alice") -> Any:
    headers = {"Authorization": f"Bearer sk-{key}"}
    more = {} if body is None else {"json": body}
    url = f"{tiny.url}/v1/sessions{path}"
    response = httpx.request(method, url, headers=headers, timeout=30, **more)
    return response.json() | {"status": response.status_code}


def ask(tiny: Serving, prompt: str, key: str = "alice", **extra: Any) -> Any:
    client = openai.OpenAI(base_url=f"{tiny.url}/v1", api_key=f"sk-{key}", max_retries=0)
    return client.completions.create(
        model="tiny", prompt=prompt, max_tokens=6, seed=1, extra_body={"ignore_eos": True, **extra}
    )


def cached(answer: Any) -> int:
    return int(answer.usage.prompt_tokens_details.cached_tokens)


def test_a_request_makes_its_session_and_comes_back_to_it(tiny: Serving) -> None:
    first = ask(tiny, PROMPT, session_id="turns", expect_return_s=30, pause_kind="tests")
    found = call(tiny, "GET", "/turns")
    assert (found["object"], found["id"], found["turns"], found["running"]) == (
        *("session", "turns"),
        *(1, 0),
    )
    total = found["tokens"]["total"]
    assert total == first.usage.prompt_tokens + 5
    assert found["tokens"] == {"total": total, "leased": total, "memory": total, "below": 0}
    assert 20 < found["expect_return_s"] <= 30
    assert found["created_at"] <= found["last_used_at"] < found["expires_at"]
    again = ask(tiny, PROMPT + first.choices[0].text + " And?", session_id="turns")
    assert cached(again) > first.usage.prompt_tokens
    assert call(tiny, "GET", "/turns")["turns"] == 2
    metrics = tiny.get_metrics()
    assert (
        'elinvar_sessions{model_name="tiny"} 1.0' in metrics and "elinvar_leased_tokens" in metrics
    )
    assert 'elinvar_session_returns_total{model_name="tiny",result="miss"} 0.0' in metrics
    assert 'route="get_session",status="200"' in metrics
    assert call(tiny, "DELETE", "/turns") == {
        "id": "turns",
        "object": "session.deleted",
        "deleted": True,
        "status": 200,
    }
    assert call(tiny, "GET", "/turns")["status"] == 404


def test_a_session_is_made_updated_and_released(tiny: Serving) -> None:
    made = call(tiny, "POST", "", {"ttl_s": 60})
    assert made["status"] == 200 and made["id"].startswith("sess_") and made["turns"] == 0
    assert made["expires_at"] - made["last_used_at"] == pytest.approx(60, abs=1)
    path = f"/{made['id']}"
    ask(tiny, PROMPT, session_id=made["id"])
    assert call(tiny, "POST", path, {"expect_return_s": 5})["tokens"]["leased"] > 0
    gone = call(tiny, "POST", path, {"expect_return_s": 0})
    assert gone["tokens"]["leased"] == 0 and gone["expect_return_s"] is None
    call(tiny, "DELETE", path)


def test_forks_go_on_from_the_same_prefix(tiny: Serving) -> None:
    first = ask(tiny, PROMPT * 2, session_id="tree/root")
    branches = call(tiny, "POST", "/tree/root/fork", {"n": 3})
    assert branches["object"] == "list" and len(branches["data"]) == 3
    named = call(tiny, "POST", "/tree/root/fork", {"id": "tree/leaf"})
    assert [one["id"] for one in named["data"]] == ["tree/leaf"]
    call(tiny, "DELETE", "/tree/root")
    for one in [*branches["data"], *named["data"]]:
        answer = ask(tiny, PROMPT * 2 + one["id"], session_id=one["id"])
        assert cached(answer) >= first.usage.prompt_tokens - 1
    for one in call(tiny, "GET")["data"]:
        call(tiny, "DELETE", f"/{one['id']}")


def test_lists_come_in_pages(tiny: Serving) -> None:
    for index in range(5):
        call(tiny, "POST", "", {"id": f"page {index}"})
    whole = call(tiny, "GET")
    assert [one["id"] for one in whole["data"]] == [f"page {i}" for i in (4, 3, 2, 1, 0)]
    assert not whole["has_more"]
    page = call(tiny, "GET", "?limit=2&after=page%203")
    assert [one["id"] for one in page["data"]] == ["page 2", "page 1"] and page["has_more"]
    for query in ("?limit=0", "?limit=101", "?limit=x", "?after=nothing", "?order=asc"):
        assert call(tiny, "GET", query)["error"]["param"] in query
    assert call(tiny, "GET", "?order=desc") == whole
    for index in range(5):
        call(tiny, "DELETE", f"/page%20{index}")


def test_tenants_see_their_own(tiny: Serving) -> None:
    call(tiny, "POST", "", {"id": "secret"})
    assert call(tiny, "GET", key="bob")["data"] == []
    for method, path in (("GET", ""), ("POST", ""), ("POST", "/fork"), ("DELETE", "")):
        body = {} if method == "POST" else None
        found = call(tiny, method, f"/secret{path}", body, key="bob")
        assert found["status"] == 404 and found["error"]["code"] == "session_not_found"
    assert call(tiny, "POST", "", {"id": "secret"}, key="bob")["status"] == 200
    for key in ("alice", "bob"):
        assert call(tiny, "DELETE", "/secret", key=key)["deleted"]
    assert call(tiny, "GET", key="eve")["status"] == 401


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("", {"id": ""}, "id"),
        ("", {"id": "x" * 257}, "id"),
        ("", {"id": "there"}, "id"),
        ("", {"id": "there/fork"}, "id"),
        ("/there/fork", {"id": "/fork"}, "id"),
        ("", {"id": 7}, "id"),
        ("", {"name": "x"}, "name"),
        ("", {"ttl_s": 0}, "ttl_s"),
        ("", {"expect_return_s": -1}, "expect_return_s"),
        ("", {"pause_kind": "x" * 257}, "pause_kind"),
        ("/there", {"id": "another"}, "id"),
        ("/there", {"ttl_s": -1}, "ttl_s"),
        ("/there/fork", {"n": 0}, "n"),
        ("/there/fork", {"n": 129}, "n"),
        ("/there/fork", {"id": "x", "n": 2}, "id"),
        ("/there/fork", {"id": "there"}, "id"),
    ],
)
def test_what_is_wrong_is_named(tiny: Serving, path: str, body: Any, param: str) -> None:
    call(tiny, "POST", "", {"id": "there"})
    found = call(tiny, "POST", path, body)
    assert found["status"] == 400, found
    assert found["error"]["param"] == param and len(json.dumps(found)) < 1000


def test_a_wrong_method_is_told_all_that_there_are(tiny: Serving) -> None:
    for path, methods in (("", "GET, HEAD, POST"), ("/a", "DELETE, GET, HEAD, POST")):
        headers = {"Authorization": "Bearer sk-alice"}
        refused = httpx.put(f"{tiny.url}/v1/sessions{path}", headers=headers)
        assert refused.status_code == 405 and refused.headers["allow"] == methods
        assert methods in refused.json()["error"]["message"]


def test_hints_need_a_session(tiny: Serving) -> None:
    for hint in ({"expect_return_s": 3}, {"pause_kind": "tests"}):
        with pytest.raises(openai.BadRequestError, match="session_id"):
            ask(tiny, PROMPT, **hint)
    with pytest.raises(openai.BadRequestError, match="pause_kind"):
        ask(tiny, PROMPT, session_id="a", pause_kind="x" * 300)


def test_a_client_that_leaves_leaves_a_session(tiny: Serving) -> None:
    client = openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="sk-bob", max_retries=0)
    with client.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=400,
        stream=True,
        extra_body={"session_id": "left", "ignore_eos": True},
    ) as stream:
        next(iter(stream))
        assert call(tiny, "GET", "/left", key="bob")["running"] == 1
    assert eventually(lambda: call(tiny, "GET", "/left", key="bob")["running"] == 0)
    assert call(tiny, "GET", "/left", key="bob")["tokens"]["total"] > 10
    assert eventually(tiny.idle)
