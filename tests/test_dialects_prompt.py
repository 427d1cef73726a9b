"""What templates write is what readers read; and what else a dialect says of its model."""

from __future__ import annotations

import json
import re
from itertools import takewhile
from typing import Any

import pytest

from chat_templates import CHATML, HEADERS, INSTRUCTIONS, MACROS, PARTS, TEMPLATES, THINKING
from dialects import read, understood
from elinvar.base.errors import InputError
from elinvar.engine.chat import ChatOptions, ChatTemplate
from elinvar.engine.detokenize import IncrementalDetokenizer
from elinvar.engine.dialects.detect import dialect_of
from elinvar.engine.dialects.dialect import Dialect
from elinvar.engine.dialects.families import FAMILIES

SEE = {
    "type": "function",
    "function": {
        "name": "see",
        "description": "Look.",
        "parameters": {
            "type": "object",
            "properties": {
                "where": {"type": "string", "description": "a place"},
                "days": {"type": "integer", "description": "how many"},
                "exact": {"type": "boolean", "description": "or not"},
                "near": {"type": "object", "description": "a point"},
            },
            "required": ["where"],
        },
    },
}
NOW = {
    "type": "function",
    "function": {
        "name": "now",
        "description": "",
        "parameters": {"type": "object", "properties": {}},
    },
}
ARGUMENTS = {"where": 'Köln "a"\n<b> \\', "days": 3, "exact": True, "near": {"x": [1, None, "c d"]}}

_CALL = "message.tool_calls"
_ASSISTANT = (
    "{%- for message in messages %}{%- if message.role == 'assistant' %}A:"
    "{%- if message.reasoning_content %}THOUGHT{%- endif %}{{ message.content }}CALLSE."
    "{%- elif message.role == 'tool' %}T:{{ message.content }}"
    "{%- else %}U:{{ message.content }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}A:{%- endif %}{%- if tools %}{%- endif %}"
)


def _template(calls: str, thought: str = "") -> str:
    """The least template that writes calls in a family's manner, from its published one."""
    each = f"{{%- for c in {_CALL} or [] %}}{{%- set f = c.function %}}{calls}{{%- endfor %}}"
    return _ASSISTANT.replace("CALLS", each).replace("THOUGHT", thought)


_JSON = "{{ f.arguments | tojson }}"
_NAMED = '{"name": "{{ f.name }}", "arguments": ' + _JSON + "}"
_VALUE = "{{ v if v is string else v | tojson }}"


def _fields(field: str) -> str:
    return (
        f"{{%- for k, v in f.arguments.items() %}}{field.replace('VALUE', _VALUE)}{{%- endfor %}}"
    )


_THOUGHT = "{{ '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}"
MANNERS = {
    "hermes": CHATML,
    "llama": HEADERS,
    "mistral": INSTRUCTIONS,
    "harmony": MACROS,
    "qwen-xml": _template(
        "{{ '\\n<tool_call>\\n<function=' + f.name + '>\\n' }}"
        + _fields("{{ '<parameter=' + k + '>\\n' }}VALUE{{ '\\n</parameter>\\n' }}")
        + "{{ '</function>\\n</tool_call>' }}",
        _THOUGHT,
    ),
    "glm-4.5": _template(
        "{{ '\\n<tool_call>' + f.name }}"
        + _fields("{{ '\\n<arg_key>' + k + '</arg_key>\\n<arg_value>' }}VALUE</arg_value>")
        + "{{ '\\n</tool_call>' }}",
        _THOUGHT,
    ),
    "minimax": _template(
        "{%- if loop.first %}{{ '\\n<minimax:tool_call>' }}{%- endif %}"
        "{{ '\\n<invoke name=\"' + f.name + '\">' }}"
        + _fields("{{ '\\n<parameter name=\"' + k + '\">' }}VALUE</parameter>")
        + "{{ '\\n</invoke>' }}{%- if loop.last %}{{ '\\n</minimax:tool_call>' }}{%- endif %}",
        _THOUGHT,
    ),
    "deepseek-v3": _template(
        "{%- if loop.first %}<｜tool▁calls▁begin｜>{%- endif %}"
        "{{ '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + f.name + '\\n```json\\n' + f.arguments"
        " + '\\n```<｜tool▁call▁end｜>' }}{%- if loop.last %}<｜tool▁calls▁end｜>{%- endif %}",
        _THOUGHT,
    ),
    "deepseek-v3.1": _template(
        "{%- if loop.first %}<｜tool▁calls▁begin｜>{%- endif %}"
        "{{ '<｜tool▁call▁begin｜>' + f.name + '<｜tool▁sep｜>' + f.arguments"
        " + '<｜tool▁call▁end｜>' }}{%- if loop.last %}<｜tool▁calls▁end｜>{%- endif %}",
        _THOUGHT,
    ),
    "kimi": _template(
        "{%- if loop.first %}<|tool_calls_section_begin|>{%- endif %}"
        "<|tool_call_begin|>{{ c.id }}<|tool_call_argument_begin|>" + _JSON + "<|tool_call_end|>"
        "{%- if loop.last %}<|tool_calls_section_end|>{%- endif %}",
        _THOUGHT,
    ),
    "mistral-args": _template(
        "[TOOL_CALLS]{{ f.name }}[CALL_ID]{{ c.id }}[ARGS]" + _JSON,
        "[THINK]{{ message.reasoning_content }}[/THINK]",
    ),
    "granite": _template(
        "{%- if loop.first %}<|tool_call|>[{%- else %}, {%- endif %}"
        + _NAMED
        + "{%- if loop.last %}]{%- endif %}",
        _THOUGHT,
    ),
    "phi": _template("<|tool_call|>" + _NAMED + "<|/tool_call|>"),
    "lfm2": PARTS + "{# <|tool_call_start|> #}",
    "json": PARTS,
}


