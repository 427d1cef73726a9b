"""Anthropic's own client against a real server over a real model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest

from elinvar.base.config import EngineConfig
from elinvar.base.limits import TenantLimits
from elinvar.engine.aio import AsyncEngine
from elinvar.engine.core import Engine
from elinvar.server.app import create_app
from elinvar.server.tenants import Tenants, hash_key
from scripted import use_script
from serving import Serving, running, serving

SKY: Any = [{"role": "user", "content": "Why is the sky blue? Answer in one sentence."}]
KEY = "sk-ant-of-a-test"
GREEDY: Any = {"temperature": 0}
"""The client has no word for it any more."""


@pytest.fixture(scope="module")
def served(smollm2_gguf: Path) -> Iterator[Serving]:
    config = EngineConfig(kv_memory=64 * 2**20, num_threads=2, max_context=512)
    with serving(smollm2_gguf, "smol", config) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Serving) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=served.url, api_key=KEY, max_retries=0)


def create(client: anthropic.Anthropic, **fields: Any) -> anthropic.types.Message:
    common: Any = {"model": "smol", "max_tokens": 24, "messages": SKY}
    body = GREEDY | fields.pop("extra_body", {})
    answer = client.messages.create(**common | fields, extra_body=body)
    assert isinstance(answer, anthropic.types.Message)
    return answer


def text_of(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_message(client: anthropic.Anthropic, served: Serving) -> None:
    answer = create(client)
    assert answer.id.startswith("msg_")
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", "smol")
    assert "sky" in text_of(answer)
    assert (answer.stop_reason, answer.stop_sequence) == ("max_tokens", None)
    usage = answer.usage
    prompt = len(served.core.encode_chat(SKY))
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == prompt
    assert (usage.cache_creation_input_tokens, usage.output_tokens) == (0, 24)
    assert answer._request_id


def test_what_is_said_in_system_turns_and_prefill(client: anthropic.Anthropic) -> None:
    """The same prompt as OpenAI's API would make of it, told by the count of its tokens."""
    one = client.messages.count_tokens(model="smol", messages=SKY)
    with_system = client.messages.count_tokens(
        model="smol", messages=SKY, system=[{"type": "text", "text": "You are a pirate."}]
    )
    assert one.input_tokens != with_system.input_tokens
    said = create(client, system="Answer with the word yes alone.")
    assert text_of(said) != text_of(create(client))
    prefilled = [*SKY, {"role": "assistant", "content": "The sky is blue because"}]
    assert not text_of(create(client, messages=prefilled)).startswith("The sky is blue")


def test_stream_equals_whole(client: anthropic.Anthropic) -> None:
    whole = create(client)
    with client.messages.stream(
        model="smol", max_tokens=24, messages=SKY, extra_body=GREEDY
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert text_of(final) == text_of(whole)
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 24)
    assert kinds[0] == "message_start"
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_events(served: Serving) -> None:
    body = {"model": "smol", "max_tokens": 3, "messages": SKY, "stream": True}
    response = served.post("/v1/messages", body)
    assert response.headers["content-type"].startswith("text/event-stream")
    names = [line[7:] for line in response.text.splitlines() if line.startswith("event: ")]
    assert names[:3] == ["message_start", "ping", "content_block_start"]
    assert set(names[3:-3]) == {"content_block_delta"}
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_sequence(client: anthropic.Anthropic, stream: bool) -> None:
    text = text_of(create(client))
    words = text.split()
    stops = ["no such text", words[3], words[5]]
    common: Any = {"max_tokens": 24, "messages": SKY, "stop_sequences": stops}
    if stream:
        with client.messages.stream(model="smol", extra_body=GREEDY, **common) as events:
            answer = events.get_final_message()
    else:
        answer = create(client, **common)
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", words[3])
    assert text_of(answer) == text[: text.index(words[3])]


def test_end_of_turn(client: anthropic.Anthropic) -> None:
    answer = create(client, messages=[{"role": "user", "content": "Say hi."}], max_tokens=200)
    assert answer.stop_reason == "end_turn"


