"""The items of /v1/responses: read from a request into the shape in which they are stored, and turned
into the messages of a conversation. No engine and no HTTP here.
"""

from __future__ import annotations

import base64
import binascii
import uuid
import zlib
from collections.abc import Sequence
from typing import Any

import msgspec

from elinvar.server import responses_schema as kinds
from elinvar.server.errors import ApiError, bad_request, invalid_value, not_supported
from elinvar.server.schema import CalledFunction, ContentPart, Message, ToolCall, convert

Item = dict[str, Any]

MAX_THOUGHTS = 2**24
"""Bytes that sealed thoughts may unpack to."""
_PREFIXES = {"function_call": "fc_", "function_call_output": "fco_", "reasoning": "rs_"}
_TEXT_PARTS = {
    "input": ("input_text", "text"),
    "assistant": ("output_text", "text", "input_text", "refusal"),
    "output": ("input_text", "text", "output_text"),
    "summary": ("summary_text",),
    "content": ("reasoning_text", "text"),
}


def read_items(given: str | Sequence[Item], path: str = "input") -> list[Item]:
    """Items as they are stored, each with an id; references are still to be looked up. Raises
    ApiError naming the field."""
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not given:
        raise invalid_value(path, f"{path} must hold at least one item, got none.")
    return [_item(one, f"{path}[{i}]") for i, one in enumerate(given)]


def _item(given: Item, path: str) -> Item:
    kind = given.get("type")
    if kind is None:
        kind = "message" if "role" in given or "id" not in given else "item_reference"
    if not isinstance(kind, str) or kind not in kinds.ITEM_KINDS:
        there = ", ".join(kinds.ITEM_KINDS)
        raise not_supported(
            f"{path}.type", f"An item of type {str(kind)[:100]!r}", f"there are {there}"
        )
    item = convert({**given, "type": kind}, kinds.ITEM_KINDS[kind], path)
    match item:
        case kinds.MessageItem():
            read = _message(item, path)
        case kinds.CallItem():
            read = _call(item, path)
        case kinds.CallOutputItem():
            read = _call_output(item, path)
        case kinds.ReasoningItem():
            read = _reasoning(item, path)
        case _:
            return {"type": "item_reference", "id": given["id"]}
    prefix = _PREFIXES.get(kind, "msg_")
    return {"id": item.id or f"{prefix}{uuid.uuid4().hex}", "type": kind, **read}


def _message(item: kinds.MessageItem, path: str) -> Item:
    if item.phase == "commentary":
        raise not_supported(f"{path}.phase", "The phase 'commentary'")
    if item.role == "assistant":
        texts = _texts(item.content, f"{path}.content", "assistant")
        parts = [{"type": "output_text", "text": text, "annotations": []} for text in texts]
    else:
        texts = _texts(item.content, f"{path}.content", "input")
        if not texts:
            raise invalid_value(f"{path}.content", f"{path}.content must hold a part, got none.")
        parts = [{"type": "input_text", "text": text} for text in texts]
    return {"status": "completed", "role": item.role, "content": parts}


