"""Grammars in llguidance's words: a main grammar in its dialect of Lark, and those it refers to.

Owns how the parts of a grammar are put together. What is regular becomes one terminal as far as it
goes, because the library's lexer is greedy: of two terminals in a row the first takes all it can,
where within one every way of dividing the text counts (docs/design/030-grammars.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from elinvar.base import grammar as g
from elinvar.base.errors import InputError
from elinvar.engine.schemas import check_inline, checked_schema

MAX_SOURCE = 1 << 17
"""Characters of a schema, a pattern, a Lark source or a text."""
MAX_PARTS = 10_000
MAX_DEPTH = 32
"""Of parts in parts."""
MAX_REPEAT = 100_000

_OPTIONS = '%llguidance {"no_forcing": true}'
"""Masks then follow from the text alone; else the library picks the token where a text is forced."""
_START = re.compile(r"^\s*[?!]?start\b[^:]*:(?!:)", re.MULTILINE)
"""What a source in Lark's notation has and one in GBNF has not."""
_TEMPERATURE = re.compile(r"^\s*[\w!-]+\s*\[[^\]\n]*\btemperature\b", re.MULTILINE)
_HALF = re.compile("[\ud800-\udfff]")


def translated(
    grammar: g.Grammar, control: Mapping[str, int], is_token: Callable[[str], bool]
) -> str:
    """What llguidance compiles, as JSON. control: the vocabulary's control tokens by name; is_token:
    whether a text is one token. Raises InputError (`grammar`) for what exceeds the limits, or cannot be
    said."""
    writer = _Writer(control, is_token)
    start = writer.rule(writer.say(grammar))
    source = "\n".join([_OPTIONS, f"start: {start}", *writer.terminals])
    return json.dumps({"grammars": [{"lark_grammar": source}, *writer.others]})


def refused(message: str) -> InputError:
    return InputError("grammar", message)


@dataclass(frozen=True, slots=True)
class _Said:
    text: str
    """An expression: of terminals where it is regular, else of rules."""
    regular: bool


