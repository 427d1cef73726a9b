"""Arguments that the benchmarks share."""

from __future__ import annotations

import typer


def numbers(text: str, flag: str) -> list[int]:
    """The whole numbers above 0 of a list such as 1,4,16, each once."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"{text!r} is not a list such as 1,4,16", param_hint=flag)
    return list(dict.fromkeys(int(part) for part in parts))
