"""How answers look on the wire: whole responses, and the chunks of a stream.

A chunk is written once a token for every stream, so its unchanging parts are encoded once a
response and a chunk is one `join`. Whole responses are plain dictionaries.
"""

from __future__ import annotations

import codecs
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import msgspec

from elinvar.base.plan import TokenLogprobs
from elinvar.server.tokens import TokenNames

JSON = dict[str, Any]
DONE = b"data: [DONE]\n\n"
_MIN_LOGPROB = -9999.0
"""What OpenAI writes for a token that is out of the question; JSON has no -inf."""

encode = msgspec.json.encode


class Wire(ABC):
    """One response of one endpoint; the subclasses are the endpoints. `index` is a choice's."""

    id_prefix: str
    whole: str
    part: str

    def __init__(
        self,
        model: str,
        fingerprint: str,
        names: TokenNames,
        with_usage: bool,
        service_tier: str | None = None,
    ) -> None:
        self.id = f"{self.id_prefix}{uuid.uuid4().hex}"
        self.names = names
        self._fields = {"created": int(time.time()), "model": model}
        self._fingerprint = {"system_fingerprint": fingerprint}
        if service_tier is not None:
            self._fingerprint["service_tier"] = service_tier
        head = {"id": self.id, "object": self.part, **self._fields, **self._fingerprint}
        self._head = b"data: " + encode(head)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if with_usage else b"]}\n\n"

    @abstractmethod
    def opening(self, index: int) -> bytes:
        """What a choice begins with in a stream; may be empty."""

    @abstractmethod
    def piece(self, index: int, text: str, logprobs: Any) -> bytes:
        """The chunk of new text; `logprobs` as `logprobs()` made them, or None."""

    @abstractmethod
    def closing(self, index: int, reason: str, seed: int) -> bytes:
        """The chunk that says why a choice ended, and the seed that repeats it."""

    def usage(self, usage: JSON) -> bytes:
        """The chunk without choices that ends a stream where the client asked for it."""
        return self._head + b'],"usage":' + encode(usage) + b"}\n\n"

    @abstractmethod
    def logprobs(self, index: int, ids: Sequence[int], values: Sequence[TokenLogprobs]) -> Any:
        """The log-probs of some tokens of a choice, following those of the call before."""

    @abstractmethod
    def content(self, text: str, logprobs: Sequence[Any] | None) -> JSON:
        """The text of a finished choice; `logprobs`: what `logprobs()` made of each delta."""

    def response(self, choices: Sequence[JSON], usage: JSON) -> bytes:
        """The whole response; a choice has `index`, its content, `finish_reason` and `seed`."""
        body = {"id": self.id, "object": self.whole, **self._fields}
        return encode(body | {"choices": choices, "usage": usage} | self._fingerprint)

    def _chunk(self, index: int, content: bytes, logprobs: bytes, end: bytes) -> bytes:
        parts = (self._head, index, content, logprobs, end, self._tail)
        return b'%b{"index":%d,%b,"logprobs":%b,"finish_reason":%b}%b' % parts


class ChatWire(Wire):
    """/v1/chat/completions."""

    id_prefix = "chatcmpl-"
    whole = "chat.completion"
    part = "chat.completion.chunk"

    def opening(self, index: int) -> bytes:
        delta = b'"delta":{"role":"assistant","content":"","refusal":null}'
        return self._chunk(index, delta, b"null", b"null")

    def piece(self, index: int, text: str, logprobs: Any) -> bytes:
        written = b"null" if logprobs is None else encode({"content": logprobs, "refusal": None})
        return self._chunk(index, b'"delta":{"content":%b}' % encode(text), written, b"null")

    def closing(self, index: int, reason: str, seed: int) -> bytes:
        return self._chunk(index, b'"delta":{}', b"null", _end(reason, seed))

    def logprobs(self, index: int, ids: Sequence[int], values: Sequence[TokenLogprobs]) -> Any:
        return [
            self._entry(token, value.logprob)
            | {"top_logprobs": [self._entry(t, p) for t, p in value.top]}
            for token, value in zip(ids, values, strict=True)
        ]

    def _entry(self, token: int, logprob: float) -> JSON:
        text, raw = self.names.chat(token)
        return {"token": text, "logprob": max(logprob, _MIN_LOGPROB), "bytes": raw}

    def content(self, text: str, logprobs: Sequence[Any] | None) -> JSON:
        joined: JSON | None = None
        if logprobs is not None:
            joined = {"content": [entry for part in logprobs for entry in part], "refusal": None}
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": joined}


class CompletionWire(Wire):
    """/v1/completions."""

    id_prefix = "cmpl-"
    whole = "text_completion"
    part = "text_completion"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._offsets: dict[int, _Offsets] = {}

    def opening(self, index: int) -> bytes:
        return b""

    def piece(self, index: int, text: str, logprobs: Any) -> bytes:
        return self._chunk(index, b'"text":%b' % encode(text), encode(logprobs), b"null")

    def closing(self, index: int, reason: str, seed: int) -> bytes:
        return self._chunk(index, b'"text":""', b"null", _end(reason, seed))

    def logprobs(self, index: int, ids: Sequence[int], values: Sequence[TokenLogprobs]) -> Any:
        name, offsets = self.names.completion, self._offsets.setdefault(index, _Offsets())
        return {
            "tokens": [name(token) for token in ids],
            "token_logprobs": [max(v.logprob, _MIN_LOGPROB) for v in values],
            "top_logprobs": [{name(t): max(p, _MIN_LOGPROB) for t, p in v.top} for v in values],
            "text_offset": [offsets.push(self.names.raw(token)) for token in ids],
        }

    def content(self, text: str, logprobs: Sequence[Any] | None) -> JSON:
        joined: JSON | None = None
        if logprobs is not None:
            keys = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
            joined = {key: [entry for part in logprobs for entry in part[key]] for key in keys}
        return {"text": text, "logprobs": joined}


def _end(reason: str, seed: int) -> bytes:
    return b'%b,"seed":%d' % (encode(reason), seed)


class _Offsets:
    """Where each token begins in the completion's text, in characters."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._num_chars = 0

    def push(self, raw: bytes) -> int:
        start = self._num_chars
        self._num_chars += len(self._decoder.decode(raw))
        return start
