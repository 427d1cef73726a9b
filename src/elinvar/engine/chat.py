"""Chat templates: a conversation to one text, with the model's own Jinja template.

Templates come with models, so they run in Jinja's sandbox, in the environment that Hugging Face
documents for them (block trimming, loop controls, `raise_exception`, `strftime_now`, `tojson`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

from elinvar.base.errors import InputError, ModelError

if TYPE_CHECKING:
    from jinja2 import Template

Message = Mapping[str, Any]
"""role, content (a text or a list of {"type": "text", "text": ...} parts), and what else the
template knows (name, tool_calls, ...)."""


class ChatTemplate:
    """A Jinja template, compiled at its first use."""

    def __init__(
        self, source: str, variables: Mapping[str, str], tool_source: str | None = None
    ) -> None:
        """`variables`: the tokens a template may write, such as bos_token and eos_token.
        `tool_source`: the template to use where there are tools; None: the same one."""
        self.source = source
        self._tool_source = tool_source
        self._variables = dict(variables)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt of a conversation. With `add_generation_prompt` it ends where the assistant
        begins to speak.

        Raises InputError("messages", ...) for messages of a wrong shape and for those the template
        refuses (for example roles that do not alternate); ModelError when it is no valid template.
        """
        from jinja2 import TemplateError

        plain = [_plain_message(i, message) for i, message in enumerate(_as_list(messages))]
        try:
            return self._template.render(
                messages=plain,
                tools=None if tools is None else list(tools),
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        # A template meets data that it was not written for in many ways, a sum of text and None
        # for example.
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise InputError(
                "messages", f"The model's chat template does not take these messages: {reason}."
            ) from error

    @cached_property
    def _template(self) -> Template:
        from jinja2 import TemplateSyntaxError

        try:
            return _environment().from_string(self.source)
        except TemplateSyntaxError as error:
            raise ModelError(
                f"The model's chat template is broken (line {error.lineno}: {error.message}); use "
                "another one with --chat-template FILE, or plain completions."
            ) from error


def _as_list(messages: Any) -> list[Any]:
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise InputError("messages", "messages must be a list with at least one message.")
    return list(messages)


def _plain_message(index: int, message: Any) -> dict[str, Any]:
    """The message with its text parts joined: every template takes a text, not all take parts."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InputError("messages", f"messages[{index}] must have a role, for example 'user'.")
    content = message.get("content")
    if content is None and ("tool_calls" in message or "function_call" in message):
        return dict(message)
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        content = "".join(_part_text(index, i, part) for i, part in enumerate(content))
    if not isinstance(content, str):
        raise InputError("messages", f"messages[{index}].content must be a text or text parts.")
    return {**message, "content": content}


def _part_text(index: int, part_index: int, part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    text = part.get("text") if kind == "text" else None
    if not isinstance(text, str):
        raise InputError(
            "messages",
            f"messages[{index}].content[{part_index}] must be a text part "
            f'({{"type": "text", "text": ...}}), got {kind!r}.',
        )
    return text


def _environment() -> Any:
    """The sandbox, with what Hugging Face promises to templates."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what the assistant says, for training; here it is transparent."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter escapes it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
