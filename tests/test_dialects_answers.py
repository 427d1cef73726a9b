"""A model that knows nothing calls tools all the same, where a dialect's grammar and budget hold it."""

from __future__ import annotations

import re

import pytest

from dialects import family_names, read, understood
from elinvar.base.grammar import JsonSchema
from elinvar.base.sampling import SamplingParams
from elinvar.base.thinking import ThinkingBudget
from elinvar.engine.dialects.detect import dialect_of
from engines import answers, tiny_engine

SET = {
    "type": "function",
    "function": {
        "name": "set",
        "parameters": {
            "type": "object",
            "properties": {
                "unit": {"type": "string", "enum": ["°C", "°F"]},
                "degrees": {"type": "integer", "minimum": -99, "maximum": 99},
                "now": {"type": "boolean"},
            },
            "required": ["unit", "degrees", "now"],
            "additionalProperties": False,
        },
    },
}
OFF = {"type": "function", "function": {"name": "off"}}
CLOSE = tuple(b"</think>")
LENGTH = 1000


@pytest.mark.parametrize("name", family_names())
def test_calls_of_a_model_that_knows_nothing(name: str) -> None:
    dialect = dialect_of("", {}, (), name=name)
    grammar = dialect.grammar([SET, OFF], "required", parallel=False, thinking=False)
    params = [SamplingParams(max_tokens=LENGTH, seed=i, grammar=grammar) for i in range(4)]
    whole = 0
    for ids, _, text in answers(tiny_engine(), [[5, 7, i] for i in range(4)], params):
        if len(ids) < LENGTH:
            whole += 1
            [(called, arguments)] = understood(read(dialect.family, text, [SET, OFF])).calls
            assert called in ("set", "off")
            if called == "set":
                assert arguments["unit"] in ("°C", "°F") and arguments["now"] in (True, False)
                assert isinstance(arguments["degrees"], int)
    assert whole


def test_what_is_said_behind_a_thought_that_was_cut() -> None:
    dialect = dialect_of("", {}, (), name="hermes")
    grammar = dialect.saying(JsonSchema('{"type": "boolean"}'), begins_in_thought=True)
    budget = ThinkingBudget(40, end=CLOSE, is_open=True)
    params = SamplingParams(max_tokens=LENGTH, seed=2, grammar=grammar, thinking=budget)
    [(ids, _, text)] = answers(tiny_engine(), [[5, 7]], [params])
    assert bytes(ids[40:48]) == b"</think>"
    found = understood(read(dialect.family, text, in_thought=True))
    assert found.thought and re.fullmatch("true|false", found.text.strip())
