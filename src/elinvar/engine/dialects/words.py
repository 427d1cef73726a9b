"""The words in which a family's way of writing thoughts and calls is described: plain data.

A description says what is written between what. It is read (`reader`), turned into a grammar that
enforces it (`grammar`), and written (`write`). White space in a literal is how templates write it; a
reader takes any in its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Thoughts:
    """Thoughts stand before what is said: where an answer begins, and after calls."""

    open: str
    close: str
    until: tuple[str, ...] = ()
    """What ends a thought that was not closed; it is read as what it is."""


@dataclass(frozen=True, slots=True)
class Syntax:
    """How values are written, where it is not JSON."""

    quote: str = ""
    """What stands around a text, and never in it; empty: ' or ", with backslashes in between."""


JSON = Syntax()
"""What is Python is read, too: ' around texts, True, False and None, tuples."""


@dataclass(frozen=True, slots=True)
class Name:
    """The name of the tool."""

    prefix: str = ""
    numbered: bool = False
    """`:` and the call's number follow, and the whole is the call's id."""


@dataclass(frozen=True, slots=True)
class Id:
    """`before` and then the call's id."""

    before: str
    needed: bool = False
    """Else it may be missing, and a grammar leaves it out."""


@dataclass(frozen=True, slots=True)
class Json:
    """The arguments as one JSON object."""


@dataclass(frozen=True, slots=True)
class Function:
    """A JSON object of the tool's name and its arguments, in any order and among others."""

    arguments: str = "arguments"
    name: str = "name"


@dataclass(frozen=True, slots=True)
class Fields:
    """Arguments one by one: a text a value, of which the tool's schema says what it is."""

    open: str
    middle: str
    """Between key and value."""
    close: str
    typed: tuple[str, str] | None = None
    """What follows the middle for texts, and for all else, where that is told."""


@dataclass(frozen=True, slots=True)
class Keywords:
    """Arguments as `key=value` in parentheses, or with other signs."""

    open: str = "("
    equals: str = "="
    close: str = ")"
    syntax: Syntax = JSON


Part = str | Name | Id | Json | Function | Fields | Keywords


@dataclass(frozen=True, slots=True)
class Calls:
    """Calls, one or many, between what frames them."""

    call: tuple[Part, ...]
    frames: tuple[tuple[str, str], ...]
    """What opens and what closes, the first as templates write it. Empty ones: none; such calls stand
    where nothing was said before, and a tool's name must tell them from other texts."""
    head: str = ""
    """Before the first call of a frame, where there are several or may be; then `tail` follows the
    last. It may be missing where there is one."""
    tail: str = ""
    between: str = ""
    many: bool = True
    """Whether a frame holds several calls; else each has its own."""


@dataclass(frozen=True, slots=True)
class Channels:
    """An answer of several messages, each with a head that says whom it is for (OpenAI's harmony)."""

    start: str = "<|start|>"
    channel: str = "<|channel|>"
    constrain: str = "<|constrain|>"
    message: str = "<|message|>"
    ends: tuple[str, ...] = ("<|end|>", "<|call|>", "<|return|>")
    role: str = "assistant"
    thoughts: str = "analysis"
    calls: str = "commentary"
    final: str = "final"
    recipient: str = "functions."


@dataclass(frozen=True, slots=True)
class Family:
    """How one family of models writes."""

    name: str
    calls: Calls | Channels
    thoughts: Thoughts | None = None
    drops: tuple[str, ...] = ()
    """Markers that are no part of what is said."""
    ends: tuple[str, ...] = ()
    """Tokens that end an answer, besides the model's own."""
    arguments: Literal["object", "text"] = "object"
    """How its template takes the arguments of earlier calls."""
    single: bool = False
    """Its template takes one call a message."""
    ids: Literal["any", "nine", "numbered"] = "any"
    """Ids of calls that its template takes: any, nine letters or digits, or as `Name.numbered`."""


def markers(family: Family) -> set[str]:
    """All literals of a family: whatever control tokens are in them must be seen."""
    found = {*family.drops}
    words, thoughts = family.calls, family.thoughts
    if thoughts is not None:
        found |= {thoughts.open, thoughts.close, *thoughts.until}
    if isinstance(words, Channels):
        return found | {words.start, words.channel, words.constrain, words.message, *words.ends}
    found |= {words.head, words.tail, words.between}
    for frame in words.frames:
        found |= {*frame}
    for part in words.call:
        match part:
            case str():
                found.add(part)
            case Id():
                found.add(part.before)
            case Fields():
                found |= {part.open, part.middle, part.close, *(part.typed or ())}
            case Keywords():
                found |= {part.open, part.equals, part.close, part.syntax.quote}
    return found - {""}
