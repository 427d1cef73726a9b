"""Chat templates: a conversation to one text, with the model's own Jinja template.

What a template is given is what transformers gives it, so that both write the same prompt. How it
is kept from doing harm is engine.sandbox's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from elinvar.base.errors import InputError, ModelError

if TYPE_CHECKING:
    from elinvar.engine.sandbox import Program

Message = Mapping[str, Any]
"""role, content (a text or a list of {"type": "text", "text": ...} parts), and what else the
template knows (name, tool_calls, reasoning_content, ...)."""

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names for what an assistant thought; templates read the first two."""
_SWITCHES = ("enable_thinking", "thinking")
"""Variables by which templates turn thinking on and off."""
_GIVEN = {"messages", "tools", "documents", "add_generation_prompt"}
_TAG = "CONTINUE_HERE_5f1d "
_WITHOUT_CONTENT = ("tool_calls", "function_call", *_REASONING)


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What a prompt is made from beside the messages."""

    tools: Sequence[Mapping[str, Any]] | None = None
    """Descriptions of functions, as OpenAI writes them."""
    documents: Sequence[Mapping[str, Any]] | None = None
    """Texts to answer from: title and text."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """What else the template reads: enable_thinking, reasoning_effort, ..."""
    thinking: bool | None = None
    """The template's switch for thinking, whatever its name; None leaves it as the model has it."""
    reasoning_effort: str | None = None
    """How much to think, for templates that ask for it; `none` is also said by the switch."""
    add_generation_prompt: bool = True
    """The prompt ends where the assistant begins to speak."""
    continue_final_message: bool = False
    """The prompt ends inside the last message, to be gone on with; no generation prompt then."""


class ChatTemplate:
    """A Jinja template, compiled at its first use."""

    def __init__(
        self, source: str, tokens: Mapping[str, str], tool_source: str | None = None
    ) -> None:
        """`tokens`: what the template may write, such as bos_token and eos_token.
        `tool_source`: the template to use where there are tools; None: the same one."""
        self.source = source
        self.tool_source = source if tool_source is None else tool_source
        self._tokens = dict(tokens)

    @property
    def switches_thinking(self) -> bool:
        """Whether ChatOptions.thinking means something here. Raises ModelError as `render`."""
        return any(name in self._program.variables for name in _SWITCHES)

    def render(self, messages: Sequence[Message], options: ChatOptions | None = None) -> str:
        """The prompt of a conversation.

        Raises InputError naming the field for messages and options of a wrong shape, for those that
        the template refuses (roles that do not alternate), and for variables it does not know;
        ModelError when it is no valid template, or does what templates may not.
        """
        from jinja2 import TemplateError
        from jinja2.exceptions import SecurityError

        options = options or ChatOptions()
        tools, documents = (
            _mappings(name, getattr(options, name)) for name in ("tools", "documents")
        )
        program = self._tool_program if tools is not None else self._program
        for name, value in (("tools", tools), ("documents", documents)):
            if value and name not in program.variables:
                raise InputError(name, f"The model's chat template takes no {name}.")
        parts = program.takes_parts
        plain = [_plain_message(i, m, parts) for i, m in enumerate(_as_list(messages))]
        last = _mark_end(plain) if options.continue_final_message else ""
        values = {
            **self._tokens,
            **self._variables(program, options),
            "messages": plain,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": options.add_generation_prompt
            and not options.continue_final_message,
        }
        try:
            rendered = program.render(values)
        except (SecurityError, MemoryError, RecursionError) as error:
            raise _harmful(error) from error
        # A template meets data that it was not written for in many ways, a sum of text and None
        # for example.
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            reason = _one_line(error)
            raise InputError(
                "messages", f"The model's chat template does not take these messages: {reason}."
            ) from error
        return _up_to_mark(rendered, last) if options.continue_final_message else rendered

    def _variables(self, program: Program, options: ChatOptions) -> dict[str, Any]:
        """The variables beyond the usual ones. A misspelt one that nobody reads would be answered
        as if it had not been given."""
        given: dict[str, Any] = _plain("chat_template_kwargs", dict(options.variables))
        switch = next((name for name in _SWITCHES if name in program.variables), None)
        effort, thinking = options.reasoning_effort, options.thinking
        if effort is not None:
            if "reasoning_effort" in program.variables:
                given.setdefault("reasoning_effort", effort)
            elif switch is None and effort != "none":
                raise InputError(
                    "reasoning_effort", "The model's chat template takes no reasoning_effort."
                )
            thinking = effort != "none" if thinking is None and switch is not None else thinking
        if thinking is not None:
            if switch is None:
                raise InputError(
                    "thinking", "The model's chat template has no switch that turns thinking off."
                )
            given.setdefault(switch, thinking)
        for name in given:
            if name in _GIVEN or name not in program.variables:
                known = sorted(program.variables - _GIVEN - self._tokens.keys())
                raise InputError(
                    "chat_template_kwargs",
                    f"The model's chat template takes no {name!r}; "
                    + (f"it takes {', '.join(known)}." if known else "it takes nothing."),
                )
        return given

    @cached_property
    def _program(self) -> Program:
        return _compile(self.source)

    @cached_property
    def _tool_program(self) -> Program:
        return self._program if self.tool_source == self.source else _compile(self.tool_source)


