"""Prompts with a hole, in the words of each family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elinvar.base.errors import InputError
from elinvar.engine.fim import ENDS, FORMATS, fill_in
from engines import ByteTokenizer


class FimTokenizer(ByteTokenizer):
    """Of bytes, with BOS before a text, a space before its first word, and control tokens."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        return [*([300] if add_special else []), *f" {text}".encode()]

    def control_id(self, name: str) -> int | None:
        return 400 + self.names.index(name) if name in self.names else None


@pytest.mark.parametrize("names", FORMATS)
def test_each_format(names: tuple[str, ...]) -> None:
    tokenizer: Any = FimTokenizer(*names, ENDS[0], "<file_sep>")
    hole = fill_in(tokenizer, "ab", "cd")
    # What follows the hole has no space of its own.
    assert hole.token_ids == [300, 400, *b" ab", 401, *b"cd", 402]
    assert hole.end_ids == (403, 404)


def test_a_model_without_them_is_named_as_such() -> None:
    tokenizer: Any = FimTokenizer("<fim_prefix>", "<fim_suffix>", "<|fim_middle|>")
    with pytest.raises(InputError, match="fill in the middle") as info:
        fill_in(tokenizer, "a", "b")
    assert info.value.field == "suffix"


def test_control_tokens_have_ids(smollm2_gguf: Path) -> None:
    from elinvar.engine.tokenizer import load_tokenizer
    from elinvar.weights.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(smollm2_gguf)
    tokenizer = load_tokenizer(checkpoint)
    checkpoint.close()
    end = tokenizer.control_id("<|im_end|>")
    assert end in tokenizer.eos_ids
    assert tokenizer.control_id("the") is None
