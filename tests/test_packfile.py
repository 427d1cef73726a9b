"""Packed weight files: what is written is mapped, what is damaged is packed again."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elinvar.base.errors import ModelError
from elinvar.ops.layout import Weight, pack_float
from elinvar.weights import packfile
from elinvar.weights.packfile import Entry, StalePack, pack_key, read_pack, write_pack

KEY = pack_key("model", 1)
VALUES = np.arange(33 * 7, dtype=np.float32).reshape(33, 7)
ENTRIES = [Entry("gain", "vector", (5,)), Entry("w", "f32", (33, 7)), Entry("x", "q8", (1, 32))]


def chunks(entry: Entry) -> Iterator[np.ndarray]:
    if entry.kind == "vector":
        yield np.arange(5, dtype=np.float32).view(np.uint8)
    elif entry.name == "w":
        yield pack_float("f32", VALUES[:16]).data
        yield pack_float("f32", VALUES[16:]).data
    else:
        yield np.zeros(entry.nbytes, np.uint8)


def write(path: Path) -> Path:
    write_pack(path, KEY, ENTRIES, ["a note"], chunks)
    return path


def test_what_is_written_is_mapped(tmp_path: Path) -> None:
    pack = read_pack(write(tmp_path / "m.pack"), KEY)
    assert pack.notes == ["a note"] and list(pack.state) == ["gain", "w", "x"]
    gain, w = pack.state["gain"], pack.state["w"]
    assert isinstance(gain, np.ndarray) and gain.tolist() == [0, 1, 2, 3, 4]
    assert isinstance(w, Weight) and (w.kind, w.shape) == ("f32", (33, 7))
    assert np.array_equal(w.data, pack_float("f32", VALUES).data)
    for data in (gain, w.data):
        assert data.ctypes.data % 64 == 0 and not data.flags.writeable
    assert os.listdir(tmp_path) == ["m.pack"]


def test_keys_tell_everything_apart() -> None:
    assert len({pack_key("a", 1), pack_key("a", 2), pack_key("a1"), pack_key("a", "1")}) == 4


def stale(path: Path, key: bytes = KEY) -> str:
    with pytest.raises(StalePack) as caught:
        read_pack(path, key)
    return str(caught.value)


def test_stale_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.pack"
    assert stale(path) == "there is none"
    assert "another file" in stale(write(path), pack_key("model", 2))
    monkeypatch.setattr(packfile, "PACK_VERSION", packfile.PACK_VERSION + 1)
    assert "another version" in stale(path)
    path.write_bytes(b"")
    assert "empty" in stale(path)


def test_every_truncation_is_stale(tmp_path: Path) -> None:
    path = write(tmp_path / "m.pack")
    for size in range(path.stat().st_size - 1, -1, -7):
        with path.open("r+b") as file:
            file.truncate(size)
        stale(path)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(at=st.integers(0, 250), value=st.binary(min_size=1, max_size=4))
def test_damaged_headers_are_stale(tmp_path: Path, at: int, value: bytes) -> None:
    path = write(tmp_path / "m.pack")
    good = path.read_bytes()
    at = min(at, good.index(b"a note"))
    bad = good[:at] + value + good[at + len(value) :]
    path.write_bytes(bad)
    if bad != good:
        stale(path)


def test_full_disk_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 100))
    with pytest.raises(ModelError) as caught:
        write(tmp_path / "m.pack")
    assert f"{tmp_path} has too little free space" in str(caught.value)
    assert re.search(r"2,\d\d\d bytes are needed", str(caught.value))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_disk_fills_while_writing(code: int, tmp_path: Path) -> None:
    def failing(entry: Entry) -> Iterator[np.ndarray]:
        yield from chunks(entry)
        raise OSError(code, os.strerror(code))

    with pytest.raises(ModelError, match=r"too little free space: 2,\d\d\d bytes are needed"):
        write_pack(tmp_path / "m.pack", KEY, ENTRIES, [], failing)
    assert os.listdir(tmp_path) == []


def test_file_size_limit(tmp_path: Path) -> None:
    """The system itself refuses the write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(ModelError, match="too little free space"):
            write(tmp_path / "m.pack")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_other_errors_leave_the_old_file(tmp_path: Path) -> None:
    path = write(tmp_path / "m.pack")
    before = path.read_bytes()

    def failing(entry: Entry) -> Iterator[np.ndarray]:
        yield from chunks(entry)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_pack(path, KEY, ENTRIES, [], failing)
    assert os.listdir(tmp_path) == ["m.pack"] and path.read_bytes() == before
    with pytest.raises(ModelError, match="cannot be written"):
        write_pack(tmp_path / "none" / "m.pack", KEY, ENTRIES, [], chunks)


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    old, new = tmp_path / ".m.pack.1.tmp", tmp_path / ".m.pack.2.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 1e6,) * 2)
    write(tmp_path / "m.pack")
    assert sorted(os.listdir(tmp_path)) == [new.name, "m.pack"]
