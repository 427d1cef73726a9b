"""Values that models write, to JSON while they come: JSON itself, Python, and what Gemma writes.

What is nearly right is taken for what it means: quotes of either kind, raw line ends in texts, commas
before a closing bracket. Nesting costs no stack, so no answer can be nested too deeply to be read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable

from elinvar.engine.dialects.source import MalformedError, Reading, Source
from elinvar.engine.dialects.words import JSON, Keywords, Syntax

Put = Callable[[str], None]

MOST_NESTED = 256

_WORD = re.compile(r"[\w+.\-]*")
_KEY = re.compile(r"[^\s:={}()\[\],'\"<>]*")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII)
_WORDS = {"True": "true", "False": "false", "None": "null"}
_WORDS |= {word: word for word in _WORDS.values()}
_CLOSERS = {"{": "}", "[": "]", "(": ")"}
_ESCAPES = {"n": "\\n", "t": "\\t", "r": "\\r", "b": "\\b", "f": "\\f", '"': '\\"', "\\": "\\\\"}
_ESCAPES |= {"/": "/", "'": "'"}
_CODES = {"u": 4, "x": 2, "U": 8}


def escaped(text: str) -> str:
    """What stands for `text` between the quotes of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def value(source: Source, put: Put, syntax: Syntax = JSON) -> Reading[None]:
    """Reads one value and puts it as JSON. Fails at the first character that none begins or goes on
    with."""
    yield from source.space()
    character = yield from source.peek()
    if not character or character not in "{[(":
        yield from _scalar(source, put, syntax)
        return
    source.take(1)
    yield from _container(source, put, syntax, character, ":", _CLOSERS[character])


def whole(text: str) -> str:
    """The JSON of a text that is one value; empty: it is none."""
    source, parts = Source(), list[str]()
    source.push(text)
    source.ended = True
    try:
        for _ in value(source, parts.append):
            pass
    except MalformedError:
        return ""
    return "".join(parts) if source.is_empty else ""


def keywords(source: Source, put: Put, part: Keywords) -> Reading[None]:
    """Reads the arguments of a call as one object."""
    yield from source.expect(part.open)
    yield from _container(source, put, part.syntax, "{", part.equals, part.close)


def _container(
    source: Source, put: Put, syntax: Syntax, kind: str, equals: str, closer: str
) -> Reading[None]:
    """From behind the opening bracket to behind the closing one."""
    stack = [(kind, equals, closer)]
    put("{" if kind == "{" else "[")
    first = True
    while stack:
        kind, equals, closer = stack[-1]
        yield from source.space()
        # A comma is put before what it divides: it may stand before a bracket, too.
        divided = first or (yield from source.accept(","))
        yield from source.space()
        if (yield from source.accept(closer)):
            stack.pop()
            put("}" if kind == "{" else "]")
            first = False
            continue
        if not divided:
            source.fail()
        if not first:
            put(", ")
        if kind == "{":
            yield from _key(source, put, syntax)
            yield from source.expect(equals)
            put(": ")
            yield from source.space()
        character = yield from source.peek()
        first = bool(character) and character in "{[("
        if not first:
            yield from _scalar(source, put, syntax)
            continue
        if len(stack) == MOST_NESTED:
            source.fail()
        source.take(1)
        put("{" if character == "{" else "[")
        stack.append((character, ":", _CLOSERS[character]))


def _key(source: Source, put: Put, syntax: Syntax) -> Reading[None]:
    quotes = (syntax.quote,) if syntax.quote else ()
    if (yield from source.starts('"', "'", *quotes)):
        yield from _scalar(source, put, syntax)
    else:
        key = yield from source.look(_KEY)
        if not key:
            source.fail()
        put(json.dumps(source.take(len(key)), ensure_ascii=False))


def _scalar(source: Source, put: Put, syntax: Syntax) -> Reading[None]:
    if syntax.quote and (yield from source.accept(syntax.quote)):
        put('"')
        found = yield from source.until((syntax.quote,), lambda text: put(escaped(text)))
        if not found:
            source.fail()
        source.take(len(found))
        put('"')
        return
    quote = yield from source.starts('"', "'")
    if quote:
        source.take(1)
        put('"')
        yield from _string(source, put, quote)
        put('"')
        return
    word = yield from source.look(_WORD)
    put(_WORDS.get(word) or _number(source, word))
    source.take(len(word))


def _string(source: Source, put: Put, quote: str) -> Reading[None]:
    """From behind the opening quote to behind the closing one."""
    while True:
        found = yield from source.until((quote, "\\"), lambda text: put(escaped(text)))
        if not found:
            source.fail()
        source.take(1)
        if found == quote:
            return
        character = yield from source.peek()
        if not character:
            source.fail()
        source.take(1)
        if character in _CODES:
            yield from _code(source, put, character)
        else:
            put(_ESCAPES.get(character) or escaped("\\" + character))


def _code(source: Source, put: Put, kind: str) -> Reading[None]:
    """A character by its code, of which JSON knows one way."""
    digits = ""
    while len(digits) < _CODES[kind]:
        character = yield from source.peek()
        if not character or character not in "0123456789abcdefABCDEF":
            put(escaped(f"\\{kind}{digits}"))
            return
        digits += source.take(1)
    code = int(digits, 16)
    half = kind == "u" or 0xD800 <= code < 0xE000  # of a pair; as a character it could not be sent
    put(f"\\u{digits[-4:]}" if half else escaped(chr(min(code, 0x10FFFF))))


def _number(source: Source, word: str) -> str:
    """A number as JSON has it: Python's may begin with a plus or a point, and end with one."""
    if _NUMBER.fullmatch(word):
        return word
    try:
        number = float(word)
    except ValueError:
        source.fail()
    if not math.isfinite(number) or "_" in word:
        source.fail()
    return json.dumps(int(word)) if re.fullmatch(r"[+-]?\d{1,18}", word) else json.dumps(number)
