"""What a dialect's grammar permits is read as the calls that were asked for, with arguments that fit."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dialects import LOOK, NOW, TOOLS, family_names, plain_texts, read, understood
from elinvar.base import grammar as g
from elinvar.base.errors import InputError
from elinvar.engine.dialects.detect import dialect_of
from elinvar.engine.dialects.dialect import Dialect
from elinvar.engine.dialects.families import FAMILIES
from elinvar.engine.dialects.grammar import without
from elinvar.engine.dialects.schema import resolved
from elinvar.engine.dialects.words import Channels, markers

LOOSE = {"type": "function", "function": {"name": "loose", "parameters": {"type": "object"}}}


def dialect(name: str) -> Dialect:
    """With a vocabulary in which markers are control tokens, or not."""
    found = sorted(markers(FAMILIES[name]))
    names = {m.strip() for m in found if m.strip().startswith("<|") and " " not in m.strip()}
    tokens = {token: i for i, token in enumerate(sorted(names))}
    return dialect_of("", tokens, set(tokens.values()), name=name)


def values(schema: dict[str, Any], root: dict[str, Any]) -> st.SearchStrategy[Any]:
    if "$ref" in schema:
        return values(dict(resolved(schema["$ref"], root)), root)
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kinds = schema.get("type", "string")
    if isinstance(kinds, list):
        return st.one_of([values({**schema, "type": kind}, root) for kind in kinds])
    if kinds == "array":
        return st.lists(values(schema["items"], root), max_size=2)
    if kinds == "object":
        own = {k: values(v, root) for k, v in schema.get("properties", {}).items()}
        needed = {k: own.pop(k) for k in schema.get("required", ())}
        return st.fixed_dictionaries(needed, optional=own)
    simple = {
        "string": plain_texts,
        "integer": st.integers(-99, 99),
        "number": st.floats(-9, 9),
        "boolean": st.booleans(),
        "null": st.none(),
    }
    return simple[kinds]


def texts(grammar: g.Grammar) -> st.SearchStrategy[str]:
    """Texts that a grammar permits; no marker comes of itself."""
    match grammar:
        case g.Literal(text):
            return st.just(text)
        case g.Special(token):
            return st.just(token)
        case g.Until(stop):
            end = stop.text if isinstance(stop, g.Literal) else stop.token
            return plain_texts.filter(lambda text: end not in text + end[:-1]).map(
                lambda t: t + end
            )
        case g.Anything():
            return plain_texts
        case g.Regex(pattern):
            return st.from_regex(pattern, fullmatch=True, alphabet=st.sampled_from('aB1_:<"> \n'))
        case g.JsonSchema(schema):
            root = json.loads(schema)
            return values(root, root).map(json.dumps)
        case g.Sequence(parts):
            return st.tuples(*map(texts, parts)).map("".join)
        case g.Choice(parts):
            return st.one_of([texts(part) for part in parts])
        case g.Repeat(part, least, most):
            most = least + 2 if most is None else most
            return st.lists(texts(part), min_size=least, max_size=most).map("".join)
    raise AssertionError(grammar)


def fits(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    if "$ref" in schema:
        return fits(value, dict(resolved(schema["$ref"], root)), root)
    if "enum" in schema:
        return value in schema["enum"]
    kinds = schema.get("type", ["string"])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    by_kind = {
        "string": isinstance(value, str),
        "integer": isinstance(value, int),
        "number": isinstance(value, int | float),
        "boolean": isinstance(value, bool),
        "null": value is None,
        "array": isinstance(value, list) and all(fits(v, schema["items"], root) for v in value),
        "object": isinstance(value, dict)
        and all(k in value for k in schema.get("required", ()))
        and all(
            fits(value[k], p, root) for k, p in schema.get("properties", {}).items() if k in value
        ),
    }
    return any(by_kind[kind] for kind in kinds)


@pytest.mark.parametrize("name", family_names())
@settings(max_examples=8)
@given(data=st.data())
def test_what_is_permitted_is_a_call(name: str, data: Any) -> None:
    family = FAMILIES[name]
    choice = data.draw(st.sampled_from(["required", "look-up", "now"]))
    parallel, thinking, begun = (data.draw(st.booleans()) for _ in range(3))
    grammar = dialect(name).grammar(TOOLS, choice, parallel, thinking, begun)
    assert grammar is not None
    answer = data.draw(texts(grammar))
    found = understood(read(family, answer, in_thought=begun))
    assert found.calls and not found.text
    assert parallel or len(found.calls) == 1
    for called, arguments in found.calls:
        assert choice in ("required", called)
        schema = LOOK["function"]["parameters"] if called == "look-up" else {"type": "object"}
        assert fits(arguments, schema, schema), arguments


@pytest.mark.parametrize("name", family_names())
@settings(max_examples=8)
@given(data=st.data())
def test_strict_tools_leave_all_else_free(name: str, data: Any) -> None:
    assert dialect(name).grammar([NOW, LOOSE], "auto") is None
    grammar = dialect(name).grammar([LOOK, NOW, LOOSE], "auto", thinking=False)
    if name == "glm-4":
        assert grammar is None  # any text may begin as a call does
        return
    assert grammar is not None
    found = understood(read(FAMILIES[name], data.draw(texts(grammar)), [LOOK, NOW, LOOSE]))
    for called, arguments in found.calls:
        schema = LOOK["function"]["parameters"] if called == "look-up" else {"type": "object"}
        assert fits(arguments, schema, schema), arguments


@pytest.mark.parametrize("name", family_names())
@settings(max_examples=8)
@given(data=st.data())
def test_what_is_said_keeps_to_a_grammar_and_thoughts_do_not(name: str, data: Any) -> None:
    thinking, begun = data.draw(st.booleans()), data.draw(st.booleans())
    grammar = dialect(name).saying(g.JsonSchema('{"type": "integer"}'), thinking, begun)
    answer = data.draw(texts(grammar))
    found = understood(read(FAMILIES[name], answer, tools=(), in_thought=begun))
    assert isinstance(json.loads(found.text), int)
    assert thinking or begun or not found.thought


@pytest.mark.parametrize("name", family_names())
def test_choices_that_are_none_are_refused(name: str) -> None:
    for tools, choice in ((TOOLS, "other"), ((), "required")):
        with pytest.raises(InputError, match="tool_choice"):
            dialect(name).grammar(tools, choice)


@given(st.text("<tool_cal>x", max_size=24))
def test_texts_without_the_trigger(text: str) -> None:
    for family in FAMILIES.values():
        if not isinstance(family.calls, Channels) and (trigger := family.calls.frames[0][0]):
            assert trigger.count(trigger[0]) == 1
    free = re.fullmatch(without("<tool_call>"), text) is not None
    assert free == ("<tool_call>" not in text)


@pytest.mark.parametrize("name", ["pythonic", "qwen-xml"])
@pytest.mark.parametrize("required", [None, 5, [["a"]], {"a": 1}])
def test_required_that_is_no_list_of_names_is_refused(name: str, required: Any) -> None:
    tool = {"name": "f", "parameters": {"properties": {"a": {}}, "required": required}}
    with pytest.raises(InputError, match="list of names") as caught:
        dialect(name).grammar([tool], "required")
    assert caught.value.field == "tools"


def test_more_keywords_than_a_grammar_can_have_are_refused_before_it_is_made() -> None:
    many = {f"p{i}": {"type": "string"} for i in range(100_000)}
    tool = {"name": "f", "parameters": {"properties": many}}
    with pytest.raises(InputError, match="at most 100 arguments") as caught:
        dialect("pythonic").grammar([tool], "required")
    assert caught.value.field == "tools"
