"""Bad words: the token sequences that spell a text which must not be in an answer."""

from __future__ import annotations

from collections.abc import Iterable

from elinvar.engine.tokenizer import Tokenizer

_BEFORE = "\n"
"""Some tokenizers write the first word of a text in another way than one that follows something."""


def spelled(
    tokenizer: Tokenizer, words: Iterable[str | tuple[int, ...]]
) -> tuple[tuple[int, ...], ...]:
    """Each text alone, after a space, and right after something; token ids as they are."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        if isinstance(word, tuple):
            found[word] = None
            continue
        for text in (word, f" {word.lstrip()}"):
            found[tuple(tokenizer.encode(text, add_special=False))] = None
        found[tuple(encode_after(tokenizer, word))] = None
    return tuple(ids for ids in found if ids)


def encode_after(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text that follows another without a space."""
    before = tokenizer.encode(_BEFORE, add_special=False)
    both = tokenizer.encode(_BEFORE + text, add_special=False)
    if both[: len(before)] == before:
        return both[len(before) :]
    return tokenizer.encode(text, add_special=False)
