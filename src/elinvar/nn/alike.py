"""Two models that were built alike, part by part: what of one stands where in the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from elinvar.ops.arguments import Experts

Pairs = list[tuple[Any, Any]]


class _UnlikeError(Exception):
    pass


def counterparts(one: object, other: object) -> Pairs | None:
    """Of arrays and of Experts that differ: (one's, the other's), as both are reached the same way. None
    where they are not built of the same parts, or have another number or text somewhere."""
    pairs: Pairs = []
    try:
        _walk(one, other, pairs, set())
    except _UnlikeError:
        return None
    return pairs


def _walk(one: Any, other: Any, pairs: Pairs, seen: set[tuple[int, int]]) -> None:
    both = id(one), id(other)
    if one is other or both in seen:
        return
    seen.add(both)
    if type(one) is not type(other):
        raise _UnlikeError
    if isinstance(one, np.ndarray | Experts):
        pairs.append((one, other))
        return
    if not _has_parts(one):
        if one != other:
            raise _UnlikeError
        return
    mine, theirs = dict(_parts(one)), dict(_parts(other))
    if mine.keys() != theirs.keys():
        raise _UnlikeError
    for name, part in mine.items():
        _walk(part, theirs[name], pairs, seen)


def _has_parts(value: Any) -> bool:
    home = type(value).__module__
    return isinstance(value, Mapping | list | tuple) or home.startswith(
        ("elinvar.nn.", "elinvar.models.")
    )


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, Sequence):
        yield from enumerate(value)
    else:
        yield from getattr(value, "__dict__", {}).items()
        for kind in type(value).__mro__:
            for name in getattr(kind, "__slots__", ()):
                if hasattr(value, name):
                    yield name, getattr(value, name)
