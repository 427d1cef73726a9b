"""What chunks and log-probs look like, where a model would seldom take us."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, cast

from elinvar.base.plan import TokenLogprobs
from elinvar.engine.tokenizer import Tokenizer
from elinvar.server.tokens import TokenNames
from elinvar.server.wire import ChatWire, CompletionWire

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
    wire = CompletionWire("m", "fp", names(), False)
    values = [TokenLogprobs(-0.5, [(3, -0.1)])] * 2
    first = wire.logprobs(0, [0, 1], values)
    second = wire.logprobs(0, [2, 3], values)
    assert first["tokens"] + second["tokens"] == ["a", r"bytes:\xe2\x82", r"bytes:\xac", " b"]
    assert first["text_offset"] + second["text_offset"] == [0, 1, 1, 2]
    assert wire.logprobs(1, [0], values[:1])["text_offset"] == [0]
    joined = wire.content("a€ b", [first, second])["logprobs"]
    assert joined["text_offset"] == [0, 1, 1, 2]
    assert joined["top_logprobs"] == [{" b": -0.1}] * 4


def test_no_infinity_in_json() -> None:
    values = [TokenLogprobs(-float("inf"), [(0, -float("inf"))])]
    (entry,) = ChatWire("m", "fp", names(), False).logprobs(0, [1], values)
    assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] == -9999.0
    assert entry["bytes"] == [0xE2, 0x82]
    assert entry["token"] == "\ufffd"
    completion = CompletionWire("m", "fp", names(), False).logprobs(0, [1], values)
    assert completion["token_logprobs"] == [-9999.0]


def test_chunks_are_one_line_of_json() -> None:
    text = 'quote " back \\ line \r\n tab \t nul \x00 sep \u2028 \U0001f642'
    for kind in (ChatWire, CompletionWire):
        wire = kind('model "x"\n', "fp", names(), True)
        piece = parse(wire.piece(3, text, None))
        assert piece["model"] == 'model "x"\n'
        assert piece["usage"] is None
        (choice,) = piece["choices"]
        assert choice["index"] == 3
        assert text in (choice.get("text"), choice.get("delta", {}).get("content"))
        end = parse(wire.closing(3, "stop", 2**64 - 1))["choices"][0]
        assert (end["finish_reason"], end["seed"]) == ("stop", 2**64 - 1)
        assert parse(wire.usage({"total_tokens": 1})) | {"choices": []} == parse(
            wire.usage({"total_tokens": 1})
        )
    assert parse(ChatWire("m", "fp", names(), False).opening(0))["choices"][0]["delta"] == {
        "role": "assistant",
        "content": "",
        "refusal": None,
    }
