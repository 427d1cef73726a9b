"""How much a chat template may make: the sizes of values before they are made, and the count.

A result no longer than its arguments together (`+`, `~`) is measured when it is made; what
multiplies (`*`, padding, replacing, joining, formatting) is foreseen and refused before it is done.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2.exceptions import SecurityError

MAX_STEPS = 300_000
"""Rounds of loops, calls of macros and pages of text in one rendering; a long conversation takes
thousands."""
_PAGE = 4096
"""Characters or items that count as one step."""
_MAX_SIZE = 1 << 24
"""Characters or items of one value, and bits of a number."""
_ITEM = 64
"""Characters that an empty list, or a digit of a power of ten, is worth."""
_SEQUENCES = re.findall(
    r"\w+",
    "attr count d default dictsort first groupby items last length list map max min random reject"
    " rejectattr reverse select selectattr sort unique",
)
"""Filters that make no text of what they are given."""
_PERCENT = re.compile(r"[%)][-+ #0]*(\d+|\*)?(?:\.(\d+|\*))?[hlL]*[diouxXeEfFgGcrsa%]")
"""Width and precision of a conversion by `%`."""

_steps: ContextVar[list[float]] = ContextVar("steps")


@contextmanager
def counting() -> Iterator[None]:
    """One rendering."""
    token = _steps.set([0.0])
    try:
        yield
    finally:
        _steps.reset(token)


def step(text: int = 0) -> None:
    """Counts one step that writes so many characters."""
    _count(1 + text / _PAGE)


def made(value: Any) -> Any:
    """Measures and counts what was made."""
    size = value.bit_length() if isinstance(value, int) else 0
    if isinstance(value, str | list | tuple | dict):
        size = len(value)
    allow(size)
    _count(size / _PAGE)
    return value


def _count(steps: float) -> None:
    count = _steps.get()
    count[0] += steps
    if count[0] > MAX_STEPS:
        raise SecurityError(f"it takes more than {MAX_STEPS} steps")


def allow(size: int) -> None:
    """Refuses what would be that large."""
    if size > _MAX_SIZE:
        raise SecurityError("it makes something huge")


def weight(value: Any) -> int:
    """About how many characters a value is as text, which is not made for it."""
    return len(value) if isinstance(value, str) else _weight(value, {})


def _weight(value: Any, known: dict[int, int]) -> int:
    # Each list is visited once, however often it is in others.
    if isinstance(value, str):
        return len(value)
    if isinstance(value, int):
        return 1 + value.bit_length() // 3
    if not isinstance(value, Collection) or isinstance(value, range):
        return 1
    if id(value) not in known:
        parts = [*value, *value.values()] if isinstance(value, Mapping) else [*value]
        known[id(value)] = 2 + sum(_weight(part, known) for part in parts)
    return known[id(value)]


def widths(form: str) -> int:
    """The most that the numbers in the format of one field can mean."""
    found = re.findall(r"\d+", form)
    return sum(int(text) if len(text) < 100 else _MAX_SIZE + 1 for text in found)


def _largest(values: Any) -> int:
    # A negative width of `%*d` pads on the other side.
    return max((abs(value) for value in values if isinstance(value, int)), default=0)


def allow_operator(operator: str, left: Any, right: Any) -> None:
    """Before `left operator right`."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else 0
        bits += left.bit_length() + right.bit_length() if operator == "*" else 0
        if bits > _MAX_SIZE:
            raise SecurityError("it makes a huge number")
    elif operator == "*":
        for sized, times in ((left, right), (right, left)):
            if isinstance(sized, str | list | tuple) and isinstance(times, int):
                allow(len(sized) * times)
    elif operator == "%" and isinstance(left, str):
        _allow_percent(left, right)


def _allow_percent(form: str, values: Any) -> None:
    found = [text for pair in _PERCENT.findall(form) for text in pair if text]
    star = _largest(values) if isinstance(values, tuple) else 0
    # By name, each value can be written many times.
    times = form.count("%") if isinstance(values, Mapping) else 1
    total = sum(star if text == "*" else widths(text) for text in found)
    allow(len(form) + total + times * weight(values))


def allow_filter(name: str, value: Any, args: Sequence[Any], named: Mapping[str, Any]) -> None:
    """Before `value | name(args)`."""
    given = (*args, *named.values())
    if name not in _SEQUENCES:
        allow(weight((value, *given)))
    if name == "format":
        _allow_percent(str(value), named or tuple(args))
    elif name in ("batch", "slice", "round", "tojson"):
        allow(_ITEM * _largest(given))
    elif name == "join" and isinstance(value, Collection):
        allow(weight(value) + len(value) * max(map(weight, given), default=0))
    elif name in ("center", "indent", "replace", "wordwrap"):
        allow_method(name, str(value), args, named)


def allow_method(name: str, text: str, args: Sequence[Any], named: Mapping[str, Any]) -> None:
    """Before `text.name(args)`, or the filter of that name."""
    given = (*args, *named.values())
    if name in ("center", "ljust", "rjust", "zfill"):
        allow(_largest(given))
    elif name == "expandtabs":
        allow(len(text) + text.count("\t") * max(_largest(given), 8))
    elif name == "indent":
        width = max(4, _largest(given), *map(weight, given))
        allow(len(text) + len(text.splitlines()) * width)
    elif name == "wordwrap":
        allow(len(text) * max((len(a) for a in given if isinstance(a, str)), default=1))
    elif name == "join" and args and isinstance(args[0], Collection):
        allow(weight(args[0]) + len(args[0]) * len(text))
    elif name == "replace":
        old, new, *_ = (*args, *(named[k] for k in ("old", "new") if k in named), "", "")
        allow(len(text) + text.count(str(old)) * len(str(new)))
