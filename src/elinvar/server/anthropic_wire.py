"""How answers look in Anthropic's Messages API: a message of blocks, and the events of a stream."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import msgspec

from elinvar.engine.pieces import Arguments, Call, Piece, Text, Thought
from elinvar.server.asked import Done, MadeCall, Step, Usage
from elinvar.server.error_shapes import anthropic_error
from elinvar.server.errors import ApiError
from elinvar.server.reply import encode
from elinvar.server.wire import Wire

JSON = dict[str, Any]
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_DELTA = (
    b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,'
    b'"delta":{"type":"%b","%b":%b}}\n\n'
)


class MessagesWire(Wire):
    """/v1/messages. One block is open at a time, and ends where a piece of another kind comes."""

    def __init__(
        self,
        model: str,
        request_id: str,
        max_tokens: int,
        *,
        caches: bool = False,
        show_thoughts: bool = True,
    ) -> None:
        """max_tokens: what was asked for. caches: the request has a cache_control. show_thoughts: or
        only that there were some."""
        self.id = f"msg_{uuid.uuid4().hex}"
        self._model, self._request_id, self._max_tokens = model, request_id, max_tokens
        self._caches, self._show_thoughts = caches, show_thoughts
        self._open: type[Piece] | None = None
        self._num_blocks = 0
        self._calls: dict[int, int] = {}
        """The block of a call, by its number."""
        self._reason: tuple[str, str | None] = "", None

    def opening(self, indices: Sequence[int], usage: Usage) -> bytes:
        # The tokens of the first step are counted, but not written yet.
        counts = self._usage(usage) | {"output_tokens": 0}
        message = self._message([], {"stop_reason": None, "stop_sequence": None}, counts)
        return _event({"type": "message_start", "message": message}) + _event({"type": "ping"})

    def chunk(self, step: Step) -> bytes:
        written = b"".join([self._piece(piece) for piece in step.pieces])
        if step.reason is not None:
            self._reason = step.reason, step.stop_text
        return written

    def ending(self, usage: Usage) -> bytes:
        end = self._end(*self._reason, usage)
        delta = {"type": "message_delta", "delta": end, "usage": self._usage(usage)}
        return self._close() + _event(delta) + _event({"type": "message_stop"})

    def error(self, error: ApiError) -> bytes:
        return _event(anthropic_error(error, self._request_id))

    def whole(self, choices: Sequence[Done], usage: Usage) -> bytes:
        (done,) = choices
        blocks = [self._block(part) for part in done.parts]
        end = self._end(done.reason, done.stop_text, usage)
        return encode(self._message(blocks, end, self._usage(usage)))

    # ---- blocks -----------------------------------------------------------------------------

    def _piece(self, piece: Piece) -> bytes:
        if isinstance(piece, Arguments):
            index, text = self._calls[piece.number], encode(piece.text)
            return _DELTA % (index, b"input_json_delta", b"partial_json", text)
        if isinstance(piece, Call):
            block = {"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}}
            opened = self._close() + self._start(Call, block)
            self._calls[piece.number] = self._num_blocks - 1
            return opened
        if isinstance(piece, Text):
            opened = self._begin(Text, {"type": "text", "text": ""})
            return opened + self._delta(b"text_delta", b"text", piece.text)
        opened = self._begin(Thought, {"type": "thinking", "thinking": "", "signature": ""})
        if not self._show_thoughts:
            return opened
        return opened + self._delta(b"thinking_delta", b"thinking", piece.text)

    def _delta(self, kind: bytes, field: bytes, text: str) -> bytes:
        """Of the block that is open."""
        return _DELTA % (self._num_blocks - 1, kind, field, encode(text))

    def _begin(self, kind: type[Piece], block: JSON) -> bytes:
        """Nothing where a block of this kind is open."""
        return b"" if self._open is kind else self._close() + self._start(kind, block)

    def _start(self, kind: type[Piece], block: JSON) -> bytes:
        index, self._open = self._num_blocks, kind
        self._num_blocks += 1
        return _event({"type": "content_block_start", "index": index, "content_block": block})

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        signed = b""
        if self._open is Thought:
            signed = self._delta(b"signature_delta", b"signature", self.id)
        self._open = None
        return signed + _event({"type": "content_block_stop", "index": self._num_blocks - 1})

    def _block(self, part: Text | Thought | MadeCall) -> JSON:
        if isinstance(part, Text):
            return {"type": "text", "text": part.text}
        if isinstance(part, Thought):
            thoughts = part.text if self._show_thoughts else ""
            # Clients send it back with the thoughts, and look no further.
            return {"type": "thinking", "thinking": thoughts, "signature": self.id}
        return {
            "type": "tool_use",
            "id": part.id,
            "name": part.name,
            "input": _input(part.arguments),
        }

    # ---- around them ------------------------------------------------------------------------

    def _message(self, content: list[JSON], end: JSON, usage: JSON) -> JSON:
        message = {"id": self.id, "type": "message", "role": "assistant", "model": self._model}
        return message | {"content": content, **end, "usage": usage}

    def _end(self, reason: str, stop_text: str | None, usage: Usage) -> JSON:
        if reason == "stop" and stop_text is not None:
            return {"stop_reason": "stop_sequence", "stop_sequence": stop_text}
        own = _REASONS[reason]
        if reason == "length" and usage.completion_tokens < self._max_tokens:
            own = "model_context_window_exceeded"
        return {"stop_reason": own, "stop_sequence": None}

    def _usage(self, usage: Usage) -> JSON:
        """What was not cached is from now on, and is counted so where the client asked for it."""
        cached = usage.cached_tokens
        new = usage.prompt_tokens - cached
        counts = {
            "input_tokens": 0 if self._caches else new,
            "cache_creation_input_tokens": new if self._caches else 0,
            "cache_read_input_tokens": cached,
            "output_tokens": usage.completion_tokens,
            "service_tier": "standard",
        }
        if usage.reasoning_tokens:
            counts["output_tokens_details"] = {"thinking_tokens": usage.reasoning_tokens}
        return counts


def _event(data: JSON) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (data["type"].encode(), encode(data))


def _input(arguments: str) -> JSON:
    """Empty where the answer ended amid them."""
    try:
        decoded = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        return {}
    return decoded if isinstance(decoded, dict) else {}
