"""Tools, thoughts and formats over HTTP, with a real model and the official client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from elinvar.base.config import EngineConfig
from elinvar.engine.aio import AsyncEngine
from elinvar.engine.core import Engine
from elinvar.server.app import create_app
from serving import Serving, running, serving

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}
ASKED: Any = {"role": "user", "content": "What is the weather in Paris?"}
GREEDY: dict[str, Any] = {"model": "small", "temperature": 0, "max_tokens": 80}
THINKS = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}<|im_start|>assistant
<think>
"""


@pytest.fixture(scope="module")
def small(smollm2_gguf: Path) -> Iterator[Serving]:
    with serving(smollm2_gguf, "small", EngineConfig(kv_memory=2**27)) as served:
        yield served


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_calls_that_are_required(small: Serving, choice: Any) -> None:
    """A small model that calls nothing by itself calls what it must, and keeps to the schema; the
    stream joins to the same call."""
    client = small.client()
    tools = [WEATHER] if choice == "required" else [CLOCK, WEATHER]
    body: dict[str, Any] = GREEDY | {"messages": [ASKED], "tools": tools, "tool_choice": choice}
    answer = client.chat.completions.create(**body).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    (call,) = answer.message.tool_calls or []
    assert call.type == "function" and call.function.name == "weather" and call.id
    arguments = json.loads(call.function.arguments)
    assert arguments.keys() == {"city", "days"} and type(arguments["days"]) is int

    name, joined, reason = "", "", None
    for chunk in client.chat.completions.create(**body, stream=True):
        reason = chunk.choices[0].finish_reason or reason
        for part in chunk.choices[0].delta.tool_calls or []:
            assert part.index == 0 and part.function is not None
            name += part.function.name or ""
            joined += part.function.arguments or ""
    assert (name, joined, reason) == ("weather", call.function.arguments, "tool_calls")


def test_a_stop_text_in_a_call(small: Serving) -> None:
    """Clients run what was called where the answer says that it ended with calls."""
    body: dict[str, Any] = GREEDY | {"messages": [ASKED], "tool_choice": "required"}
    answer = (
        small.client().chat.completions.create(**body, tools=[WEATHER], stop=['"days"']).choices[0]
    )
    (call,) = answer.message.tool_calls or []
    assert answer.finish_reason == "stop" and call.type == "function"
    with pytest.raises(json.JSONDecodeError):
        json.loads(call.function.arguments)
    function = WEATHER["function"]
    tool = {"name": "weather", "input_schema": function["parameters"]}
    asked = {"model": "small", "max_tokens": 80, "temperature": 0, "messages": [ASKED]}
    asked |= {"tools": [tool], "tool_choice": {"type": "any"}, "stop_sequences": ['"days"']}
    told = small.post("/v1/messages", asked).json()
    assert (told["stop_reason"], told["stop_sequence"]) == ("stop_sequence", '"days"')


def test_tools_that_may_not_be_called(small: Serving) -> None:
    """`none`: the prompt and the answer are those without tools."""
    client = small.client()
    plain = client.chat.completions.create(**GREEDY, messages=[ASKED])
    told = client.chat.completions.create(
        **GREEDY, messages=[ASKED], tools=[WEATHER], tool_choice="none"
    )
    assert told.choices[0].message.content == plain.choices[0].message.content
    assert told.usage and plain.usage and told.usage.prompt_tokens == plain.usage.prompt_tokens
    auto = client.chat.completions.create(**GREEDY, messages=[ASKED], tools=[WEATHER])
    assert auto.usage and auto.usage.prompt_tokens > plain.usage.prompt_tokens


def test_a_conversation_goes_on_after_a_call(small: Serving) -> None:
    call: Any = {
        "id": "c1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Paris", "days": 1}'},
    }
    messages: Any = [
        ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    create = small.client().chat.completions.create
    answer = create(**GREEDY, messages=messages, tools=[WEATHER], max_completion_tokens=None)
    assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")
    with pytest.raises(openai.BadRequestError) as info:
        create(**GREEDY, messages=[ASKED], tools=[WEATHER], tool_choice="sometimes")  # type: ignore[call-overload]
    assert info.value.param == "tool_choice"


def test_tools_and_a_format(small: Serving) -> None:
    """Beside calls that must be made a format has nothing to say; beside those that may, it is kept
    to."""
    schema = {
        "name": "x",
        "schema": {
            "type": "object",
            "properties": {"a": {"type": "integer"}},
            "required": ["a"],
            "additionalProperties": False,
        },
    }
    body: dict[str, Any] = GREEDY | {"messages": [ASKED], "tools": [WEATHER]}
    wanted: Any = {"type": "json_schema", "json_schema": schema}
    create = small.client().chat.completions.create
    answer = create(**body, response_format=wanted).choices[0]
    assert type(json.loads(answer.message.content or "")["a"]) is int
    called = create(**body, response_format=wanted, tool_choice="required").choices[0]
    assert called.message.tool_calls


def test_thoughts(smollm2_gguf: Path) -> None:
    """A template that opens a thought: all is one until it ends, and a budget ends it. The format is
    that of what is said."""
    core = Engine.load(str(smollm2_gguf), EngineConfig(kv_memory=2**27))
    core.tokenizer.use_chat_template(THINKS)
    with running(create_app(AsyncEngine(core), "small")) as (port, _):
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0)
        body: dict[str, Any] = GREEDY | {"messages": [ASKED]}
        message = client.chat.completions.create(**body).choices[0].message
        assert not message.content
        assert (message.model_extra or {})["reasoning_content"]
        yes_or_no: Any = {"guided_choice": ["yes", "no"]}
        with pytest.raises(openai.BadRequestError) as info:
            client.chat.completions.create(**body, extra_body={"max_thinking_tokens": 5})
        assert info.value.param == "max_thinking_tokens"  # the model has no token that ends one
        streamed = client.chat.completions.create(**body, stream=True, extra_body=yes_or_no)
        thoughts = [c.choices[0].delta.model_extra or {} for c in streamed]
        assert any(one.get("reasoning_content") for one in thoughts)
