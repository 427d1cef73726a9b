"""Text in pieces equals the text of the whole, and no piece holds half a character."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elinvar.engine.detokenize import IncrementalDetokenizer
from elinvar.engine.tokenizer import Tokenizer, load_tokenizer
from elinvar.weights.checkpoint import open_checkpoint

MANY = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", params=["smollm2_gguf", "tiny_gguf"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """A byte-level one, and a SentencePiece one with byte tokens."""
    path: Path = request.getfixturevalue(request.param)
    checkpoint = open_checkpoint(path)
    return load_tokenizer(checkpoint)


def pieces_of(tokenizer: Tokenizer, chunks: list[list[int]]) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer)
    return [*(detokenizer.push(chunk) for chunk in chunks), detokenizer.finish()]


@functools.cache
def byte_ids(tokenizer: Tokenizer) -> list[int]:
    """Tokens of one byte that is no character of its own."""
    singles = (i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1)
    return [i for i in singles if tokenizer.token_bytes(i)[0] >= 128]


@given(data=st.data())
@MANY
def test_pieces_join_to_the_whole(tokenizer: Tokenizer, data: st.DataObject) -> None:
    # Single bytes beyond ASCII are drawn often: most sequences of them are malformed.
    token = st.integers(0, tokenizer.vocab_size + 3) | st.sampled_from(byte_ids(tokenizer))
    chunks = data.draw(st.lists(st.lists(token, max_size=4), max_size=12))
    ids = [i for chunk in chunks for i in chunk]
    assert "".join(pieces_of(tokenizer, chunks)) == tokenizer.decode(ids)


@given(text=st.text(alphabet="aé日😀\u0301 ", max_size=30))
@MANY
def test_no_half_characters(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special=False)
    pieces = pieces_of(tokenizer, [[i] for i in ids])
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces).lstrip(" ") == text.lstrip(" ")
    assert pieces[-1] == ""  # nothing is held back at the end of a whole text


def test_malformed_bytes_come_out_as_soon_as_they_are_certain(tokenizer: Tokenizer) -> None:
    by_byte = {tokenizer.token_bytes(i)[0]: i for i in reversed(byte_ids(tokenizer))}
    lead, follow = by_byte[0xC3], by_byte[0xA9]
    (plain,) = tokenizer.encode("x", add_special=False)[-1:]
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push([lead]) == ""
    assert detokenizer.push([follow]) == "é"
    assert detokenizer.push([lead]) == ""
    assert detokenizer.push([plain]).startswith("\ufffd")
    assert detokenizer.push([lead]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_special_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    special = min(tokenizer.special_ids)
    ids = tokenizer.encode("é", add_special=False)
    chunks = [[special], ids, [special]]
    assert "".join(pieces_of(tokenizer, chunks)).strip() == "é"
    assert tokenizer.decode([special]) == ""
    assert tokenizer.token_bytes(special) == tokenizer.token_text(special).encode() != b""