def _message(arguments: Any, thought: str | None, count: int) -> dict[str, Any]:
    named = [("see", arguments), ("now", {})][:count]
    calls = [
        {"id": f"call_{i}", "type": "function", "function": {"name": n, "arguments": json.dumps(a)}}
        for i, (n, a) in enumerate(named)
    ]
    message: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": calls}
    return message if thought is None else {**message, "reasoning_content": thought}


def _rendered(template: ChatTemplate, dialect: Dialect, said: list[Any], **options: Any) -> str:
    messages, tools = dialect.prompt(said, [SEE, NOW])
    return template.render(messages, ChatOptions(tools=tools, **options))


@pytest.mark.parametrize("name", MANNERS)
def test_what_a_template_writes_is_read(name: str) -> None:
    template = ChatTemplate(MANNERS[name], {"bos_token": "<s>", "eos_token": "</s>"})
    dialect = dialect_of(MANNERS[name], {}, ())
    assert dialect.name == name
    asked = {"role": "user", "content": "Where?"}
    arguments = {**ARGUMENTS, "where": "Köln"} if name == "lfm2" else ARGUMENTS
    for count in (1, 1 if dialect.family.single else 2):
        for thought in (None, "hm"):
            said = [asked, _message(arguments, thought, count)]
            prompt = _rendered(template, dialect, said[:1])
            both = _rendered(template, dialect, said, add_generation_prompt=False)
            same = takewhile(lambda pair: pair[0] == pair[1], zip(prompt, both, strict=False))
            start = sum(1 for _ in same)
            while both[start - 1] in "<|[｜":
                start -= 1  # the prompt goes on as the answer begins
            found = understood(read(dialect.family, both[start:], [SEE, NOW]))
            assert found.calls == [("see", arguments), ("now", {})][:count]
            assert found.thought in (thought or "", "")
    results = [{"role": "tool", "content": "22", "tool_call_id": f"call_{i}"} for i in range(2)]
    two = [asked, _message(arguments, None, 2), *results]
    both = _rendered(template, dialect, two)
    assert both.count("22") >= 2 and "now" in both


def test_prompts_for_templates_that_know_no_tools() -> None:
    dialect = dialect_of(PARTS, {}, ())
    said = [
        {"role": "user", "content": "Hi"},
        _message(ARGUMENTS, None, 2),
        {"role": "tool", "content": "a", "tool_call_id": "call_0"},
        {"role": "tool", "content": [{"type": "text", "text": "b"}], "tool_call_id": "call_1"},
        {"role": "user", "content": "So?"},
    ]
    messages, tools = dialect.prompt(said, [SEE, NOW])
    assert tools is None
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user"]
    assert '"name": "see"' in messages[0]["content"] and "<tool_call>" in messages[0]["content"]
    assert understood(read(dialect.family, messages[2]["content"], [SEE, NOW])).calls == [
        ("see", ARGUMENTS),
        ("now", {}),
    ]
    end = "<tool_response>\na\n</tool_response>\n<tool_response>\nb\n</tool_response>\nSo?"
    assert messages[3]["content"] == end
    # Where there is no system message either, the first one begins with it.
    refusing = PARTS + "{{ raise_exception('System role not supported') }}"
    messages, _ = dialect_of(refusing, {}, ()).prompt(said[:1], [SEE])
    assert [m["role"] for m in messages] == ["user"] and messages[0]["content"].endswith("Hi")


def test_ids_are_those_that_a_template_takes() -> None:
    said = [
        _message({}, None, 2),
        {"role": "tool", "content": "", "tool_call_id": "call_1"},
    ]
    for name, pattern in (
        ("mistral", "[0-9a-f]{9}"),
        ("kimi", r"functions\.now:1"),
        ("hermes", "call_1"),
    ):
        messages, _ = dialect_of("tool_calls 'tool'", {}, (), name=name).prompt(said, None)
        ids = [call["id"] for call in messages[0]["tool_calls"]]
        assert messages[1]["tool_call_id"] == ids[1] != ids[0]
        assert messages[1]["name"] == "now"
        assert re.fullmatch(pattern, ids[1])
    assert said[0]["tool_calls"][0]["id"] == "call_0"