def _compile(source: str) -> Program:
    from jinja2 import TemplateSyntaxError
    from jinja2.exceptions import SecurityError

    from elinvar.engine.sandbox import Program

    try:
        return Program(source)
    except TemplateSyntaxError as error:
        raise ModelError(
            f"The model's chat template is broken (line {error.lineno}: {error.message}); use "
            "another one with --chat-template FILE, or plain completions."
        ) from error
    except (SecurityError, MemoryError, RecursionError) as error:
        raise _harmful(error) from error


def _harmful(error: BaseException) -> ModelError:
    reasons: dict[type, str] = {
        MemoryError: "it takes too much memory",
        RecursionError: "it is nested too deeply",
    }
    reason = reasons.get(type(error)) or _one_line(error)
    return ModelError(
        f"The model's chat template does what a template may not ({reason}); use another one with "
        "--chat-template FILE, or plain completions."
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")[:300]


def _as_list(messages: Any) -> list[Any]:
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise InputError("messages", "messages must be a list with at least one message.")
    return list(messages)


def _plain_message(index: int, message: Any, parts: bool) -> dict[str, Any]:
    """The message as templates know it: without what is None, thoughts under each of their names,
    and the content's parts joined unless the template goes through them itself."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InputError("messages", f"messages[{index}] must have a role, for example 'user'.")
    given = {key: value for key, value in message.items() if value is not None}
    plain: dict[str, Any] = _plain(f"messages[{index}]", given)
    thoughts = next((plain[name] for name in _REASONING if name in plain), None)
    if thoughts is not None:
        plain = {"thinking": thoughts, **plain, "reasoning_content": thoughts}
    content = plain.get("content")
    if content is None and any(name in plain for name in _WITHOUT_CONTENT):
        return plain
    if isinstance(content, list):
        texts = [_part_text(index, i, part) for i, part in enumerate(content)]
        content = content if parts else "".join(texts)
    elif not isinstance(content, str):
        raise InputError("messages", f"messages[{index}].content must be a text or text parts.")
    return {**plain, "content": content}


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


def _mappings(name: str, value: Any) -> list[dict[str, Any]] | None:
    if value is None:
        return None
    good = isinstance(value, Sequence) and all(isinstance(entry, Mapping) for entry in value)
    if not good or isinstance(value, str | bytes):
        raise InputError(name, f"{name} must be a list of objects.")
    return list(_plain(name, list(value)))


def _plain(path: str, value: Any) -> Any:
    """A copy made of what JSON knows: other objects have methods that a template could call."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(f"{path}.{key}", item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(f"{path}[{i}]", item) for i, item in enumerate(value)]
    field_name = path.split(".")[0].split("[")[0]
    kind = type(value).__name__
    raise InputError(field_name, f"{path} is of type {kind}, which JSON does not know.")


def _mark_end(messages: list[dict[str, Any]]) -> str:
    """Puts a mark behind the last message's text, to be found again in the prompt; returns the text
    without it."""
    last = messages[-1]
    content = last.get("content")
    if isinstance(content, str):
        last["content"] = content + _TAG
        return content
    if content:
        text = str(content[-1]["text"])
        content[-1]["text"] = text + _TAG
        return text
    raise InputError("messages", "The last message has no content that could be gone on with.")


def _up_to_mark(rendered: str, last: str) -> str:
    at = rendered.rfind(_TAG.strip())
    if at < 0 or last.strip() not in rendered:
        raise InputError(
            "messages",
            "The model's chat template leaves the last message out or changes it: it cannot go on.",
        )
    # A template may write a message twice: elsewhere the mark goes without a trace.
    kept = rendered[:at].replace(_TAG.strip(), "")
    # One that trims messages has taken the mark's space, and would take the text's.
    return kept if rendered.startswith(_TAG, at) else kept.rstrip()
