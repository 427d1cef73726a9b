"""The text of an answer while it comes, and what a reader does with it.

What needs more text than has come yields; whoever drives the reader goes on when more is there. All
these stop at the first character that does not fit, before they take it, and look ahead no farther
than a marker is long: so an answer is read in linear time, and alike however it is cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from functools import lru_cache
from typing import NoReturn, TypeVar

Result = TypeVar("Result")
Find = Callable[[str, int], "re.Match[str] | None"]
Reading = Generator[None, None, Result]
"""Yields where it needs more text."""

LONGEST_NAME = 256
"""Most characters of a name, a key, a number or the head of a message."""

_SPACE = re.compile(r"\s*")
_NAME = re.compile(r"""[^\s<>{}()\[\]"'`=,|]*""")


class MalformedError(Exception):
    """What has come is not what was to come."""


class Source:
    """What has come and was not yet taken."""

    __slots__ = ("_at", "_kept", "_text", "ended")

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._kept: list[str] | None = None
        self.ended = False
        """No more will come."""

    def push(self, text: str) -> None:
        self._text = self._text[self._at :] + text
        self._at = 0

    @property
    def is_empty(self) -> bool:
        """Whether all that has come was taken."""
        return self._at == len(self._text)

    def keep(self) -> None:
        """From here on what is taken can be given back."""
        self._kept = []

    def give_back(self) -> str:
        """What was taken since `keep`."""
        kept, self._kept = self._kept, None
        return "".join(kept or ())

    def take(self, length: int) -> str:
        """The next characters; they have come."""
        text = self._text[self._at : self._at + length]
        self._at += length
        if self._kept is not None:
            self._kept.append(text)
        return text

    def skip(self) -> None:
        """Takes all that has come."""
        self._at = len(self._text)

    def fail(self) -> NoReturn:
        raise MalformedError

    def peek(self) -> Reading[str]:
        """The next character; empty at the end."""
        while self._at == len(self._text):
            if self.ended:
                return ""
            yield
        return self._text[self._at]

    def starts(self, *markers: str) -> Reading[str]:
        """Which of the markers comes next, not taken; empty: none. None of them begins another."""
        longest = max(map(len, markers), default=0)
        while True:
            ahead = self._text[self._at : self._at + longest]
            for marker in markers:
                if ahead.startswith(marker):
                    return marker
            if self.ended or not any(marker.startswith(ahead) for marker in markers):
                return ""
            yield

    def space(self) -> Reading[str]:
        """Takes white space."""
        taken = []
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None
            taken.append(self.take(match.end() - self._at))
            if self._at < len(self._text) or self.ended:
                return "".join(taken)
            yield

    def accept(self, marker: str) -> Reading[bool]:
        """Takes the marker if it is next."""
        found = yield from self.starts(marker)
        self.take(len(found))
        return bool(found)

    def expect(self, literal: str) -> Reading[None]:
        """Takes the literal, with any white space around and for that within it."""
        for word in literal.split():
            yield from self.space()
            if not (yield from self.accept(word)):
                self.fail()

    def look(self, pattern: re.Pattern[str]) -> Reading[str]:
        """The characters that match, not taken; the pattern may match none."""
        while True:
            match = pattern.match(self._text, self._at, self._at + LONGEST_NAME)
            assert match is not None
            length = match.end() - self._at
            if length == LONGEST_NAME:
                self.fail()
            if match.end() < len(self._text) or self.ended:
                return match[0]
            yield

    def name(self) -> Reading[str]:
        """Takes a name, of one character at least; an answer that ends in it has none."""
        found = yield from self.look(_NAME)
        if not found or self._at + len(found) == len(self._text):
            self.fail()
        return self.take(len(found))

    def before(self, literal: str) -> Reading[str]:
        """The characters, no more than of a name, before the literal. Takes both."""
        pattern = _literal(literal)
        while True:
            match = pattern.search(self._text, self._at, self._at + LONGEST_NAME)
            if match is not None:
                found = self._text[self._at : match.start()]
                self.take(match.end() - self._at)
                return found
            if self.ended or len(self._text) - self._at >= LONGEST_NAME:
                self.fail()
            yield

    def until(self, markers: tuple[str, ...], put: Callable[[str], None]) -> Reading[str]:
        """Takes what comes before the first of the markers, and puts it. Returns the marker, not taken;
        empty: there was none."""
        search, may_begin, longest = _search(markers)
        while True:
            match = search(self._text, self._at)
            if match is not None:
                put(self.take(match.start() - self._at))
                return match[0]
            end = len(self._text)
            if not self.ended:
                tail = may_begin(self._text, max(self._at, end - longest + 1))
                end = tail.start() if tail is not None else end
            if end > self._at:
                put(self.take(end - self._at))
            if self.ended:
                return ""
            yield


@lru_cache(maxsize=512)
def _literal(literal: str) -> re.Pattern[str]:
    return re.compile(r"\s*".join(map(re.escape, literal.split())))


@lru_cache(maxsize=512)
def _search(markers: tuple[str, ...]) -> tuple[Find, Find, int]:
    whole = "|".join(map(re.escape, markers)) or r"(?!)"
    begun = "|".join(map(_beginning, markers)) or r"(?!)"
    longest = max(map(len, markers), default=1)
    return re.compile(whole).search, re.compile(rf"(?:{begun})\Z").search, longest


def _beginning(marker: str) -> str:
    """An expression for the marker's first characters, one to all but one."""
    pattern = ""
    for character in reversed(marker[1:-1]):
        pattern = f"(?:{re.escape(character)}{pattern})?"
    return re.escape(marker[0]) + pattern
