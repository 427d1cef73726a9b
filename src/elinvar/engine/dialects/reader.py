"""Reads one answer by its family's description: a recursive descent that waits where it needs more text.

What is taken is a call from the moment that its name is known and its arguments begin. What fails before
is given back as text, to the first character that does not fit, and reading goes on from there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from elinvar.engine.dialects import schema as schemas
from elinvar.engine.dialects.channels import read_messages
from elinvar.engine.dialects.fields import fields
from elinvar.engine.dialects.said import MakeId, Said
from elinvar.engine.dialects.source import MalformedError, Reading, Source
from elinvar.engine.dialects.values import keywords, value, whole
from elinvar.engine.dialects.words import (
    Calls,
    Channels,
    Family,
    Fields,
    Function,
    Id,
    Json,
    Keywords,
    Name,
    Part,
    Thoughts,
)
from elinvar.engine.pieces import Piece, Thought


class _Heading:
    """What is known of a call before its arguments come."""

    __slots__ = ("bare", "id", "name")

    def __init__(self, bare: bool) -> None:
        self.bare = bare
        self.name = ""
        self.id = ""


class AnswerReader:
    """A Reader (see engine.pieces) of one answer."""

    def __init__(
        self,
        family: Family,
        functions: Mapping[str, Mapping[str, Any]],
        begins_in_thought: bool,
        make_id: MakeId,
    ) -> None:
        self.family = family
        self.source = Source()
        self.pieces = Said(make_id)
        self.inside = False
        """What comes is no text but the frame of a call: its opener has come, or its name."""
        self._cut = False
        self._functions = functions
        if isinstance(family.calls, Channels):
            self._reading = read_messages(self, family.calls, begins_in_thought)
        else:
            self._reading = self._answer(family.calls, begins_in_thought)
        next(self._reading)

    def push(self, text: str) -> list[Piece]:
        self.source.push(text)
        next(self._reading, None)
        made, self.pieces.made = self.pieces.made, []
        return made

    def finish(self, cut: bool = False) -> list[Piece]:
        """See Reader. Of a call that is cut, what is known was said: its name and arguments so far."""
        self.source.ended = True
        self._cut = cut and self.inside
        return self.push("")

    def give_up(self) -> bool:
        """What was taken for a call is a text, unless it is one whose end is missing. False: something is
        said."""
        text = self.source.give_back()
        self.inside = False
        if self._cut:
            self.source.skip()
            self.pieces.drop_space()
            return True
        self.pieces.say(text)
        return not text.strip()

    @property
    def calls_tools(self) -> bool:
        """Without tools a call is a text like others."""
        return bool(self._functions)

    def knows(self, name: str) -> bool:
        return name in self._functions

    def _answer(self, calls: Calls, in_thought: bool) -> Reading[None]:
        source, pieces, family = self.source, self.pieces, self.family
        thoughts, drops = family.thoughts, family.drops
        frames = dict(calls.frames) if self.calls_tools else {}
        bare = frames.pop("", None) is not None
        thought = thoughts.open.strip() if thoughts else ""
        if thoughts and in_thought:
            yield from source.space()
            yield from source.accept(thought)
            yield from self._thought(thoughts)
        silent = fits = True  # thoughts may come; a bare call may
        glued = in_thought  # to what is no text: white space is no part of the answer
        while True:
            space = yield from source.space()
            pieces.say("" if glued else space)
            glued = False
            found = yield from source.starts(*frames, *drops, *((thought,) if thoughts else ()))
            if thoughts and silent and found == thought:
                source.take(len(found))
                yield from self._thought(thoughts)
                glued = True
                continue
            if found in drops:
                source.take(len(found))
                fits = True
                continue
            if found in frames or (bare and fits and not found):
                number = pieces.number
                glued = yield from self._try(calls, found, frames.get(found, ""))
                silent = fits = pieces.number > number and glued
                if glued:
                    continue
            silent = fits = False
            if not (yield from source.until((*frames, *drops), pieces.say)):
                pieces.flush()
                return

    def _thought(self, thoughts: Thoughts) -> Reading[None]:
        """From behind what opens it to behind what closes it."""
        source, pieces = self.source, self.pieces
        pieces.drop_space()
        yield from source.space()
        ends = (thoughts.close, *thoughts.until)
        found = yield from source.until(ends, lambda text: pieces.say(text, Thought))
        if not found:
            pieces.flush(Thought)
        pieces.drop_space()
        if found == thoughts.close:
            source.take(len(found))

    def _try(self, calls: Calls, opener: str, closer: str) -> Reading[bool]:
        """Reads what may be calls. False: it was a text, or went on as one."""
        source = self.source
        source.keep()
        source.take(len(opener))
        self.inside = bool(opener)
        try:
            yield from self._calls(calls, bare=not opener)
            yield from source.space()
            yield from source.accept(closer.strip())
        except MalformedError:
            return self.give_up()
        source.give_back()
        self.inside = False
        return True

    def _calls(self, calls: Calls, bare: bool) -> Reading[None]:
        """Those of one frame."""
        source, between = self.source, calls.between.strip()
        yield from source.space()
        listed = bool(calls.head) and (yield from source.accept(calls.head))
        while True:
            yield from self._call(calls.call, bare)
            if not (listed or (calls.many and not calls.head)):
                return
            yield from source.space()
            if listed and (yield from source.accept(calls.tail)):
                return
            if between and (yield from source.accept(between)):
                continue
            if listed:
                source.fail()
            if not (yield from source.starts(_beginning(calls.call[0]))):
                return

    def _call(self, parts: tuple[Part, ...], bare: bool) -> Reading[None]:
        source, heading = self.source, _Heading(bare)
        for part in parts:
            if isinstance(part, str):
                yield from source.expect(part)
                continue
            yield from source.space()
            match part:
                case Name():
                    yield from self._name(part, heading)
                case Id():
                    if (yield from source.accept(part.before)):
                        heading.id = yield from source.name()
                case Json():
                    yield from self._object(heading)
                case Function():
                    yield from self._function(part, heading)
                case Fields():
                    self._begin(heading)
                    described = schemas.parameters(self._functions.get(heading.name, {}))
                    yield from fields(source, self.pieces.arguments, part, described)
                    source.keep()
                case Keywords():
                    if not (yield from source.starts(part.open)):
                        source.fail()
                    self._begin(heading)
                    yield from keywords(source, self.pieces.arguments, part)
                    source.keep()

    def _begin(self, heading: _Heading) -> None:
        """From here on it is a call. Among other texts, only a tool's name tells."""
        if not heading.name or (heading.bare and heading.name not in self._functions):
            self.source.fail()
        self.source.give_back()
        self.inside = True
        self.pieces.call(heading.name, heading.id)

    def _name(self, part: Name, heading: _Heading) -> Reading[None]:
        written = yield from self.source.name()
        heading.name = written.removeprefix(part.prefix)
        if part.numbered:
            name, colon, number = heading.name.rpartition(":")
            heading.id = written
            if colon and number.isdecimal():
                heading.name = name

    def _object(self, heading: _Heading) -> Reading[None]:
        """Arguments as JSON, where the name is known."""
        if not (yield from self.source.starts("{")):
            self.source.fail()
        self._begin(heading)
        yield from value(self.source, self.pieces.arguments)
        self.source.keep()

    def _function(self, part: Function, heading: _Heading) -> Reading[None]:
        """An object of name and arguments. Arguments that come before the name are held."""
        source = self.source
        yield from source.expect("{")
        begun, held, first = False, "{}", True
        while True:
            yield from source.space()
            if (yield from source.accept("}")):
                break
            if not first:
                yield from source.expect(",")
            first = False
            key = json.loads((yield from self._collected()))
            yield from source.expect(":")
            yield from source.space()
            if key in (part.arguments, *_ARGUMENTS) and not begun:
                if heading.name and (yield from source.starts("{")):
                    yield from self._object(heading)
                    begun = True
                else:
                    held = _as_object((yield from self._collected())) or source.fail()
            else:
                found = yield from self._collected()
                if key == part.name and found.startswith('"'):
                    heading.name = _text(found)
                elif key == "id" and found.startswith('"'):
                    heading.id = _text(found)
        if not begun:
            self._begin(heading)
            self.pieces.arguments(held)
            source.keep()

    def _collected(self) -> Reading[str]:
        parts: list[str] = []
        yield from value(self.source, parts.append)
        return "".join(parts)


_ARGUMENTS = "arguments", "parameters"
"""Names by which models call them, whatever they were told."""


def _beginning(part: Part) -> str:
    """What a call begins with."""
    if isinstance(part, str):
        return part.split()[0]
    return part.before if isinstance(part, Id) else "{"


def _text(found: str) -> str:
    """What a JSON string says; halves of characters, which could not be sent, are none."""
    return str(json.loads(found)).encode("utf-8", "replace").decode()


def _as_object(found: str) -> str:
    """Arguments that came whole: an object, nothing, or a text that holds one. Empty: none of these."""
    if found.startswith('"'):
        text = _text(found).strip()
        found = whole(text) if text else ""
        if text and not found:
            return ""
    if found in ("null", ""):
        return "{}"
    return found if found.startswith("{") else ""
