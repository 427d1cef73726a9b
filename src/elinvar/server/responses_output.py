"""The answer of /v1/responses as items, and the events that tell how they grow."""

from __future__ import annotations

from typing import Any

from elinvar.base.plan import TokenLogprobs
from elinvar.engine.pieces import Call, Piece, Text, Thought
from elinvar.server.asked import Step
from elinvar.server.responses_items import seal
from elinvar.server.tokens import TokenNames
from elinvar.server.wire import MIN_LOGPROB

JSON = dict[str, Any]
_ARGUMENTS = "response.function_call_arguments"
_EMPTY: dict[str, JSON] = {"message": {"content": []}, "reasoning": {"content": []}}
"""What an item has when it begins: it grows afterwards."""


class Output:
    """The items of one answer as they grow.

    Methods return the events of what they do, without numbers. A message and the thoughts before it
    end when something else begins; calls end with the answer, since the arguments of several may
    come in turns.
    """

    def __init__(
        self, response_id: str, names: TokenNames | None, *, with_logprobs: bool, sealed: bool
    ) -> None:
        """with_logprobs: of the text; sealed: thoughts are written as `encrypted_content`, too."""
        self.items: list[JSON] = []
        self.reason: str | None = None
        self.seed: int | None = None
        self._tail = response_id.removeprefix("resp_")
        self.names = names
        """Needed for log-probs."""
        self._with_logprobs, self._sealed = with_logprobs, sealed
        self._kind: type[Piece] | None = None
        """Of what is open, a message or thoughts."""
        self._index = 0
        """Of the open one among the items."""
        self._delta: JSON = {}
        """What its deltas have in common: there is one a token."""
        self._texts: list[str] = []
        self._logprobs: list[JSON] = []
        self._pending: list[JSON] = []
        """Log-probs of tokens whose text is held back."""
        self._calls: dict[int, tuple[int, list[str]]] = {}
        """Items and arguments of calls by their number."""

    def push(self, step: Step) -> list[JSON]:
        events: list[JSON] = []
        if self._with_logprobs and step.logprobs:
            values = zip(step.ids, step.logprobs, strict=True)
            self._pending += [self._logprob(token, value) for token, value in values if value]
        for piece in step.pieces:
            self._add(piece, events)
        if step.reason is not None:
            self.reason, self.seed = step.reason, step.seed
            self._finish(events)
        return events

    def _add(self, piece: Piece, events: list[JSON]) -> None:
        if isinstance(piece, Text | Thought):
            if piece.text:
                self._write(piece, events)
            return
        if isinstance(piece, Call):
            self._close(events)
            call = {"call_id": piece.id, "name": piece.name, "arguments": ""}
            self._calls[piece.number] = self._begin("fc", "function_call", call, events), []
        else:
            index, arguments = self._calls[piece.number]
            arguments.append(piece.text)
            events.append(self._event(f"{_ARGUMENTS}.delta", index, delta=piece.text))
        self._pending = []

    def _write(self, piece: Text | Thought, events: list[JSON]) -> None:
        kind = type(piece)
        if kind is not self._kind:
            self._close(events)
            self._open(kind, events)
        self._texts.append(piece.text)
        logprobs, self._pending = self._pending, []
        if kind is Text:
            self._logprobs += logprobs
            events.append({**self._delta, "delta": piece.text, "logprobs": logprobs})
        else:
            events.append({**self._delta, "delta": piece.text})

    def _open(self, kind: type[Text] | type[Thought], events: list[JSON]) -> None:
        if kind is Text:
            more: JSON = {"role": "assistant", "content": []}
            self._index = self._begin("msg", "message", more, events)
        else:
            more = {"summary": [], "content": []}
            self._index = self._begin("rs", "reasoning", more, events)
        self._kind, self._texts, self._logprobs = kind, [], []
        self._delta = self._text_event("delta", {})
        events.append(self._part("added", ""))

    def _close(self, events: list[JSON]) -> None:
        """What is open, other than calls."""
        if self._kind is None:
            return
        item, text = self.items[self._index], "".join(self._texts)
        if self._kind is Text:
            self._logprobs += self._pending
            self._pending = []
        part = self._part("done", text)
        shown: JSON = {"text": text}
        if self._kind is Text:
            shown["logprobs"] = self._logprobs
        elif self._sealed:
            item["encrypted_content"] = seal(text)
        item["content"].append(part["part"])
        events += [self._text_event("done", shown), part]
        self._kind = None
        self._end(self._index, events)

    def _finish(self, events: list[JSON]) -> None:
        if not self.items:
            # Clients look for a message, even if there is nothing in it.
            self._open(Text, events)
        if self.reason == "length":
            self.items[-1]["status"] = "incomplete"
        self._close(events)
        for index, arguments in self._calls.values():
            item = self.items[index]
            item["arguments"] = "".join(arguments)
            arguments_done = self._event(f"{_ARGUMENTS}.done", index, arguments=item["arguments"])
            events.append(arguments_done)
            self._end(index, events)

    def cut_off(self) -> list[JSON]:
        """The items of an answer that will not go on."""
        if self.reason is None and self.items:
            self.reason = "length"
            self._finish([])
        return self.items

    # ---- events ---------------------------------------------------------------------------------

    def _begin(self, prefix: str, kind: str, more: JSON, events: list[JSON]) -> int:
        index = len(self.items)
        item = {"id": f"{prefix}_{self._tail}{index:02x}", "type": kind, **more}
        item["status"] = "in_progress"
        self.items.append(item)
        added = {"output_index": index, "item": {**item, **_EMPTY.get(kind, {})}}
        events.append({"type": "response.output_item.added", **added})
        return index

    def _end(self, index: int, events: list[JSON]) -> None:
        item = self.items[index]
        if item["status"] == "in_progress":
            item["status"] = "completed"
        done = {"output_index": index, "item": item}
        events.append({"type": "response.output_item.done", **done})

    def _part(self, what: str, text: str) -> JSON:
        """The event of the open one's only part."""
        part: JSON = {"type": "reasoning_text", "text": text}
        if self._kind is Text:
            part = {"type": "output_text", "text": text, "annotations": []}
            part["logprobs"] = self._logprobs
        return self._event(f"response.content_part.{what}", self._index, content_index=0, part=part)

    def _text_event(self, what: str, more: JSON) -> JSON:
        kind = "output_text" if self._kind is Text else "reasoning_text"
        return self._event(f"response.{kind}.{what}", self._index, content_index=0, **more)

    def _event(self, name: str, index: int, **more: Any) -> JSON:
        return {"type": name, "item_id": self.items[index]["id"], "output_index": index, **more}

    def _logprob(self, token: int, value: TokenLogprobs) -> JSON:
        top = [self._entry(t, p) for t, p in value.top]
        return self._entry(token, value.logprob) | {"top_logprobs": top}

    def _entry(self, token: int, logprob: float) -> JSON:
        assert self.names is not None
        text, raw = self.names.chat(token)
        return {"token": text, "logprob": max(logprob, MIN_LOGPROB), "bytes": raw}
