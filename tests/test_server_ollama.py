"""Ollama's API: what its messages become, and what calls of tools look like."""

from __future__ import annotations

import json
from typing import Any, cast

import httpx
import ollama
import pytest

from elinvar.base.grammar import JsonSchema
from elinvar.engine.pieces import Arguments, Call, Piece, Text, Thought
from elinvar.server.asked import Collector, Step, Usage
from elinvar.server.errors import ApiError
from elinvar.server.formats import ANY_OBJECT
from elinvar.server.ollama_messages import TEMPERATURE, TOP_K, TOP_P, chat, wanted, wants_thoughts
from elinvar.server.ollama_schema import OllamaChatRequest
from elinvar.server.ollama_wire import OllamaChatWire, OllamaGenerateWire, OllamaWire
from elinvar.server.schema import decode
from elinvar.server.tokens import TokenNames

HELLO = [{"role": "user", "content": "hello"}]


def parse(**fields: Any) -> OllamaChatRequest:
    body = {"model": "m", "messages": HELLO} | fields
    return decode(json.dumps(body).encode(), OllamaChatRequest)


def test_tools_and_their_results() -> None:
    def called(name: str, **more: Any) -> dict[str, Any]:
        return {"function": {"name": name, "arguments": {"at": 1}}, **more}

    turns = chat(
        parse(
            messages=[
                *HELLO,
                {
                    "role": "assistant",
                    "content": "",
                    "thinking": "hm",
                    "tool_calls": [called("a"), called("b"), called("b", id="x")],
                },
                {"role": "tool", "content": "1", "tool_name": "b"},
                {"role": "tool", "content": "2"},
                {"role": "tool", "content": "3", "tool_call_id": "x"},
                {"role": "tool", "content": "4", "tool_name": "c"},
            ],
            tools=[{"type": "function", "function": {"name": "a"}}],
        ),
        thinking=None,
    )
    _, assistant, *results = turns.messages
    assert assistant["reasoning_content"] == "hm"
    assert [call["id"] for call in assistant["tool_calls"]] == ["call_1_0", "call_1_1", "x"]
    assert assistant["tool_calls"][0]["function"] == {"name": "a", "arguments": '{"at":1}'}
    assert [(r.get("tool_call_id"), r.get("name")) for r in results] == [
        ("call_1_1", "b"),
        ("call_1_0", "a"),
        ("x", "b"),
        (None, "c"),
    ]
    empty = {"type": "object", "properties": {}}
    assert turns.tools == [{"type": "function", "function": {"name": "a", "parameters": empty}}]


def test_what_is_wanted() -> None:
    plain = wanted(parse(), 512, None)
    params = plain.params
    assert (params.temperature, params.top_k, params.top_p) == (TEMPERATURE, TOP_K, TOP_P)
    assert (plain.max_tokens, plain.max_context, params.seed) == (None, None, None)
    options = {
        "temperature": 0,
        "top_k": 0,
        "top_p": 1,
        "min_p": 0.1,
        "seed": 0,
        "num_predict": 7,
        "num_ctx": 128,
        "stop": ["a", "b"],
    }
    asked = wanted(parse(options=options), 512, None)
    params = asked.params
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0, 0, 1, 0.1)
    assert (params.seed, params.stop) == (0, ("a", "b"))
    assert (asked.max_tokens, asked.max_context) == (7, 128)
    assert wanted(parse(options={"num_predict": -1}), 512, None).max_tokens is None


@pytest.mark.parametrize(
    ("think", "found", "effort"),
    [(None, None, None), (True, True, None), (False, False, None), ("high", None, "high")],
)
def test_think(think: Any, found: bool | None, effort: str | None) -> None:
    request = parse(think=think)
    assert wants_thoughts(request) is found
    options = chat(request, found).options
    assert (options.thinking, options.reasoning_effort) == (found, effort)


def test_format() -> None:
    assert wanted(parse(format="json"), 512, None).params.grammar == ANY_OBJECT
    schema = wanted(parse(format={"type": "array"}), 512, None).params.grammar
    assert schema == JsonSchema('{"type":"array"}')
    with pytest.raises(ApiError, match="'json' or a JSON schema"):
        wanted(parse(format="xml"), 512, None)


# ---- the wire -----------------------------------------------------------------------------------

PIECES: list[list[Piece]] = [
    [Thought("hm")],
    [Text("I look.")],
    [Call(0, "c0", "weather"), Arguments(0, '{"at": ')],
    [Arguments(0, '"Rome"}'), Call(1, "c1", "time"), Arguments(1, "{}")],
]
STEPS = [Step(0, pieces, [1], [], None, 7) for pieces in PIECES]
END = Step(0, [], [], [], "tool_calls", 7)


def make(kind: type[OllamaWire]) -> OllamaWire:
    times = {"prefill": 3, "decode": 4, "total": 9}
    return kind("m", cast(TokenNames, None), lambda _: times, with_logprobs=False)


def client_of(body: bytes) -> ollama.Client:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=body))
    return ollama.Client("http://nowhere", transport=transport)


def test_calls_as_the_client_reads_them() -> None:
    wire, usage = make(OllamaChatWire), Usage()
    lines = [wire.opening([0], usage), *(wire.chunk(step) for step in (*STEPS, END))]
    client = client_of(b"".join([*lines, wire.ending(usage)]))
    parts = list(client.chat("m", HELLO, stream=True))
    calls = [call.function for part in parts for call in part.message.tool_calls or ()]
    assert [(call.name, call.arguments) for call in calls] == [
        ("weather", {"at": "Rome"}),
        ("time", {}),
    ]
    assert "".join(part.message.thinking or "" for part in parts) == "hm"
    assert "".join(part.message.content or "" for part in parts) == "I look."
    last = parts[-1]
    assert (last.done, last.done_reason) == (True, "stop")
    durations = last.total_duration, last.prompt_eval_duration, last.eval_duration
    assert durations == (9, 3, 4)

    collector = Collector([0])
    for step in (*STEPS, END):
        collector.push(step)
    whole = client_of(make(OllamaChatWire).whole(collector.finish(), usage)).chat("m", HELLO)
    assert whole.message.tool_calls is not None
    assert [call.function for call in whole.message.tool_calls] == calls
    assert (whole.message.content, whole.message.thinking) == ("I look.", "hm")


def test_thoughts_of_generate() -> None:
    wire = make(OllamaGenerateWire)
    lines = b"".join(wire.chunk(step) for step in STEPS[:2]).splitlines()
    said = [(line["response"], line.get("thinking")) for line in map(json.loads, lines)]
    assert said == [("", "hm"), ("I look.", None)]


def test_an_error_amid_a_stream() -> None:
    wire = make(OllamaChatWire)
    body = wire.chunk(STEPS[1]) + wire.error(ApiError(503, "The server is shutting down."))
    with pytest.raises(ollama.ResponseError, match="shutting down"):
        list(client_of(body).chat("m", HELLO, stream=True))
