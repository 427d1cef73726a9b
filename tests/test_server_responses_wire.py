"""Items and events of /v1/responses, from pieces that a model would seldom write; and any input."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from elinvar.base.plan import TokenLogprobs
from elinvar.engine.pieces import Arguments, Call, Piece, Text, Thought
from elinvar.server import prepare
from elinvar.server.asked import Step, Usage
from elinvar.server.errors import ApiError, unavailable
from elinvar.server.openai_messages import chat_messages, conversation
from elinvar.server.responses_items import read_items, seal, to_messages, unseal
from elinvar.server.responses_request import as_chat, check_supported, in_our_words, shown
from elinvar.server.responses_schema import ResponseRequest
from elinvar.server.responses_wire import ResponseWire
from elinvar.server.schema import decode
from test_server_wire import names

REQUEST = ResponseRequest(model="m", input="x")
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def wire(**options: Any) -> ResponseWire:
    return ResponseWire("resp_1", shown(REQUEST), names(), **options)


def events_of(raw: Sequence[bytes]) -> list[dict[str, Any]]:
    """Each is what the official client takes for an event of its type, all fields and no others."""
    events = []
    for one in raw:
        head, data = one.decode().removesuffix("\n\n").split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert head == f"event: {event['type']}"
        EVENT.validate_python(event)
        events.append(event)
    return events


def run(pieces: Sequence[Sequence[Piece]], reason: str = "stop", **options: Any) -> tuple[Any, Any]:
    """(the events of a stream, the same whole)."""
    steps = [Step(0, list(some), [], [], None, 5) for some in pieces]
    steps.append(Step(0, [], [], [], reason, 5))
    streamed, whole = wire(**options), wire(**options)
    raw = streamed.begin()
    for step in steps:
        raw += streamed.advance(step)
        whole.see(step)
    raw += streamed.end(Usage())
    body = json.loads(whole.whole([], Usage()))
    last = json.loads(msgspec.json.encode(streamed.result))
    assert {**last, "completed_at": 0} == {**body, "completed_at": 0}
    Response.model_validate(body)
    events = events_of(raw)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events, body


def rebuilt(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items as a client knows them that reads nothing but deltas."""
    items: dict[int, dict[str, Any]] = {}
    for event in events:
        match event["type"].removeprefix("response.").split("."):
            case ["output_item", "added"]:
                assert event["output_index"] == len(items)
                items[len(items)] = {**event["item"], "told": ""}
            case [_, "delta"]:
                assert items[event["output_index"]]["id"] == event["item_id"]
                items[event["output_index"]]["told"] += event["delta"]
            case ["output_item", "done"]:
                items[event["output_index"]]["done"] = event["item"]
    return list(items.values())


def text_of(item: dict[str, Any]) -> str:
    if item["type"] == "function_call":
        return str(item["arguments"])
    (part,) = item["content"]
    return str(part["text"])


def test_thoughts_text_and_calls() -> None:
    pieces: list[list[Piece]] = [[Thought("h"), Thought("m")], [Text("so"), Call(0, "c1", "f")]]
    pieces += [
        [Arguments(0, '{"a":')],
        [Call(1, "c2", "g"), Arguments(0, "1}"), Arguments(1, "{}")],
    ]
    _, body = run(pieces, "tool_calls", sealed=True)
    thoughts, _, first, second = body["output"]
    assert [text_of(item) for item in body["output"]] == ["hm", "so", '{"a":1}', "{}"]
    assert unseal(thoughts["encrypted_content"], "x") == "hm"
    assert (first["call_id"], first["name"], second["call_id"]) == ("c1", "f", "c2")
    assert body["status"] == "completed" and body["completed_at"]
    assert {item["status"] for item in body["output"]} == {"completed"}
    messages = to_messages(read_items(body["output"]), None)
    assert len(messages) == 1 and messages[0].reasoning_content == "hm"
    assert messages[0].content == "so" and len(messages[0].tool_calls or ()) == 2


def test_an_empty_answer_has_a_message() -> None:
    _, body = run([])
    assert [text_of(item) for item in body["output"]] == [""]


def test_a_cut_answer_ends_with_what_is_cut() -> None:
    _, body = run([[Thought("a"), Text("b")]], "length")
    assert [item["status"] for item in body["output"]] == ["completed", "incomplete"]
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}


def test_failing() -> None:
    one = wire()
    raw = one.begin() + one.advance(Step(0, [Text("ab")], [], [], None, 5))
    raw += one.fail(unavailable("Gone."))
    last = events_of(raw)[-1]["response"]
    assert (last["status"], last["error"]["message"]) == ("failed", "Gone.")
    assert text_of(last["output"][0]) == "ab" and last["output"][0]["status"] == "incomplete"


def test_log_probs_go_with_the_text_of_their_tokens() -> None:
    """Those of held back tokens with the text that they become; those of thoughts with nothing."""
    one = wire(with_logprobs=True)
    values = [TokenLogprobs(-0.5, [(3, -0.1)])]
    steps = [([Thought("t")], [0]), ([], [1]), ([Text("€")], [2]), ([], [3])]
    raw = []
    for pieces, ids in steps:
        raw += one.advance(Step(0, pieces, ids, values, None, 5))  # type: ignore[arg-type]
    raw += one.advance(Step(0, [], [], [], "stop", 5))
    (delta,) = (e for e in events_of(raw) if e["type"] == "response.output_text.delta")
    assert [entry["token"] for entry in delta["logprobs"]] == ["\ufffd", "\ufffd"]
    (part,) = one.output.items[1]["content"]
    assert [entry["token"] for entry in part["logprobs"]] == ["\ufffd", "\ufffd", " b"]