WEATHER: Any = {
    "name": "weather",
    "description": "The weather of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}


def test_tools(served: Serving, client: anthropic.Anthropic) -> None:
    """A call that must be made, whole and in a stream, and the turn that has its result."""
    question = {"role": "user", "content": "What is the weather in Paris?"}
    body: Any = {
        "model": "smol",
        "max_tokens": 80,
        "messages": [question],
        "tools": [WEATHER],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "extra_body": GREEDY,
    }
    whole = client.messages.create(**body)
    assert whole.stop_reason == "tool_use"
    (call,) = [block for block in whole.content if block.type == "tool_use"]
    assert call.name == "weather" and type(call.input["days"]) is int
    with client.messages.stream(**body) as stream:
        streamed = stream.get_final_message()
    (again,) = [block for block in streamed.content if block.type == "tool_use"]
    assert (again.name, again.input) == (call.name, call.input)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    turns = [question, whole.to_param(), {"role": "user", "content": [result]}]
    told = body | {"messages": turns, "tool_choice": {"type": "none"}}
    assert client.messages.create(**told).stop_reason in ("end_turn", "max_tokens")


def test_a_model_that_always_thinks(smollm2_gguf: Path) -> None:
    """Its thoughts are blocks; what this one cannot be kept from is refused, not ignored."""
    core = Engine.load(smollm2_gguf, EngineConfig(kv_memory=2**26, num_threads=2))
    core.tokenizer.use_chat_template(
        "{% for m in messages %}{{ m.content }}\n{% endfor %}<think>\n"
    )
    with running(create_app(AsyncEngine(core), "smol")) as (port, _):
        url = f"http://127.0.0.1:{port}"
        client = anthropic.Anthropic(base_url=url, api_key=KEY, max_retries=0)
        use_script(core, lambda prompt: "The sky scatters.</think>It is blue.")
        answer = create(client, thinking={"type": "adaptive"})
        assert [block.type for block in answer.content] == ["thinking", "text"]
        assert text_of(answer) == "It is blue."
        with client.messages.stream(model="smol", max_tokens=24, messages=SKY) as stream:
            thoughts, said = stream.get_final_message().content
        assert thoughts.type == "thinking" and "scatters" in thoughts.thinking
        assert thoughts.signature and said.type == "text" and said.text == "It is blue."
        for thinking in ({"type": "disabled"}, {"type": "enabled", "budget_tokens": 1024}):
            with pytest.raises(anthropic.BadRequestError, match="thinking"):
                create(client, thinking=thinking, max_tokens=2000)


def test_format(client: anthropic.Anthropic) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    form: Any = {"type": "json_schema", "schema": schema | {"additionalProperties": False}}
    answer = create(client, output_config={"format": form}, max_tokens=60)
    assert json.loads(text_of(answer)).keys() == {"a"}


def test_more_tokens_than_there_are(client: anthropic.Anthropic) -> None:
    """An answer may want more than the context has; it ends there, and says why."""
    assert create(client, max_tokens=20_000, stop_sequences=[" the"]).stop_sequence == " the"
    message = {"role": "user", "content": "Count to a hundred: 1, 2, 3. " + "word " * 440}
    begun = {"role": "assistant", "content": "1, 2, 3, 4, 5,"}
    answer = create(client, max_tokens=20_000, messages=[message, begun])
    assert answer.stop_reason == "model_context_window_exceeded"


def test_cached_tokens(client: anthropic.Anthropic) -> None:
    system = [
        {
            "type": "text",
            "text": "Be brief and exact. " * 40,
            "cache_control": {"type": "ephemeral", "ttl": "1h"},
        }
    ]
    first, second = (create(client, system=system).usage for _ in range(2))
    created, read = first.cache_creation_input_tokens, second.cache_read_input_tokens
    assert created and created > 200 and first.input_tokens == 0
    assert read and read > 200
    for usage in (first, second):
        new, old = usage.cache_creation_input_tokens, usage.cache_read_input_tokens
        assert (new or 0) + (old or 0) == 226


def test_async(served: Serving) -> None:
    async def ask() -> list[str]:
        async with anthropic.AsyncAnthropic(base_url=served.url, api_key=KEY) as client:

            async def one() -> str:
                async with client.messages.stream(
                    model="smol", max_tokens=12, messages=SKY, extra_body=GREEDY
                ) as stream:
                    return "".join([text async for text in stream.text_stream])

            return await asyncio.gather(*(one() for _ in range(4)))

    assert len(set(asyncio.run(ask()))) == 1


def test_models(client: anthropic.Anthropic) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.type, model.display_name) == ("smol", "model", "smol")
    assert client.models.retrieve("smol").id == "smol"
    with pytest.raises(anthropic.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"system": "word " * 9000}, "maximum context length"),
        ({"messages": []}, "messages"),
        ({"extra_body": {"temperature": -1}}, "temperature"),
        ({"stop_sequences": [""]}, "stop_sequences must hold"),
        ({"extra_body": {"tempurature": 1}}, "tempurature"),
        ({"extra_body": {"mcp_servers": [{"type": "url"}]}}, "mcp_servers"),
        ({"extra_body": {"container": "c"}}, "container"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'image'"),
    ],
)
def test_bad_requests(client: anthropic.Anthropic, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(anthropic.BadRequestError) as info:
        create(client, **fields)
    body: Any = info.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert words in body["error"]["message"]
    assert body["request_id"] == info.value.response.headers["request-id"]


def test_not_found(client: anthropic.Anthropic, served: Serving) -> None:
    with pytest.raises(anthropic.NotFoundError) as info:
        create(client, model="claude")
    body: Any = info.value.body
    assert body["error"]["type"] == "not_found_error"
    for answer in (
        served.post("/v1/messages/batches", {}),
        served.post("/v1/messages", content=b""),
    ):
        assert answer.json()["type"] == "error"


def test_keys_and_limits(tiny_gguf: Path) -> None:
    """Either header has the key; who has none, or too much, is told in Anthropic's words."""
    limits = {"ann": TenantLimits(max_running=1, max_waiting=0)}
    tenants = Tenants(limits, ((bytes.fromhex(hash_key(KEY)), "ann"),))
    config = EngineConfig(kv_memory=64 * 2**20, num_threads=2, tenants=limits)
    with serving(tiny_gguf, "smol", config, tenants=tenants, max_body_bytes=2000) as served:
        by_key = anthropic.Anthropic(base_url=served.url, api_key=KEY, max_retries=0)
        by_token = anthropic.Anthropic(base_url=served.url, auth_token=KEY, max_retries=0)
        for client in (by_key, by_token):
            assert create(client, max_tokens=2).usage.output_tokens <= 2
        stranger = anthropic.Anthropic(base_url=served.url, api_key="x", max_retries=0)
        with pytest.raises(anthropic.AuthenticationError) as refused:
            create(stranger)
        body: Any = refused.value.body
        assert body["error"]["type"] == "authentication_error"
        use_script(served.core, lambda prompt: "long " * 900)
        with by_key.messages.stream(model="smol", max_tokens=900, messages=SKY) as stream:
            next(iter(stream))
            with pytest.raises(anthropic.RateLimitError) as limited:
                create(by_key)
            assert int(limited.value.response.headers["retry-after"]) >= 1
        with pytest.raises(anthropic.APIStatusError) as large:
            create(by_key, system="x" * 4000)
        assert large.value.status_code == 413
        body = large.value.body
        assert body["error"]["type"] == "request_too_large"
