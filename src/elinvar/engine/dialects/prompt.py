"""Messages in OpenAI's words, to what a family's chat template takes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elinvar.base.digest import blake2b
from elinvar.base.errors import InputError
from elinvar.engine.chat import Message
from elinvar.engine.dialects.schema import functions
from elinvar.engine.dialects.words import Channels, Family
from elinvar.engine.dialects.write import Written, write_calls

Said = dict[str, Any]
_NINE = re.compile(r"[A-Za-z0-9]{9}")
_NUMBERED = re.compile(r"\S+:\d+")
_TOOLS = re.compile(r"\{[%{][^{}%]*\btools\b")
_RESULTS = re.compile(r"""["'](tool|ipython|tool_result)["']""")
_ASKS_FOR_NONE = re.compile(r"""content["']?\]? is none""")
"""What has no content is left out of what templates see: these would never write a call."""
_NO_SYSTEM = re.compile("system role (is )?not supported", re.IGNORECASE)
_THOUGHTS = "reasoning_content", "thinking", "reasoning"


@dataclass(frozen=True, slots=True)
class Takes:
    """What a chat template takes; what it does not is written into texts."""

    tools: bool = True
    calls: bool = True
    results: bool = True
    """Messages of the role `tool`."""
    system: bool = True

    @classmethod
    def of(cls, template: str) -> Takes:
        """From its source: guesses, which other templates than published ones can mislead."""
        return cls(
            tools=_TOOLS.search(template) is not None,
            calls="tool_calls" in template and _ASKS_FOR_NONE.search(template) is None,
            results=_RESULTS.search(template) is not None,
            system=_NO_SYSTEM.search(template) is None,
        )


def prepared(
    family: Family,
    takes: Takes,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
) -> tuple[list[Said], Sequence[Mapping[str, Any]] | None]:
    """See Dialect.prompt."""
    said = _with_own_ids(family, [_with_objects(i, m) for i, m in enumerate(messages)])
    if not takes.calls:
        said = [_calls_as_text(family, message) for message in said]
    elif family.single:
        said = [*_one_call_each(said)]
    if not takes.results:
        said = [*_results_as_texts(said)]
    said = [_for_template(family, message) for message in said]
    if tools and not takes.tools:
        return _told_of(family, takes, said, tools), None
    return said, tools


def _with_objects(index: int, message: Message) -> Said:
    """Calls whose arguments are objects; each has an id."""
    said = dict(message)
    calls = said.get("tool_calls")
    if not calls:
        said.pop("tool_calls", None)
        return said
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise InputError("messages", f"messages[{index}].tool_calls must be a list.")
    said["tool_calls"] = [
        _call(f"messages[{index}].tool_calls[{i}]", c) for i, c in enumerate(calls)
    ]
    said["content"] = said.get("content") or ""
    return said


def _call(path: str, call: Any) -> Said:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError("messages", f"{path} must have a function with a name.")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, Mapping):
        raise InputError("messages", f"{path}.function.arguments must be a JSON object.")
    return {
        "id": str(call.get("id") or ""),
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _with_own_ids(family: Family, messages: list[Said]) -> list[Said]:
    """Ids that the template takes, and results that say whose they are by id and by name."""
    given: dict[str, tuple[str, str]] = {}
    number = 0
    for message in messages:
        for call in message.get("tool_calls", ()):
            name, old = call["function"]["name"], call["id"]
            call["id"] = _own_id(family, old, name, number)
            given[old] = call["id"], name
            number += 1
        old = message.get("tool_call_id")
        if old in given:
            message["tool_call_id"], name = given[old]
            message.setdefault("name", name)
    return messages


def _own_id(family: Family, given: str, name: str, number: int) -> str:
    if family.ids == "nine" and not _NINE.fullmatch(given):
        return blake2b(given.encode(), digest_size=8).hexdigest()[:9]
    if family.ids == "numbered" and not _NUMBERED.fullmatch(given):
        return f"functions.{name}:{number}"
    return given


def _one_call_each(messages: Sequence[Said]) -> Iterator[Said]:
    """A message a call, each before its result: for templates that write one call and forget the
    others, or refuse."""
    at = 0
    while at < len(messages):
        message, at = messages[at], at + 1
        calls = message.get("tool_calls", ())
        if len(calls) < 2:
            yield message
            continue
        results = []
        while at < len(messages) and messages[at].get("role") == "tool":
            results.append(messages[at])
            at += 1
        for i, call in enumerate(calls):
            first = message if i == 0 else {"role": message["role"], "content": ""}
            yield {**first, "tool_calls": [call]}
            yield from (r for r in results if r.get("tool_call_id") == call["id"])
        known = {call["id"] for call in calls}
        yield from (r for r in results if r.get("tool_call_id") not in known)


def _for_template(family: Family, message: Said) -> Said:
    if family.arguments == "text":
        for call in message.get("tool_calls", ()):
            function = call["function"]
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    thoughts = next((message[name] for name in _THOUGHTS if message.get(name)), None)
    if isinstance(family.calls, Channels) and message.get("tool_calls") and thoughts:
        # What was said before the call and what was thought are one to it.
        said = message.get("content")
        both = f"{thoughts}\n\n{said}" if said else thoughts
        return {**message, "content": "", "thinking": both}
    return message


def _calls_as_text(family: Family, message: Said) -> Said:
    calls = message.pop("tool_calls", ())
    if not calls:
        return message
    functions = (call["function"] for call in calls)
    written = [
        Written(function["name"], function["arguments"], call["id"])
        for function, call in zip(functions, calls, strict=True)
    ]
    said = f"{_text(message)}\n{write_calls(family, written)}".lstrip("\n")
    return {**message, "content": said}


def _results_as_texts(messages: Sequence[Said]) -> Iterator[Said]:
    """In the words of the user, whose they become a part of: roles alternate as before."""
    results: list[str] = []
    for message in messages:
        if message.get("role") == "tool":
            results.append(f"<tool_response>\n{_text(message)}\n</tool_response>")
            continue
        if results and message.get("role") == "user":
            message = {**message, "content": "\n".join([*results, _text(message)])}
        elif results:
            yield {"role": "user", "content": "\n".join(results)}
        results = []
        yield message
    if results:
        yield {"role": "user", "content": "\n".join(results)}


def _told_of(
    family: Family, takes: Takes, messages: Sequence[Said], tools: Sequence[Mapping[str, Any]]
) -> list[Said]:
    """The tools in a system message, or in the first one."""
    described = [json.dumps(f, ensure_ascii=False) for f in functions(tools).values()]
    example = write_calls(family, [Written("NAME", {"ARGUMENT": "VALUE"}, "call00000")])
    text = "\n".join(
        [
            "You may call these functions, which are described by JSON Schema:",
            *described,
            "To call one, write nothing but this, with its name and its arguments:",
            example,
            "Its result comes with the next message. Call none where none is needed.",
        ]
    )
    first = messages[0] if messages else {}
    if first.get("role") == "system" or not takes.system:
        parts = (text, _text(first)) if first.get("role") == "user" else (_text(first), text)
        return [{**first, "content": "\n\n".join(parts)}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _text(message: Said) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content)
