"""Processes that are measured: run to the end, run to the first byte, or kept as a worker."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKERS = Path(__file__).parent.parent / "workers"
PATIENCE = 600.0
"""Seconds after which a silent worker counts as stuck: compiling a model can take minutes."""


class PeerError(Exception):
    """A side could not do its job; the message is one sentence for the person."""


@dataclass(frozen=True, slots=True)
class Finished:
    stdout: str
    peak_memory: int
    """Bytes resident at most; never below what the caller itself held when it began the process
    (Linux counts from before the exec), so the caller must be small."""


def run(command: list[str]) -> Finished:
    """Raises PeerError where the command does not exist or fails."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = _spawn(command, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            said = " ".join(err.read().split())[-400:]
            raise PeerError(f"{Path(command[0]).name} failed ({process.returncode}): {said}")
        return Finished(out.read(), usage.ru_maxrss * 1024)


def seconds_to_output(command: list[str]) -> float:
    """From the start of the process to the first byte on its stdout; it then runs to its end."""
    with tempfile.TemporaryFile("w+") as err:
        start = time.perf_counter()
        process = _spawn(command, stdout=subprocess.PIPE, stderr=err)
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 1)
        seconds = time.perf_counter() - start
        process.communicate()
        if process.returncode or not first:
            err.seek(0)
            said = " ".join(err.read().split())[-400:]
            raise PeerError(f"{Path(command[0]).name} failed ({process.returncode}): {said}")
    return seconds


class Worker:
    """A worker process (see workers/protocol.py). Between its jobs it is stopped by a signal, so
    that a peer whose threads spin while they wait takes no time from the side that is measured."""

    def __init__(self, command: list[str], patience: float = PATIENCE) -> None:
        """Starts it and waits for its first token; raises PeerError if that never comes."""
        self._patience = patience
        self._name = Path(command[1]).name if len(command) > 1 else command[0]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._unread = b""
        start = time.perf_counter()
        self._process = _spawn(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            # A group of its own: an engine may have processes of its own, stopped along with it.
            start_new_session=True,
        )
        self.about: dict[str, str] = self._reply()["ready"]
        self.start_seconds = time.perf_counter() - start
        self._signal(signal.SIGSTOP)

    def ask(self, **job: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._reply()
        self._signal(signal.SIGSTOP)
        return answer

    def close(self) -> None:
        if self._process.poll() is None:
            self._signal(signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            assert stream is not None
            stream.close()

    def _reply(self) -> dict[str, Any]:
        line = self._line()
        try:
            answer = json.loads(line)
        except ValueError:
            answer = {"error": line.decode(errors="replace").strip() or self._last_words()}
        if "error" in answer:
            self.close()
            raise PeerError(f"{self._name}: {answer['error']}")
        return answer

    def _line(self) -> bytes:
        """The next line of its stdout; what there is of it where the process ends or is silent."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + self._patience
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                return f"said nothing for {self._patience:.0f} s".encode()
            piece = os.read(self._process.stdout.fileno(), 65536)
            if not piece:
                break
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        return f"ended without an answer: {lines[-1][-400:] if lines else 'it said nothing'}"

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)


def _spawn(command: list[str], **streams: Any) -> subprocess.Popen[Any]:
    try:
        return subprocess.Popen(command, **streams)
    except OSError as error:
        raise PeerError(f"{command[0]} cannot be run: {error.strerror}") from None
