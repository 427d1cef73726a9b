"""HostTier: nothing wrong ever comes out of it, whatever was done to it, and nothing leaks."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elinvar.base.errors import InputError
from elinvar.kv.tiers import segment
from elinvar.kv.tiers.host import HostTier
from elinvar.kv.tiers.segment import slot_size
from tiers import SIZES, content, key, size, wait_for

MB = 1 << 20


@pytest.fixture
def path() -> Iterator[Path]:
    path = Path(f"/dev/shm/elinvar-test-{os.getpid()}-{time.monotonic_ns()}")
    yield path
    path.unlink(missing_ok=True)


def put(host: HostTier, number: int) -> bool:
    return host.put(key(number), memoryview(content(number)))


def get(host: HostTier, number: int) -> bool:
    """Whether it is there; then it is right."""
    into = bytearray(size(number))
    found = host.get(key(number), memoryview(into))
    assert not found or into == content(number)
    return found


@given(st.lists(st.integers(1, 50 * MB), min_size=1, max_size=4))
def test_slots_waste_little(sizes: list[int]) -> None:
    slot = slot_size(sizes)
    assert slot % 64 == 0 or slot == min(sizes)
    taken = [-(-n // slot) * slot for n in sizes]
    if len(sizes) == 1 and sizes[0] > 16384:
        assert taken[0] <= 1.05 * sizes[0]
    assert all(n <= have < n + slot for n, have in zip(sizes, taken, strict=True))


def test_sizes_of_a_model_waste_less_than_a_hundredth() -> None:
    sizes = [24_576, 737_280, 2_211_840]
    slot = slot_size(sizes)
    assert all(-(-n // slot) * slot <= 1.01 * n for n in sizes)


def test_what_is_put_is_found_by_the_next(path: Path) -> None:
    host = HostTier(path, MB, SIZES, b"model")
    assert all(put(host, n) for n in range(9))
    host.close()
    assert not put(host, 10)
    assert not get(host, 1)
    again = HostTier(path, MB, SIZES, b"model")
    again.check()
    assert [k for k, _ in again.contents()] == [key(n) for n in range(9)]
    assert all(get(again, n) for n in range(9))
    again.close()
    assert path.stat().st_mode & 0o77 == 0


@pytest.mark.parametrize(
    "other", [(MB, SIZES, b"other"), (2 * MB, SIZES, b"model"), (MB, [999], b"model")]
)
def test_a_segment_of_something_else_is_emptied(path: Path, other: tuple) -> None:
    host = HostTier(path, MB, SIZES, b"model")
    put(host, 1)
    host.close()
    host = HostTier(path, *other)
    assert not host.contents()
    assert put(host, 0)
    assert get(host, 0)
    host.check()
    host.close()


def test_a_file_of_rubbish_is_emptied(path: Path) -> None:
    path.write_bytes(os.urandom(MB))
    path.chmod(0o644)
    host = HostTier(path, MB, SIZES)
    assert path.stat().st_mode & 0o777 == 0o600
    assert not host.contents()
    assert put(host, 1)
    assert get(host, 1)
    host.close()


def test_one_engine_at_a_time(path: Path) -> None:
    host = HostTier(path, MB, SIZES)
    with pytest.raises(InputError, match=r"in use by another engine.*kv_host_path") as refused:
        HostTier(path, MB, SIZES)
    assert refused.value.field == "kv_host_path"
    host.close()
    HostTier(path, MB, SIZES).close()


@pytest.mark.parametrize("what", ["folder", "link", "pipe", "missing"])
def test_what_is_no_file_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / what
    if what == "folder":
        path.mkdir()
    elif what == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif what == "pipe":
        os.mkfifo(path)
    else:
        path = path / "x"
    with pytest.raises(InputError, match=r"kv_host_path another file"):
        HostTier(path, MB, SIZES)
    assert not (tmp_path / "elsewhere").exists()


def test_too_little_is_refused() -> None:
    with pytest.raises(InputError, match="hold no block"):
        HostTier(None, 9000, SIZES)


def test_the_one_not_used_for_longest_goes() -> None:
    host = HostTier(None, 300_000, [20_000])
    numbers = range(1, 31, 3)  # all of 20,000 bytes
    for n in numbers:
        put(host, n)
    assert get(host, 1)
    assert all(put(host, n) for n in range(31, 31 + 3 * 6, 3))
    assert get(host, 1)
    assert not get(host, 4)
    assert host.num_evicted == 2
    host.check()
    host.close()


def test_the_pinned_stay_and_nothing_goes_for_nothing() -> None:
    host = HostTier(None, 300_000, [20_000])
    numbers = range(1, 43, 3)
    for n in numbers:
        assert put(host, n)
    pins = [host.pin(key(n)) for n in numbers[:-1]]
    assert not put(host, 2)  # 70,000 bytes, and only 20,000 may go
    assert get(host, numbers[-1])
    assert put(host, 100)
    assert all(get(host, n) for n in numbers[:-1])
    for pin in pins:
        assert pin is not None
        host.unpin(pin)
    assert host.num_pinned() == 0
    assert put(host, 2)
    host.check()
    host.close()


def test_what_is_forgotten_while_pinned_keeps_its_memory_until_then() -> None:
    host = HostTier(None, 300_000, [20_000])
    put(host, 1)
    pin = host.pin(key(1))
    assert pin is not None
    host.forget(key(1))
    assert not get(host, 1)
    assert put(host, 1)  # a new one beside the old
    host.unpin(pin)
    assert get(host, 1)
    host.check()
    assert len(host._free) + 1 == host._num_fresh
    host.close()


def test_a_size_that_is_not_the_contents_is_a_miss() -> None:
    host = HostTier(None, MB, SIZES)
    put(host, 0)
    assert not host.get(key(0), memoryview(bytearray(5)))
    assert get(host, 0)
    host.close()


@pytest.mark.parametrize("seed", range(20))
def test_flipped_bytes_anywhere_are_never_served(path: Path, seed: int) -> None:
    host = HostTier(path, MB, SIZES)
    for n in range(12):
        put(host, n)
    host.close()
    data = bytearray(path.read_bytes())
    used = host._segment._data_at + host._num_fresh * host._segment.slot_bytes
    for i in range(40):
        data[hash((seed, i)) % (used - 4096) + 4096] ^= 1 << (i % 8)
    path.write_bytes(data)
    host = HostTier(path, MB, SIZES)
    for n in range(12):
        get(host, n)
    for n in range(12):
        assert put(host, n)
        assert get(host, n)
    host.check()
    host.close()


def test_where_the_machine_has_no_more_memory_it_makes_do(monkeypatch: pytest.MonkeyPatch) -> None:
    host = HostTier(None, 64 * MB, [70_000])
    real = os.posix_fallocate

    def full(file: int, at: int, count: int) -> None:
        if at + count > 5 * MB:
            raise OSError(28, "No space left on device")
        real(file, at, count)

    monkeypatch.setattr(segment.os, "posix_fallocate", full)
    assert all(put(host, n) for n in range(2, 902, 3))
    assert 2 * MB < host.num_bytes < 5 * MB
    assert get(host, 899)
    host.check()
    host.close()


def test_a_full_file_system_is_no_bus_error(small_disk: Path) -> None:
    host = HostTier(small_disk / "segment", 64 * MB, [70_000])
    for n in range(2, 302, 3):
        put(host, n)
    assert host.num_bytes < 2 * MB
    host.check()
    host.close()


_WRITER = """
import sys
from pathlib import Path
from tiers import SIZES, content, key
from elinvar.kv.tiers.host import HostTier
host = HostTier(Path(sys.argv[1]), 1 << 20, SIZES, b"model")
print("ready", flush=True)
number = int(sys.argv[2])
while True:
    number += 1
    host.put(key(number), memoryview(content(number)))
    if number % 7 == 0:
        host.forget(key(number - 3))
"""


def test_killed_amid_writes_it_is_right_to_the_byte(path: Path) -> None:
    held = 0
    for attempt in range(25):
        start = 1000 * attempt
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(path), str(start)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parent,
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(0.002 * (attempt % 5) + 0.0007 * attempt)
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        host = HostTier(path, MB, SIZES, b"model")
        host.check()
        contents = host.contents()
        held = max(held, len(contents))
        for k, num_bytes in contents:
            n = int.from_bytes(k[:4], "little")
            assert num_bytes == size(n)
            assert get(host, n)
        assert host.num_damaged == 0
        host.close()
    assert held > 10


def test_no_file_stays_open(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        host = HostTier(path, MB, SIZES)
        put(host, 1)
        host.close()
    wait_for(lambda: len(os.listdir("/proc/self/fd")) <= before)
