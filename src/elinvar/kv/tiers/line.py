"""Line: a connected socket of which every transfer has a deadline."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from contextlib import suppress

_MAX_PARTS = 512
"""Buffers a system call; Linux takes 1024."""


class WireError(Exception):
    """The other side is gone, late, or does not speak the protocol. Raised as itself within this
    package only."""


class Line:
    """A connected socket. Each transfer must be over by a deadline (of time.monotonic()), however
    slowly the other side drips. Raises WireError."""

    def __init__(self, sock: socket.socket) -> None:
        with suppress(OSError):  # the other side is gone: the first transfer will say so
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock

    def receive(self, num_bytes: int, deadline: float) -> bytearray:
        data = bytearray(num_bytes)
        self.receive_into([memoryview(data)], deadline)
        return data

    def receive_into(self, parts: Sequence[memoryview], deadline: float) -> None:
        """Fill all the parts."""
        left = list(parts)
        while left:
            self._sock.settimeout(_until(deadline))
            try:
                count = self._sock.recvmsg_into(left[:_MAX_PARTS])[0]
            except OSError as error:
                raise _said(error) from None
            if count == 0:
                raise WireError("it closed the connection")
            _skip(left, count)

    def send(self, parts: Sequence[bytes | memoryview], deadline: float) -> None:
        left = [memoryview(part) for part in parts if len(part)]
        while left:
            self._sock.settimeout(_until(deadline))
            try:
                count = self._sock.sendmsg(left[:_MAX_PARTS])
            except OSError as error:
                raise _said(error) from None
            _skip(left, count)

    @property
    def quiet(self) -> bool:
        """Whether the other side has said nothing since its last answer, nor closed."""
        self._sock.settimeout(0)
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def shut(self) -> None:
        """End it while another thread waits on it, whose transfer fails."""
        with suppress(OSError):  # the other side was first
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()


def _until(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise WireError("it took too long")
    return left


def _said(error: OSError) -> WireError:
    if isinstance(error, TimeoutError):
        return WireError("it took too long")
    return WireError(error.strerror or str(error))


def _skip(parts: list[memoryview], count: int) -> None:
    """Leave out the first `count` bytes."""
    done = 0
    while done < len(parts) and count >= len(parts[done]):
        count -= len(parts[done])
        done += 1
    del parts[:done]
    if count:
        parts[0] = parts[0][count:]