def _call(item: kinds.CallItem, path: str) -> Item:
    _refuse_callers(item, path)
    if item.run_async:
        raise not_supported(f"{path}.async")
    try:
        arguments = msgspec.json.decode(item.arguments or "{}")
    except (msgspec.DecodeError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        field = f"{path}.arguments"
        raise invalid_value(field, f"{field} must be the JSON text of an object.")
    made = {"call_id": item.call_id, "name": item.name, "arguments": item.arguments}
    return {**made, "status": "completed"}


def _call_output(item: kinds.CallOutputItem, path: str) -> Item:
    _refuse_callers(item, path)
    output: Any = item.output
    if not isinstance(output, str):
        texts = _texts(output, f"{path}.output", "output")
        output = [{"type": "input_text", "text": text} for text in texts]
    return {"call_id": item.call_id, "output": output, "status": "completed"}


def _reasoning(item: kinds.ReasoningItem, path: str) -> Item:
    summary = _texts(item.summary or [], f"{path}.summary", "summary")
    content = _texts(item.content or [], f"{path}.content", "content")
    if not content and item.encrypted_content:
        content = [unseal(item.encrypted_content, f"{path}.encrypted_content")]
    return {
        "summary": [{"type": "summary_text", "text": text} for text in summary],
        "content": [{"type": "reasoning_text", "text": text} for text in content],
        "status": "completed",
    }


def _refuse_callers(item: kinds.CallItem | kinds.CallOutputItem, path: str) -> None:
    if item.caller not in (None, {"type": "direct"}):
        raise not_supported(f"{path}.caller")
    if item.namespace:
        raise not_supported(f"{path}.namespace")


def _texts(content: str | Sequence[Item], path: str, where: str) -> list[str]:
    """The texts of a content's parts."""
    if isinstance(content, str):
        return [content]
    texts = []
    for i, given in enumerate(content):
        at, kind = f"{path}[{i}]", given.get("type")
        if kind not in _TEXT_PARTS[where]:
            there = ", ".join(_TEXT_PARTS[where])
            what = f"Content of type {str(kind)[:100]!r} here"
            raise not_supported(f"{at}.type", what, f"there is {there}")
        part = convert(given, kinds.ContentPart, at)
        if part.prompt_cache_breakpoint is not None:
            raise not_supported(f"{at}.prompt_cache_breakpoint")
        field = "refusal" if kind == "refusal" else "text"
        text = getattr(part, field)
        if text is None:
            name = f"{at}.{field}"
            message = f"Missing required parameter: '{name}'."
            raise bad_request(message, name, "missing_required_parameter")
        texts.append(text)
    return texts


# ---- thoughts that travel -----------------------------------------------------------------------


def seal(thoughts: str) -> str:
    """Thoughts for `encrypted_content`: opaque to clients, who send them back. They are the client's
    own to read, so this hides nothing."""
    return base64.urlsafe_b64encode(zlib.compress(thoughts.encode())).decode()


def unseal(sealed: str, path: str) -> str:
    try:
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(base64.urlsafe_b64decode(sealed), MAX_THOUGHTS)
        if not unpacker.eof:
            raise ValueError
        return raw.decode()
    except (zlib.error, binascii.Error, ValueError):
        raise invalid_value(
            path, f"{path} was not written by this server; leave the item out."
        ) from None


# ---- messages -----------------------------------------------------------------------------------


def to_messages(items: Sequence[Item], instructions: str | None) -> list[Message]:
    """The conversation that the items are. What the assistant thought, said and called in a row is
    one message. Raises ApiError for an output of a call that is not there."""
    messages: list[Message] = []
    if instructions is not None:
        messages.append(Message("system", instructions))
    called: set[str] = set()
    turn: Message | None = None
    for item in items:
        kind = item["type"]
        if kind == "message" and item["role"] != "assistant":
            turn = None
            messages.append(Message(item["role"], _content(item["content"])))
        elif kind == "function_call_output":
            turn = None
            if item["call_id"] not in called:
                raise _unknown_call(item["call_id"])
            content = _content(item["output"])
            messages.append(Message("tool", content, tool_call_id=item["call_id"]))
        else:
            if turn is None or not _goes_on(turn, kind):
                turn = Message("assistant")
                messages.append(turn)
            _add(turn, item)
            called.add(item.get("call_id", ""))
    for message in messages:
        if message.content is None and not message.tool_calls:
            message.content = ""
    return messages


def _goes_on(turn: Message, kind: str) -> bool:
    """Whether the turn's message takes this item, too: it holds thoughts, text and calls in this
    order."""
    if kind == "function_call":
        return True
    if turn.content is not None or turn.tool_calls:
        return False
    return kind == "message" or turn.reasoning_content is None


def _add(turn: Message, item: Item) -> None:
    match item["type"]:
        case "reasoning":
            turn.reasoning_content = "".join(part["text"] for part in item["content"]) or None
        case "message":
            turn.content = "".join(part["text"] for part in item["content"])
        case _:
            function = CalledFunction(item["name"], item["arguments"])
            turn.tool_calls = [*(turn.tool_calls or ()), ToolCall(item["call_id"], function)]


def _content(content: str | Sequence[Item]) -> str | list[ContentPart]:
    if isinstance(content, str):
        return content
    texts = [part["text"] for part in content]
    return texts[0] if len(texts) == 1 else [ContentPart("text", text) for text in texts]


def _unknown_call(call_id: str) -> ApiError:
    message = f"input has an output of a call {call_id[:200]!r}, but no such function_call before."
    return invalid_value("input", message)
