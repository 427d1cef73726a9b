"""How OpenAI's answers look on the wire: whole responses, and the chunks of a stream.

A chunk is written once a token for every stream, so its unchanging parts are encoded once a
response and a chunk is one `join`. Whole responses are plain dictionaries.
"""

from __future__ import annotations

import codecs
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import starmap
from typing import Any

from elinvar.base.plan import TokenLogprobs
from elinvar.engine.pieces import Call, Piece, Text, Thought
from elinvar.server.asked import Done, MadeCall, Step, Usage
from elinvar.server.errors import ApiError
from elinvar.server.reply import encode
from elinvar.server.tokens import TokenNames

JSON = dict[str, Any]
DONE = b"data: [DONE]\n\n"
MIN_LOGPROB = -9999.0
"""What OpenAI writes for a token that is out of the question; JSON has no -inf."""


class Wire(ABC):
    """How one response of one API is written. What it returns is sent as it is."""

    id: str
    """The response's."""
    stream_type = b"text/event-stream; charset=utf-8"
    """The media type of a stream."""

    @abstractmethod
    def opening(self, indices: Sequence[int], usage: Usage) -> bytes:
        """What a stream of these choices begins with; of the usage, the prompts' is known."""

    @abstractmethod
    def chunk(self, step: Step) -> bytes:
        """One step of one choice; may be empty."""

    @abstractmethod
    def ending(self, usage: Usage) -> bytes:
        """What a stream ends with."""

    @abstractmethod
    def error(self, error: ApiError) -> bytes:
        """What a stream ends with that cannot go on."""

    def see(self, step: Step) -> None:  # noqa: B027 (few want to)
        """One step of a response that will be sent whole, for wires that read steps themselves."""

    @abstractmethod
    def whole(self, choices: Sequence[Done], usage: Usage) -> bytes:
        """The response in one piece."""


class OpenAIWire(Wire):
    """What both kinds of completions share; the subclasses are the endpoints."""

    id_prefix: str
    object: str
    part: str

    def __init__(
        self,
        model: str,
        fingerprint: str,
        names: TokenNames,
        *,
        with_usage: bool = False,
        with_logprobs: bool = False,
        service_tier: str | None = None,
    ) -> None:
        """with_usage: a stream ends with a chunk that has it."""
        self.id = f"{self.id_prefix}{uuid.uuid4().hex}"
        self.names = names
        self._with_usage, self._with_logprobs = with_usage, with_logprobs
        self._fields = {"created": int(time.time()), "model": model}
        self._fingerprint = {"system_fingerprint": fingerprint}
        if service_tier is not None:
            self._fingerprint["service_tier"] = service_tier
        head = {"id": self.id, "object": self.part, **self._fields, **self._fingerprint}
        self._head = b"data: " + encode(head)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if with_usage else b"]}\n\n"

    def chunk(self, step: Step) -> bytes:
        index = step.index
        logprobs = self.logprobs(index, step.ids, step.logprobs) if step.logprobs else None
        # Log-probs go with the first piece of their step.
        chunks = []
        for piece in step.pieces or ((Text(""),) if logprobs else ()):
            chunks.append(self.piece(index, piece, logprobs))
            logprobs = None
        if step.reason is not None:
            chunks.append(self.closing(index, step.reason, step.seed))
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def ending(self, usage: Usage) -> bytes:
        if not self._with_usage:
            return DONE
        return self._head + b'],"usage":' + encode(usage.as_json()) + b"}\n\n" + DONE

    def error(self, error: ApiError) -> bytes:
        return b"data: " + error.body() + b"\n\n"

    def whole(self, choices: Sequence[Done], usage: Usage) -> bytes:
        done = [
            {
                "index": one.index,
                **self.content(one),
                **self.of_prompt(one),
                "logprobs": self.logprobs(one.index, one.ids, one.logprobs)
                if self._with_logprobs
                else None,
                "finish_reason": one.reason,
                "seed": one.seed,
            }
            for one in choices
        ]
        body = {"id": self.id, "object": self.object, **self._fields}
        body |= self.of_prompts(choices)
        return encode(body | {"choices": done, "usage": usage.as_json()} | self._fingerprint)

    @abstractmethod
    def piece(self, index: int, piece: Piece, logprobs: Any) -> bytes:
        """The chunk of a piece; `logprobs` as `logprobs()` made them, or None."""

    @abstractmethod
    def closing(self, index: int, reason: str, seed: int) -> bytes:
        """The chunk that says why a choice ended, and the seed that repeats it."""

    @abstractmethod
    def logprobs(
        self, index: int, ids: Sequence[int], values: Sequence[TokenLogprobs | None]
    ) -> Any:
        """The log-probs of some tokens of a choice, following those of the call before."""

    @abstractmethod
    def content(self, done: Done) -> JSON:
        """What a finished choice says."""

    def of_prompt(self, done: Done) -> JSON:
        """What a finished choice says of its prompt."""
        return {}

    def of_prompts(self, choices: Sequence[Done]) -> JSON:
        """What a whole response says of its prompt."""
        return {}

    def prompt_logprobs(self, done: Done) -> JSON:
        """As vLLM writes them: of each token its own and those of the likeliest, by id."""
        if done.prompt_logprobs is None:
            return {}
        return {"prompt_logprobs": [None, *starmap(self._ranked, done.prompt_logprobs)]}

    def _ranked(self, token: int, value: TokenLogprobs) -> JSON:
        told: dict[int, tuple[float, int | None]] = {token: (value.logprob, None)}
        told |= {t: (p, rank) for rank, (t, p) in enumerate(value.top, 1)}
        return {
            str(t): {
                "logprob": max(p, MIN_LOGPROB),
                "rank": rank,
                "decoded_token": self.names.chat(t)[0],
            }
            for t, (p, rank) in told.items()
        }

    def _chunk(self, index: int, content: bytes, logprobs: bytes, end: bytes) -> bytes:
        parts = (self._head, index, content, logprobs, end, self._tail)
        return b'%b{"index":%d,%b,"logprobs":%b,"finish_reason":%b}%b' % parts


