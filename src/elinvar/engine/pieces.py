"""What an answer is made of once it is understood: text, thoughts, calls of tools.

A reader turns the text of an answer into these however the text is cut; the endpoints write them each
in its own words.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Text(NamedTuple):
    """More of what is said to the user."""

    text: str


class Thought(NamedTuple):
    """More of what the model thinks before it speaks."""

    text: str


class Call(NamedTuple):
    """A call of a tool begins; its arguments follow, and end where the next piece is another's."""

    number: int
    """0 for the first call of the answer."""
    id: str
    name: str


class Arguments(NamedTuple):
    """More of a call's arguments: the pieces join to one JSON object."""

    number: int
    text: str


Piece = Text | Thought | Call | Arguments


class Reader(Protocol):
    """Reads one answer. Its pieces joined are the same however the text is cut."""

    def push(self, text: str) -> list[Piece]: ...

    def finish(self, cut: bool = False) -> list[Piece]:
        """What was held back. The answer may have ended anywhere; nothing is ever raised. cut: its length
        ended it, so that the beginning of a call is no text."""
        ...
