"""What a tool's schema says of its arguments, for families that write them as texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from elinvar.base.errors import InputError
from elinvar.engine.dialects.values import whole

Schema = Mapping[str, Any]
_NOTHING: Schema = {"type": "object", "properties": {}, "additionalProperties": False}
_WORDS = {"true": "true", "false": "false", "none": "null", "null": "null"}


def functions(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Tools by name, from OpenAI's two ways to write them. Raises InputError for what has no name."""
    found = {}
    for i, tool in enumerate(tools):
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise InputError("tools", f"tools[{i}] must have a function with a name.")
        found[name] = function
    return found


def parameters(function: Mapping[str, Any]) -> Schema:
    """The schema of its arguments; a function that says nothing takes none."""
    schema = function.get("parameters")
    return schema if isinstance(schema, Mapping) else _NOTHING


def properties(schema: Schema) -> Mapping[str, Schema]:
    """The properties that are described."""
    found = schema.get("properties")
    if not isinstance(found, Mapping):
        return {}
    return {k: v if isinstance(v, Mapping) else {} for k, v in found.items()}


def types(schema: Schema, root: Schema, depth: int = 4) -> set[str]:
    """JSON types that a value may have; empty: nothing is said of it."""
    reference = schema.get("$ref")
    if isinstance(reference, str) and depth:
        return types(resolved(reference, root), root, depth - 1)
    kind = schema.get("type")
    if isinstance(kind, str):
        return {kind}
    if isinstance(kind, Sequence):
        return {k for k in kind if isinstance(k, str)}
    chosen = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(chosen, list):
        return {_type(v) for v in chosen}
    for word in ("anyOf", "oneOf"):
        branches = schema.get(word)
        if isinstance(branches, list) and depth:
            found = [types(b, root, depth - 1) for b in branches if isinstance(b, Mapping)]
            return set().union(*found) if all(found) else set()
    return set()


def resolved(reference: str, root: Schema) -> Schema:
    """What `#/...` stands for; nothing where it leads nowhere."""
    found: Any = root
    for step in reference.removeprefix("#").strip("/").split("/"):
        found = found.get(step) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def is_text(kinds: set[str]) -> bool:
    """Whether a value can be nothing but a text, or null, and so is one as soon as it begins."""
    return "string" in kinds and kinds <= {"string"}


def as_json(text: str, kinds: set[str]) -> str:
    """The JSON of a value that was written as text: what the schema allows, else a text."""
    plain = text.strip()
    plain = _WORDS.get(plain.lower(), plain)
    try:
        value = json.loads(plain, parse_constant=_refuse)
    except (ValueError, RecursionError):
        # Templates that know no better write objects as Python does.
        found = whole(plain) if plain[:1] in ("{", "[") and kinds != {"string"} else ""
        return found or json.dumps(text, ensure_ascii=False)
    kind = _type(value)
    if kind == "number" and "integer" in kinds and value.is_integer():
        return str(int(value))
    # Quotes are a part of it where nobody says that they are not.
    fits = kind in kinds or (kind == "integer" and "number" in kinds) if kinds else kind != "string"
    if fits or (kinds and "string" not in kinds):
        return plain
    return json.dumps(text, ensure_ascii=False)


def _refuse(constant: str) -> float:
    raise ValueError(constant)


def _type(value: Any) -> str:
    if value is None:
        return "null"
    for kind, name in ((bool, "boolean"), (str, "string"), (int, "integer"), (float, "number")):
        if isinstance(value, kind):
            return name
    return "array" if isinstance(value, list) else "object"
