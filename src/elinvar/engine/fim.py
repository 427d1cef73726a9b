"""Filling in the middle: the prompt of a text with a hole, in the words of models that learned it
(Bavarian et al., 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from elinvar.base.errors import InputError
from elinvar.engine.bad_words import encode_after
from elinvar.engine.tokenizer import Tokenizer

FORMATS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite code
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek coder
)
"""What comes before the text before the hole, before the one after it, and before the answer."""

ENDS = (
    *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|file_separator|>"),
    *("<fim_pad>", "<file_sep>", "<repo_name>", "▁<EOT>"),
)
"""Tokens that end the middle in models that have them, besides their ends of an answer."""


@dataclass(frozen=True, slots=True)
class Hole:
    """A prompt, and what else ends its answer."""

    token_ids: list[int]
    end_ids: tuple[int, ...]


def fill_in(tokenizer: Tokenizer, before: str, after: str) -> Hole:
    """Raises InputError naming `suffix` where the model has no such tokens."""
    for names in FORMATS:
        ids = [tokenizer.control_id(name) for name in names]
        begin, hole, middle = ids
        if begin is not None and hole is not None and middle is not None:
            break
    else:
        raise InputError(
            "suffix",
            "suffix needs a model that learned to fill in the middle, and this one has no tokens "
            "for it; leave suffix out.",
        )
    whole = tokenizer.encode(before)
    text = tokenizer.encode(before, add_special=False)
    start = whole[: len(whole) - len(text)]
    rest = encode_after(tokenizer, after)
    ends = [tokenizer.control_id(name) for name in ENDS]
    token_ids = [*start, begin, *text, hole, *rest, middle]
    return Hole(token_ids, tuple(i for i in ends if i is not None))
