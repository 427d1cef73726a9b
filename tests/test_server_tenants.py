"""Tenants over HTTP: keys, limits, and that nobody learns from the cache what others asked."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from elinvar.base.config import EngineConfig
from elinvar.base.errors import InputError
from elinvar.base.limits import TenantLimits
from elinvar.base.plan import StepPlan
from elinvar.run.ahead import Begun
from elinvar.server.tenants import Tenants, hash_key, read_tenants
from serving import Serving, eventually, serving

FILE = f"""
[tenants.alice]
key = "sk-alice"
weight = 2
max_running = 1
max_waiting = 1
tokens_per_s = 1e6

[tenants.bob]
key_sha256 = ["{hash_key("sk-bob")}", "{hash_key("sk-bob-new")}"]

[tenants.carol]
key = ["sk-carol", "sk-çarol"]
share_prefixes = true

[tenants.erin]
key = "sk-erin"
max_running = 1

[tenants.dave]
key = "sk-dave"
share_prefixes = true
"""
LONG = "Nobody may tell by the clock what somebody else has asked before. " * 4


def read(tmp_path: Path, text: str = FILE, name: str = "tenants.toml") -> Tenants:
    (tmp_path / name).write_text(text)
    return read_tenants(tmp_path / name)


@pytest.fixture(scope="module")
def tiny(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    tenants = read(tmp_path_factory.mktemp("tenants"))
    config = EngineConfig(kv_memory=64 * 2**20, num_threads=2, tenants=tenants.limits)
    with serving(tiny_gguf, "tiny", config, tenants=tenants) as running:
        yield running


def client(tiny: Serving, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{tiny.url}/v1", api_key=key, max_retries=0)


def ask(tiny: Serving, key: str, prompt: str = LONG) -> Any:
    answer = client(tiny, key).completions.create(model="tiny", prompt=prompt, max_tokens=2, seed=1)
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    return answer


def cached(answer: Any) -> int:
    return int(answer.usage.prompt_tokens_details.cached_tokens)


def test_the_file_in_both_formats(tmp_path: Path) -> None:
    tenants = read(tmp_path)
    assert tenants.limits["alice"] == TenantLimits(2, 1e6, max_running=1, max_waiting=1)
    assert [tenants.of(b"sk-" + name) for name in (b"alice", b"bob", b"bob-new", b"eve")] == [
        *("alice", "bob", "bob"),
        None,
    ]
    assert tenants.of(None) is None and Tenants().of(b"anything") == ""
    other = read(tmp_path, '{"tenants": {"default": {}, "a": {"key": "k"}}}', "tenants.json")
    assert [other.of(key) for key in (None, b"x", b"k")] == ["default", "default", "a"]
    marked = '\ufeff[tenants.a]\nkey = "k"'
    assert read(tmp_path, marked).of(b"k") == "a"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["[tenants.alice]"]),
        ("tenants = 3", ["[tenants.alice]"]),
        ("[tenants.a\n", ["not TOML"]),
        ("[tenants.a]\n", ["'a'", "key"]),
        ("[tenants.a]\nkey = 3", ["'a'", "key must be a text"]),
        ('[tenants.a]\nkey = ""', ["'a'", "not empty"]),
        ('[tenants.a]\nkey_sha256 = "abc"', ["'a'", "64 hexadecimal digits"]),
        ('[tenants.a]\nkey = "k"\nwieght = 2', ["'a'", "wieght", "weight"]),
        ('[tenants.a]\nkey = "k"\nweight = -1', ["'a'", "weight", "-1"]),
        (f'[tenants.a]\nkey = "k"\nweight = 1{"0" * 300}', ["'a'", "weight", "1e+12"]),
        ('[tenants.a]\nkey = "k"\ntokens_per_s = inf', ["'a'", "tokens_per_s", "inf"]),
        ('[tenants.a]\nkey = "k"\nmax_running = 0', ["'a'", "max_running", "0"]),
        ('[tenants.a]\nkey = "k"\nshare_prefixes = "yes"', ["share_prefixes", "'yes'"]),
        ('[tenants.a]\nkey = "k"\n[tenants.b]\nkey = "k"', ["'b'", "'a'"]),
        ('[tenants."*"]\nkey = "k"', ["'*'", "name"]),
        ("[more]\n[tenants.default]", ["nothing else"]),
        ("tenants.a = 1", ["'a'", "table"]),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        read(tmp_path, text)
    for word in (*words, "tenants.toml"):
        assert word in str(error.value)


@pytest.mark.parametrize(("name", "key"), [("a", "\\ud800"), ("a\\udc00", "k")])
def test_half_a_character_is_none(tmp_path: Path, name: str, key: str) -> None:
    text = f'{{"tenants": {{"{name}": {{"key": "{key}"}}}}}}'
    with pytest.raises(InputError, match=r"tenants\.json: .* half of a surrogate pair"):
        read(tmp_path, text, "tenants.json")


def test_keys(tiny: Serving) -> None:
    for headers in (
        {},
        {"Authorization": "Bearer sk-eve"},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic sk-alice"},
        {"Authorization": "Bearer sk-alice x"},
        {"Authorization": b"Bearer \xff\xfe"},
    ):
        for path in ("/v1/models", "/v1/requests/x/explain", "/v1/nothing"):
            response = httpx.get(tiny.url + path, headers=headers)  # type: ignore[arg-type]
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert "sk-" not in response.text
    with pytest.raises(openai.AuthenticationError):
        ask(tiny, "sk-eve")
    assert client(tiny, "sk-bob-new").models.list().data[0].id == "tiny"
    lower = httpx.get(f"{tiny.url}/v1/models", headers={"authorization": "bearer sk-bob"})
    assert lower.status_code == 200
    name = {"authorization": "Bearer sk-çarol".encode()}
    assert httpx.get(f"{tiny.url}/v1/models", headers=name).status_code == 200  # type: ignore[arg-type]
    for path in ("/health", "/metrics"):
        assert httpx.get(tiny.url + path).status_code == 200


def test_prefixes_are_found_by_their_own_tenant_only(tiny: Serving) -> None:
    assert cached(ask(tiny, "sk-alice")) == 0
    assert cached(ask(tiny, "sk-alice")) >= 32
    assert cached(ask(tiny, "sk-bob")) == 0
    assert cached(ask(tiny, "sk-bob-new")) >= 32
    # Those who share found nothing of the others', and find each other's.
    assert cached(ask(tiny, "sk-carol")) == 0
    assert cached(ask(tiny, "sk-dave")) >= 32
    texts = {ask(tiny, f"sk-{name}").choices[0].text for name in ("alice", "bob", "dave")}
    assert len(texts) == 1


def test_explanations_are_for_their_own_tenant_only(tiny: Serving) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 2}
    alice, bob = (
        {"Authorization": f"Bearer sk-{n}", "x-request-id": "same"} for n in ("alice", "bob")
    )
    name = tiny.post("/v1/completions", body, headers=alice).json()["id"]
    tiny.post("/v1/completions", body, headers=bob)
    url = f"{tiny.url}/v1/requests"
    mine = httpx.get(f"{url}/{name}/explain", headers=alice).json()
    assert mine["choices"][0]["tenant"] == "alice"
    assert httpx.get(f"{url}/same/explain", headers=alice).json() == mine
    assert httpx.get(f"{url}/same/explain", headers=bob).json()["id"] != name
    for missing in (name, "nothing"):
        response = httpx.get(f"{url}/{missing}/explain", headers=bob)
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "request_not_found"


def test_what_is_left(tiny: Serving) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 2}
    for more in ({}, {"stream": True}):
        headers = {"Authorization": "Bearer sk-alice"}
        got = tiny.post("/v1/completions", body | more, headers=headers).headers
        assert got["x-ratelimit-limit-requests"] == "2"
        assert int(got["x-ratelimit-remaining-requests"]) in (1, 2)
        assert got["x-ratelimit-limit-tokens"] == "10000000"
        assert 0 < int(got["x-ratelimit-remaining-tokens"]) <= 10_000_000
        assert got["x-ratelimit-reset-tokens"].endswith("s")
        headers = {"Authorization": "Bearer sk-bob"}
        got = tiny.post("/v1/completions", body | more, headers=headers).headers
        assert not any(name.startswith("x-ratelimit") for name in got)


def test_more_at_once_than_ever_may_be(tiny: Serving) -> None:
    headers = {"Authorization": "Bearer sk-alice"}
    body = {"model": "tiny", "prompt": "x", "max_tokens": 2}
    assert eventually(tiny.idle)
    assert tiny.post("/v1/completions", body | {"n": 2}, headers=headers).status_code == 200
    for more, field in (({"n": 3}, "n"), ({"prompt": ["x", "y", "z"]}, "prompt")):
        refused = tiny.post("/v1/completions", body | more, headers=headers)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == field


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue(tiny: Serving, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    """alice may have one request running and one waiting."""
    assert eventually(tiny.idle)
    begin, asked = tiny.core.runner.begin, threading.Event()

    def slow(plan: StepPlan) -> Begun:
        asked.wait(0.02)
        return begin(plan)

    monkeypatch.setattr(tiny.core.runner, "begin", slow)
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1000, "ignore_eos": True}
    headers = {"Authorization": "Bearer sk-alice"}
    done: list[httpx.Response] = []

    def post() -> None:
        done.append(tiny.post("/v1/completions", body, headers=headers))

    threads, scheduler = [threading.Thread(target=post) for _ in range(2)], tiny.core.scheduler
    threads[0].start()
    assert eventually(lambda: scheduler.num_running == 1)
    threads[1].start()
    assert eventually(lambda: scheduler.num_waiting == 1)
    refused = tiny.post("/v1/completions", body | {"stream": stream}, headers=headers)
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 3600
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    with pytest.raises(openai.RateLimitError):
        ask(tiny, "sk-alice")
    asked.set()
    assert ask(tiny, "sk-bob", "y")
    for thread in threads:
        thread.join()
    assert [response.status_code for response in done] == [200, 200]
    assert eventually(tiny.idle)


def test_a_waiting_tenant_sees_why(tiny: Serving) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 10, "ignore_eos": True, "n": 2}
    headers = {"Authorization": "Bearer sk-erin"}
    name = tiny.post("/v1/completions", body, headers=headers).json()["id"]
    found = httpx.get(f"{tiny.url}/v1/requests/{name}/explain", headers=headers).json()["choices"]
    waits = [choice["causes_ns"]["queued"].get("tenant", 0) for choice in found]
    assert min(waits) == 0 < max(waits)
    assert [choice["largest_batch"] for choice in found] == [1, 1]


def test_rights_go_by_the_path_that_is_served(tiny_gguf: Path, tmp_path: Path) -> None:
    """Routes match a path with a line end behind it, too."""
    tenants = read(tmp_path, '[tenants.boss]\nkey = "b"\nadmin = true\n[tenants.eve]\nkey = "e"')
    body = {"lora_name": "x", "lora_path": "/nonexistent"}
    with serving(tiny_gguf, "tiny", tenants=tenants, allow_adapter_loading=True) as running:
        for behind, wanted in {"": 403, "%0a": 404, "/": 404, "%0d": 404, "%20": 404}.items():
            headers = {"Authorization": "Bearer e"}
            answer = running.post(f"/v1/load_lora_adapter{behind}", body, headers=headers)
            assert answer.status_code == wanted
