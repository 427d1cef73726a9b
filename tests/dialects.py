"""Answers in the words of every dialect: made, cut anywhere, read, joined."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import count, pairwise
from typing import Any, NamedTuple

from hypothesis import strategies as st

from elinvar.engine.dialects.families import FAMILIES
from elinvar.engine.dialects.reader import AnswerReader
from elinvar.engine.dialects.schema import functions
from elinvar.engine.dialects.words import Channels, Family, markers
from elinvar.engine.dialects.write import Written, write_calls
from elinvar.engine.pieces import Arguments, Call, Piece, Text, Thought

LOOK = {
    "type": "function",
    "function": {
        "name": "look-up",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "words": {"type": "string"},
                "kind": {"type": "string", "enum": ["near", "far"]},
                "most": {"type": "integer"},
                "share": {"type": ["number", "null"]},
                "deep": {"type": "boolean"},
                "tags": {"type": "array", "items": {"type": "string"}},
                "place": {"$ref": "#/$defs/place"},
            },
            "required": ["words"],
            "$defs": {"place": {"type": "object", "properties": {"x": {"type": "number"}}}},
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [LOOK, NOW]


class Understood(NamedTuple):
    """Pieces joined."""

    thought: str
    text: str
    calls: list[tuple[str, Any]]
    """Names and arguments, which are text where they are no JSON."""
    ids: list[str]


def read(
    family: Family,
    deltas: Iterable[str],
    tools: Sequence[Mapping[str, Any]] = TOOLS,
    in_thought: bool = False,
    cut_off: bool = False,
) -> list[Piece]:
    """All pieces; neighbours of one kind are joined."""
    numbers = count()
    reader = AnswerReader(family, functions(tools), in_thought, lambda: f"id{next(numbers)}")
    pieces: list[Piece] = []
    for piece in (p for made in [*map(reader.push, deltas), reader.finish(cut_off)] for p in made):
        last = pieces[-1] if pieces else None
        if isinstance(piece, Call) or type(last) is not type(piece):
            pieces.append(piece)
        else:
            pieces[-1] = last._replace(text=last.text + piece.text)  # type: ignore[union-attr]
    return pieces


def understood(pieces: Iterable[Piece]) -> Understood:
    thought, text, calls, ids = "", "", [], []
    for piece in pieces:
        match piece:
            case Thought():
                thought += piece.text
            case Text():
                text += piece.text
            case Call():
                assert piece.number == len(calls)
                calls.append([piece.name, ""])
                ids.append(piece.id)
            case Arguments():
                assert piece.number == len(calls) - 1
                calls[-1][1] += piece.text
    return Understood(thought, text, [(name, _loaded(raw)) for name, raw in calls], ids)


def _loaded(raw: str) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return raw


def cut(text: str, at: Iterable[int]) -> list[str]:
    edges = [0, *sorted(i % (len(text) + 1) for i in at), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


def written(family: Family, thought: str, text: str, calls: Sequence[Written]) -> str:
    """An answer as the family's template would write it."""
    words, thoughts = family.calls, family.thoughts
    called = write_calls(family, calls) if calls else ""
    if isinstance(words, Channels):
        messages = [
            f"<|channel|>analysis<|message|>{thought}<|end|>" if thought else "",
            f"<|channel|>commentary<|message|>{text}<|end|>" if text else "",
            called,
        ]
        return "<|start|>assistant".join(m for m in messages if m)
    before = f"{thoughts.open}\n{thought}\n{thoughts.close}\n\n" if thoughts and thought else ""
    return f"{before}{text}\n{called}" if called else before + text


plain_texts = st.text("ab é\n<{[(\"'\\|:,=日", max_size=12)
said = plain_texts.map(str.strip)


def answers(family: Family) -> st.SearchStrategy[tuple[str, str, list[Written]]]:
    """Thought, text and calls that the family can write."""
    forbidden = {marker for marker in markers(family) if marker.strip(" \n,;()[]{}:=\"'")}
    safe = plain_texts.filter(lambda text: not any(m in text for m in forbidden))
    if any(quote in markers(family) for quote in ("<escape>", '<|"|>')):
        values: st.SearchStrategy[str] = safe
    else:
        values = st.text(max_size=8).filter(_is_unicode) | safe
    numbers = st.integers(-(10**9), 10**9)
    shares = st.floats(allow_nan=False, allow_infinity=False).map(lambda x: x + 0.0)
    place = st.fixed_dictionaries({}, optional={"x": shares, "y": st.lists(numbers, max_size=2)})
    looks = st.fixed_dictionaries(
        {"words": values},
        optional={
            "kind": st.sampled_from(["near", "far"]),
            "most": numbers,
            "share": st.none() | shares,
            "deep": st.booleans(),
            "tags": st.lists(values, max_size=3),
            "place": place,
        },
    )
    call = looks.map(lambda a: Written("look-up", a)) | st.just(Written("now", {}))
    many = st.lists(call, max_size=3)
    thought = said if family.thoughts or isinstance(family.calls, Channels) else st.just("")
    if isinstance(family.calls, Channels):
        many = st.lists(call, max_size=1)
    elif ("", "") in family.calls.frames:
        if not family.calls.many:
            many = st.lists(call, max_size=1)
        spoken = st.tuples(thought, said.map(lambda s: f"x{s}"), st.just(list[Written]()))
        return spoken | st.tuples(thought, st.just(""), many)
    return st.tuples(thought, said, many)


def _is_unicode(text: str) -> bool:
    return text.isprintable() and "<" not in text


def family_names() -> list[str]:
    return list(FAMILIES)
