"""Tiers against a dict, under everything that may happen: failures, deaths, restarts, pins."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from elinvar.kv.tiers.disk import DiskTier
from elinvar.kv.tiers.hierarchy import HOST, Tiers
from elinvar.kv.tiers.host import HostTier
from elinvar.kv.tiers.ticket import Ticket
from tiers import DOWN, SIZES, FakeTier, content, key, kill_threads, new_threads, size, wait_for

NUMBERS = st.integers(0, 19)
HOST_BYTES = 400_000
DISK_BYTES = 500_000
SPEED = 20
"""Seconds of the tiers in one of ours: pauses and limits pass quickly."""


class TiersMachine(RuleBasedStateMachine):
    """The model: contents follow from keys, so what is there must be right; which keys may be there
    at all are those that were put; which are pinned are those of the tickets held."""

    def __init__(self) -> None:
        super().__init__()
        self.others = threading.enumerate()
        self.folder = Path(tempfile.mkdtemp())
        self.segment = Path(f"/dev/shm/elinvar-test-{os.getpid()}-{time.monotonic_ns()}")
        self.far = FakeTier("far")
        self.written: set[int] = set()
        self.tickets: list[tuple[Ticket, list[int]]] = []
        self.start()

    def start(self) -> None:
        self.host = HostTier(self.segment, HOST_BYTES, SIZES, b"model")
        self.host.check()
        self.tiers = Tiers(
            self.host,
            [DiskTier(self.folder, DISK_BYTES), self.far],
            num_threads=2,
            clock=lambda: time.monotonic() * SPEED,
        )

    # ---- what an engine does ----------------------------------------------------------------

    @rule(numbers=st.lists(NUMBERS, min_size=1, max_size=4))
    def put(self, numbers: list[int]) -> None:
        for n in numbers:
            if self.tiers.put(key(n), memoryview(content(n))):
                self.written.add(n)
                assert self.get(n)
            else:
                assert self.tickets, "only pins stand in its way"

    @rule(n=NUMBERS)
    def read(self, n: int) -> None:
        if self.get(n):
            assert n in self.written

    def get(self, n: int) -> bool:
        into = bytearray(size(n))
        found = self.tiers.get(key(n), memoryview(into))
        assert not found or into == content(n)
        return found

    @rule(numbers=st.lists(NUMBERS, min_size=1, max_size=6))
    def fetch(self, numbers: list[int]) -> None:
        ticket = self.tiers.fetch([key(n) for n in numbers], [size(n) for n in numbers])
        self.tickets.append((ticket, numbers))

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        ticket, numbers = data.draw(st.sampled_from(self.tickets))
        wait_for(lambda: ticket.done)
        for n in numbers[: ticket.num_ready]:
            assert n in self.written
            assert self.tiers.where([key(n)]) == [HOST]
            assert self.get(n)

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        ticket, _ = self.tickets.pop(data.draw(st.integers(0, len(self.tickets) - 1)))
        ticket.release()
        assert ticket.done

    @rule(numbers=st.lists(NUMBERS, min_size=1, max_size=6))
    def ask(self, numbers: list[int]) -> None:
        keys, sizes = [key(n) for n in numbers], [size(n) for n in numbers]
        ticket = self.tiers.ask(keys, sizes)
        wait_for(lambda: ticket.done)
        levels = self.tiers.where(keys)
        assert self.tiers.predict(levels, sizes) >= 0
        for n, level in zip(numbers, levels, strict=True):
            assert level < 0 or n in self.written

    @rule(n=NUMBERS)
    def forget(self, n: int) -> None:
        if not any(n in numbers for _, numbers in self.tickets):
            self.tiers.forget(key(n))

    @rule()
    def flush(self) -> None:
        self.tiers.flush(0.05 * SPEED)

    # ---- what happens to it -----------------------------------------------------------------

    @rule(trouble=st.sampled_from([DOWN, DOWN, SystemExit(), KeyError("x"), MemoryError()]))
    def fail(self, trouble: BaseException) -> None:
        self.far.fail = trouble

    @rule()
    def hang(self) -> None:
        self.far.gate.clear()

    @rule()
    def recover(self) -> None:
        self.far.fail = None
        self.far.gate.set()

    @rule()
    def lose(self) -> None:
        self.far.contents.clear()

    @rule(seed=st.integers(0, 1 << 20))
    def damage(self, seed: int) -> None:
        files = sorted(self.folder.rglob("*.kv"))
        if files:
            path = files[seed % len(files)]
            with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
                file.seek(seed % path.stat().st_size)
                file.write(b"?")

    @rule()
    def kill(self) -> None:
        self.settle()
        kill_threads(self.tiers)

    @rule()
    def restart(self) -> None:
        self.far.gate.set()
        self.stop()
        self.start()

    def settle(self) -> None:
        """Threads rest, so that they die between two pieces of work."""
        self.far.gate.set()
        self.tiers.flush(SPEED)
        for ticket, _ in self.tickets:
            wait_for(lambda ticket=ticket: ticket.done)

    # ---- what always holds ------------------------------------------------------------------

    @invariant()
    def bounds_are_kept(self) -> None:
        held = 0
        for path in self.folder.rglob("*.kv"):
            with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
                held += path.stat().st_size
        assert held <= DISK_BYTES
        assert len(new_threads(self.others)) <= 4

    def stop(self) -> None:
        for ticket, _ in self.tickets:
            ticket.release()
        self.tickets.clear()
        self.tiers.close()
        assert self.host.num_pinned() == 0
        self.host.check()
        assert not self.tiers._wants
        held = sum(len(c.slots) for c in self.host._by_key.values())
        assert held + len(self.host._free) == self.host._num_fresh, "slots are lost"

    def teardown(self) -> None:
        self.far.fail = None
        self.far.gate.set()
        self.stop()
        shutil.rmtree(self.folder)
        self.segment.unlink()


@pytest.fixture(autouse=True)
def deaths_are_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own hook says nothing of a SystemExit, pytest's does."""
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)


TestTiers = TiersMachine.TestCase
TestTiers.settings = settings(
    max_examples=25,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