@dataclass(slots=True)
class _Writer:
    control: Mapping[str, int]
    is_token: Callable[[str], bool]
    terminals: list[str] = field(default_factory=list)
    others: list[dict[str, Any]] = field(default_factory=list)
    num_parts: int = 0

    def say(self, part: g.Grammar, depth: int = 0) -> _Said:
        self.num_parts += 1
        if depth > MAX_DEPTH or self.num_parts > MAX_PARTS:
            raise refused(f"A grammar has at most {MAX_PARTS} parts, {MAX_DEPTH} in one another.")
        match part:
            case g.JsonSchema(schema):
                return self._other("json_schema", checked_schema(_sized(schema)))
            case g.Lark(source):
                return self._other("lark_grammar", _lark(source))
            case g.Regex(pattern):
                return _Said(_regex(pattern), True)
            case g.Anything():
                return _Said("/(?s:.*)/", True)
            case g.Special(token):
                return self._special(token)
            case g.Literal(text):
                return self._sequence([self._piece(piece) for piece in self._pieces(text)])
            case g.Until(stop):
                return self._until(stop)
            case g.Sequence(parts):
                return self._sequence([self.say(p, depth + 1) for p in parts])
            case g.Choice(parts):
                return self._choice([self.say(p, depth + 1) for p in parts])
            case g.Repeat(inner, least, most):
                one = self.say(inner, depth + 1)
                return _Said(f"({one.text}){_times(least, most)}", one.regular)

    def rule(self, said: _Said) -> str:
        """As an expression of rules: a regular one has a name there."""
        if not said.regular:
            return said.text
        name = f"T{len(self.terminals)}"
        self.terminals.append(f"{name}: {said.text}")
        return name

    def _sequence(self, parts: list[_Said]) -> _Said:
        runs = []
        for regular, run in groupby(parts, lambda part: part.regular):
            runs.append(_Said(" ".join(part.text for part in run), regular))
        if len(runs) <= 1:
            return _Said(f"({runs[0].text})", runs[0].regular) if runs else _Said(_text(""), True)
        return _Said(f"({' '.join(map(self.rule, runs))})", False)

    def _choice(self, parts: list[_Said]) -> _Said:
        if not parts:
            raise refused("A choice has at least one part.")
        regular = all(part.regular for part in parts)
        words = [part.text if regular else self.rule(part) for part in parts]
        return _Said(f"({' | '.join(words)})", regular)

    def _other(self, kind: str, content: Any) -> _Said:
        name = f"g{len(self.others)}"
        self.others.append({"name": name, kind: content})
        return _Said(f"@{name}", False)

    def _special(self, token: str) -> _Said:
        """Vocabularies have tokens of their own for tags that they take for text."""
        if _sized(token) in self.control:
            return _Said(f"<[{self.control[token]}]>", False)
        if self.is_token(token):
            return _Said(_text(token), True)
        raise refused(f"The model's vocabulary has no token {token[:100]!r}.")

    def _until(self, stop: g.Literal | g.Special) -> _Said:
        if isinstance(stop, g.Special):
            token = self._special(stop.token)
            if not token.regular:  # and so in no text
                return self._sequence([_Said("/(?s:.*)/", True), token])
        name = stop.token if isinstance(stop, g.Special) else stop.text
        if not name:
            return _Said(_text(""), True)
        # All that ends with the text, but what has it before, too.
        text = _text(name)
        written = _Said(f"((/(?s:.*)/ {text}) & ~(/(?s:.*)/ {text} /(?s:.+)/))", True)
        if name not in self.control:
            return written
        without = _Said(f"(/(?s:.*)/ & ~(/(?s:.*)/ {text} /(?s:.*)/))", True)
        return self._choice([written, self._sequence([without, self._special(name)])])

    def _piece(self, piece: str) -> _Said:
        """A control token's name is the token, or its letters."""
        written = _Said(_text(piece), True)
        if piece not in self.control:
            return written
        return self._choice([written, self._special(piece)])

    def _pieces(self, text: str) -> list[str]:
        """The text, cut before and behind names of control tokens."""
        names = sorted((name for name in self.control if name in text), key=len, reverse=True)
        if not names:
            return [text]
        return [piece for piece in re.split(f"({'|'.join(map(re.escape, names))})", text) if piece]


def _text(text: str) -> str:
    """A terminal that is this text."""
    letters = "".join(c if c.isalnum() else f"\\x{{{ord(c):x}}}" for c in _sized(text))
    return f"/{letters}/" if text else '""'


def _regex(pattern: str) -> str:
    from llguidance import regex_to_lark

    # "dw": digits and words are of ASCII, as in JSON Schema.
    return f"(/{regex_to_lark(_sized(pattern), 'dw')}/)" if pattern else '""'


def _lark(source: str) -> str:
    from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

    if _TEMPERATURE.search(_sized(source)):
        raise refused("A rule's temperature is not supported; the request's holds everywhere.")
    try:
        if "::=" in source and not _START.search(source):
            source = str(gbnf_to_lark(source))
    except (GbnfToLarkError, RecursionError) as error:
        raise refused(f"The grammar cannot be read as GBNF: {str(error)[:300]}.") from None
    check_inline(source)
    return source


def _times(least: int, most: int | None) -> str:
    if not 0 <= least <= (MAX_REPEAT if most is None else most) <= MAX_REPEAT:
        raise refused(f"A part is repeated from 0 to {MAX_REPEAT} times, got {least} to {most}.")
    return f"{{{least},{'' if most is None else most}}}"


def _sized(text: str) -> str:
    if not isinstance(text, str):
        raise refused(f"A grammar's text is a string, got {text!r:.100}.")
    if len(text) > MAX_SOURCE:
        message = f"A grammar's text has at most {MAX_SOURCE} characters, this one {len(text)}."
        raise refused(message)
    if _HALF.search(text):
        raise refused("A grammar's text holds half of a surrogate pair, which is not a character.")
    return text
