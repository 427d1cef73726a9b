"""The lines of a batch's input: read, and checked before any of them runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from elinvar.server.errors import ApiError
from elinvar.server.schema import decode

MAX_LINES = 50_000
"""OpenAI's own limit."""
MAX_ERRORS = 100
"""More are not told."""
MAX_ID = 512
_FORBIDDEN = "stream", "background"


class Line(msgspec.Struct, forbid_unknown_fields=True):
    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class Asks(msgspec.Struct):
    """What is looked at of a line's body."""

    model: Any = None
    stream: Any = None
    background: Any = None


@dataclass(slots=True)
class Checked:
    """What is to be said of an input."""

    total: int = 0
    errors: list[dict[str, Any]] = field(default_factory=list)
    models: set[str] = field(default_factory=set)

    def complain(self, line: int | None, code: str, message: str, param: str | None = None) -> None:
        if len(self.errors) < MAX_ERRORS:
            error = {"code": code, "line": line, "message": message, "param": param}
            self.errors.append(error)


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of those that are not empty; they count from 1."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if stripped := line.strip():
                yield number, stripped


def check(path: Path, endpoint: str, has_model: Callable[[str], bool], max_bytes: int) -> Checked:
    """Complaints about an input, by line. Raises OSError for a file that cannot be read."""
    checked = Checked()
    seen: dict[str, int] = {}
    if not path.exists():
        message = "The content of the file is not there any more."
        checked.complain(None, "file_not_found", message, "input_file_id")
        return checked
    for number, raw in read_lines(path):
        checked.total += 1
        if checked.total > MAX_LINES:
            message = f"The file has more than {MAX_LINES} lines; make several batches of it."
            checked.complain(number, "too_many_lines", message)
            break
        if len(raw) > max_bytes:
            message = f"The line is longer than this server's limit of {max_bytes} bytes."
            checked.complain(number, "line_too_large", message)
            continue
        try:
            line = decode(raw, Line)
            body = decode(bytes(line.body), Asks)
        except ApiError as error:
            message = error.message.replace("The request body", "The line")
            checked.complain(number, error.code or "invalid_value", message, error.param)
            continue
        _check_line(checked, number, line, endpoint)
        _check_body(checked, number, body, has_model)
        if line.custom_id in seen:
            first = seen[line.custom_id]
            message = f"The custom_id {line.custom_id[:100]!r} is that of line {first}, too."
            checked.complain(number, "duplicate_custom_id", message, "custom_id")
        seen.setdefault(line.custom_id, number)
    if not checked.total:
        checked.complain(None, "empty_file", "The file has no lines.", "input_file_id")
    return checked


def _check_line(checked: Checked, number: int, line: Line, endpoint: str) -> None:
    if not 1 <= len(line.custom_id) <= MAX_ID:
        message = f"custom_id must have 1 to {MAX_ID} characters."
        checked.complain(number, "invalid_custom_id", message, "custom_id")
    if line.method != "POST":
        message = f"method must be POST, got {line.method[:100]!r}."
        checked.complain(number, "invalid_method", message, "method")
    if line.url != endpoint:
        message = f"url must be the batch's endpoint {endpoint}, got {line.url[:200]!r}."
        checked.complain(number, "invalid_url", message, "url")


def _check_body(
    checked: Checked, number: int, body: Asks, has_model: Callable[[str], bool]
) -> None:
    if not isinstance(body.model, str) or not has_model(body.model):
        message = f"This server has no model {str(body.model)[:200]!r}."
        checked.complain(number, "model_not_found", message, "body.model")
    else:
        checked.models.add(body.model)
    for name in _FORBIDDEN:
        if getattr(body, name):
            message = f"Nobody reads a batch as it runs; leave {name} out."
            checked.complain(number, "invalid_value", message, f"body.{name}")
