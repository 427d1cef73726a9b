"""How a request asks to be treated: what arrives at the engine, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elinvar import LLM, Handling, SamplingParams
from elinvar.base.config import EngineConfig, PolicyName
from elinvar.base.errors import InputError
from elinvar.base.handling import OFFLINE
from elinvar.engine.output import FinishReason
from elinvar.sched.request import Request
from elinvar.server import prepare
from elinvar.server.errors import ApiError
from elinvar.server.schema import ChatRequest, CompletionRequest, decode
from engines import tiny_engine
from serving import Serving, serving

HELLO: Any = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> ChatRequest:
    return decode(json.dumps({"model": "m", "messages": HELLO} | fields).encode(), ChatRequest)


def completion(**fields: Any) -> CompletionRequest:
    return decode(json.dumps({"model": "m", "prompt": "x"} | fields).encode(), CompletionRequest)


def test_what_fields_mean() -> None:
    for make in (chat, completion):
        assert prepare.handling(make(), "", "fcfs") == Handling()
        assert prepare.handling(make(priority=0), "a", "fcfs") == Handling(tenant="a")
        full = make(priority=-3, session_id="s", expect_return_s=1.5, service_tier="flex")
        assert prepare.handling(full, "a", "priority") == Handling("a", "batch", -3, "s", 1.5)
        for tier in ("auto", "default", "priority"):
            request = make(service_tier=tier)
            assert prepare.handling(request, "", "fcfs").service == "interactive"
            assert prepare.tier_used(request) == "default"
        assert prepare.tier_used(make(service_tier="flex")) == "flex"
        assert prepare.tier_used(make()) is None


@pytest.mark.parametrize(
    ("fields", "policy", "param", "words"),
    [
        ({"priority": 1001}, "priority", "priority", "-1000 to 1000"),
        ({"priority": 1}, "fcfs", "priority", "policy is fcfs"),
        ({"priority": -1}, "fair", "priority", "leave it out"),
        ({"session_id": ""}, "fcfs", "session_id", "session_id must not be empty"),
        ({"session_id": "x/fork"}, "fcfs", "session_id", "session_id must not end in /fork"),
        ({"session_id": "x" * 257}, "fcfs", "session_id", "session_id must be a name"),
        ({"expect_return_s": 1}, "fcfs", "expect_return_s", "session_id"),
        ({"session_id": "s", "expect_return_s": -1}, "fcfs", "expect_return_s", "-1"),
        ({"service_tier": "scale"}, "fcfs", "service_tier", "auto, default, priority, flex"),
        ({"service_tier": ""}, "fcfs", "service_tier", "''"),
    ],
)
def test_refusals_name_the_field(
    fields: dict[str, Any], policy: PolicyName, param: str, words: str
) -> None:
    for make in (chat, completion):
        with pytest.raises((ApiError, InputError)) as error:
            prepare.handling(make(**fields), "", policy)
        found = error.value
        assert (found.param if isinstance(found, ApiError) else found.field) == param
        assert words in (found.message if isinstance(found, ApiError) else str(found))


@given(
    st.none() | st.integers(),
    st.none() | st.text(max_size=300),
    st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(),
    st.none() | st.text(max_size=5) | st.sampled_from(prepare.SERVICE_TIERS),
)
def test_any_values_are_read_or_refused(
    priority: int | None, session: str | None, seconds: float | None, tier: str | None
) -> None:
    request = ChatRequest(
        model="m", messages=[], priority=priority, session_id=session,
        expect_return_s=seconds, service_tier=tier,
    )  # fmt: skip
    try:
        found = prepare.handling(request, "t", "priority")
    except (ApiError, InputError):
        return
    assert (found.priority, found.session) == (priority or 0, session)


class Seen:
    """A watcher that keeps what it is shown."""

    def __init__(self) -> None:
        self.handlings: list[Handling] = []

    def began(self, request: Request) -> None:
        pass

    def ended(self, request: Request, reason: FinishReason) -> None:
        self.handlings.append(request.handling)


@pytest.fixture(scope="module")
def tiny(tiny_gguf: Path) -> Iterator[Serving]:
    config = EngineConfig(kv_memory=64 * 2**20, num_threads=2, policy="priority")
    with serving(tiny_gguf, "tiny", config) as running:
        yield running


def test_over_http(tiny: Serving) -> None:
    seen = Seen()
    tiny.core.watchers.append(seen)
    extra = {"priority": 5, "session_id": "chat-17", "expect_return_s": 20}
    client = tiny.client()
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=2, service_tier="flex", extra_body=extra
    )
    assert answer.service_tier == "flex"
    assert seen.handlings == [Handling("", "batch", 5, "chat-17", 20)]
    stream = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=2, service_tier="priority", stream=True
    )
    assert {chunk.service_tier for chunk in stream} == {"default"}
    text = client.completions.create(model="tiny", prompt="x", max_tokens=2, extra_body=extra)
    assert not hasattr(text, "service_tier")
    assert seen.handlings[1:] == [Handling(), Handling("", "interactive", 5, "chat-17", 20)]
    with pytest.raises(openai.BadRequestError, match="session_id must not be empty"):
        client.completions.create(model="tiny", prompt="x", extra_body={"session_id": ""})
    tiny.core.watchers.remove(seen)


def test_in_python() -> None:
    engine, seen = tiny_engine(), Seen()
    engine.watchers.append(seen)
    llm, params = LLM(engine), SamplingParams(max_tokens=3, seed=1)
    plain = llm.generate(["one", "two"], params)
    batch = Handling(service="batch", session="s")
    treated = llm.generate(["one", "two"], params, handling=batch)
    assert [one.token_ids for one in plain] == [one.token_ids for one in treated]
    assert list(llm.stream("one", params, batch))[-1].finish_reason is not None
    assert seen.handlings == [OFFLINE] * 2 + [batch] * 3
