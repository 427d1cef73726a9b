"""Whatever a family writes is understood, however it is cut; and nothing else does any harm."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dialects import TOOLS, answers, cut, family_names, read, understood, written
from elinvar.engine.dialects.families import FAMILIES
from elinvar.engine.dialects.words import Channels, Thoughts, markers
from elinvar.engine.pieces import Arguments, Call, Text, Thought

cuts = st.lists(st.integers(0, 10**6), max_size=12)


@pytest.mark.parametrize("name", family_names())
@settings(max_examples=25)
@given(data=st.data(), at=cuts)
def test_what_is_written_is_read_however_it_is_cut(name: str, data: Any, at: list[int]) -> None:
    family = FAMILIES[name]
    thought, text, calls = data.draw(answers(family))
    answer = written(family, thought, text, calls)
    whole = read(family, [answer])
    assert read(family, cut(answer, at)) == whole
    found = understood(whole)
    assert (found.thought.strip(), found.text.strip()) == (thought, text)
    assert found.calls == [(call.name, call.arguments) for call in calls]


@pytest.mark.parametrize("name", family_names())
@settings(max_examples=25)
@given(data=st.data(), at=cuts, in_thought=st.booleans())
def test_garbage_is_given_back(name: str, data: Any, at: list[int], in_thought: bool) -> None:
    family = FAMILIES[name]
    tokens = [*markers(family), "look-up", "now", '{"name": "now"', '"arguments": {', "}", "]"]
    noise = st.sampled_from(
        [*tokens, '"', "'", ",", ":", " ", "\n", "\\", "\\u12", "\\ud800", "-", "9", "é"]
    )
    garbage = "".join(data.draw(st.lists(noise | st.text(max_size=3), max_size=20)))
    whole = read(family, [garbage], in_thought=in_thought)
    assert read(family, cut(garbage, at), in_thought=in_thought) == whole
    json.dumps(whole, ensure_ascii=False).encode()  # it can be sent
    if isinstance(family.calls, Channels) or in_thought:
        return
    dropped = {*family.drops} | ({family.thoughts.open.strip()} if family.thoughts else set())
    if not any(isinstance(piece, Call) for piece in whole) and not any(
        d in garbage for d in dropped
    ):
        assert understood(whole).text == garbage


@pytest.mark.parametrize("name", family_names())
@settings(max_examples=25)
@given(data=st.data(), length=st.integers(0, 10**6))
def test_an_answer_may_end_anywhere(name: str, data: Any, length: int) -> None:
    family = FAMILIES[name]
    answer = written(family, *data.draw(answers(family)))
    begun = answer[: length % (len(answer) + 1)]
    whole, partly = understood(read(family, [answer])), understood(read(family, [begun]))
    assert partly.thought in begun
    assert [name for name, _ in partly.calls] == [n for n, _ in whole.calls][: len(partly.calls)]


@pytest.mark.parametrize("name", family_names())
@settings(max_examples=25)
@given(data=st.data(), length=st.integers(0, 10**6))
def test_what_its_length_ended_shows_no_call_as_text(name: str, data: Any, length: int) -> None:
    """But for what may still become a marker, and where only its name tells that it is a call."""
    family = FAMILIES[name]
    if not isinstance(family.calls, Channels) and ("", "") in family.calls.frames:
        return
    thought, text, calls = data.draw(answers(family))
    answer = written(family, thought, text, calls)
    begun = answer[: length % (len(answer) + 1)]
    whole = understood(read(family, [answer]))
    found = understood(read(family, [begun], cut_off=True))
    possible = [said + end for said in ("", text) for end in ("", *markers(family))]
    shown, *possible = ("".join(one.split()) for one in (found.text, *possible))
    assert any(one.startswith(shown) for one in possible), begun
    assert [n for n, _ in found.calls] == [n for n, _ in whole.calls][: len(found.calls)]


@pytest.mark.parametrize(
    ("name", "begun", "calls"),
    [
        ("hermes", 'Well.\n<tool_call>\n{"na', []),
        ("hermes", 'Well.\n<tool_call>\n{"name": "now", "argu', []),
        ("hermes", 'Well.<tool_call>{"name": "now", "arguments": {"a": [1, "b', [("now", '{"a": [1, "b')]),
        ("harmony", "<|channel|>final<|message|>Well.<|end|><|start|>assistant<|channel|>comm", []),
        ("harmony", "<|channel|>final<|message|>Well.<|end|><|start|>assistant to=functions.now<|chan", []),
        ("llama", 'Well.{"name": "now", "parameters": {"a": 1', []),
    ],
)  # fmt: skip
def test_a_call_that_is_cut_off(name: str, begun: str, calls: list[Any]) -> None:
    """Its arguments so far, or nothing; among other texts it is one."""
    found = understood(read(FAMILIES[name], begun, cut_off=True))
    assert found.text == ("Well." if name != "llama" else begun) and found.calls == calls


@pytest.mark.parametrize("name", family_names())
def test_reading_takes_linear_time(name: str) -> None:
    """Work is counted in calls of Python functions, which no other load changes."""
    import sys

    family = FAMILIES[name]
    hostile = [m for m in markers(family) if len(m) > 1]
    for unit in [*hostile, '{"name": "', '{"a":[', "[[", "\\u", " ", "now(", "<"]:
        calls = []
        for size in (800, 3_200):
            text = (unit * size)[:size]
            counted = 0

            def count(frame: Any, event: str, _: Any) -> None:
                nonlocal counted
                counted += event == "call"

            deltas = cut(text, range(0, size, 7))
            sys.setprofile(count)
            try:
                read(family, deltas)
            finally:
                sys.setprofile(None)
            calls.append(counted)
        assert calls[1] < 6 * calls[0] + 1000, unit


def test_a_megabyte_is_held_once() -> None:
    text = '<tool_call>{"arguments": "' + "x" * 1_000_000
    tracemalloc.start()
    read(FAMILIES["hermes"], cut(text, range(0, len(text), 50)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30_000_000


def test_arguments_stream_while_they_come() -> None:
    for name, opening, step in (
        ("hermes", '<tool_call>{"name": "look-up", "arguments": {"words": "', "ab"),
        ("qwen-xml", "<tool_call><function=look-up><parameter=words>\n", "ab"),
        ("pythonic", "[look-up(words='", "ab"),
        ("gemma4", '<|tool_call>call:look-up{words:<|"|>', "ab"),
        ("harmony", '<|channel|>commentary to=functions.look-up<|message|>{"words": "', "ab"),
    ):
        from elinvar.engine.dialects.reader import AnswerReader
        from elinvar.engine.dialects.schema import functions

        reader = AnswerReader(FAMILIES[name], functions(TOOLS), False, lambda: "i")
        begun = reader.push(opening)
        assert begun[0] == Call(0, "i", "look-up")
        assert reader.push(step) == [Arguments(0, "ab")]


CALL = ("look-up", {"words": 'a "b"', "most": 3})
AS_PUBLISHED = {
    "json": '```json\n{"name": "look-up", "parameters": {"words": "a \\"b\\"", "most": 3}}\n```',
    "hermes": '<tool_call>\n{"name": "look-up", "arguments": {"words": "a \\"b\\"", "most": 3}}\n</tool_call>',
    "qwen-xml": '<tool_call>\n<function=look-up>\n<parameter=words>\na "b"\n</parameter>\n<parameter=most>\n3\n</parameter>\n</function>\n</tool_call>',
    "seed": '<seed:tool_call>\n<function=look-up>\n<parameter=words>a "b"</parameter>\n<parameter=most>3</parameter>\n</function>\n</seed:tool_call>',
    "minimax": '<minimax:tool_call>\n<invoke name="look-up">\n<parameter name="words">a "b"</parameter>\n<parameter name="most">3</parameter>\n</invoke>\n</minimax:tool_call>',
    "glm-4.5": '<tool_call>look-up\n<arg_key>words</arg_key>\n<arg_value>a "b"</arg_value>\n<arg_key>most</arg_key>\n<arg_value>3</arg_value>\n</tool_call>',
    "glm-4": 'look-up\n{"words": "a \\"b\\"", "most": 3}',
    "llama": '<|python_tag|>{"type": "function", "name": "look-up", "parameters": {"words": "a \\"b\\"", "most": 3}}',
    "pythonic": "```tool_code\nlook-up(words='a \"b\"', most=3)\n```",
    "lfm2": "<|tool_call_start|>[look-up(words='a \"b\"', most=3)]<|tool_call_end|>",
    "mistral": '[TOOL_CALLS] [{"name": "look-up", "arguments": {"words": "a \\"b\\"", "most": 3}, "id": "123456789"}]',
    "mistral-args": '[TOOL_CALLS]look-up[CALL_ID]123456789[ARGS]{"words": "a \\"b\\"", "most": 3}',
    "deepseek-v3": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>look-up\n```json\n{"words": "a \\"b\\"", "most": 3}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "deepseek-v3.1": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>look-up<｜tool▁sep｜>{"words": "a \\"b\\"", "most": 3}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "deepseek-v3.2": '<｜DSML｜function_calls>\n<｜DSML｜invoke name="look-up">\n<｜DSML｜parameter name="words" string="true">a "b"</｜DSML｜parameter>\n<｜DSML｜parameter name="most" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
    "kimi": '<|tool_calls_section_begin|><|tool_call_begin|>functions.look-up:0<|tool_call_argument_begin|>{"words": "a \\"b\\"", "most": 3}<|tool_call_end|><|tool_calls_section_end|>',
    "granite": '<|tool_call|>[{"name": "look-up", "arguments": {"words": "a \\"b\\"", "most": 3}}]',
    "phi": '<|tool_call|>{"name": "look-up", "arguments": {"words": "a \\"b\\"", "most": 3}}<|/tool_call|>',
    "command": '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "look-up", "parameters": {"words": "a \\"b\\"", "most": 3}}\n]<|END_ACTION|>',
    "apertus": '<|tools_prefix|>[{"look-up": {"words": "a \\"b\\"", "most": 3}}]<|tools_suffix|>',
    "apriel": '<tool_calls>[{"name": "look-up", "arguments": {"words": "a \\"b\\"", "most": 3}}]</tool_calls>',
    "nemotron": '<TOOLCALL>[{"name": "look-up", "arguments": {"words": "a \\"b\\"", "most": 3}}]</TOOLCALL>',
    "solar": '<|tool_calls|><|tool_call:begin|>123456789<|tool_call:name|>look-up<|tool_call:args|>{"words": "a \\"b\\"", "most": 3}<|tool_call:end|><|calls|>',
    "function-gemma": '<start_function_call>call:look-up{words:<escape>a "b"<escape>,most:3}<end_function_call>',
    "gemma4": '<|tool_call>call:look-up{words:<|"|>a "b"<|"|>,most:3}<tool_call|>',
    "harmony": '<|channel|>commentary to=functions.look-up <|constrain|>json<|message|>{"words": "a \\"b\\"", "most": 3}',
}


@pytest.mark.parametrize("name", family_names())
def test_the_published_way_to_call(name: str) -> None:
    """Written by hand, so that reader and writer do not agree on an error."""
    found = understood(read(FAMILIES[name], AS_PUBLISHED[name]))
    assert found.calls == [CALL] and not found.text
    expected = {"kimi": "functions.look-up:0", "mistral-args": "123456789", "solar": "123456789"}
    assert found.ids == [expected.get(name, "id0")]


@pytest.mark.parametrize("name", family_names())
def test_without_tools_a_call_is_a_text(name: str) -> None:
    found = understood(read(FAMILIES[name], AS_PUBLISHED[name], tools=()))
    assert not found.calls
    assert found.text.endswith(("3}", AS_PUBLISHED[name][-9:]))


@pytest.mark.parametrize("name", [n for n in family_names() if FAMILIES[n].thoughts])
def test_thoughts_that_the_prompt_opened(name: str) -> None:
    family = FAMILIES[name]
    thoughts = family.thoughts
    assert isinstance(thoughts, Thoughts)
    for opened in ("", thoughts.open):
        answer = f"{opened}\nhm, hm\n{thoughts.close}\n\nYes."
        assert read(family, answer, in_thought=True) == [Thought("hm, hm"), Text("Yes.")]
    for end in thoughts.until:
        found = understood(read(family, "hm" + AS_PUBLISHED[name], in_thought=True))
        assert end and found.thought == "hm" and found.calls == [CALL]
    late = f"Write {thoughts.open} and {thoughts.close}."
    if thoughts.close not in family.drops:
        assert read(family, late) == [Text(late)]


def test_thoughts_come_again_after_calls() -> None:
    answer = '<think>a</think><tool_call>{"name": "now"}</tool_call>\n<think>b</think>c'
    assert read(FAMILIES["hermes"], answer) == [
        Thought("a"),
        Call(0, "id0", "now"),
        Arguments(0, "{}"),
        Thought("b"),
        Text("c"),
    ]


def test_harmony_says_whom_each_message_is_for() -> None:
    answer = (
        "<|channel|>analysis<|message|>a <b>\n<|end|><|start|>assistant<|channel|>commentary"
        "<|message|>Let me see.<|end|><|start|>assistant to=functions.now<|channel|>commentary "
        "<|constrain|>json<|message|>{}"
    )
    assert read(FAMILIES["harmony"], answer) == [
        Thought("a <b>\n"),
        Text("Let me see."),
        Call(0, "id0", "now"),
        Arguments(0, "{}"),
    ]
    unprefixed = "<|channel|>commentary to=now<|message|>{}"
    assert understood(read(FAMILIES["harmony"], unprefixed)).calls == [("now", {})]
    assert read(FAMILIES["harmony"], "<|channel|>final<|message|>x\n") == [Text("x\n")]
    assert read(FAMILIES["harmony"], "no head") == [Text("no head")]
    begun = "hm<|end|><|start|>assistant<|channel|>final<|message|>x"
    assert read(FAMILIES["harmony"], begun, in_thought=True) == [Thought("hm"), Text("x")]


@pytest.mark.parametrize(
    ("name", "answer", "arguments"),
    [
        ("hermes", '{"arguments": {"most": 1}, "name": "now"}', {"most": 1}),
        ("hermes", '{"name": "now", "arguments": "{\\"most\\": [1, 2,]}"}', {"most": [1, 2]}),
        (
            "hermes",
            "{'name': 'now', 'arguments': {'a': True, 'b': \"x\ny\"}}",
            {"a": True, "b": "x\ny"},
        ),
        ("hermes", '{"name": "now", "arguments": null}', {}),
        ("hermes", '{"name": "now", "arguments": {"a": "\\d \\u00e9"}}', {"a": "\\d é"}),
        (
            "qwen-xml",
            "<function=now><parameter=a>1</parameter><parameter=b>[1, 'x']</parameter></function>",
            {"a": 1, "b": [1, "x"]},
        ),
        ("qwen-xml", "<function=look-up><parameter=words>1</parameter></function>", {"words": "1"}),
        (
            "qwen-xml",
            "<function=look-up><parameter=most>many</parameter></function>",
            {"most": "many"},
        ),
        ("qwen-xml", "<function=look-up><parameter=most>3.0</parameter></function>", {"most": 3}),
        (
            "qwen-xml",
            "<function=look-up><parameter=deep>True</parameter></function>",
            {"deep": True},
        ),
        (
            "qwen-xml",
            "<function=look-up><parameter=place>{'x': None}</parameter></function>",
            {"place": {"x": None}},
        ),
    ],
)
def test_what_is_nearly_right_is_taken_for_what_it_means(
    name: str, answer: str, arguments: Any
) -> None:
    [(_, found)] = understood(read(FAMILIES[name], f"<tool_call>{answer}</tool_call>")).calls
    assert found == arguments


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("llama", '{"name": "Ada", "parameters": {"born": 1815}}'),
        ("llama", "<|python_tag|>print(1)"),
        ("pythonic", "[1] and [now] are notes."),
        ("json", '```json\n{"a": [1, 2]}\n```\nThat is all.'),
        ("glm-4", "now\nis the time"),
        ("hermes", "<tool_call>now</tool_call>"),
        ("hermes", "Say <tool_call>."),
        ("mistral-args", "[TOOL_CALLS] is a token."),
    ],
)
def test_what_only_looks_like_a_call_is_a_text(name: str, answer: str) -> None:
    assert read(FAMILIES[name], answer) == [Text(answer)]


def test_no_marker_hides_in_another() -> None:
    """The first of several is found alike however a text is cut only where none ends inside another."""
    for family in FAMILIES.values():
        found = {m.strip() for m in markers(family) if len(m.strip()) > 1}
        for one in found:
            for other in found - {one}:
                assert one not in other[:-1] or other.endswith(one) or not other.startswith("<")


def test_deep_nesting_is_a_text_or_ends() -> None:
    deep = '<tool_call>{"name": "now", "arguments": {"a": ' + "[" * 100_000
    found = understood(read(FAMILIES["hermes"], [deep]))
    assert found.calls[0][0] == "now"
    assert json.loads(found.calls[0][1].rstrip("[") + "[" * 0 + "null}") == {"a": None}
