"""Request bodies: what is accepted, and that every complaint names the field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import completion_create_params as completion_types
from openai.types.chat import completion_create_params as chat_types

from elinvar.base.errors import InputError
from elinvar.server import chats, openai_messages, prepare
from elinvar.server.errors import ApiError
from elinvar.server.schema import DEFAULTS, ChatRequest, CompletionRequest, decode

HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> ChatRequest:
    body = {"model": "m", "messages": HELLO} | fields
    return decode(json.dumps(body).encode(), ChatRequest)


def completion(**fields: Any) -> CompletionRequest:
    body = {"model": "m", "prompt": "hello"} | fields
    return decode(json.dumps(body).encode(), CompletionRequest)


def refused(body: bytes | dict[str, Any], kind: type = ChatRequest) -> ApiError:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(ApiError) as info:
        decode(raw, kind)
    assert info.value.status == 400
    return info.value


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"not json",
        b'{"model": "m", "messages": []} trailing',
        b'{"model": "\\ud800", "messages": []}',
        b'{"model": "\xff", "messages": []}',
        b'{"model": "\x00", "messages": []}',
        b"\xef\xbb\xbf{}",
        b'{"model": "m", "messages": [], "audio": ' + b"[" * 100_000,
        b'{"model": "m", "messages": [], "x": ' + b'{"a":' * 100_000,
    ],
)
def test_malformed_json(body: bytes) -> None:
    assert refused(body).code in ("invalid_json", "unknown_parameter")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": "hot"}, "temperature", "expected a number or null, got a string"),
        ({"temperature": "NaN"}, "temperature", "expected a number"),
        ({"temperature": float("nan")}, "temperature", "finite"),
        ({"top_p": float("inf")}, "top_p", "finite"),
        ({"max_tokens": 1.5}, "max_tokens", "expected an integer"),
        ({"n": True}, "n", "expected an integer or null, got a boolean"),
        ({"messages": "hi"}, "messages", "expected an array, got a string"),
        ({"messages": [*HELLO, {"role": "user", "content": 3}]}, "messages[1].content", "got an"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "king"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "Missing"),
        ({"messages": [{"role": "user", "content": "x", "y": 1}]}, "messages[0].y", "Unrecog"),
        ({"stop": ["a", 3]}, "stop[1]", "expected a string"),
        ({"stream_options": {"usage": True}}, "stream_options.usage", "Unrecognized"),
        ({"temprature": 1}, "temprature", "supplied: temprature. Did you mean temperature?"),
        ({"extra_body": {}}, "extra_body", "Unrecognized"),
    ],
)
def test_complaints_name_the_field(fields: dict[str, Any], param: str, words: str) -> None:
    error = refused({"model": "m", "messages": HELLO} | fields)
    assert error.param == param
    assert words in error.message


def test_missing_and_wrong_bodies() -> None:
    assert refused({"messages": HELLO}).param == "model"
    assert refused({"model": "m"}).param == "messages"
    assert refused({"model": "m"}, CompletionRequest).param == "prompt"
    assert "must be an object, got an array" in refused(b"[]").message
    assert (
        refused({"model": "m", "prompt": [1, [2, "x"]]}, CompletionRequest).param == "prompt[1][1]"
    )


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_junk_gives_an_api_error(body: bytes) -> None:
    refused(body)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(ChatRequest.__struct_fields__), json_values))
def test_any_values_are_read_or_refused(fields: dict[str, Any]) -> None:
    try:
        request = chat(**fields)
        openai_messages.chat_messages(request)
        prepare.wanted(request)
    except (ApiError, InputError):
        pass


def test_every_parameter_of_the_official_client_is_known() -> None:
    """Each is either used or refused by name; none is 'unrecognized'."""
    ours = set(ChatRequest.__struct_fields__)
    theirs = set(chat_types.CompletionCreateParamsBase.__annotations__) | {"stream"}
    assert theirs <= ours
    ours = set(CompletionRequest.__struct_fields__)
    theirs = set(completion_types.CompletionCreateParamsBase.__annotations__) | {"stream"}
    assert theirs <= ours


def test_null_means_not_given() -> None:
    request = chat(**dict.fromkeys(set(ChatRequest.__struct_fields__) - {"model", "messages"}))
    prepare.check_supported(request)
    assert prepare.num_choices(request) == 1
    assert prepare.token_limit(request) is None
    assert prepare.num_logprobs(request) is None
    params = prepare.sampling_params(request, 7, None)
    assert (params.temperature, params.top_p, params.seed, params.stop) == (1.0, 1.0, None, ())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", [{}]),
        ("audio", {"voice": "x"}),
        ("modalities", ["text", "audio"]),
        ("store", True),
        ("web_search_options", {}),
        ("prediction", {"type": "content", "content": ""}),
    ],
)
def test_known_but_not_served(field: str, value: Any) -> None:
    with pytest.raises(ApiError, match="not supported") as info:
        prepare.check_supported(chat(**{field: value}))
    assert (info.value.status, info.value.param) == (400, field)


def test_harmless_values_are_accepted() -> None:
    for name, values in DEFAULTS.items():
        for value in values:
            if name in ChatRequest.__struct_fields__:
                prepare.check_supported(chat(**{name: value}))
            if name in CompletionRequest.__struct_fields__:
                prepare.check_supported(completion(**{name: value}))


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


def messages(*given: dict[str, Any]) -> list[dict[str, Any]]:
    return openai_messages.chat_messages(chat(messages=list(given)))


def test_messages() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert messages(
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": parts, "name": "ann"},
        {"role": "assistant", "content": "x\x00\x1b", "refusal": None, "tool_calls": None},
    ) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": parts, "name": "ann"},
        {"role": "assistant", "content": "x\x00\x1b"},
    ]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": []}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[0].content[0]",
        ),
        ({"role": "function", "content": "x", "name": "f"}, "messages[0].role"),
        ({"role": "tool", "content": "x"}, "messages[0].tool_call_id"),
        ({"role": "user", "content": "x", "tool_call_id": "1"}, "messages[0].tool_call_id"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "messages[0].tool_calls"),
        ({"role": "user", "content": "x", "reasoning": "y"}, "messages[0].reasoning_content"),
        (
            {
                "role": "assistant",
                "tool_calls": [CALL | {"function": {"name": "f", "arguments": "["}}],
            },
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            {"role": "assistant", "tool_calls": [CALL | {"type": "custom"}]},
            "messages[0].tool_calls[0].type",
        ),
    ],
)
def test_messages_that_are_refused(message: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as info:
        messages(message)
    assert (info.value.status, info.value.param) == (400, param)


TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "g", "description": "gee", "strict": True}},
]


def test_calls_and_their_results() -> None:
    said: list[dict[str, Any]] = [
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "c1", "content": "4"},
    ]
    assert messages(*said) == [
        {"role": "assistant", "tool_calls": [CALL], "reasoning_content": "hm"},
        {"role": "tool", "content": "4", "tool_call_id": "c1"},
    ]


@pytest.mark.parametrize(
    ("choice", "names", "kind", "named"),
    [
        (None, "fg", "auto", None),
        ("none", "fg", "none", None),
        ("required", "fg", "required", None),
        ({"type": "function", "function": {"name": "g"}}, "fg", "named", "g"),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "g"}}],
                },
            },
            "g",
            "required",
            None,
        ),
    ],
)
def test_tools(choice: Any, names: str, kind: str, named: str | None) -> None:
    found = openai_messages.conversation(chat(tools=TOOLS, tool_choice=choice))
    assert "".join(tool["function"]["name"] for tool in found.tools) == names
    assert (found.tool_choice, found.tool_name) == (kind, named)
    assert all("parameters" in tool["function"] for tool in found.tools)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools[1].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "no good"}}]},
            "tools[0].function.name",
        ),
        ({"tools": TOOLS[:1] * 129}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "h"}}},
            "tool_choice",
        ),
    ],
)
def test_tools_that_are_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as info:
        openai_messages.conversation(chat(**fields))
    assert (info.value.status, info.value.param) == (400, param)


def test_chat_options() -> None:
    given = chat(chat_template_kwargs={"enable_thinking": False}, reasoning_effort="low")
    options = openai_messages.conversation(given).options
    assert options.variables == {"enable_thinking": False}
    assert options.reasoning_effort == "low"
    assert openai_messages.conversation(chat()).options.variables == {}
    for fields in ({"reasoning_effort": "very"}, {"chat_template_kwargs": [1]}):
        with pytest.raises(ApiError) as info:
            chat(**fields)
        assert (info.value.status, info.value.param) == (400, next(iter(fields)))


def test_the_texts_of_parts_are_counted() -> None:
    parts = [{"type": "text", "text": "abc"}, {"type": "text", "text": "d"}]
    both = messages({"role": "user", "content": parts}, {"role": "user", "content": "efg"})
    assert chats.text_length(both) == 64 + 4 + 64 + 3


def test_no_messages() -> None:
    with pytest.raises(ApiError) as info:
        messages()
    assert info.value.param == "messages"


def test_prompts() -> None:
    def prompts(prompt: Any) -> Any:
        return prepare.completion_prompts(completion(prompt=prompt), vocab_size=10)

    assert prompts("a") == ["a"]
    assert prompts(["a", "b"]) == ["a", "b"]
    assert prompts([1, 2]) == [[1, 2]]
    assert prompts([[1], [2, 3]]) == [[1], [2, 3]]
    for bad, param in [
        ([], "prompt"),
        ([[]], "prompt[0]"),
        ([1, "a"], "prompt"),
        ([1, 10], "prompt[1]"),
        ([[1], [2, -1]], "prompt[1][1]"),
        ([2**70], "prompt[0]"),
    ]:
        with pytest.raises(ApiError) as info:
            prompts(bad)
        assert info.value.param == param


def test_limits() -> None:
    assert prepare.token_limit(chat(max_tokens=5)) == 5
    assert prepare.token_limit(chat(max_completion_tokens=6)) == 6
    for fields, param in [
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 2, "max_tokens": 2}, "max_tokens"),
    ]:
        with pytest.raises(ApiError) as info:
            prepare.token_limit(chat(**fields))
        assert info.value.param == param
    for n in (0, -1, 129, 2**80):
        with pytest.raises(ApiError) as info:
            prepare.num_choices(chat(n=n))
        assert info.value.param == "n"


def test_room() -> None:
    assert chats.fit(None, None, 90, 100, "messages") == 10
    assert chats.fit(None, 16, 90, 100, "prompt") == 10
    assert chats.fit(None, 16, 50, 100, "prompt") == 16
    assert chats.fit(10, 16, 90, 100, "prompt") == 10
    for limit, num_prompt in [(11, 90), (None, 100), (5, 100)]:
        with pytest.raises(ApiError) as info:
            chats.fit(limit, 16, num_prompt, 100, "prompt")
        assert info.value.code == "context_length_exceeded"
        assert "100 tokens" in info.value.message
        assert str(num_prompt) in info.value.message


def test_logprobs() -> None:
    assert prepare.num_logprobs(chat(logprobs=True)) == 0
    assert prepare.num_logprobs(chat(logprobs=False)) is None
    assert prepare.num_logprobs(chat(logprobs=True, top_logprobs=3)) == 3
    assert prepare.num_logprobs(completion(logprobs=2)) == 2
    refused_ones: list[tuple[ChatRequest | CompletionRequest, str]] = [
        (chat(top_logprobs=3), "top_logprobs"),
        (chat(logprobs=True, top_logprobs=21), "top_logprobs"),
        (completion(logprobs=-1), "logprobs"),
    ]
    for request, param in refused_ones:
        with pytest.raises(ApiError) as info:
            prepare.num_logprobs(request)
        assert info.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ""}, None),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"attention_window": 0}, "attention_window"),
        ({"attention_sinks": 64}, "attention_sinks"),
        ({"attention_sinks": 4}, "attention_sinks"),
        ({"attention_budget": 0}, "attention_budget"),
        ({"attention_budget": 64, "attention_window": 64}, "attention_budget"),
    ],
)
def test_ranges(fields: dict[str, Any], param: str | None) -> None:
    if param is None:
        assert prepare.sampling_params(chat(**fields), 1, None).stop == ()
        return
    with pytest.raises(InputError) as info:
        prepare.sampling_params(chat(**fields), 1, None)
    assert info.value.field == param


def test_usage_of_streams() -> None:
    assert prepare.stream_usage(chat(stream=True, stream_options={"include_usage": True}))
    assert not prepare.stream_usage(chat(stream=True))
    with pytest.raises(ApiError) as info:
        prepare.stream_usage(chat(stream_options={"include_usage": True}))
    assert info.value.param == "stream_options"
