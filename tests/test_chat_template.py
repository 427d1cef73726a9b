"""Rendering equals Hugging Face's, and what a template refuses is a bad request, not a crash."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from elinvar.base.errors import InputError, ModelError
from elinvar.engine.chat import ChatTemplate
from elinvar.engine.tokenizer import Tokenizer, load_tokenizer
from elinvar.weights.checkpoint import open_checkpoint

USER = {"role": "user", "content": "What is <b>1 & 1</b>?"}
ANSWER = {"role": "assistant", "content": "2\n\n"}
SYSTEM = {"role": "system", "content": "Be brief. é"}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [USER],
    [SYSTEM, USER],
    [SYSTEM, USER, ANSWER, USER],
    [USER, ANSWER],
    [{"role": "user", "content": ""}],
]

ALTERNATING = """{{ bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant!') }}
    {%- endif %}
    {%- if loop.index > 4 %}{% break %}{% endif %}
    {%- generation %}[{{ message['role'] }}] {{ message['content'] | trim }}{% endgeneration %}
    {{- eos_token }}
{%- endfor %}
{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{%- if add_generation_prompt %}[assistant]{% endif %}"""


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Tokenizer:
    return load_tokenizer(open_checkpoint(smollm2_gguf))


@pytest.fixture(scope="module")
def reference(smollm2_gguf: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name
    )


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_smollm2_equals_transformers(
    smollm2: Tokenizer, reference: Any, messages: list[dict[str, Any]], add_generation_prompt: bool
) -> None:
    own = smollm2.chat_template
    assert own is not None
    text = own.render(messages, add_generation_prompt=add_generation_prompt)
    assert text == reference.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    ids = smollm2.encode_chat(text)
    assert smollm2.decode(ids, skip_special=False) == text
    assert ids[0] == smollm2.encode("<|im_start|>")[0] == 1


@pytest.mark.parametrize("tools", [None, [{"name": "f", "about": "<é> & 'x'"}]])
def test_extensions_equal_transformers(reference: Any, tools: Any) -> None:
    messages = [USER, ANSWER] * 3
    expected = reference.apply_chat_template(
        messages, tools=tools, chat_template=ALTERNATING, tokenize=False
    )
    own = ChatTemplate(
        ALTERNATING, {"bos_token": reference.bos_token, "eos_token": reference.eos_token}
    )
    assert own.render(messages, tools, add_generation_prompt=False) == expected


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
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely"),
        ("{{ 1 // 0 }}", "division"),
    ],
)
def test_what_a_template_refuses_is_a_bad_request(source: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        template(source).render([ANSWER])
    assert caught.value.field == "messages"


def test_a_broken_template_is_the_models_fault() -> None:
    with pytest.raises(ModelError, match=r"line 2.*--chat-template FILE"):
        template("\n{% if %}").render([USER])


def test_a_template_can_be_replaced(smollm2_gguf: Path) -> None:
    tokenizer = load_tokenizer(open_checkpoint(smollm2_gguf))
    tokenizer.use_chat_template("{{ eos_token }}")
    assert tokenizer.chat_template is not None
    assert tokenizer.chat_template.render([USER]) == "<|im_end|>"
