"""The pieces that a reader makes: what was said, thought and called since it was last asked."""

from __future__ import annotations

from collections.abc import Callable

from elinvar.engine.pieces import Arguments, Call, Piece, Text, Thought

MakeId = Callable[[], str]


class Said:
    """What was understood since it was last asked for."""

    __slots__ = ("_held", "_make_id", "made", "number")

    def __init__(self, make_id: MakeId) -> None:
        self._make_id = make_id
        self._held: list[str] = []
        self.made: list[Piece] = []
        self.number = -1
        """Of the last call."""

    def say(self, text: str, kind: type[Text] | type[Thought] = Text) -> None:
        """More of what is said or thought. White space waits for what it stands before: beside calls
        and around thoughts it belongs to them."""
        said = text.rstrip()
        if said:
            held, self._held = "".join(self._held), []
            self.made.append(kind(held + said))
        if len(said) < len(text):
            self._held.append(text[len(said) :])

    def flush(self, kind: type[Text] | type[Thought] = Text) -> None:
        """The white space was part of it."""
        if self._held:
            self.made.append(kind("".join(self._held)))
            self._held = []

    def drop_space(self) -> None:
        self._held = []

    def call(self, name: str, given_id: str) -> None:
        self.drop_space()
        self.number += 1
        self.made.append(Call(self.number, given_id or self._make_id(), name))

    def arguments(self, text: str) -> None:
        if text:
            self.made.append(Arguments(self.number, text))
