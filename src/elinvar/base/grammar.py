"""Grammars that an answer keeps to: plain data, made at the door, compiled by the engine.

They nest: what a family's tool calls look like is a sequence of literals, special tokens and JSON.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """A JSON value that a schema describes."""

    schema: str
    """As JSON text; `{}` is any value, `{"type":"object"}` any object."""


@dataclass(frozen=True, slots=True)
class Regex:
    """A text that a regular expression matches as a whole."""

    pattern: str


@dataclass(frozen=True, slots=True)
class Lark:
    """A context-free grammar in Lark's notation, from its rule `start`; or in GBNF, from `root`."""

    source: str


@dataclass(frozen=True, slots=True)
class Literal:
    """This text, in whatever tokens; where a special token has its name, or that token."""

    text: str


@dataclass(frozen=True, slots=True)
class Special:
    """One special token, by its name in the vocabulary (`<|channel|>`). Where that is a token of texts
    there, as some tags are, it is the text."""

    token: str


@dataclass(frozen=True, slots=True)
class Until:
    """Any text that does not contain `stop`, and then `stop`: a text, or a special token."""

    stop: Literal | Special


@dataclass(frozen=True, slots=True)
class Anything:
    """Any text up to the end of the answer."""


@dataclass(frozen=True, slots=True)
class Sequence:
    parts: tuple[Grammar, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """One of them."""

    parts: tuple[Grammar, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    part: Grammar
    least: int = 0
    most: int | None = None


Grammar = (
    JsonSchema | Regex | Lark | Literal | Special | Until | Anything | Sequence | Choice | Repeat
)