def test_one_call_a_message_keeps_each_before_its_result() -> None:
    results = [{"role": "tool", "content": str(i), "tool_call_id": f"call_{i}"} for i in (1, 0)]
    messages, _ = dialect_of(HEADERS, {}, ()).prompt([_message({}, "hm", 2), *results], None)
    assert [m["role"] for m in messages] == ["assistant", "tool"] * 2
    assert [m["content"] for m in messages[1::2]] == ["0", "1"]


@pytest.mark.parametrize(
    ("calls", "named"),
    [
        ("f", "tool_calls must be a list"),
        ([{"id": "a"}], "tool_calls[0] must have a function"),
        ([{"function": {"name": "f", "arguments": "{"}}], "arguments must be a JSON object"),
        ([{"function": {"name": "f", "arguments": "[]"}}], "arguments must be a JSON object"),
        ([{"function": {"name": "f", "arguments": 3}}], "arguments must be a JSON object"),
    ],
)
def test_calls_that_are_none_are_refused(calls: Any, named: str) -> None:
    with pytest.raises(InputError) as error:
        dialect_of("", {}, ()).prompt([{"role": "assistant", "tool_calls": calls}], None)
    assert named in str(error.value) and error.value.field == "messages"


def test_a_family_is_told_by_template_vocabulary_or_name() -> None:
    told = {name: dialect_of(source, {}, ()).name for name, source in TEMPLATES.items()}
    assert told == {
        "chatml": "hermes",
        "thinking": "hermes",
        "headers": "llama",
        "instructions": "mistral",
        "parts": "json",
        "macros": "harmony",
        "documents": "json",
    }
    assert dialect_of("", {"[TOOL_CALLS]": 5}, ()).name == "mistral"
    assert dialect_of("", {}, (), "gpt-oss").name == "harmony"
    assert dialect_of(CHATML, {}, (), name="kimi").name == "kimi"
    with pytest.raises(InputError, match="dialect must be one of json, hermes"):
        dialect_of(CHATML, {}, (), name="klingon")


def test_a_template_may_think_otherwise_than_its_family() -> None:
    granite = "<|tool_call|> Here is my thought process: and Here is my response:"
    answer = "Here is my thought process: a Here is my response: b"
    found = understood(read(dialect_of(granite, {}, ()).family, answer))
    assert (found.thought, found.text) == ("a", "b")


def test_where_the_prompt_opens_a_thought() -> None:
    dialect = dialect_of(THINKING, {}, ())
    assert dialect.begins_in_thought("...assistant\n<think>\n")
    assert not dialect.begins_in_thought("...assistant\n<think>\n\n</think>\n\n")
    harmony = dialect_of(MACROS, {}, ())
    assert harmony.begins_in_thought("<|start|>assistant<|channel|>analysis<|message|>")
    assert not harmony.begins_in_thought("<|start|>assistant")


class _Tokens:
    """Token i is a letter, those from 200 on are control tokens."""

    names = (
        "<|channel|>",
        "<|message|>",
        "<|end|>",
        "<|call|>",
        "<|other|>",
        "<think>",
        "</think>",
    )
    special_ids = frozenset(range(200, 200 + len(names)))
    ids = {name: 200 + i for i, name in enumerate(names)}  # noqa: RUF012

    def text_bytes(self, ids: Any, hidden: Any = None) -> bytes:
        hidden = self.special_ids if hidden is None else hidden
        shown = [i for i in ids if i not in hidden]
        return b"".join(self.names[i - 200].encode() if i >= 200 else bytes([i]) for i in shown)


def test_control_tokens_have_the_text_that_the_reader_needs_and_no_other() -> None:
    tokens = _Tokens()
    dialect = dialect_of(MACROS, tokens.ids, tokens.special_ids)
    assert dialect.special_text == (200, 201, 202, 203) and dialect.end_ids == (203,)
    detokenizer: Any = IncrementalDetokenizer(tokens, dialect.special_text)  # type: ignore[arg-type]
    text = detokenizer.push([200, *b"final", 201, *b"x", 204, 202])
    assert text == "<|channel|>final<|message|>x<|end|>"
    assert IncrementalDetokenizer(tokens).push([200, 65]) == "A"  # type: ignore[arg-type]
    assert dialect_of(CHATML, tokens.ids, tokens.special_ids).special_text == (205, 206)


def test_a_budget_needs_a_token_that_ends_thoughts() -> None:
    ids = _Tokens.ids
    budget = dialect_of(CHATML, ids, ()).thinking_budget(7, True, lambda text: [ids[text]])
    assert (budget.max_tokens, budget.end, budget.begin, budget.is_open) == (
        7,
        (206,),
        (205,),
        True,
    )
    harmony = dialect_of(MACROS, ids, ()).thinking_budget(7, False, lambda text: [len(text)])
    assert harmony.end == (202,) and not harmony.is_open
    with pytest.raises(InputError, match="max_thinking_tokens"):
        dialect_of(CHATML, {}, ()).thinking_budget(7, False, lambda text: [1])


def test_every_family_is_known_by_its_name() -> None:
    assert all(name == family.name for name, family in FAMILIES.items())
    assert {dialect_of("", {}, (), name=name).name for name in FAMILIES} == {*FAMILIES}
