"""Grammars of arguments: by the tool's schema, in the family's way to write them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from elinvar.base.errors import InputError
from elinvar.base.grammar import Choice, Grammar, JsonSchema, Regex, Repeat
from elinvar.base.grammar import Sequence as Row
from elinvar.engine.dialects.schema import Schema, properties, resolved, types
from elinvar.engine.dialects.words import Fields, Keywords

Texts = Callable[[str], tuple[Grammar, ...]]
Items = list[tuple[Grammar, bool]]
"""Each with whether it must be there."""
UntilText = Callable[[str], Grammar]

_KEY = Regex(r"[A-Za-z_][A-Za-z0-9_.-]*")
_DEFINITIONS = "$defs", "definitions"
MAX_KEYWORDS = 100
"""Any may be the first, and each brings those behind it: their grammar grows with the square."""


def arguments_grammar(schema: Schema) -> JsonSchema:
    """The arguments as JSON: an object, whatever else the schema says."""
    return JsonSchema(json.dumps({"type": "object", **schema}, ensure_ascii=False))


def fields_grammar(texts: Texts, until: UntilText, part: Fields, schema: Schema) -> Grammar:
    """Each property at most once, in the schema's order, those that are required always."""
    required = _required(schema)
    row: list[Grammar] = []
    for name, described in properties(schema).items():
        text, value = _field_value(texts, until, part, described, schema)
        told = part.typed[not text] if part.typed else ""
        field = Row((*texts(f"{part.open}{name}{part.middle}{told}"), value))
        row.append(field if name in required else Repeat(field, 0, 1))
    if not properties(schema) and schema.get("additionalProperties", True):
        told = part.typed[0] if part.typed else ""
        key = Row((*texts(part.open), _KEY, *texts(part.middle + told), until(part.close)))
        row.append(Repeat(key))
    return Row(tuple(row))


def _required(schema: Schema) -> frozenset[str]:
    """The properties that must be there."""
    names = schema.get("required", [])
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise InputError(
            "tools", f"required in a tool's schema must be a list of names, got {names!r:.100}."
        )
    return frozenset(names)


def _field_value(
    texts: Texts, until: UntilText, part: Fields, described: Schema, root: Schema
) -> tuple[bool, Grammar]:
    """Whether it is a text; and the value with what closes it."""
    choices = described.get("enum")
    if isinstance(choices, list) and choices and all(isinstance(c, str) for c in choices):
        return True, Choice(tuple(Row(texts(choice + part.close)) for choice in choices))
    kinds = types(described, root)
    if not kinds or "string" in kinds:
        return True, until(part.close)
    return False, Row((_json(described, root), *texts(part.close)))


def keywords_grammar(texts: Texts, until: UntilText, part: Keywords, schema: Schema) -> Grammar:
    """The same as keywords, with commas between those that are there."""
    required = _required(schema)
    if len(properties(schema)) > MAX_KEYWORDS:
        message = f"This model is held to calls of at most {MAX_KEYWORDS} arguments."
        raise InputError("tools", message)
    items: Items = [
        (
            Row((*texts(f"{name}{part.equals}"), _keyword(texts, until, part, described, schema))),
            name in required,
        )
        for name, described in properties(schema).items()
    ]
    if not items and schema.get("additionalProperties", True):
        value = _keyword(texts, until, part, {}, schema)
        items = [(Row((_KEY, *texts(part.equals), value)), False)]
    return Row(
        (
            *texts(part.open),
            *_divided(items, texts(", " if part.equals == "=" else ",")),
            *texts(part.close),
        )
    )


def _divided(items: Items, comma: tuple[Grammar, ...]) -> Iterator[Grammar]:
    """Items in this order, of which those that are not required may be missing."""

    def later(rest: Items) -> list[Grammar]:
        rows = [Row((*comma, item)) for item, _ in rest]
        return [r if must else Repeat(r, 0, 1) for r, (_, must) in zip(rows, rest, strict=True)]

    first = [Row((item, *later(items[i + 1 :]))) for i, (item, _) in enumerate(items)]
    until = next((i for i, (_, must) in enumerate(items) if must), None)
    # Any of those up to the first that is required may come first.
    if until is not None:
        yield Choice(tuple(first[: until + 1]))
    elif first:
        yield Repeat(Choice(tuple(first)), 0, 1)


def _keyword(
    texts: Texts, until: UntilText, part: Keywords, described: Schema, root: Schema
) -> Grammar:
    quote = part.syntax.quote
    kinds = types(described, root)
    choices = described.get("enum")
    if not quote:
        return _json(described, root)
    if isinstance(choices, list) and choices and all(isinstance(c, str) for c in choices):
        return Choice(tuple(Row(texts(f"{quote}{choice}{quote}")) for choice in choices))
    if not kinds or "string" in kinds:
        return Row((*texts(quote), until(quote)))
    return _json(described, root)


def _json(described: Schema, root: Schema) -> JsonSchema:
    """A part of a schema that finds what it refers to."""
    found: dict[str, Any] = dict(described)
    reference = found.get("$ref")
    if isinstance(reference, str) and isinstance(resolved(reference, root), Mapping):
        found = {**resolved(reference, root)}
    found |= {name: root[name] for name in _DEFINITIONS if name in root}
    return JsonSchema(json.dumps(found, ensure_ascii=False))
