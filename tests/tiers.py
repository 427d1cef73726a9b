"""Contents that follow from their keys, a tier in a dict that fails when told, and waiting."""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections.abc import Callable, Collection, Sequence

from elinvar.kv.tiers.hierarchy import Tiers
from elinvar.kv.tiers.tier import TierError

SIZES = (3_000, 20_000, 70_000)


def key(number: int) -> bytes:
    return number.to_bytes(4, "little") * 8


def size(number: int) -> int:
    return SIZES[number % len(SIZES)]


def content(number: int) -> bytes:
    return random.Random(number).randbytes(size(number))


def wait_for(condition: Callable[[], object], limit_s: float = 20.0) -> None:
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.001)


def new_threads(others: Collection[threading.Thread]) -> list[threading.Thread]:
    """Of tiers, that are alive and none of `others`: a test before may have left some that hang."""
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("elinvar-")]
    return [thread for thread in threads if thread not in others]


def kill_threads(tiers: Tiers) -> list[threading.Thread]:
    """Each dies of the next thing that it does. Returns them."""
    threads = [thread for lane in tiers._lanes for thread in lane._threads if thread.is_alive()]
    for thread in threads:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit)
        )
    return threads


class FakeTier:
    """A dict. `fail` is raised by the next calls, or by those of `failing` alone; `gate` holds them
    until it is set."""

    def __init__(self, name: str = "fake") -> None:
        self.name = name
        self.contents: dict[bytes, bytes] = {}
        self.fail: BaseException | None = None
        self.failing = {"has", "read", "write"}
        self.gate = threading.Event()
        self.gate.set()
        self.calls: list[str] = []
        self.is_closed = False

    def _enter(self, call: str) -> None:
        self.calls.append(call)
        self.gate.wait()
        if self.fail is not None and call in self.failing:
            raise self.fail

    def has(self, keys: Sequence[bytes]) -> list[bool]:
        self._enter("has")
        return [key in self.contents for key in keys]

    def read(self, key: bytes, into: memoryview) -> bool:
        self._enter("read")
        data = self.contents.get(key)
        if data is None or len(data) != len(into):
            return False
        into[:] = data
        return True

    def write(self, key: bytes, data: memoryview) -> None:
        self._enter("write")
        self.contents[key] = bytes(data)

    def close(self) -> None:
        self.is_closed = True


DOWN = TierError("it is down")
