"""Tracing requests: a line of JSON for each that ended, in a file. No texts and no tokens.

A thread of its own writes, so that neither steps nor answers wait for a disk.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from contextlib import suppress
from pathlib import Path
from queue import Empty, Full, Queue
from typing import TYPE_CHECKING

import msgspec

from elinvar.base.errors import ElinvarError
from elinvar.engine.watch import Record, record

if TYPE_CHECKING:
    from elinvar.engine.output import FinishReason
    from elinvar.sched.request import Request

log = logging.getLogger(__name__)

CLOSE_SECONDS = 10.0
"""For what is pending at the end."""
MAX_PENDING = 10_000
"""Lines that wait for the disk; beyond them lines are lost, and the log says so."""


class TraceFile:
    """A Watcher of an engine. Lines are appended to `path`; `events`: with all transitions of each
    request. Raises ElinvarError when the file cannot be opened.

    A disk that is full or slow costs lines, never an answer; the log tells once when lines are lost,
    and once when they are not any more.
    """

    def __init__(self, path: Path, events: bool = False) -> None:
        try:
            # A pipe that nobody reads would hold the start up.
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK
            self._file = os.open(path, flags, 0o640)
            os.set_blocking(self._file, True)
        except OSError as error:
            unread = error.errno == errno.ENXIO
            why = "it is a pipe that nobody reads" if unread else error.strerror
            raise ElinvarError(
                f"The trace {path} cannot be written: {why}; choose another file."
            ) from None
        self._path = path
        self._events = events
        self._pending: Queue[Record | None] = Queue(MAX_PENDING)
        self._num_lost = 0
        self._torn = False
        """Whether the file may end amid a line."""
        self._thread = threading.Thread(target=self._run, name="elinvar-trace", daemon=True)
        self._thread.start()

    def began(self, request: Request) -> None:
        pass

    def ended(self, request: Request, reason: FinishReason) -> None:
        line = record(request, reason)
        if not self._events:
            del line["events"]
        try:
            self._pending.put_nowait(line)
        except Full:
            self._lose(1, "the disk is slower than the requests")

    def close(self) -> None:
        """Write what is pending, then close the file. Once, and nothing is told of afterwards."""
        with suppress(Full):
            self._pending.put(None, timeout=CLOSE_SECONDS)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():  # a daemon: it does not keep the process
            log.error("The trace %s hangs; its last lines are lost.", self._path)
        else:
            os.close(self._file)

    def _run(self) -> None:
        closing = False
        while not closing:
            lines = [self._pending.get()]
            try:
                while True:
                    lines.append(self._pending.get_nowait())
            except Empty:
                pass
            closing = None in lines
            self._write([msgspec.json.encode(line) for line in lines if line is not None])

    def _write(self, lines: list[bytes]) -> None:
        # A line that a full disk cut stays alone: the next one begins anew.
        data = b"\n" * self._torn + b"".join(line + b"\n" for line in lines)
        written = num_whole = 0
        try:
            while written < len(data):
                written += os.write(self._file, data[written:])
        except OSError as error:
            if written:
                num_whole = data[:written].count(b"\n") - self._torn
                self._torn = data[written - 1 : written] != b"\n"
            self._lose(len(lines) - num_whole, error.strerror)
            return
        self._torn = False
        if self._num_lost and lines:
            log.warning("The trace %s goes on; %d lines were lost.", self._path, self._num_lost)
            self._num_lost = 0

    def _lose(self, count: int, why: str | None) -> None:
        if not self._num_lost:
            log.error("Lines of the trace %s are lost: %s.", self._path, why)
        self._num_lost += count
