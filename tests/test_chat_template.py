"""Rendering equals Hugging Face's, and what a template refuses is a bad request, not a crash."""

from __future__ import annotations

import functools
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from chat_templates import CLOCK, CONVERSATIONS, TEMPLATES, WEATHER
from elinvar.base.errors import InputError, ModelError
from elinvar.engine.chat import ChatOptions, ChatTemplate
from elinvar.engine.sandbox import Program
from elinvar.engine.tokenizer import load_tokenizer
from elinvar.weights.checkpoint import open_checkpoint

USER = {"role": "user", "content": "What is <b>1 & 1</b>?"}
ANSWER = {"role": "assistant", "content": "2\n\n"}
SYSTEM = {"role": "system", "content": "Be brief. é"}

ALTERNATING = """{{ bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant!') }}
    {%- endif %}
{%- endfor %}"""


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.fixture(scope="module")
def reference() -> Any:
    """transformers' rendering; which tokenizer it belongs to matters for two tokens alone."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import WordLevel

    backend = Backend(WordLevel({"<s>": 0, "</s>": 1}, "<s>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    )


OPTIONS: list[ChatOptions] = [
    ChatOptions(),
    ChatOptions(add_generation_prompt=False),
    ChatOptions(continue_final_message=True),
    ChatOptions(tools=[WEATHER, CLOCK]),
    ChatOptions(tools=[]),
    ChatOptions(documents=[{"title": "T", "text": "é & <b>"}, {"text": "{{ x }}"}]),
    ChatOptions(variables={"enable_thinking": False}),
    ChatOptions(variables={"enable_thinking": True}),
    ChatOptions(variables={"thinking": True}),
    ChatOptions(variables={"reasoning_effort": "high"}),
    ChatOptions(tools=[CLOCK], variables={"tools_in_user_message": False, "date_string": "now"}),
]


def by_transformers(reference: Any, source: str, messages: Any, options: ChatOptions) -> str | None:
    """None where transformers, or the template, refuses."""
    generate = options.add_generation_prompt and not options.continue_final_message
    try:
        return str(
            reference.apply_chat_template(
                messages,
                tools=options.tools,
                documents=options.documents,
                chat_template=source,
                tokenize=False,
                add_generation_prompt=generate,
                continue_final_message=options.continue_final_message,
                **options.variables,
            )
        ).replace("CONTINUE_FINAL_MESSAGE_TAG", "")
    except Exception:
        return None


def by_us(own: ChatTemplate, messages: Any, options: ChatOptions) -> str | None:
    try:
        return own.render(messages, options)
    except InputError:
        return None


def asked_for(source: str, options: ChatOptions) -> bool:
    """Whether the template takes what the options give: we refuse what it would not look at."""
    names = set(options.variables)
    names |= {name for name in ("tools", "documents") if getattr(options, name)}
    return names <= Program(source).variables


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_conversation_equals_transformers(reference: Any, name: str) -> None:
    source = TEMPLATES[name]
    own = template(source)
    through_parts = name in ("parts", "macros")
    rendered = 0
    for options in OPTIONS:
        if not asked_for(source, options):
            continue
        for messages in CONVERSATIONS:
            # Where a template takes only texts, we join the parts, and transformers does not.
            if any(isinstance(m["content"], list) for m in messages) and not through_parts:
                continue
            text = by_us(own, messages, options)
            assert text == by_transformers(reference, source, messages, options), messages
            rendered += text is not None
    assert rendered > 20


def test_real_templates_equal_transformers(reference: Any) -> None:
    """Those that transformers carries; neither is copied here."""
    llama4 = pytest.importorskip("transformers.models.llama4.processing_llama4").chat_template
    smolvlm = pytest.importorskip("transformers.models.smolvlm.processing_smolvlm")
    for source, count in ((llama4, 40), (smolvlm.DEFAULT_CHAT_TEMPLATE, 4)):
        own, rendered = template(source), 0
        for options in filter(functools.partial(asked_for, source), OPTIONS):
            for messages in CONVERSATIONS:
                text = by_us(own, messages, options)
                assert text == by_transformers(reference, source, messages, options), messages
                rendered += text is not None
        assert rendered >= count


@pytest.mark.parametrize(
    "expression",
    [
        "'%5d|%-8s|%%|%.2f %s' % (3, 'a', 1.5, none)",
        "'%(a)s %(a)r' % {'a': [1]}",
        "'20241231 **%s** (x) *%s*' | format('a', 2)",
        "'{:>9}|{a!r:<{w}}|{0[0]}'.format('ab', a=1.5, w=6) ~ '{x}'.format_map({'x': 1})",
        "('{} & {}' | safe).format('<', 1) ~ ('a%s' | safe) % '<'",
        "'a\\tb'.expandtabs() ~ 'a'.center(5) ~ '7'.zfill(3) ~ 'x'.ljust(3, '.')",
        "'aXbXc'.replace('X', '--', 1) ~ ('aXb' | replace('X', 1)) ~ 'a'.replace('', '-')",
        "','.join(messages | map(attribute='role')) ~ (messages | join('; ', attribute='role'))",
        "messages | map(attribute='role') | reverse | join(d=1)",
        "'a\\nb' | indent ~ ('a\\nb' | indent('> ', first=true)) ~ ('a' | center(7))",
        "'some words to wrap' | wordwrap(6, wrapstring='\\n  ')",
        "[1, 2, 3] | batch(2, 0) | list ~ ([1, 2, 3] | slice(2) | list) ~ [[1], [2]] | sum(start=[])",
        "([1] + [2]) ~ none ~ true ~ undefined_name ~ 3 * 'a' ~ 2 ** 10 ~ 7 % 4 ~ (1.5 + 2)",
        "messages | tojson(indent=2) ~ ({'b': 1, 'a': 'é'} | tojson(sort_keys=true))",
    ],
)
def test_what_is_measured_stays_what_it_is(reference: Any, expression: str) -> None:
    source = "{{ " + expression + " }}{{ messages | length }}"
    expected = by_transformers(reference, source, [USER, ANSWER], ChatOptions())
    assert expected is not None
    assert template(source).render([USER, ANSWER]) == expected


def test_smollm2_equals_transformers(smollm2_gguf: Path, reference: Any) -> None:
    tokenizer = load_tokenizer(open_checkpoint(smollm2_gguf))
    own = tokenizer.chat_template
    assert own is not None
    for messages in CONVERSATIONS[:4]:
        for generate in (True, False):
            options = ChatOptions(add_generation_prompt=generate)
            text = own.render(messages, options)
            assert text == by_transformers(reference, own.source, messages, options)
            ids = tokenizer.encode_chat(text)
            assert tokenizer.decode(ids, skip_special=False) == text
            assert ids[0] == tokenizer.encode("<|im_start|>")[0] == 1


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    rendered = template("{{ messages[0].content }}").render([{"role": "user", "content": parts}])
    assert rendered == "ab"


def test_a_tool_call_may_have_no_content() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert template("{{ messages[0].tool_calls[0].name }}").render([call]) == "f"


def test_today() -> None:
    assert template("{{ strftime_now('%Y') }}").render([USER]) == str(datetime.now().year)


BAD_MESSAGES: list[Any] = [
    [],
    "hello",
    None,
    ["hello"],
    [{"content": "x"}],
    [{"role": 3, "content": "x"}],
    [{"role": "user"}],
    [{"role": "user", "content": 3}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": ["x"]}],
]


@pytest.mark.parametrize("messages", BAD_MESSAGES)
def test_malformed_messages_are_named(messages: Any) -> None:
    with pytest.raises(InputError, match="messages") as caught:
        template("{{ messages }}").render(messages)
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (ALTERNATING, "Roles must alternate"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{{ messages[5].content }}", "no element 5"),
        ("{{ 1 // 0 }}", "division"),
    ],
)
def test_what_a_template_refuses_is_a_bad_request(source: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        template(source).render([ANSWER])
    assert caught.value.field == "messages"


HARMFUL = [
    ("{% import 'os' as os %}{{ os.listdir('/') }}", "imports"),
    ("{% from 'os' import system %}", "imports"),
    ("{% include '/etc/passwd' %}", "imports"),
    ("{% extends 'base' %}", "imports"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    ("{{ ''['__class__']['__mro__'] }}", "unsafe"),
    ("{{ ('' | attr('__class__')).__mro__ }}", "unsafe"),
    ("{{ raise_exception.__globals__['__builtins__'] }}", "unsafe"),
    ("{{ strftime_now.__globals__.os.system('id') }}", "unsafe"),
    ("{{ namespace.__init__.__globals__ }}", "unsafe"),
    ("{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}", "unsafe"),
    ("{{ messages.append(1) }}", "unsafe"),
    ("{{ messages[0].update(role='x') }}", "unsafe"),
    ("{{ self.__init__.__globals__ }}", "unsafe"),
    ("{% set ns = namespace(__class__=1) %}", "__class__"),
    ("{% set ns = namespace() %}{% set ns.__dict__ = 1 %}", "__dict__"),
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "steps"),
    ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "nested"),
    (
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(99) }}",
        "steps",
    ),
    ("{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}", "nested|steps"),
    ("{{ 'a' * 10 ** 12 }}", "huge"),
    ("{{ 10 ** 12 * [1] }}", "huge"),
    ("{{ 9 ** (9 ** 9) }}", "huge"),
    ("{{ 'a' | center(10 ** 15) }}", "huge"),
    ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "nested"),
]

DOUBLE = (
    "{%% set ns = namespace(x=%s) %%}{%% for i in range(99) %%}{%% set ns.x = %s %%}{%% endfor %%}"
)
HUGE = [
    *(
        "{{ " + expression + " }}"
        for expression in (
            "'%2000000000d' % 1",
            "'%(a())2000000000d' % {'a()': 1}",
            "'%.*f' % (2000000000, 1.0)",
            "'%*d' % (-2000000000, 1)",
            "'%2000000000d' | format(1)",
            "'%(a)s' * 10000 % {'a': 'a' * 10000}",
            "'a' | center(2000000000)",
            "'a' | center(width=2000000000)",
            "'a' | indent(2000000000, true)",
            "('a\\n' * 10000) | indent('a' * 10000)",
            "('a ' * 10000) | wordwrap(1, wrapstring='a' * 10000)",
            "'a'.ljust(10 ** 10)",
            "'a'.rjust(10 ** 10)",
            "'a'.center(10 ** 10)",
            "'a'.zfill(10 ** 10)",
            "'\\t'.expandtabs(2000000000)",
            "('\\t' * 100000).expandtabs(tabsize=100000)",
            "('a' * 10000).replace('a', 'b' * 10000)",
            "('a' * 10000) | replace('a', 'b' * 10000)",
            "('a' * 10000) | replace(new='b' * 10000, old='a')",
            "('a' * 10000).join('b' * 10000)",
            "('b' * 10000) | join('a' * 10000)",
            "range(10000) | map('string') | join('a' * 10000)",
            "(['b' * 10000] * 10000) | reverse | join",
            "['a'] | map('center', 2000000000) | join",
            "'{:2000000000}'.format('a')",
            "'{:{}}'.format('a', 2000000000)",
            "'{:{}{}}'.format('a', 20000, 10000)",
            "'{a:2000000000}'.format_map({'a': 1})",
            "[1] | batch(2000000000, 0) | list",
            "[1] | slice(2000000000) | list",
            "([[1] * 10000] * 10000) | sum(start=[])",
            "[1] | tojson(indent=2000000000)",
            "1 | round(2000000000)",
            "2 ** 9999999 * 2 ** 9999999",
        )
    ),
    DOUBLE % ("'aa'", "ns.x + ns.x"),
    DOUBLE % ("'aa'", "ns.x ~ ns.x"),
    DOUBLE % ("'aa'", "[ns.x, ns.x] | join"),
    DOUBLE % ("'aa'", "'%s%s' % (ns.x, ns.x)"),
    DOUBLE % ("'aa'", "'{0}{0}'.format(ns.x)"),
    DOUBLE % ("[1]", "ns.x + ns.x"),
    *(
        DOUBLE % ("[1]", "[ns.x, ns.x]") + end
        for end in (
            "{{ ns.x }}",
            "{{ ns.x ~ 1 }}",
            "{{ ns.x | string }}",
            "{{ ns.x | upper }}",
            "{{ ns.x | tojson }}",
            "{{ '%s' % ns.x }}",
            "{{ '{!r}'.format(ns.x) }}",
            "{{ [ns.x] | join }}",
        )
    ),
]
MUCH = [
    "{% set a = 'a' * 10000000 %}{% for i in range(99999) %}{{ a }}{% endfor %}",
    "{% set a = 'a' * 10000000 %}{% for i in range(99999) %}{% set b = a.strip('b') %}{% endfor %}",
    "{% for i in range(99999) %}" + "a" * 99999 + "{% endfor %}",
]
HARMFUL += [(source, "huge") for source in HUGE] + [(source, "steps") for source in MUCH]
HARMFUL += [
    ("{{ 'a'.encode() * 10 ** 10 }}", "unsafe"),
    ("{{ 'a'.translate({97: 'a' * 10000}) }}", "unsafe"),
    ("{{ 1 .to_bytes(10 ** 10) }}", "unsafe"),
    ("{{ 1 | pprint }}", "pprint"),
]


@pytest.mark.parametrize(("source", "reason"), HARMFUL)
def test_what_no_template_may_do_is_the_models_fault(source: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        template(source).render([ANSWER])
    assert "--chat-template FILE" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ os.system('id') }}",
        "{{ lipsum.__globals__ }}",
        "{{ config }}{{ environment.globals }}",
        "{{ range(10 ** 9) | list }}",
        "{{ messages | sum }}",
        "{{ '%d' | format('x') }}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_what_is_not_there_is_a_bad_request_or_empty(source: str) -> None:
    try:
        assert template(source).render([ANSWER]) == ""
    except (InputError, ModelError) as error:
        assert "\n" not in str(error)


def test_templates_see_copies_of_plain_values() -> None:
    class Odd:
        def __str__(self) -> str:
            raise AssertionError

    messages: Any = [{"role": "user", "content": "x", "extra": {"a": [Odd()]}}]
    with pytest.raises(InputError, match=r"messages\[0\]\.extra\.a\[0\] is of type Odd"):
        template("{{ messages }}").render(messages)
    for field in ("tools", "documents"):
        wrong: Any = ChatOptions(**{field: ["x"]})
        with pytest.raises(InputError, match=f"{field} must be a list of objects") as caught:
            template("{{ tools }}{{ documents }}").render([USER], wrong)
        assert caught.value.field == field


def test_what_a_template_does_not_read_is_refused() -> None:
    own = template("{{ messages }}{% if enable_thinking %}{% endif %}{% set x = y or 1 %}{{ x }}")
    with pytest.raises(InputError, match=r"no 'think'; it takes enable_thinking, y") as caught:
        own.render([USER], ChatOptions(variables={"think": 1}))
    assert caught.value.field == "chat_template_kwargs"
    with pytest.raises(InputError, match="no 'messages'"):
        own.render([USER], ChatOptions(variables={"messages": []}))
    with pytest.raises(InputError, match="takes no tools"):
        own.render([USER], ChatOptions(tools=[CLOCK]))
    with pytest.raises(InputError, match="takes no documents"):
        own.render([USER], ChatOptions(documents=[{"text": "x"}]))
    with pytest.raises(InputError, match="takes nothing"):
        template("{{ messages }}").render([USER], ChatOptions(variables={"a": 1}))


@pytest.mark.parametrize("switch", ["enable_thinking", "thinking"])
def test_thinking_is_switched_whatever_the_switch_is_called(switch: str) -> None:
    own = template(f"{{{{ {switch} is not defined or {switch} }}}}")
    assert own.render([USER]) == "True"
    assert own.render([USER], ChatOptions(thinking=True)) == "True"
    assert own.render([USER], ChatOptions(thinking=False)) == "False"
    assert own.render([USER], ChatOptions(reasoning_effort="none")) == "False"
    assert own.render([USER], ChatOptions(reasoning_effort="high")) == "True"
    given = ChatOptions(reasoning_effort="high", variables={switch: False})
    assert own.render([USER], given) == "False"


def test_reasoning_effort() -> None:
    own = template("{{ reasoning_effort | default('medium') }}")
    assert own.render([USER]) == "medium"
    assert own.render([USER], ChatOptions(reasoning_effort="high")) == "high"
    with pytest.raises(InputError, match="no switch") as caught:
        own.render([USER], ChatOptions(thinking=False))
    assert caught.value.field == "thinking"
    plain = template("{{ messages | length }}")
    assert plain.render([USER], ChatOptions(reasoning_effort="none")) == "1"
    with pytest.raises(InputError, match="no reasoning_effort") as caught:
        plain.render([USER], ChatOptions(reasoning_effort="low"))
    assert caught.value.field == "reasoning_effort"


def test_tools_have_a_template_of_their_own() -> None:
    own = ChatTemplate("plain", {}, "{{ tools | length }}")
    assert own.render([USER]) == "plain"
    assert own.render([USER], ChatOptions(tools=[CLOCK])) == "1"


def test_a_message_that_the_template_leaves_out_cannot_be_continued() -> None:
    on = ChatOptions(continue_final_message=True)
    with pytest.raises(InputError, match="leaves the last message out"):
        template("{{ messages[0].content }}").render([USER, ANSWER], on)
    with pytest.raises(InputError, match="no content"):
        template("{{ messages }}").render([{"role": "assistant", "tool_calls": []}], on)


def test_a_broken_template_is_the_models_fault() -> None:
    with pytest.raises(ModelError, match=r"line 2.*--chat-template FILE"):
        template("\n{% if %}").render([USER])


def test_a_template_can_be_replaced(smollm2_gguf: Path) -> None:
    tokenizer = load_tokenizer(open_checkpoint(smollm2_gguf))
    tokenizer.use_chat_template("{{ eos_token }}")
    assert tokenizer.chat_template is not None
    assert tokenizer.chat_template.render([USER]) == "<|im_end|>"
