"""Grammars that hold a model to its family's way of calling, and to the schemas of its tools."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from elinvar.base.errors import InputError
from elinvar.base.grammar import (
    Anything,
    Choice,
    Grammar,
    Literal,
    Regex,
    Repeat,
    Special,
    Until,
)
from elinvar.base.grammar import Sequence as Row
from elinvar.engine.dialects.arguments import arguments_grammar, fields_grammar, keywords_grammar
from elinvar.engine.dialects.schema import parameters
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
)

_ANY = {"parameters": {"type": "object"}}
_ID = Regex("[A-Za-z0-9]{9}")
Functions = Mapping[str, Mapping[str, Any]]


def answer_grammar(
    family: Family,
    special: Collection[str],
    functions: Functions,
    choice: str,
    *,
    parallel: bool,
    thinking: bool,
    in_thought: bool,
) -> Grammar | None:
    """See Dialect.grammar."""
    if choice not in ("auto", "required"):
        if choice not in functions:
            raise InputError("tool_choice", f"tool_choice names {choice!r}, which is no tool.")
        functions = {choice: functions[choice]}
    if not functions:
        raise InputError("tool_choice", "tool_choice needs tools, too.")
    strict = {name for name, f in functions.items() if f.get("strict")}
    if choice == "auto":
        if not strict:
            return None
        if isinstance(family.calls, Calls) and not _begins_with_a_sign(family.calls):
            return None
        functions = {n: f if n in strict else _ANY for n, f in functions.items()}
    grammars = _Grammars(special)
    if isinstance(family.calls, Channels):
        calls = grammars.messages(family.calls, functions, choice == "auto")
    else:
        calls = grammars.calls(family.calls, functions, choice == "auto", parallel)
    return Row((*grammars.thoughts(family, thinking, in_thought), calls))


def said_grammar(
    family: Family, special: Collection[str], grammar: Grammar, *, thinking: bool, in_thought: bool
) -> Grammar:
    """See Dialect.saying."""
    grammars = _Grammars(special)
    words = family.calls
    head: tuple[Grammar, ...] = ()
    if isinstance(words, Channels):
        head = grammars.text(f"{words.channel}{words.final}{words.message}")
    return Row((*grammars.thoughts(family, thinking, in_thought), *head, grammar))


class _Grammars:
    """Descriptions to grammars, for a vocabulary's control tokens."""

    def __init__(self, special: Collection[str]) -> None:
        names = sorted(special, key=len, reverse=True)
        self._cut = re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def text(self, literal: str) -> tuple[Grammar, ...]:
        """A literal, cut into control tokens and texts."""
        row: list[Grammar] = []
        at = 0
        for match in self._cut.finditer(literal):
            if match.start() > at:
                row.append(Literal(literal[at : match.start()]))
            row.append(Special(match[0]))
            at = match.end()
        if at < len(literal):
            row.append(Literal(literal[at:]))
        return tuple(row)

    def until(self, literal: str) -> Grammar:
        """Any text up to the literal, and the literal."""
        first, *rest = self.text(literal)
        assert isinstance(first, Literal | Special)
        return Row((Until(first), *rest))

    def calls(self, words: Calls, functions: Functions, free: bool, parallel: bool) -> Grammar:
        """One call at least; where `free`, any text and then perhaps calls."""
        opener, closer = words.frames[0]
        ends = (*self.text(words.tail), *self.text(closer))
        # What closes a call may begin as more of it would: they must be told apart as one.
        own = () if words.many else ends
        rows = (self._call(words.call, name, function) for name, function in functions.items())
        call = Choice(tuple(Row((*row, *own)) for row in rows))
        between = self.text(words.between)
        more = (Repeat(Row((*between, call))),) if parallel else ()
        inside = (*self.text(words.head), call, *((*more, *ends) if words.many else ()))
        if not free:
            framed = Row((*self.text(opener), *inside))
            if not parallel or words.many or not opener:
                return framed
            return Row((framed, Repeat(Row((Repeat(Literal("\n"), 0, 1), framed)))))
        if not opener:
            # What begins as a call does is one; all else is a text.
            begins = re.escape(words.head or "{")
            return Choice((Row(inside), Regex(rf"[^\s{begins}](?:.|\n)*")))
        trigger = self.text(opener)
        first = trigger[0]
        assert isinstance(first, Literal | Special)
        framed = Row((Until(first), *trigger[1:], *inside))
        rest = Anything() if isinstance(first, Special) else Regex(without(first.text))
        return Row((Repeat(framed, 0, None if parallel else 1), rest))

    def _call(
        self, parts: Sequence[Part], name: str, function: Mapping[str, Any]
    ) -> tuple[Grammar, ...]:
        schema = parameters(function)
        row: list[Grammar] = []
        for part in parts:
            match part:
                case str():
                    row += self.text(part)
                case Name():
                    row += self.text(part.prefix + name)
                    row += [Regex(r":\d{1,3}")] if part.numbered else []
                case Id():
                    row += [*self.text(part.before), _ID] if part.needed else []
                case Json():
                    row.append(arguments_grammar(schema))
                case Function():
                    head = f'{{"{part.name}": {json.dumps(name)}, "{part.arguments}": '
                    row += [Literal(head), arguments_grammar(schema), Literal("}")]
                case Fields():
                    row.append(fields_grammar(self.text, self.until, part, schema))
                case Keywords():
                    row.append(keywords_grammar(self.text, self.until, part, schema))
        return tuple(row)

    def messages(self, words: Channels, functions: Functions, free: bool) -> Grammar:
        """A message that calls; where `free`, one to the user may come instead."""
        rows: list[Grammar] = []
        for name, function in functions.items():
            whom = f"{words.channel}{words.calls} to={words.recipient}{name} "
            head = self.text(f"{whom}{words.constrain}json{words.message}")
            rows.append(Row((*head, arguments_grammar(parameters(function)))))
        if free:
            head = self.text(f"{words.channel}{words.final}{words.message}")
            rows.append(Row((*head, Anything())))
        return Choice(tuple(rows))

    def thoughts(self, family: Family, thinking: bool, in_thought: bool) -> tuple[Grammar, ...]:
        """What comes before all else: the thought that the prompt opened, or one that may be."""
        words, thoughts = family.calls, family.thoughts
        if isinstance(words, Channels):
            opens = f"{words.channel}{words.thoughts}{words.message}"
            close, after = words.ends[0], self.text(words.start + words.role)
        elif thoughts is not None:
            opens, close, after = thoughts.open.strip(), thoughts.close, (Regex(r"\s*"),)
        else:
            return ()
        if in_thought:
            return self.until(close), *after
        return (Repeat(Row((*self.text(opens), self.until(close), *after)), 0, 1),) * thinking


def _begins_with_a_sign(words: Calls) -> bool:
    """Else any text may begin as a call does, and nothing tells when to hold a model to one."""
    return bool(words.frames[0][0] or words.head or isinstance(words.call[0], Function))


def without(text: str) -> str:
    """A regular expression for all texts that do not contain `text`, whose first character comes in it
    once only."""
    first = re.escape(text[0])
    begun, broken = "", ""
    for character in reversed(text[1:]):
        other = f"[^{re.escape(character)}{first}]"
        broken = f"(?:{other}|{re.escape(character)}{broken})" if broken else other
    for character in reversed(text[1:-1]):
        begun = f"(?:{re.escape(character)}{begun})?"
    begun, broken = first + begun, first + broken
    return f"(?:[^{first}]|(?:{begun})*{broken})*(?:{begun})*"
