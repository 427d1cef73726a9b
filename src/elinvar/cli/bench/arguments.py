"""Arguments and prompts that the benchmarks share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from elinvar.engine.core import Engine


def numbers(text: str, flag: str) -> list[int]:
    """The whole numbers above 0 of a list such as 1,4,16, each once."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"{text!r} is not a list such as 1,4,16", param_hint=flag)
    return list(dict.fromkeys(int(part) for part in parts))


def spread_prompt(engine: Engine, row: int, length: int) -> list[int]:
    """Token ids spread over the vocabulary, other ones for each row."""
    size = engine.tokenizer.vocab_size
    return [(7919 * (i + 131 * row) + 17) % size for i in range(length)]
