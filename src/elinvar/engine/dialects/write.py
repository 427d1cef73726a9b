"""Calls as a family writes them: for prompts of models whose template does not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from elinvar.engine.dialects.words import (
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


class Written(NamedTuple):
    """A call to write."""

    name: str
    arguments: Mapping[str, Any]
    id: str = ""


def write_calls(family: Family, calls: Sequence[Written]) -> str:
    """As the model is to write them."""
    words = family.calls
    if isinstance(words, Channels):
        return (words.start + words.role).join(_message(words, call) for call in calls)
    opener, closer = words.frames[0]
    texts = ["".join(_part(part, call) for part in words.call) for call in calls]
    if not words.many:
        return "\n".join(f"{opener}{text}{closer}" for text in texts)
    return f"{opener}{words.head}{words.between.join(texts)}{words.tail}{closer}"


def _message(words: Channels, call: Written) -> str:
    head = f"{words.channel}{words.calls} to={words.recipient}{call.name} {words.constrain}json"
    return f"{head}{words.message}{_json(call.arguments)}{words.ends[1]}"


def _part(part: Part, call: Written) -> str:
    match part:
        case str():
            return part
        case Name():
            return call.id if part.numbered and call.id else part.prefix + call.name
        case Id():
            return f"{part.before}{call.id or 'call'}" if call.id or part.needed else ""
        case Json():
            return _json(call.arguments)
        case Function():
            named = {"id": call.id} if call.id else {}
            return _json({**named, part.name: call.name, part.arguments: call.arguments})
        case Fields():
            return "".join(_field(part, *item) for item in call.arguments.items())
        case Keywords():
            items = ((k, value_text(v, part)) for k, v in call.arguments.items())
            separator = ", " if part.equals == "=" else ","
            inner = separator.join(f"{key}{part.equals}{text}" for key, text in items)
            return f"{part.open}{inner}{part.close}"


def _field(part: Fields, key: str, value: Any) -> str:
    text = value if isinstance(value, str) else _json(value)
    told = part.typed[not isinstance(value, str)] if part.typed else ""
    return f"{part.open}{key}{part.middle}{told}{text}{part.close}"


def value_text(value: Any, part: Keywords) -> str:
    """A value where arguments are keywords: Python's, or with the family's own quotes."""
    quote = part.syntax.quote
    if not quote:
        return repr(value)
    if isinstance(value, str):
        return f"{quote}{value}{quote}"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{k}:{value_text(v, part)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(value_text(v, part) for v in value) + "]"
    return _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
