"""How answers look in Ollama's API: lines of JSON, the last of which has counts and durations."""

from __future__ import annotations

import uuid
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from elinvar.base.plan import TokenLogprobs
from elinvar.engine.pieces import Arguments, Call, Text, Thought
from elinvar.server.asked import Done, MadeCall, Step, Usage
from elinvar.server.errors import ApiError
from elinvar.server.reply import encode
from elinvar.server.tokens import TokenNames
from elinvar.server.wire import MIN_LOGPROB, Wire

JSON = dict[str, Any]
Times = Callable[[str], Mapping[str, int]]
"""Nanoseconds that the answer of an id spent in each state, and `total`."""


class OllamaWire(Wire):
    """What both endpoints share."""

    stream_type = b"application/x-ndjson"

    def __init__(self, model: str, names: TokenNames, times: Times, with_logprobs: bool) -> None:
        self.id = f"ollama-{uuid.uuid4().hex}"
        self._names, self._times, self._with_logprobs = names, times, with_logprobs
        self._fields: JSON = {"model": model, "created_at": now()}
        self._head = encode(self._fields)[:-1] + b","
        self._calls: list[MadeCall] = []
        """Those that are being written: clients get them whole."""
        self._num_calls = 0
        self._reason = ""

    def opening(self, indices: Sequence[int], usage: Usage) -> bytes:
        return b""

    def chunk(self, step: Step) -> bytes:
        lines = []
        logprobs = self._logprobs(step.ids, step.logprobs) if step.logprobs else None
        for piece in step.pieces or ((Text(""),) if logprobs else ()):
            if isinstance(piece, Arguments):
                self._calls[-1].arguments += piece.text
                continue
            lines += self._called()
            if isinstance(piece, Call):
                self._calls.append(MadeCall(piece.id, piece.name, ""))
                continue
            said = ("", piece.text) if isinstance(piece, Thought) else (piece.text, "")
            lines.append(self._line(*said, logprobs))
            logprobs = None
        if step.reason is not None:
            lines += self._called()
            self._reason = step.reason
        return b"".join(lines)

    def ending(self, usage: Usage) -> bytes:
        return encode(self._fields | self.said() | self._end(self._reason, usage)) + b"\n"

    def error(self, error: ApiError) -> bytes:
        return encode({"error": error.message}) + b"\n"

    def whole(self, choices: Sequence[Done], usage: Usage) -> bytes:
        (done,) = choices
        calls = [call_json(call, i) for i, call in enumerate(done.calls)]
        body = self._fields | self.said(done.text, done.thoughts, calls)
        if self._with_logprobs:
            body["logprobs"] = self._logprobs(done.ids, done.logprobs)
        return encode(body | self._end(done.reason, usage))

    @abstractmethod
    def said(self, text: str = "", thinking: str = "", calls: Sequence[JSON] = ()) -> JSON:
        """The fields of something said."""

    def _line(self, text: str, thinking: str, logprobs: list[JSON] | None) -> bytes:
        more: JSON = {"done": False} if logprobs is None else {"done": False, "logprobs": logprobs}
        return self._head + encode(self.said(text, thinking) | more)[1:] + b"\n"

    def _called(self) -> list[bytes]:
        """The lines of calls that are whole now."""
        lines = []
        for call in self._calls:
            calls = [call_json(call, self._num_calls)]
            lines.append(encode(self._fields | self.said(calls=calls) | {"done": False}) + b"\n")
            self._num_calls += 1
        self._calls = []
        return lines

    def _logprobs(self, ids: Sequence[int], values: Sequence[TokenLogprobs | None]) -> list[JSON]:
        return [
            self._entry(token, value.logprob)
            | {"top_logprobs": [self._entry(t, p) for t, p in value.top]}
            for token, value in zip(ids, values, strict=True)
            if value is not None
        ]

    def _entry(self, token: int, logprob: float) -> JSON:
        text, raw = self._names.chat(token)
        return {"token": text, "logprob": max(logprob, MIN_LOGPROB), "bytes": raw}

    def _end(self, reason: str, usage: Usage) -> JSON:
        times = self._times(self.id)
        return {
            "done": True,
            "done_reason": "length" if reason == "length" else "stop",
            "total_duration": times.get("total", 0),
            "load_duration": 0,
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": times.get("prefill", 0),
            "eval_count": usage.completion_tokens,
            "eval_duration": times.get("decode", 0),
        }


class OllamaChatWire(OllamaWire):
    """/api/chat."""

    def said(self, text: str = "", thinking: str = "", calls: Sequence[JSON] = ()) -> JSON:
        message: JSON = {"role": "assistant", "content": text}
        if thinking:
            message["thinking"] = thinking
        if calls:
            message["tool_calls"] = calls
        return {"message": message}


class OllamaGenerateWire(OllamaWire):
    """/api/generate, which has no tools."""

    def said(self, text: str = "", thinking: str = "", calls: Sequence[JSON] = ()) -> JSON:
        return {"response": text, "thinking": thinking} if thinking else {"response": text}


def now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def call_json(call: MadeCall, index: int) -> JSON:
    """Empty arguments where the answer ended amid them."""
    try:
        arguments = msgspec.json.decode(call.arguments)
    except (msgspec.DecodeError, RecursionError):
        arguments = None
    arguments = arguments if isinstance(arguments, dict) else {}
    function = {"index": index, "name": call.name, "arguments": arguments}
    return {"id": call.id, "function": function}
