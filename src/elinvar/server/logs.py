"""The log of a server: lines of text or JSON on stderr, and one line for each request that ended.

Owns how a line looks. No line holds what clients ask or get, unless that is asked for.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Any, Literal

import msgspec

from elinvar.server.seen import CURRENT, Answered, Seen

Format = Literal["text", "json"]
LEVELS = "debug", "info", "warning", "error"
_PARTS = "queued", "prefill", "decode", "preempted"

log = logging.getLogger(__name__)


def configure(form: Format, level: str) -> None:
    """All of the process's lines, uvicorn's too. level: of ours; libraries say nothing below a
    warning, or below `level` where that is higher."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    handler.addFilter(_with_request_id)
    logging.basicConfig(level="WARNING", handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.getLogger("elinvar").setLevel(level.upper())
    if level == "error":
        logging.getLogger().setLevel("ERROR")


def say(text: str) -> None:
    """What is told whatever the level: that the server listens."""
    record = log.makeRecord("elinvar", logging.INFO, "", 0, text, (), None)
    logging.getLogger("elinvar").handle(record)


def _with_request_id(record: logging.LogRecord) -> bool:
    seen = CURRENT.get()
    record.request_id = "" if seen is None else seen.request_id
    return True


class TextLines(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        request_id = getattr(record, "request_id", "")
        if request_id and request_id not in text:
            first, newline, rest = text.partition("\n")
            text = f"{first} [{request_id}]{newline}{rest}"
        return text


class JsonLines(logging.Formatter):
    """An object a line, with `fields` of the record beside what all lines have."""

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{at}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := getattr(record, "request_id", ""):
            line["request_id"] = request_id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = record.stack_info
        fields = getattr(record, "fields", None)
        if fields is not None:
            line |= {"message": "request", **fields}
        return msgspec.json.encode(line).decode()


class RequestLog:
    """A Teller: a line at level `info` for each request. prompts: with what was asked, as text."""

    def __init__(self, prompts: bool = False) -> None:
        self._prompts = prompts

    def tell(self, seen: Seen) -> None:
        if not log.isEnabledFor(logging.INFO):
            return
        fields = request_fields(seen)
        if self._prompts:
            fields["prompts"] = [text for one in seen.answers for text in _prompts(one)]
        text = " ".join(f"{name}={_shown(value)}" for name, value in fields.items())
        log.info("request %s", text, extra={"fields": fields})

    def close(self) -> None:
        for handler in logging.getLogger().handlers:
            handler.flush()


def request_fields(seen: Seen) -> dict[str, Any]:
    """What a line tells of a request: whose and which, what came of it, its tokens, its times in ms."""
    fields: dict[str, Any] = {
        "request_id": seen.request_id,
        "method": seen.scope["method"],
        "path": seen.scope["path"],
        "route": seen.route,
        "status": seen.status,
        "tenant": seen.tenant,
        "total_ms": round(1e3 * (seen.seconds or 0.0), 3),
    }
    if seen.texts is not None:
        fields |= {"model": seen.texts[0], "prompt_tokens": seen.texts[1]}
    if not seen.answers:
        return fields
    answer = seen.answers[-1]
    used = answer.used
    fields |= {
        "id": answer.id,
        "model": answer.model,
        "finish_reason": ",".join(dict.fromkeys(answer.reasons)) or None,
        "prompt_tokens": used.prompt_tokens,
        "cached_tokens": used.cached_tokens,
        "output_tokens": used.completion_tokens,
    }
    if answer.records:
        slowest = max(answer.records.values(), key=lambda one: one["wall_ns"])
        parts = slowest["parts_ns"]
        fields |= {f"{name}_ms": round(parts[name] / 1e6, 3) for name in _PARTS}
    return fields


def _prompts(answer: Answered) -> list[str]:
    by_prompt = {one.prompt_index: one.prompt_ids for one in answer.choices}
    return [answer.served.core.tokenizer.decode(ids) for ids in by_prompt.values()]


def _shown(value: Any) -> str:
    """One word, or in quotes: nothing that a client sends can begin a line."""
    text = str(value)
    return (
        text
        if text.isprintable() and text and " " not in text
        else msgspec.json.encode(value).decode()
    )
