"""Anthropic's API: what its messages become, and what blocks look like, where a small model seldom
takes us."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx2
import pytest

from elinvar.engine.pieces import Arguments, Call, Piece, Text, Thought
from elinvar.server.anthropic_messages import (
    conversation,
    has_cache_control,
    wanted,
    wants_thoughts,
)
from elinvar.server.anthropic_schema import MessagesRequest
from elinvar.server.anthropic_wire import MessagesWire
from elinvar.server.asked import Collector, Step, Usage
from elinvar.server.chats import Conversation
from elinvar.server.errors import ApiError
from elinvar.server.schema import decode

HELLO = [{"role": "user", "content": "hello"}]
TOOL = {"name": "weather", "description": "d", "input_schema": {"type": "object"}}
EPHEMERAL = {"type": "ephemeral"}


def parse(**fields: Any) -> MessagesRequest:
    body = {"model": "m", "max_tokens": 2048, "messages": HELLO} | fields
    return decode(json.dumps(body).encode(), MessagesRequest)


def said(**fields: Any) -> Conversation:
    return conversation(parse(**fields), thinking=None)


def test_tools_and_their_results() -> None:
    turns = said(
        tools=[TOOL],
        system=[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        messages=[
            {"role": "user", "content": "How is it?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "text", "text": "I "},
                    {"type": "text", "text": "look."},
                    {"type": "tool_use", "id": "t1", "name": "weather", "input": {"at": "é"}},
                    {"type": "tool_use", "id": "t2", "name": "weather", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": "sun"},
                    {
                        "type": "tool_result",
                        "tool_use_id": "t2",
                        "is_error": True,
                        "content": [{"type": "text", "text": "gone"}],
                    },
                    {"type": "text", "text": "Well?"},
                ],
            },
            {"role": "user", "content": "Say."},
        ],
    )

    def call(name: str, arguments: str) -> dict[str, Any]:
        function = {"name": "weather", "arguments": arguments}
        return {"id": name, "type": "function", "function": function}

    assert turns.messages == [
        {"role": "system", "content": "a\n\nb"},
        {"role": "user", "content": "How is it?"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "hm",
            "tool_calls": [call("t1", '{"at":"é"}'), call("t2", "{}")],
        },
        {"role": "tool", "content": "sun", "tool_call_id": "t1", "name": "weather"},
        {"role": "tool", "content": "Error: gone", "tool_call_id": "t2", "name": "weather"},
        {"role": "user", "content": "Well?\n\nSay."},
    ]
    function = {"name": "weather", "parameters": {"type": "object"}, "description": "d"}
    assert turns.tools == [{"type": "function", "function": function}]
    assert not turns.options.continue_final_message


@pytest.mark.parametrize(
    ("choice", "found"),
    [
        (None, ("auto", None, True)),
        ({"type": "auto"}, ("auto", None, True)),
        ({"type": "any", "disable_parallel_tool_use": True}, ("required", None, False)),
        ({"type": "tool", "name": "weather"}, ("named", "weather", True)),
        ({"type": "none"}, ("none", None, True)),
    ],
)
def test_tool_choice(choice: Any, found: tuple[str, str | None, bool]) -> None:
    turns = said(tools=[TOOL], tool_choice=choice)
    assert (turns.tool_choice, turns.tool_name, turns.parallel_calls) == found


@pytest.mark.parametrize(
    ("thinking", "found", "most"),
    [
        (None, None, 7),
        ({"type": "adaptive"}, None, 7),
        ({"type": "enabled", "budget_tokens": 1024}, True, 1024),
        ({"type": "disabled"}, False, 7),
    ],
)
def test_thinking(thinking: Any, found: bool | None, most: int) -> None:
    request = parse(thinking=thinking)
    assert wants_thoughts(request) is found
    assert wanted(request, 7).max_thinking_tokens == most
    assert conversation(request, thinking=True).options.thinking is True


def test_what_is_wanted() -> None:
    request = parse(temperature=0.5, top_k=7, top_p=0.9, stop_sequences=["x"], seed=3)
    params = wanted(request, None).params
    assert (params.temperature, params.top_k, params.top_p) == (0.5, 7, 0.9)
    assert (params.stop, params.seed) == (("x",), 3)
    assert said(output_config={"effort": "low"}).options.reasoning_effort == "low"
    begun = said(messages=[*HELLO, {"role": "assistant", "content": "It"}])
    assert begun.options.continue_final_message


@pytest.mark.parametrize(
    "fields",
    [
        {"cache_control": EPHEMERAL},
        {"system": [{"type": "text", "text": "a", "cache_control": EPHEMERAL}]},
        {"tools": [TOOL | {"cache_control": EPHEMERAL}]},
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a", "cache_control": EPHEMERAL}],
                }
            ]
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "tool_result",
                            "tool_use_id": "t",
                            "content": [{"type": "text", "text": "a", "cache_control": EPHEMERAL}],
                        }
                    ],
                }
            ]
        },
    ],
)
def test_cache_control_is_taken_anywhere(fields: dict[str, Any]) -> None:
    assert has_cache_control(parse(**fields))
    assert not has_cache_control(parse(tools=[TOOL]))


def block(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [fields]}]}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        (block(type="image", source={}), "messages[0].content[0]", "'image'"),
        (block(type="document"), "messages[0].content[0]", "'document'"),
        (block(type="thinking", thinking="x"), "messages[0].content[0]", "'thinking'"),
        (block(type="text", text="x", citations=[1]), "messages[0].content[0].citations", ""),
        (block(type="tool_result", tool_use_id="t"), "messages[0].content[0].tool_use_id", ""),
        (block(type="server_tool_use"), "messages[0].content[0].type", "server_tool_use"),
        ({"tools": [{"type": "web_search_20250305"}]}, "tools[0].type", "web_search"),
        ({"tools": [TOOL, TOOL]}, "tools[1].name", "two tools"),
        ({"tools": [TOOL | {"name": "a b"}]}, "tools[0].name", "letters"),
        ({"tools": [TOOL | {"defer_loading": True}]}, "tools[0].defer_loading", ""),
        ({"tools": [TOOL | {"input_examples": [{}]}]}, "tools[0].input_examples", ""),
        ({"tools": [TOOL | {"allowed_callers": ["x"]}]}, "tools[0].allowed_callers", ""),
        (
            {"tools": [TOOL | {"eager_input_streaming": False}]},
            "tools[0].eager_input_streaming",
            "",
        ),
        ({"tool_choice": {"type": "any"}}, "tool_choice", "needs tools"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}},
            "tool_choice.name",
            "weather",
        ),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens", ""),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "block"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"speed": "fast"}, "speed", ""),
        ({"mcp_servers": [{}]}, "mcp_servers", ""),
        ({"context_management": {}}, "context_management", ""),
        ({"inference_geo": "eu"}, "inference_geo", ""),
        ({"diagnostics": {}}, "diagnostics", ""),
        ({"service_tier": "flex"}, "service_tier", ""),
        ({"metadata": {"user": "x"}}, "metadata.user", ""),
        ({"cache_control": {"type": "ephemeral", "ttl": "2h"}}, "cache_control.ttl", "2h"),
    ],
)
def test_refused_by_name(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(ApiError) as info:
        request = parse(**fields)
        conversation(request, thinking=None)
        wanted(request, None)
    assert (info.value.status, info.value.param) == (400, param)
    assert param in info.value.message or words
    assert words in info.value.message


# ---- the wire -----------------------------------------------------------------------------------

PIECES: list[list[Piece]] = [
    [Thought("Let me")],
    [Thought(" see."), Text("I ")],
    [Text("look.")],
    [Call(0, "toolu_a", "weather")],
    [Arguments(0, '{"at": ')],
    [Arguments(0, '"Rome"}'), Call(1, "toolu_b", "time"), Arguments(1, "{}")],
]


def steps(reason: str = "tool_calls", stop_text: str | None = None) -> list[Step]:
    found = [Step(0, pieces, [1], [], None, 7) for pieces in PIECES]
    return [*found, Step(0, [], [], [], reason, 7, stop_text)]


def usage() -> Usage:
    counted = Usage()
    counted._prompts[0] = (10, 4)
    counted.completion_tokens = 9
    return counted


def client_of(body: bytes, kind: str) -> anthropic.Anthropic:
    """Anthropic's client, which gets these bytes as its answer."""

    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers={"content-type": kind}, content=body)

    http = httpx2.Client(transport=httpx2.MockTransport(answer))
    return anthropic.Anthropic(api_key="x", http_client=http)


