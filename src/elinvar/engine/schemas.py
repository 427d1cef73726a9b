"""JSON Schemas as grammars take them: read, within limits, with the white space that answers may have.

What keywords mean is the library's; here is what would make compiling them slow, or an answer long.
"""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

from elinvar.base.errors import InputError

MAX_DEPTH = 60
"""Of objects and lists in the schema; the library reads 128, a $ref goes on from anywhere."""
MAX_VALUES = 50_000
MAX_PROPERTIES = 1000
"""Of one object; compiling those that may be left out takes time in their square."""
MAX_MULTIPLE = 10_000
"""Digits of multipleOf without the point: as many states tell the remainders apart."""

WHITE_SPACE = r" |\n( {0,40}|\t{0,10})"
"""Between the parts of a value: a space, or a new line with its indentation. Any number of them is
JSON as well, but a model that begins to repeat one would not end."""


def checked_schema(text: str) -> dict[str, Any]:
    """The schema as the library takes it. Raises InputError (`grammar`)."""
    try:
        schema = json.loads(text, parse_constant=_not_json)
    except (ValueError, RecursionError) as error:
        raise _refused(f"The schema is not JSON: {str(error)[:200]}.") from None
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise _refused(f"A schema is an object, got {json.dumps(schema)[:100]}.")
    if "x-guidance" in schema:
        raise _refused("x-guidance is not supported.")
    _check(schema)
    return {**schema, "x-guidance": {"whitespace_pattern": WHITE_SPACE}}


def _check(schema: dict[str, Any]) -> None:
    stack: list[tuple[Any, int]] = [(schema, 1)]
    count = 0
    while stack:
        value, depth = stack.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise _refused(f"A schema is at most {MAX_DEPTH} deep.")
        if count > MAX_VALUES:
            raise _refused(f"A schema has at most {MAX_VALUES} values in it.")
        if isinstance(value, dict):
            _check_numbers(value)
            properties = value.get("properties")
            if isinstance(properties, dict) and len(properties) > MAX_PROPERTIES:
                raise _refused(f"An object has at most {MAX_PROPERTIES} properties.")
            value = list(value.values())
        if isinstance(value, list):
            stack += [(one, depth + 1) for one in value]


def _check_numbers(value: dict[str, Any]) -> None:
    multiple = value.get("multipleOf")
    if isinstance(multiple, int | float) and math.isfinite(multiple):
        digits = int("".join(map(str, Decimal(repr(multiple)).normalize().as_tuple().digits)))
        if digits > MAX_MULTIPLE:
            message = f"multipleOf has at most as many digits as {MAX_MULTIPLE}, got {multiple}."
            raise _refused(message)


def _not_json(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _refused(message: str) -> InputError:
    return InputError("grammar", message)
