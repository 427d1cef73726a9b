"""How answers look on the wire: whole responses, and the chunks of a stream.

A chunk is written once a token for every stream, so its unchanging parts are encoded once a
response and a chunk is one `join`. Whole responses are plain dictionaries.
"""

from __future__ import annotations

import codecs
import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from elinvar.base.plan import TokenLogprobs
from elinvar.server.tokens import TokenNames

JSON = dict[str, Any]
DONE = b"data: [DONE]\n\n"
_MIN_LOGPROB = -9999.0
"""What OpenAI writes for a token that is out of the question; JSON has no -inf."""

encode = msgspec.json.encode


class Wire(Protocol):
    """One response of one endpoint. `index` is the choice's."""

    id: str

    def opening(self, index: int) -> bytes:
        """What a choice begins with in a stream; may be empty."""

    def piece(self, index: int, text: str, logprobs: Any) -> bytes:
        """The chunk of new text; `logprobs` as `logprobs()` made them, or None."""

    def closing(self, index: int, reason: str) -> bytes:
        """The chunk that says why a choice ended."""

    def usage(self, usage: JSON) -> bytes:
        """The chunk without choices that ends a stream where the client asked for it."""

    def logprobs(self, index: int, ids: Sequence[int], values: Sequence[TokenLogprobs]) -> Any:
        """The log-probs of some tokens of a choice, following those of the call before."""

    def choice(self, index: int, text: str, logprobs: list[Any] | None, reason: str) -> JSON:
        """A finished choice of a whole response; `logprobs` of all its deltas."""

    def response(self, choices: list[JSON], usage: JSON) -> bytes:
        """The whole response."""


class _Wire:
    """What both endpoints share: the fields around the choices."""

    id_prefix: str
    whole: str
    part: str

    def __init__(self, model: str, fingerprint: str, names: TokenNames, with_usage: bool) -> None:
        self.id = f"{self.id_prefix}{uuid.uuid4().hex}"
        self.names = names
        self._fields = {"created": int(time.time()), "model": model}
        self._fingerprint = {"system_fingerprint": fingerprint}
        head = {"id": self.id, "object": self.part, **self._fields, **self._fingerprint}
        self._head = b"data: " + encode(head)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if with_usage else b"]}\n\n"

    def usage(self, usage: JSON) -> bytes:
        return self._head + b'],"usage":' + encode(usage) + b"}\n\n"

    def response(self, choices: list[JSON], usage: JSON) -> bytes:
        body = {"id": self.id, "object": self.whole, **self._fields}
        return encode(body | {"choices": choices, "usage": usage} | self._fingerprint)


class ChatWire(_Wire):
    """/v1/chat/completions."""

    id_prefix = "chatcmpl-"
    whole = "chat.completion"
    part = "chat.completion.chunk"

    def opening(self, index: int) -> bytes:
        return self._chunk(index, b'{"role":"assistant","content":"","refusal":null}')

    def piece(self, index: int, text: str, logprobs: Any) -> bytes:
        written = b"null" if logprobs is None else encode({"content": logprobs, "refusal": None})
        return self._chunk(index, b'{"content":' + encode(text) + b"}", written)

    def closing(self, index: int, reason: str) -> bytes:
        return self._chunk(index, b"{}", reason=encode(reason))

    def _chunk(
        self, index: int, delta: bytes, logprobs: bytes = b"null", reason: bytes = b"null"
    ) -> bytes:
        return b'%b{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b}%b' % (
            self._head,
            index,
            delta,
            logprobs,
            reason,
            self._tail,
        )

    def logprobs(
        self, index: int, ids: Sequence[int], values: Sequence[TokenLogprobs]
    ) -> list[JSON]:
        return [
            self._entry(token, value.logprob)
            | {"top_logprobs": [self._entry(t, p) for t, p in value.top]}
            for token, value in zip(ids, values, strict=True)
        ]

    def _entry(self, token: int, logprob: float) -> JSON:
        text, raw = self.names.chat(token)
        return {"token": text, "logprob": max(logprob, _MIN_LOGPROB), "bytes": raw}

    def choice(self, index: int, text: str, logprobs: list[Any] | None, reason: str) -> JSON:
        content = None if logprobs is None else [entry for part in logprobs for entry in part]
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None if content is None else {"content": content, "refusal": None},
            "finish_reason": reason,
        }


class CompletionWire(_Wire):
    """/v1/completions."""

    id_prefix = "cmpl-"
    whole = "text_completion"
    part = "text_completion"

    def __init__(self, model: str, fingerprint: str, names: TokenNames, with_usage: bool) -> None:
        super().__init__(model, fingerprint, names, with_usage)
        self._offsets: dict[int, _Offsets] = {}

    def opening(self, index: int) -> bytes:
        return b""

    def piece(self, index: int, text: str, logprobs: Any) -> bytes:
        return self._chunk(index, encode(text), b"null" if logprobs is None else encode(logprobs))

    def closing(self, index: int, reason: str) -> bytes:
        return self._chunk(index, b'""', reason=encode(reason))

    def _chunk(
        self, index: int, text: bytes, logprobs: bytes = b"null", reason: bytes = b"null"
    ) -> bytes:
        return b'%b{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b}%b' % (
            self._head,
            index,
            text,
            logprobs,
            reason,
            self._tail,
        )

    def logprobs(self, index: int, ids: Sequence[int], values: Sequence[TokenLogprobs]) -> JSON:
        name, offsets = self.names.completion, self._offsets.setdefault(index, _Offsets())
        return {
            "tokens": [name(token) for token in ids],
            "token_logprobs": [max(v.logprob, _MIN_LOGPROB) for v in values],
            "top_logprobs": [{name(t): max(p, _MIN_LOGPROB) for t, p in v.top} for v in values],
            "text_offset": [offsets.push(self.names.raw(token)) for token in ids],
        }

    def choice(self, index: int, text: str, logprobs: list[Any] | None, reason: str) -> JSON:
        joined: JSON | None = None
        if logprobs is not None:
            keys = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
            joined = {key: [entry for part in logprobs for entry in part[key]] for key in keys}
        return {"index": index, "text": text, "logprobs": joined, "finish_reason": reason}


class _Offsets:
    """Where each token begins in the completion's text, in characters."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._num_chars = 0

    def push(self, raw: bytes) -> int:
        start = self._num_chars
        self._num_chars += len(self._decoder.decode(raw))
        return start