class ChatWire(OpenAIWire):
    """/v1/chat/completions."""

    id_prefix = "chatcmpl-"
    object = "chat.completion"
    part = "chat.completion.chunk"

    def opening(self, indices: Sequence[int], usage: Usage) -> bytes:
        delta = b'"delta":{"role":"assistant","content":"","refusal":null}'
        return b"".join(self._chunk(index, delta, b"null", b"null") for index in indices)

    def piece(self, index: int, piece: Piece, logprobs: Any) -> bytes:
        written = b"null" if logprobs is None else encode(logprobs)
        if type(piece) is Text:
            delta = b'{"content":%b}' % encode(piece.text)
        elif type(piece) is Thought:
            delta = b'{"reasoning_content":%b}' % encode(piece.text)
        else:
            delta = encode({"tool_calls": [_call_delta(piece)]})
        return self._chunk(index, b'"delta":' + delta, written, b"null")

    def closing(self, index: int, reason: str, seed: int) -> bytes:
        return self._chunk(index, b'"delta":{}', b"null", _end(reason, seed))

    def logprobs(
        self, index: int, ids: Sequence[int], values: Sequence[TokenLogprobs | None]
    ) -> Any:
        entries = [
            self._entry(token, value.logprob)
            | {"top_logprobs": [self._entry(t, p) for t, p in value.top]}
            for token, value in zip(ids, values, strict=True)
            if value is not None
        ]
        return {"content": entries, "refusal": None}

    def _entry(self, token: int, logprob: float) -> JSON:
        text, raw = self.names.chat(token)
        return {"token": text, "logprob": max(logprob, MIN_LOGPROB), "bytes": raw}

    def content(self, done: Done) -> JSON:
        calls = done.calls
        text = done.text
        message: JSON = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": [_call(one) for one in calls]}
        if thoughts := done.thoughts:
            message["reasoning_content"] = thoughts
        return {"message": message}

    def of_prompts(self, choices: Sequence[Done]) -> JSON:
        return self.prompt_logprobs(choices[0])


class CompletionWire(OpenAIWire):
    """/v1/completions."""

    id_prefix = "cmpl-"
    object = "text_completion"
    part = "text_completion"

    def __init__(self, *args: Any, shift: int = 0, **options: Any) -> None:
        """shift: by how much a prompt that is repeated is longer than the text of its tokens."""
        super().__init__(*args, **options)
        self._shift = shift
        self._offsets: dict[int, _Offsets] = {}

    def opening(self, indices: Sequence[int], usage: Usage) -> bytes:
        return b""

    def piece(self, index: int, piece: Piece, logprobs: Any) -> bytes:
        assert isinstance(piece, Text)
        return self._chunk(index, b'"text":%b' % encode(piece.text), encode(logprobs), b"null")

    def closing(self, index: int, reason: str, seed: int) -> bytes:
        return self._chunk(index, b'"text":""', b"null", _end(reason, seed))

    def logprobs(
        self, index: int, ids: Sequence[int], values: Sequence[TokenLogprobs | None]
    ) -> Any:
        name, offsets = (
            self.names.completion,
            self._offsets.setdefault(index, _Offsets(self._shift)),
        )
        return {
            "tokens": [name(token) for token in ids],
            "token_logprobs": [v and max(v.logprob, MIN_LOGPROB) for v in values],
            "top_logprobs": [
                v and {name(t): max(p, MIN_LOGPROB) for t, p in v.top} for v in values
            ],
            "text_offset": [offsets.push(self.names.raw(token)) for token in ids],
        }

    def content(self, done: Done) -> JSON:
        return {"text": done.text}

    def of_prompt(self, done: Done) -> JSON:
        return self.prompt_logprobs(done)


def _call_delta(piece: Piece) -> JSON:
    if isinstance(piece, Call):
        function = {"name": piece.name, "arguments": ""}
        return {"index": piece.number, "id": piece.id, "type": "function", "function": function}
    assert not isinstance(piece, Text | Thought)
    return {"index": piece.number, "function": {"arguments": piece.text}}


def _call(call: MadeCall) -> JSON:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _end(reason: str, seed: int) -> bytes:
    return b'%b,"seed":%d' % (encode(reason), seed)


class _Offsets:
    """Where each token begins in the completion's text, in characters."""

    def __init__(self, start: int) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._num_chars = start

    def push(self, raw: bytes) -> int:
        start = max(0, self._num_chars)
        self._num_chars += len(self._decoder.decode(raw))
        return start