def streamed(wire: MessagesWire, reason: str = "tool_calls") -> bytes:
    chunks = [wire.chunk(step) for step in steps(reason)]
    return b"".join([wire.opening([0], usage()), *chunks, wire.ending(usage())])


def collected(wire: MessagesWire, reason: str = "tool_calls") -> bytes:
    collector = Collector([0])
    for step in steps(reason):
        collector.push(step)
    return wire.whole(collector.finish(), usage())


@pytest.mark.parametrize("stream", [True, False])
def test_blocks_as_the_client_reads_them(stream: bool) -> None:
    wire = MessagesWire("m", "req_1", 100)
    common: Any = {"model": "m", "max_tokens": 100, "messages": HELLO}
    if stream:
        client = client_of(streamed(wire), "text/event-stream")
        with client.messages.stream(**common) as events:
            message = events.get_final_message()
    else:
        client = client_of(collected(wire), "application/json")
        message = client.messages.create(**common)
    assert [block.model_dump(exclude_none=True) for block in message.content] == [
        {"type": "thinking", "thinking": "Let me see.", "signature": wire.id},
        {"type": "text", "text": "I look."},
        {"type": "tool_use", "id": "toolu_a", "name": "weather", "input": {"at": "Rome"}},
        {"type": "tool_use", "id": "toolu_b", "name": "time", "input": {}},
    ]
    assert message.stop_reason == "tool_use"
    counts = message.usage
    assert (counts.input_tokens, counts.cache_read_input_tokens) == (6, 4)
    assert counts.output_tokens == 9


