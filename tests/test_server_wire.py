"""What chunks and log-probs look like, where a model would seldom take us."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, cast

from elinvar.base.plan import TokenLogprobs
from elinvar.engine.pieces import Arguments, Call, Piece, Text, Thought
from elinvar.engine.tokenizer import Tokenizer
from elinvar.server.asked import Collector, Done, Step, Usage
from elinvar.server.tokens import TokenNames
from elinvar.server.wire import DONE, ChatWire, CompletionWire

TOKENS = [b"a", b"\xe2\x82", b"\xac", b" b", b"<end>"]


class Spelling:
    """The part of a Tokenizer that TokenNames reads; token 4 is a control token."""

    def token_bytes(self, token: int) -> bytes:
        return TOKENS[token]

    def token_text(self, token: int) -> str:
        return TOKENS[token].decode("utf-8", "replace")

    def text_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(TOKENS[i] for i in ids if i != 4)


def names() -> TokenNames:
    return TokenNames(cast(Tokenizer, Spelling()))


def parse(chunk: bytes) -> Any:
    assert chunk.startswith(b"data: ") and chunk.endswith(b"\n\n")
    assert b"\n" not in chunk[:-2] and b"\r" not in chunk
    return json.loads(chunk.removeprefix(b"data: "))


def test_offsets_of_split_characters() -> None:
    """'a€ b': the euro sign is two tokens; both begin where the character does, or after."""
    wire = CompletionWire("m", "fp", names())
    values = [TokenLogprobs(-0.5, [(3, -0.1)])] * 2
    first = wire.logprobs(0, [0, 1], values)
    second = wire.logprobs(0, [2, 3], values)
    assert first["tokens"] + second["tokens"] == ["a", r"bytes:\xe2\x82", r"bytes:\xac", " b"]
    assert first["text_offset"] + second["text_offset"] == [0, 1, 1, 2]
    assert wire.logprobs(1, [0], values[:1])["text_offset"] == [0]
    whole = CompletionWire("m", "fp", names(), with_logprobs=True)
    done = Done(0, [Text("a€ b")], [0, 1, 2, 3], values * 2, "stop", 7)
    (choice,) = json.loads(whole.whole([done], Usage()))["choices"]
    assert (choice["text"], choice["seed"]) == ("a€ b", 7)
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 2]
    assert choice["logprobs"]["top_logprobs"] == [{" b": -0.1}] * 4


def test_no_infinity_in_json() -> None:
    values = [TokenLogprobs(-float("inf"), [(0, -float("inf"))])]
    (entry,) = ChatWire("m", "fp", names()).logprobs(0, [1], values)["content"]
    assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] == -9999.0
    assert entry["bytes"] == [0xE2, 0x82]
    assert entry["token"] == "\ufffd"
    completion = CompletionWire("m", "fp", names()).logprobs(0, [1], values)
    assert completion["token_logprobs"] == [-9999.0]


def test_chunks_are_one_line_of_json() -> None:
    text = 'quote " back \\ line \r\n tab \t nul \x00 sep \u2028 \U0001f642'
    for kind in (ChatWire, CompletionWire):
        wire = kind('model "x"\n', "fp", names(), with_usage=True)
        piece = parse(wire.chunk(Step(3, [Text(text)], [1], [], None, 5)))
        assert piece["model"] == 'model "x"\n'
        assert piece["usage"] is None
        (choice,) = piece["choices"]
        assert choice["index"] == 3
        assert text in (choice.get("text"), choice.get("delta", {}).get("content"))
        end = parse(wire.chunk(Step(3, [], [], [], "stop", 2**64 - 1)))["choices"][0]
        assert (end["finish_reason"], end["seed"]) == ("stop", 2**64 - 1)
        usage, done = wire.ending(Usage()).split(b"\n\n", 1)
        assert (parse(usage + b"\n\n")["choices"], done) == ([], DONE)
    opening = ChatWire("m", "fp", names()).opening([0], Usage())
    delta = {"role": "assistant", "content": "", "refusal": None}
    assert parse(opening)["choices"][0]["delta"] == delta


def test_calls_and_thoughts() -> None:
    """In a stream and whole; log-probs of a step are written once."""
    wire = ChatWire("m", "fp", names(), with_logprobs=True)
    pieces: list[Piece] = [Thought("hm"), Text("so"), Call(0, "c1", "f"), Arguments(0, '{"a":')]
    pieces += [Call(1, "c2", "g"), Arguments(0, "1}"), Arguments(1, "{}")]
    step = Step(0, pieces, [0], [TokenLogprobs(-0.5, [])], "tool_calls", 7)
    chunks = [parse(part + b"\n\n") for part in wire.chunk(step).split(b"\n\n")[:-1]]
    (*choices, end) = (chunk["choices"][0] for chunk in chunks)
    assert [bool(choice["logprobs"]) for choice in choices] == [True] + [False] * 6
    deltas = [choice["delta"] for choice in choices]
    assert deltas[:2] == [{"reasoning_content": "hm"}, {"content": "so"}]
    calls = [delta["tool_calls"][0] for delta in deltas[2:]]
    began = {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}}
    assert calls[0] == began
    assert calls[1] == {"index": 0, "function": {"arguments": '{"a":'}}
    assert [call["index"] for call in calls] == [0, 0, 1, 0, 1]
    assert end["finish_reason"] == "tool_calls"

    collector = Collector([0])
    collector.push(step)
    (choice,) = json.loads(wire.whole(collector.finish(), Usage()))["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["content"], message["reasoning_content"]) == ("so", "hm")
    functions = [(one["id"], one["function"]) for one in message["tool_calls"]]
    assert functions == [
        ("c1", {"name": "f", "arguments": '{"a":1}'}),
        ("c2", {"name": "g", "arguments": "{}"}),
    ]
