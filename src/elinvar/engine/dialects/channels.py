"""Reads answers that are several messages, each with a head that says whom it is for."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from elinvar.engine.dialects.source import MalformedError, Reading
from elinvar.engine.dialects.values import value
from elinvar.engine.dialects.words import Channels
from elinvar.engine.pieces import Text, Thought

if TYPE_CHECKING:
    from elinvar.engine.dialects.reader import AnswerReader


def read_messages(reader: AnswerReader, words: Channels, in_thought: bool) -> Reading[None]:
    """The answer begins where the prompt ends: behind the role, or in a thought."""
    source, pieces = reader.source, reader.pieces
    marks = (words.start, words.channel)
    if in_thought:
        yield from _body(reader, words, Thought)
    while True:
        space = yield from source.space()
        if mark := (yield from source.starts(*marks, "to=")):
            source.keep()
            reader.inside = mark in marks
            try:
                head = yield from source.before(words.message)
            except MalformedError:
                reader.give_up()
            else:
                reader.inside = False
                yield from _message(reader, words, head)
                continue
        # What has no head is said; what only looks like one is as well.
        pieces.say(space)
        mark = yield from source.starts(*marks)
        pieces.say(source.take(len(mark)))
        if not (yield from source.until(marks, pieces.say)):
            pieces.flush()
            return


def _message(reader: AnswerReader, words: Channels, head: str) -> Reading[None]:
    recipient = re.search(r"\bto=([^\s<]+)", head)
    channel = re.search(rf"{re.escape(words.channel)}\s*(\w+)", head)
    if recipient and reader.calls_tools:
        name = recipient[1].removeprefix(words.recipient)
        if name != recipient[1] or reader.knows(name):
            yield from _call(reader, words, name)
            return
    reader.source.give_back()
    thinks = channel is not None and channel[1] == words.thoughts
    yield from _body(reader, words, Thought if thinks else Text)


def _call(reader: AnswerReader, words: Channels, name: str) -> Reading[None]:
    source, pieces = reader.source, reader.pieces
    reader.inside = True
    try:
        yield from source.space()
        if not (yield from source.starts("{")):
            source.fail()
        source.give_back()
        pieces.call(name, "")
        yield from value(source, pieces.arguments)
        yield from source.space()
        source.take(len((yield from source.starts(*words.ends))))
        reader.inside = False
    except MalformedError:
        reader.give_up()


def _body(reader: AnswerReader, words: Channels, kind: type[Text] | type[Thought]) -> Reading[None]:
    source, pieces = reader.source, reader.pieces
    marks = (*words.ends, words.start, words.channel)
    found = yield from source.until(marks, lambda text: pieces.say(text, kind))
    pieces.flush(kind)
    if found in words.ends:
        source.take(len(found))
