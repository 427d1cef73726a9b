"""Tiers over tiers that fail, lie, hang and die: callers never wait, nothing is lost track of."""

import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elinvar.kv.tiers.disk import DiskTier
from elinvar.kv.tiers.hierarchy import HOST, NOWHERE, UNKNOWN, Tiers
from elinvar.kv.tiers.host import HostTier
from elinvar.kv.tiers.ticket import Ticket
from tiers import DOWN, SIZES, FakeTier, content, key, kill_threads, new_threads, size, wait_for

MB = 1 << 20
SMALL = 400_000
"""Host memory for a few contents."""


class Clock:
    """The real one, and what is added to it."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead


Make = Callable[..., Tiers]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Tiers] = []
    others = threading.enumerate()
    gates: list[FakeTier] = []

    def build(*lower: FakeTier | DiskTier, num_bytes: int = SMALL, **more: object) -> Tiers:
        made.append(Tiers(HostTier(None, num_bytes, SIZES), lower, **more))  # type: ignore[arg-type]
        gates.extend(tier for tier in lower if isinstance(tier, FakeTier))
        return made[-1]

    yield build
    for tier in gates:
        tier.gate.set()
    for tiers in made:
        tiers.close()
    wait_for(lambda: not new_threads(others))


def put(tiers: Tiers, *numbers: int) -> None:
    for n in numbers:
        assert tiers.put(key(n), memoryview(content(n)))


def get(tiers: Tiers, number: int) -> bool:
    into = bytearray(size(number))
    found = tiers.get(key(number), memoryview(into))
    assert not found or into == content(number)
    return found


def where(tiers: Tiers, *numbers: int) -> list[int]:
    return tiers.where([key(n) for n in numbers])


def ask(tiers: Tiers, *numbers: int) -> None:
    ticket = tiers.ask([key(n) for n in numbers], [size(n) for n in numbers])
    wait_for(lambda: ticket.done)


def fetch(tiers: Tiers, *numbers: int) -> Ticket:
    return tiers.fetch([key(n) for n in numbers], [size(n) for n in numbers])


def fetched(tiers: Tiers, *numbers: int) -> Ticket:
    ticket = fetch(tiers, *numbers)
    wait_for(lambda: ticket.done)
    return ticket


MANY = tuple(range(2, 92, 3))
"""More contents, of 70,000 bytes each, than host memory holds."""


def put_slowly(tiers: Tiers, *numbers: int) -> None:
    for n in numbers:
        put(tiers, n)
        assert tiers.flush()


def test_what_host_memory_gives_up_comes_back_from_below(make: Make, tmp_path: Path) -> None:
    tiers = make(DiskTier(tmp_path, 10 * MB))
    put_slowly(tiers, *MANY)
    assert where(tiers, MANY[0], MANY[-1], 1000) == [1, HOST, UNKNOWN]
    ticket = fetched(tiers, *MANY[:4])
    assert ticket.num_ready == 4
    assert where(tiers, *MANY[:4]) == [HOST] * 4
    put(tiers, *range(202, 262, 3))  # they are pinned
    assert all(get(tiers, n) for n in MANY[:4])
    ticket.release()
    ticket.release()
    assert tiers._host.num_pinned() == 0
    tiers._host.check()


def test_who_was_not_asked_is_unknown(make: Make) -> None:
    near, far = FakeTier("near"), FakeTier("far")
    far.contents[key(1)] = content(1)
    tiers = make(near, far)
    assert where(tiers, 1, 2) == [UNKNOWN, UNKNOWN]
    assert tiers.predict([UNKNOWN], [5]) == float("inf")
    ask(tiers, 1, 2)
    assert where(tiers, 1, 2) == [2, NOWHERE]
    assert fetched(tiers, 1).num_ready == 1
    assert where(tiers, 1) == [HOST]


def test_a_fetch_of_the_unknown_tries_tiers_in_turn(make: Make) -> None:
    near, far = FakeTier("near"), FakeTier("far")
    for n in (1, 2, 4):
        far.contents[key(n)] = content(n)
    tiers = make(near, far)
    assert fetched(tiers, 1, 2, 3, 4).num_ready == 2
    assert where(tiers, 3) == [NOWHERE]
    wait_for(lambda: key(1) in near.contents)  # what comes from afar is kept nearer


def test_absence_is_not_believed_for_ever(make: Make) -> None:
    clock, far = Clock(), FakeTier()
    tiers = make(far, clock=clock)
    ask(tiers, 1)
    assert where(tiers, 1) == [NOWHERE]
    clock.ahead += 11
    assert where(tiers, 1) == [UNKNOWN]


def test_one_read_serves_all_who_wait(make: Make) -> None:
    far = FakeTier()
    far.contents[key(1)] = content(1)
    tiers = make(far)
    far.gate.clear()
    tickets = [fetch(tiers, 1) for _ in range(10)]
    assert not any(ticket.done for ticket in tickets)
    tickets[0].release()
    far.gate.set()
    wait_for(lambda: all(ticket.done for ticket in tickets))
    assert [ticket.num_ready for ticket in tickets] == [0] + [1] * 9
    assert far.calls.count("read") == 1
    for ticket in tickets:
        assert tiers._host.num_pinned() == 1
        ticket.release()
    assert tiers._host.num_pinned() == 0


def test_a_price_is_measured_before_anything_relies_on_it(make: Make) -> None:
    clock, far = Clock(), FakeTier()
    far.contents[key(1)] = content(1)
    tiers = make(far, clock=clock)
    assert tiers.predict([], []) == 0
    assert tiers.predict([1], [1000]) == float("inf")
    assert tiers.ask_s == 0
    ask(tiers, 1)
    assert 0 < tiers.ask_s < 1
    wait_for(lambda: tiers.predict([1], [1000]) < 1)
    assert tiers.predict([1], [10**9]) > tiers.predict([1], [10**6])
    assert tiers.predict([1], [0]) < tiers.predict([1], [10**6])


def test_a_tier_that_was_slow_is_tried_again(make: Make) -> None:
    clock, far = Clock(), FakeTier()
    far.contents[key(1)] = content(1)
    tiers = make(far, clock=clock, timeout_s=100.0)
    far.gate.clear()
    ticket = fetch(tiers, 1)
    wait_for(lambda: far.calls)
    clock.ahead += 20
    far.gate.set()
    wait_for(lambda: ticket.done)
    ticket.release()
    assert tiers.predict([1], [size(1)]) > 19
    for _ in range(60):
        clock.ahead += 31
        before, reads = tiers.predict([1], [size(1)]), far.calls.count("read")
        tiers.ask([key(5)], [size(5)])  # any work wakes a thread
        wait_for(lambda reads=reads: far.calls.count("read") > reads)
        wait_for(lambda before=before: tiers.predict([1], [size(1)]) < before)
    assert tiers.predict([1], [size(1)]) < 0.2


def test_trouble_is_logged_once_and_its_end(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    clock, far = Clock(), FakeTier()
    tiers = make(far, clock=clock)
    put_slowly(tiers, 1)
    far.fail = DOWN
    caplog.set_level(logging.INFO)
    for n in range(2, 40):
        assert fetched(tiers, 1000 + n).num_ready == 0
        put(tiers, n)
    wait_for(lambda: len(caplog.messages) == 2)
    assert sorted(caplog.messages) == [
        "fake: reading fails, requests go on without it: it is down",
        "fake: writing fails, requests go on without it: it is down",
    ]
    assert where(tiers, 39, 1, 1000) == [HOST, NOWHERE, NOWHERE]
    assert len(far.calls) < 20
    for _ in range(8):  # its pauses grow
        clock.ahead += 100
        put(tiers, 77)
        time.sleep(0.02)
    assert len(caplog.messages) == 2
    far.fail = None
    clock.ahead += 100
    put(tiers, 78)
    wait_for(lambda: len(caplog.messages) == 4)
    assert sorted(caplog.messages[2:]) == ["fake: reading works again", "fake: writing works again"]
    assert tiers.flush()
    far.contents[key(500)] = content(500)
    assert fetched(tiers, 500).num_ready == 1


def test_a_full_tier_is_read_and_not_said_to_work(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    clock, far = Clock(), FakeTier()
    far.contents[key(1)] = content(1)
    tiers = make(far, clock=clock)
    far.fail, far.failing = DOWN, {"write"}
    for n in range(2, 8):
        calls = len(far.calls)
        put(tiers, n)
        wait_for(lambda calls=calls: "write" in far.calls[calls:])
        clock.ahead += 70
    assert len([m for m in caplog.messages if "writing" in m]) == 1
    ticket = fetched(tiers, 1)
    assert ticket.num_ready == 1
    ticket.release()
    far.fail = None
    put(tiers, 8)
    wait_for(lambda: "fake: writing works again" in caplog.messages)
    assert not any("reading" in m for m in caplog.messages)


def test_a_tier_that_hangs_holds_up_nobody(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    clock, far, near = Clock(), FakeTier("far"), FakeTier("near")
    for n in (1, 4):
        far.contents[key(n)] = content(n)
    tiers = make(far, near, clock=clock)
    far.gate.clear()
    tickets = [fetch(tiers, n) for n in (1, 4, 7, 10, 13)]
    put(tiers, 2)
    wait_for(lambda: far.calls.count("read") == 3)
    assert not tickets[0].done
    clock.ahead += 6
    assert all(ticket.done and ticket.num_ready == 0 for ticket in tickets)
    near.contents[key(1)] = content(1)
    assert where(tiers, 1, 4) == [UNKNOWN, UNKNOWN]  # of the one that works
    assert fetched(tiers, 1).num_ready == 1  # and so it comes from there
    assert get(tiers, 2)
    assert "far: reading fails, requests go on without it: no answer in 5 s" in caplog.messages
    far.gate.set()
    clock.ahead += 1
    wait_for(lambda: where(tiers, 4) != [NOWHERE])
    wait_for(lambda: "far: reading works again" in caplog.messages)
    assert fetched(tiers, 4).num_ready == 1


def test_closing_beside_a_tier_that_hangs(make: Make) -> None:
    far = FakeTier()
    tiers = make(far)
    far.gate.clear()
    ticket = fetch(tiers, 1, 2)
    put(tiers, 3)
    began = time.monotonic()
    assert not tiers.flush(0.05)
    tiers.close()
    assert time.monotonic() - began < 10
    assert ticket.done
    assert ticket.num_ready == 0
    ticket.release()
    assert not tiers.put(key(4), memoryview(content(4)))
    assert not get(tiers, 3)
    assert fetch(tiers, 3).done
    assert not far.is_closed or far.calls


@pytest.mark.parametrize("death", [SystemExit(), KeyError("x"), MemoryError(), GeneratorExit()])
def test_what_a_thread_dies_of_costs_no_ticket(make: Make, death: BaseException) -> None:
    clock, far = Clock(), FakeTier()
    far.contents[key(1)] = content(1)
    tiers = make(far, clock=clock)
    far.fail = death
    assert fetched(tiers, 1, 2).num_ready == 0
    far.fail = None
    clock.ahead += 1
    put(tiers, 2)  # any work wakes a thread
    wait_for(lambda: where(tiers, 1) != [NOWHERE])
    assert fetched(tiers, 1).num_ready == 1


def test_dead_threads_are_replaced(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    far = FakeTier()
    far.contents[key(1)] = content(1)
    others = threading.enumerate()
    tiers = make(far)
    old = kill_threads(tiers)
    for n in itertools.count(2):
        if not any(thread.is_alive() for thread in old):
            break
        put(tiers, n)  # which wakes one that still lives
        time.sleep(0.001)
    put(tiers, 10_000)  # and this has all that died replaced
    assert tiers.flush()
    assert fetched(tiers, 1).num_ready == 1
    assert len(new_threads(others)) == 3


def test_host_memory_full_of_pins_ends_tickets_early(make: Make) -> None:
    far = FakeTier()
    for n in MANY:
        far.contents[key(n)] = content(n)
    tiers = make(far)
    ticket = fetched(tiers, *MANY)
    assert 0 < ticket.num_ready < 6
    # What came behind the first that did not is not pinned, so there may be room for some.
    for n in range(500, 510):
        tiers.put(key(n), memoryview(content(n)))
    assert all(get(tiers, n) for n in MANY[: ticket.num_ready])
    ticket.release()
    put(tiers, 500)
    tiers._host.check()


def test_the_last_keys_make_room_for_the_first() -> None:
    host = HostTier(None, SMALL, SIZES)
    ticket = Ticket(host, threading.Lock(), 4, 0, float("inf"), time.monotonic)
    for index in (1, 3):
        content_there = host.put_pinned(key(index), memoryview(content(index)))
        assert content_there is not None
        ticket.came(index, content_there)
    assert ticket.gave_up_last(0) and not ticket.wants(3) and ticket.wants(2)
    assert host.num_pinned() == 1
    assert ticket.gave_up_last(0) and not ticket.wants(1) and ticket.wants(0)
    assert host.num_pinned() == 0
    assert not ticket.gave_up_last(0), "nothing is held any more"
    first = host.put_pinned(key(0), memoryview(content(0)))
    assert first is not None
    ticket.came(0, first)
    assert ticket.done and ticket.num_ready == 1
    ticket.release()
    assert not ticket.gave_up_last(0)
    host.check()
    host.close()


def test_threads_that_read_ahead_leave_room_for_the_first(make: Make) -> None:
    class LateFirst(FakeTier):
        def read(self, name: bytes, into: memoryview) -> bool:
            if name == key(MANY[0]):
                wait_for(lambda: where(tiers, *MANY).count(HOST) == 5)
            return super().read(name, into)

    far = LateFirst()
    for n in MANY:
        far.contents[key(n)] = content(n)
    tiers = make(far)
    ticket = fetched(tiers, *MANY)
    # Two other threads may each hold one that nobody wants any more, just when the first looks for room.
    assert 3 <= ticket.num_ready <= 5
    assert all(get(tiers, n) for n in MANY[: ticket.num_ready])
    ticket.release()
    wait_for(lambda: tiers._host.num_pinned() == 0)
    tiers._host.check()


def test_what_is_lost_before_it_was_written_is_counted(make: Make) -> None:
    clock, far = Clock(), FakeTier()
    tiers = make(far, clock=clock)
    far.fail = DOWN
    put(tiers, *MANY)
    wait_for(lambda: far.calls)
    far.fail = None
    clock.ahead += 100
    put(tiers, 1)
    assert tiers.flush()
    wait_for(lambda: key(1) in far.contents)
    stats = tiers.stats()[1]
    assert stats.lost >= len(MANY) - 6
    assert stats.bytes_in == sum(len(data) for data in far.contents.values())
    assert stats.errors >= 1


def test_stats_say_what_went_where(make: Make, tmp_path: Path) -> None:
    tiers = make(DiskTier(tmp_path, 10 * MB))
    put_slowly(tiers, 0, 3)
    assert get(tiers, 0)
    assert not get(tiers, 6)
    host, disk = tiers.stats()
    assert (host.name, host.hits, host.misses) == ("host", 1, 1)
    assert (host.bytes_in, host.bytes_out, host.bytes_held) == (6_000, 3_000, 6_000)
    assert (disk.name, disk.bytes_in, disk.bytes_held) == ("disk", 6_000, 8_192)
    assert (disk.errors, disk.damaged, disk.lost) == (0, 0, 0)


def test_damage_on_disk_is_a_shorter_ticket(make: Make, tmp_path: Path) -> None:
    tiers = make(DiskTier(tmp_path, 10 * MB))
    put_slowly(tiers, *MANY)
    path = next(tmp_path.rglob(f"{key(MANY[1]).hex()}.kv"))
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    assert fetched(tiers, *MANY[:3]).num_ready == 1
    assert tiers.stats()[1].damaged == 1
    assert where(tiers, MANY[1]) == [NOWHERE]


def test_nothing_below_is_fine_too(make: Make) -> None:
    tiers = make()
    put(tiers, 1)
    assert where(tiers, 1, 2) == [HOST, NOWHERE]
    ticket = fetch(tiers, 1, 2)
    assert ticket.done
    assert ticket.num_ready == 1
    assert tiers.ask([key(2)], [size(2)]).done
    assert tiers.flush()
    tiers.forget(key(1))
    assert not get(tiers, 1)
    ticket.release()


def test_files_stay_as_many(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        host = HostTier(tmp_path / "segment", MB, SIZES)
        tiers = Tiers(host, [DiskTier(tmp_path / "kv", MB)])
        put_slowly(tiers, 1, 2, 3)
        fetched(tiers, 1, 2).release()
        tiers.close()
    wait_for(lambda: len(os.listdir("/proc/self/fd")) <= before)
