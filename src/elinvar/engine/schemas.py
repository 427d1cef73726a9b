"""JSON Schemas as grammars take them: read, within limits, with the white space that answers may have.

What keywords mean is the library's; here is what would make compiling them slow, or an answer long.
"""

from __future__ import annotations

import json
import math
import re
from decimal import Decimal
from typing import Any

from elinvar.base.errors import InputError

MAX_DEPTH = 60
"""Of objects and lists in the schema; the library reads 128, a $ref goes on from anywhere."""
MAX_VALUES = 50_000
MAX_PROPERTIES = 1000
"""Of one object; compiling those that may be left out takes time in their square."""
MAX_MULTIPLE = 1_000
"""The least common multiple of all multipleOf, whose digits are taken without the point: as many states
tell the remainders apart where they meet."""

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
    _check(schema)
    return {**schema, "x-guidance": {"whitespace_pattern": WHITE_SPACE}}


def check_inline(source: str) -> None:
    """The schemas in a Lark source: `%json {...}`. Raises InputError (`grammar`)."""
    for match in re.finditer(r"%json\b\s*", source):
        try:
            schema, _ = json.JSONDecoder(parse_constant=_not_json).raw_decode(source, match.end())
        except (ValueError, RecursionError):
            raise _refused("In a Lark source, the schema follows %json at once.") from None
        _check(schema)


def _check(schema: Any) -> None:
    if not isinstance(schema, dict):
        raise _refused(f"A schema is an object, got {json.dumps(schema)[:100]}.")
    if "x-guidance" in schema:
        raise _refused("x-guidance is not supported.")
    stack: list[tuple[Any, int]] = [(schema, 1)]
    count, multiple = 0, 1
    while stack:
        value, depth = stack.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise _refused(f"A schema is at most {MAX_DEPTH} deep.")
        if count > MAX_VALUES:
            raise _refused(f"A schema has at most {MAX_VALUES} values in it.")
        if isinstance(value, dict):
            multiple = math.lcm(multiple, _digits(value.get("multipleOf")))
            properties = value.get("properties")
            if isinstance(properties, dict) and len(properties) > MAX_PROPERTIES:
                raise _refused(f"An object has at most {MAX_PROPERTIES} properties.")
            value = list(value.values())
        if isinstance(value, list):
            stack += [(one, depth + 1) for one in value]
        if multiple > MAX_MULTIPLE:
            message = f"multipleOf of all numbers have a common multiple of at most {MAX_MULTIPLE}."
            raise _refused(message)


def _digits(multiple: Any) -> int:
    if not isinstance(multiple, int | float) or not multiple or not math.isfinite(multiple):
        return 1
    # Only a fraction's zeros go with the point: 1e9 has as many remainders as 999999999.
    _, digits, exponent = Decimal(str(abs(multiple))).normalize().as_tuple()
    return int("".join(map(str, digits))) * 10 ** max(0, int(exponent))


def _not_json(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _refused(message: str) -> InputError:
    return InputError("grammar", message)
