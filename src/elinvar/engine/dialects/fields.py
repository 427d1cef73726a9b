"""Arguments that are written one by one as texts, to a JSON object while they come."""

from __future__ import annotations

import json

from elinvar.engine.dialects.schema import Schema, as_json, is_text, properties, types
from elinvar.engine.dialects.source import Reading, Source
from elinvar.engine.dialects.values import Put, escaped
from elinvar.engine.dialects.words import Fields


def fields(source: Source, put: Put, part: Fields, schema: Schema) -> Reading[None]:
    """Reads them all and puts one object. Texts, which the schema tells from other values, are put while
    they come."""
    known = properties(schema)
    opener, closer = part.open.strip(), part.close.strip()
    # A line end beside a value is the template's, not the value's.
    ends = (closer,) if part.close == closer else (part.close, closer)
    put("{")
    separator = ""
    while True:
        yield from source.space()
        if not (yield from source.accept(opener)):
            break
        key = yield from source.before(part.middle)
        kinds = types(known.get(key, {}), schema)
        if part.typed:
            told = yield from source.starts(*part.typed)
            source.take(len(told))
            kinds = {"string"} if told == part.typed[0] else kinds - {"string"}
        if part.middle.endswith("\n"):
            yield from source.accept("\n")
        put(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
        separator = ", "
        yield from _value(source, put, kinds, ends)
    put("}")


def _value(source: Source, put: Put, kinds: set[str], ends: tuple[str, ...]) -> Reading[None]:
    if is_text(kinds):
        put('"')
        found = yield from source.until(ends, lambda text: put(escaped(text)))
    else:
        parts: list[str] = []
        found = yield from source.until(ends, parts.append)
        put(as_json("".join(parts), kinds) if found else "".join(parts))
    if not found:
        source.fail()
    source.take(len(found))
    if is_text(kinds):
        put('"')
