"""How answers look at /v1/responses: a response object, or numbered events."""

from __future__ import annotations

import time
from collections.abc import Sequence

from elinvar.server.asked import Done, Step, Usage
from elinvar.server.errors import ApiError
from elinvar.server.reply import encode
from elinvar.server.responses_output import JSON, Output
from elinvar.server.tokens import TokenNames
from elinvar.server.wire import Wire

_CODES = {429: "rate_limit_exceeded", 400: "invalid_prompt"}


class ResponseWire(Wire):
    """One response. What it came to is `result` once it has ended."""

    def __init__(
        self,
        response_id: str,
        shown: JSON,
        names: TokenNames | None,
        *,
        with_logprobs: bool = False,
        sealed: bool = False,
        created_at: int | None = None,
    ) -> None:
        """shown: what the response repeats of its request."""
        self.id = response_id
        self.output = Output(response_id, names, with_logprobs=with_logprobs, sealed=sealed)
        self._head: JSON = {"id": response_id, "object": "response"}
        self._head["created_at"] = int(time.time()) if created_at is None else created_at
        self._shown = shown
        self._number = 0
        self.result: JSON = self._response("in_progress")

    # ---- as a list of events, for those who keep them -------------------------------------------

    def begin(self, queued: bool = False) -> list[bytes]:
        """queued: it may wait long before it runs."""
        states = ("created", "queued", "in_progress") if queued else ("created", "in_progress")
        first = "queued" if queued else "in_progress"
        events = []
        for name in states:
            status = "in_progress" if name == "in_progress" else first
            events.append({"type": f"response.{name}", "response": self._response(status)})
        self.result = self._response(first)
        return self._numbered(events)

    def advance(self, step: Step) -> list[bytes]:
        self.result["status"] = "in_progress"
        return self._numbered(self.output.push(step))

    def end(self, usage: Usage) -> list[bytes]:
        self.result = self._ended(usage)
        status = self.result["status"]
        return self._numbered([{"type": f"response.{status}", "response": self.result}])

    def fail(self, error: ApiError) -> list[bytes]:
        code = _CODES.get(error.status, "server_error")
        told = {"code": code, "message": error.message}
        self.result = self._response("failed", self.output.cut_off()) | {"error": told}
        return self._numbered([{"type": "response.failed", "response": self.result}])

    def running(self) -> JSON:
        return self._response("in_progress")

    def cancel(self) -> list[bytes]:
        """There is no event for it: the stream just ends."""
        self.result = self._response("cancelled", self.output.cut_off())
        return []

    # ---- as a Wire ------------------------------------------------------------------------------

    def opening(self, indices: Sequence[int], usage: Usage) -> bytes:
        return b"".join(self.begin())

    def chunk(self, step: Step) -> bytes:
        return b"".join(self.advance(step))

    def ending(self, usage: Usage) -> bytes:
        return b"".join(self.end(usage))

    def error(self, error: ApiError) -> bytes:
        return b"".join(self.fail(error))

    def see(self, step: Step) -> None:
        self.output.push(step)

    def whole(self, choices: Sequence[Done], usage: Usage) -> bytes:
        self.result = self._ended(usage)
        return encode(self.result)

    def _ended(self, usage: Usage) -> JSON:
        cut = self.output.reason == "length"
        ended = self._response("incomplete" if cut else "completed", self.output.items)
        if cut:
            ended["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            ended["completed_at"] = int(time.time())
        return ended | {"usage": usage_json(usage), "seed": self.output.seed}

    def _response(self, status: str, output: Sequence[JSON] = ()) -> JSON:
        unset = {"error": None, "incomplete_details": None, "completed_at": None, "usage": None}
        return {**self._head, "status": status, **self._shown, "output": output, **unset}

    def _numbered(self, events: Sequence[JSON]) -> list[bytes]:
        written = []
        for event in events:
            event["sequence_number"] = self._number
            self._number += 1
            written.append(b"event: %b\ndata: %b\n\n" % (event["type"].encode(), encode(event)))
        return written


def usage_json(usage: Usage) -> JSON:
    prompt, answer = usage.prompt_tokens, usage.completion_tokens
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": answer,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": prompt + answer,
    }