def test_every_block_that_starts_stops() -> None:
    events = [
        json.loads(line[6:])
        for line in streamed(MessagesWire("m", "r", 9)).decode().splitlines()
        if line.startswith("data: ")
    ]
    open_block: int | None = None
    for event in events:
        if event["type"] == "content_block_start":
            assert open_block is None
            open_block = event["index"]
        elif event["type"] == "content_block_delta":
            assert event["index"] == open_block
        elif event["type"] == "content_block_stop":
            assert event["index"] == open_block
            open_block = None
    assert open_block is None


def test_thoughts_that_are_not_shown() -> None:
    wire = MessagesWire("m", "r", 100, show_thoughts=False)
    assert b"Let me" not in streamed(wire)
    whole = json.loads(collected(MessagesWire("m", "r", 100, show_thoughts=False)))
    assert whole["content"][0]["thinking"] == ""
    assert whole["content"][0]["signature"]


def test_ends() -> None:
    def end(reason: str, max_tokens: int = 100, stop_text: str | None = None) -> Any:
        collector = Collector([0])
        for step in steps(reason, stop_text):
            collector.push(step)
        whole = json.loads(MessagesWire("m", "r", max_tokens).whole(collector.finish(), usage()))
        return whole["stop_reason"], whole["stop_sequence"]

    assert end("stop") == ("end_turn", None)
    assert end("stop", stop_text="##") == ("stop_sequence", "##")
    assert end("length", 9) == ("max_tokens", None)
    assert end("length", 10) == ("model_context_window_exceeded", None)


def test_usage_of_a_request_that_caches() -> None:
    counts = json.loads(collected(MessagesWire("m", "r", 9, caches=True)))["usage"]
    assert counts["input_tokens"] == 0
    assert counts["cache_creation_input_tokens"] == 6
    assert counts["cache_read_input_tokens"] == 4


def test_an_error_amid_a_stream() -> None:
    wire = MessagesWire("m", "req_1", 9)
    begin = wire.opening([0], usage()) + wire.chunk(steps()[1])
    body = begin + wire.error(ApiError(503, "The server is shutting down."))
    client = client_of(body, "text/event-stream")
    with (
        pytest.raises(anthropic.APIStatusError) as info,
        client.messages.stream(model="m", max_tokens=9, messages=HELLO) as events,  # type: ignore[arg-type]
    ):
        events.get_final_message()
    error: Any = info.value.body
    assert error["error"] == {"type": "overloaded_error", "message": "The server is shutting down."}
    assert error["request_id"] == "req_1"


def test_arguments_that_were_cut_off() -> None:
    collector = Collector([0])
    collector.push(Step(0, [Call(0, "t", "f"), Arguments(0, '{"a": ')], [1], [], "length", 7))
    whole = json.loads(MessagesWire("m", "r", 9).whole(collector.finish(), usage()))
    assert whole["content"] == [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]