texts = st.text(max_size=3)
answers = st.lists(
    st.one_of(
        texts.map(Text),
        texts.map(Thought),
        st.integers(0, 3).map(lambda n: Call(n, f"c{n}", "f")),
        st.builds(Arguments, st.integers(0, 3), texts),
    ),
    max_size=12,
)


@given(answers, st.lists(st.integers(0, 12)), st.sampled_from(["stop", "length", "tool_calls"]))
def test_any_pieces(pieces: list[Piece], cuts: list[int], reason: str) -> None:
    """However they are cut into steps: a stream's deltas, its last event and the whole agree."""
    made: set[int] = set()
    real: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, Call) and piece.number in made:
            continue
        if isinstance(piece, Arguments) and piece.number not in made:
            continue
        if isinstance(piece, Call):
            made.add(piece.number)
        real.append(piece)
    ends = [0, *sorted(min(cut, len(real)) for cut in cuts), len(real)]
    steps = [real[a:b] for a, b in pairwise(ends)]
    events, body = run(steps, reason)
    items = rebuilt(events)
    assert [item["done"] for item in items] == body["output"]
    assert [item["told"] for item in items] == [text_of(item) for item in body["output"]]
    told = "".join(text_of(item) for item in body["output"] if item["type"] == "message")
    assert told == "".join(piece.text for piece in real if isinstance(piece, Text))


# ---- input --------------------------------------------------------------------------------------

contents = texts | st.lists(
    st.builds(lambda t: {"type": "input_text", "text": t}, texts), min_size=1, max_size=3
)
spoken = st.builds(
    lambda role, content, kind: {"role": role, "content": content, **kind},
    st.sampled_from(["user", "system", "developer"]),
    contents,
    st.sampled_from([{}, {"type": "message"}]),
)
answered = st.builds(
    lambda t: {
        "type": "message",
        "id": "msg_1",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": t, "annotations": [], "logprobs": []}],
    },
    texts,
)
thought = st.builds(
    lambda t, shut: {"type": "reasoning", "id": "rs_1", "summary": []}
    | ({"encrypted_content": seal(t)} if shut else {"content": [{"type": "reasoning_text", "text": t}]}),
    texts,
    st.booleans(),
)  # fmt: skip
used = st.integers(0, 9).map(
    lambda n: [
        {"type": "function_call", "call_id": f"c{n}", "name": "f", "arguments": '{"a":1}'},
        {"type": "function_call_output", "call_id": f"c{n}", "output": str(n)},
    ]
)
conversations = st.lists(
    st.one_of(*(one.map(lambda item: [item]) for one in (spoken, answered, thought)), used),
    min_size=1,
    max_size=6,
).map(lambda lists: [item for items in lists for item in items])


@given(conversations)
def test_any_conversation(items: list[dict[str, Any]]) -> None:
    """Reading what was read changes nothing, and the messages are the items in their order."""
    read = read_items(items)
    assert read_items(read) == read
    messages = chat_messages(as_chat(ResponseRequest(model="m", instructions="I"), read))
    assert messages[0] == {"role": "system", "content": "I"}
    said: list[str] = []
    for message in messages[1:]:
        content = message.get("content") or ""
        text = content if isinstance(content, str) else "".join(part["text"] for part in content)
        said += [message.get("reasoning_content") or "", text]
        said += [call["id"] for call in message.get("tool_calls", ())]
    expected: list[str] = []
    for item in read:
        if item["type"] == "function_call":
            expected.append(item["call_id"])
        elif item["type"] == "function_call_output":
            expected.append(item["output"])
        else:
            expected += [part["text"] for part in item["content"]]
    assert "".join(said) == "".join(expected)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
fields = st.sampled_from(
    ["type", "role", "content", "id", "call_id", "output", "summary", "encrypted_content", "name"]
)
kinds = st.sampled_from(
    ["message", "function_call", "function_call_output", "reasoning", "program"]
)


@given(st.lists(st.dictionaries(fields, anything | kinds | contents, max_size=6), max_size=3))
def test_any_input_is_read_or_refused(items: list[dict[str, Any]]) -> None:
    try:
        read = read_items(items)
        if all(item["type"] != "item_reference" for item in read):
            to_messages(read, None)
    except ApiError as error:
        assert error.status == 400 and error.param is not None


values = anything | st.sampled_from(
    [
        [{"type": "function", "name": "f"}],
        [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}],
        {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
        {"type": "function", "name": "f"},
        {"effort": "low", "summary": "auto"},
        {"format": {"type": "json_schema", "name": "n", "schema": {}}},
        ["reasoning.encrypted_content"],
    ]
)


@given(st.dictionaries(st.sampled_from(ResponseRequest.__struct_fields__), values, max_size=6))
def test_any_request_is_read_or_refused(fields: dict[str, Any]) -> None:
    """And what is read can be shown again, as the official client takes it."""
    body = msgspec.json.encode({"model": "m", "input": "x"} | fields)
    try:
        with in_our_words():
            request = decode(body, ResponseRequest)
            check_supported(request)
            chat = as_chat(request, read_items(request.input or "x"))
            prepare.wanted(chat)
            conversation(chat)
    except ApiError as error:
        assert error.status in (400, 404)
        return
    one = ResponseWire("resp_1", shown(request), names())
    Response.model_validate(json.loads(one.whole([], Usage())))
