"""What a line of a batch came to: the line of the output, and what it used."""

from __future__ import annotations

import uuid
from typing import Any

import msgspec

from elinvar.server.reply import encode

Body = dict[str, Any]

_LINE_ENDS = tuple((end.encode(), f"\\u{ord(end):04x}".encode()) for end in "\x85\u2028\u2029")
"""What JSON may hold as it is, and Python's splitlines takes for the end of a line."""


def result_line(custom_id: str, response: Body | None, error: Body | None) -> bytes:
    name = f"batch_req_{uuid.uuid4().hex}"
    line = encode({"id": name, "custom_id": custom_id, "response": response, "error": error})
    for raw, escaped in _LINE_ENDS:
        line = line.replace(raw, escaped)
    return line


NO_USAGE = dict.fromkeys(
    ("input_tokens", "output_tokens", "total_tokens", "cached_tokens", "reasoning_tokens"), 0
)


class _Details(msgspec.Struct):
    cached_tokens: int = 0
    reasoning_tokens: int = 0


class _Usage(msgspec.Struct):
    """As any of the endpoints writes it."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    prompt_tokens_details: _Details = msgspec.field(default_factory=_Details)
    completion_tokens_details: _Details = msgspec.field(default_factory=_Details)
    input_tokens_details: _Details = msgspec.field(default_factory=_Details)
    output_tokens_details: _Details = msgspec.field(default_factory=_Details)


class _Answer(msgspec.Struct):
    usage: _Usage


def usage_of(answer: bytes) -> dict[str, int]:
    said = msgspec.json.decode(answer, type=_Answer).usage
    given = said.prompt_tokens + said.input_tokens
    made = said.completion_tokens + said.output_tokens
    details = said.prompt_tokens_details, said.input_tokens_details
    thought = said.completion_tokens_details, said.output_tokens_details
    return {
        "input_tokens": given,
        "output_tokens": made,
        "total_tokens": given + made,
        "cached_tokens": sum(one.cached_tokens for one in details),
        "reasoning_tokens": sum(one.reasoning_tokens for one in thought),
    }
