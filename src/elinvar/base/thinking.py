"""How long an answer may think: plain data, part of what decides its tokens."""

from __future__ import annotations

from dataclasses import dataclass

from elinvar.base.errors import InputError


@dataclass(frozen=True, slots=True)
class ThinkingBudget:
    """Tokens of all thoughts of an answer together; then a thought ends, and so does each that begins
    after it: where there is a grammar, as soon as that lets it, which may be a character later."""

    max_tokens: int
    """0 and more; what opens and closes a thought is not counted."""
    end: tuple[int, ...]
    """Tokens that close a thought."""
    begin: tuple[int, ...] = ()
    """Tokens that open one."""
    is_open: bool = False
    """The prompt ends in one."""

    def __post_init__(self) -> None:
        most = self.max_tokens
        if isinstance(most, bool) or not isinstance(most, int) or not 0 <= most < 2**31:
            raise InputError(
                "max_thinking_tokens",
                f"max_thinking_tokens must be an integer of 0 or more, got {most!r}.",
            )
        if not self.end or not (self.begin or self.is_open):
            raise InputError("max_thinking_tokens", "A thought must have what opens and closes it.")
