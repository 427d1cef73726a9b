"""Arguments and prompts that the benchmarks and `elinvar profile` share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from elinvar.cli.command import Decorator, option
from elinvar.cli.options import AT_LEAST_1

if TYPE_CHECKING:
    from elinvar.engine.core import Engine


prefill = option("--prefill", default="512", help="Prompt lengths, with commas.")


def batch(default: str) -> Decorator:
    return option("--batch", "-b", default=default, help="Batch sizes of decode, with commas.")


def count(name: str, default: int, help: str) -> Decorator:
    return option(name, type=AT_LEAST_1, metavar="N", default=default, help=help)


prompt_tokens = count("--prompt-tokens", 128, "Tokens of each prompt before decode.")


def numbers(text: str, flag: str) -> list[int]:
    """The whole numbers above 0 of a list such as 1,4,16, each once."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{text!r} is not a list such as 1,4,16", param_hint=flag)
    return list(dict.fromkeys(int(part) for part in parts))


def spread_prompt(engine: Engine, row: int, length: int) -> list[int]:
    """Token ids spread over the vocabulary, other ones for each row."""
    size = engine.tokenizer.vocab_size
    return [(7919 * (i + 131 * row) + 17) % size for i in range(length)]
