"""Forms of multipart/form-data (RFC 7578), read as they arrive: a file in one never lies in memory."""

from __future__ import annotations

import email
import re
from dataclasses import dataclass
from email.message import Message

from elinvar.server.errors import ApiError, bad_request

MAX_HEADERS = 2**14
MAX_PARTS = 32
_BOUNDARY = re.compile(r'boundary=(?:"([^"]{1,200})"|([^\s;]{1,200}))', re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Begin:
    """A part begins."""

    name: str
    filename: str | None


Event = Begin | bytes
"""Bytes belong to the part that began last."""


class Multipart:
    """Reads one body, however it is cut."""

    def __init__(self, content_type: str) -> None:
        """Raises ApiError 400 where it is no such form."""
        found = _BOUNDARY.search(content_type)
        if found is None or not content_type.lower().startswith("multipart/form-data"):
            raise bad_request("The request body must be a form: multipart/form-data.")
        self._delimiter = b"\r\n--" + (found[1] or found[2]).encode("latin-1")
        # The first delimiter has no line before it.
        self._buffer = bytearray(b"\r\n")
        self._read = self._data
        self._in_part = False
        self._num_parts = 0
        self.ended = False

    def feed(self, data: bytes) -> list[Event]:
        """Raises ApiError 400 for what is malformed."""
        events: list[Event] = []
        self._buffer += data
        while not self.ended and self._read(events):
            pass
        if self.ended:
            self._buffer.clear()  # what follows means nothing
        return events

    def _data(self, events: list[Event]) -> bool:
        """Up to the next delimiter; whether there is more to be read now."""
        at = self._buffer.find(self._delimiter)
        # The end may be the beginning of one.
        sure = at if at >= 0 else len(self._buffer) - len(self._delimiter) + 1
        if sure > 0:
            if self._in_part:
                events.append(bytes(self._buffer[:sure]))
            del self._buffer[:sure]
        if at < 0:
            return False
        del self._buffer[: len(self._delimiter)]
        self._read = self._after_delimiter
        return True

    def _after_delimiter(self, events: list[Event]) -> bool:
        if len(self._buffer) < 2:
            return False
        self.ended = self._buffer[:2] == b"--"
        if not self.ended and self._buffer[:2] != b"\r\n":
            raise _malformed()
        # The line end stays: a part without headers has an empty line at once.
        self._read = self._headers
        return True

    def _headers(self, events: list[Event]) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > MAX_HEADERS:
                raise _malformed()
            return False
        head = email.message_from_string(self._buffer[2:end].decode("utf-8", "replace") + "\n\n")
        del self._buffer[: end + 4]
        name = head.get_param("name", header="content-disposition")
        self._num_parts += 1
        if not isinstance(name, str) or self._num_parts > MAX_PARTS:
            raise _malformed()
        events.append(Begin(name, _filename(head)))
        self._in_part, self._read = True, self._data
        return True


def _filename(head: Message) -> str | None:
    """In the charset that the client names (RFC 2231): some of Python's codecs refuse, or make halves
    of characters."""
    try:
        name = head.get_filename()
    except ValueError:
        raise _malformed() from None
    return None if name is None else name.encode(errors="replace").decode()


def _malformed() -> ApiError:
    return bad_request("The form of the request body is malformed.", code="invalid_form")
