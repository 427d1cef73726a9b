"""DiskTier: a folder that is full, damaged, shared, or not what it was."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from elinvar.base.errors import InputError
from elinvar.kv.tiers import disk as module
from elinvar.kv.tiers.disk import DiskTier
from elinvar.kv.tiers.tier import TierError
from elinvar.ops.files import exist
from tiers import content, key, size

MB = 1 << 20


def write(disk: DiskTier, number: int) -> None:
    disk.write(key(number), memoryview(content(number)))


def read(disk: DiskTier, number: int) -> bool:
    """Whether it is there; then it is right."""
    into = bytearray(size(number))
    found = disk.read(key(number), memoryview(into))
    assert not found or into == content(number)
    return found


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.kv"))


@pytest.mark.parametrize("ask", [exist, module.exist_each])
def test_what_is_there_is_asked_for_many_at_once(tmp_path: Path, ask: module.Exist) -> None:
    folder = tmp_path / os.fsdecode(b"not utf-8: \xff")
    disk = DiskTier(folder, MB, exist=ask)
    assert disk.has([]) == []
    for n in range(0, 6, 2):
        write(disk, n)
    assert disk.has([key(n) for n in range(7)]) == [True, False] * 3 + [False]
    files(folder)[0].unlink()
    assert sum(disk.has([key(n) for n in range(7)])) == 2


def test_what_is_written_is_found_by_the_next(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path / "a" / "b", MB)
    for n in range(6):
        write(disk, n)
    assert disk.has([key(n) for n in range(8)]) == [True] * 6 + [False] * 2
    disk.close()
    again = DiskTier(tmp_path / "a" / "b", MB)
    assert all(read(again, n) for n in range(6))
    assert not read(again, 7)
    assert all(f.stat().st_mode & 0o77 == 0 for f in (tmp_path / "a/b").rglob("*"))


def test_the_one_not_used_for_longest_goes_also_after_a_restart(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, 200_000)
    for n in range(2, 62, 3):  # 70,000 bytes
        write(disk, n)
        assert sum(f.stat().st_size for f in files(tmp_path)) <= 200_000
    assert len(files(tmp_path)) == 2
    assert disk.num_bytes == 2 * 73_728
    assert read(disk, 56)
    again = DiskTier(tmp_path, 200_000)
    write(again, 2)
    assert read(again, 56)
    assert not read(again, 59)


def test_what_is_larger_than_the_bound_is_not_kept(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, 10_000)
    write(disk, 0)
    write(disk, 2)
    assert read(disk, 0)
    assert not read(disk, 2)


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncated":
        del data[-1]
    elif how == "emptied":
        data.clear()
    elif how == "zeros":
        data = bytearray(len(data))
    elif how == "longer":
        data += b"x"
    elif how == "flipped":
        data[len(data) // 2] ^= 4
    elif how == "header":
        data[9] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "emptied", "zeros", "longer", "flipped", "header"])
def test_a_damaged_file_is_a_miss_and_goes(tmp_path: Path, how: str) -> None:
    disk = DiskTier(tmp_path, MB)
    write(disk, 1)
    (path,) = files(tmp_path)
    damage(path, how)
    assert not read(disk, 1)
    assert not files(tmp_path)
    assert disk.num_damaged == 1
    write(disk, 1)
    assert read(disk, 1)


def test_a_file_under_the_name_of_another_is_a_miss(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, MB)
    write(disk, 1)
    write(disk, 4)
    a, b = files(tmp_path)
    b.write_bytes(a.read_bytes())
    assert [read(disk, 1), read(disk, 4)].count(True) == 1


@pytest.mark.parametrize("what", ["folder", "pipe", "link"])
def test_a_name_that_is_no_file_harms_nobody(tmp_path: Path, what: str) -> None:
    disk = DiskTier(tmp_path, 200_000)
    write(disk, 1)
    (path,) = files(tmp_path)
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    try:
        assert not read(disk, 1)
    except TierError:
        assert what == "link"
    disk = DiskTier(tmp_path, 200_000)
    for n in range(2, 20, 3):
        write(disk, n)
    assert read(disk, 17)


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, 200_000)
    write(disk, 1)
    folder = files(tmp_path)[0].parent
    foreign = [tmp_path / "notes.txt", folder / "notes.kv", folder / "00.txt", tmp_path / "v1/x"]
    for path in foreign:
        path.write_bytes(bytes(300_000))
    disk = DiskTier(tmp_path, 200_000)
    for n in range(2, 20, 3):
        write(disk, n)
    assert all(path.stat().st_size == 300_000 for path in foreign)
    assert read(disk, 17)


def test_a_folder_that_cannot_be_had_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="give kv_disk a folder"):
        DiskTier(tmp_path / "file", MB)


def test_a_folder_that_was_there_is_nobody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = tmp_path / "v1" / "new"
    new.mkdir(parents=True)
    for folder in (new, new.parent):
        folder.chmod(0o755)
    DiskTier(tmp_path, MB)
    assert [folder.stat().st_mode & 0o777 for folder in (new, new.parent)] == [0o700, 0o700]
    monkeypatch.setattr(os, "geteuid", lambda: new.stat().st_uid + 1)
    with pytest.raises(InputError, match="belongs to another user: give kv_disk a folder"):
        DiskTier(tmp_path, MB)


def test_a_folder_that_vanishes_is_made_again(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path / "kv", MB)
    write(disk, 1)
    (tmp_path / "kv").rename(tmp_path / "gone")
    assert not read(disk, 1)
    write(disk, 1)
    assert read(disk, 1)


@pytest.mark.parametrize("call", ["open", "writev", "rename"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS])
def test_trouble_of_the_device_is_a_tier_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    disk = DiskTier(tmp_path, MB)
    write(disk, 2)

    def fails(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(module.os, call, fails)
        with pytest.raises(TierError):
            write(disk, 1)
    assert not list((tmp_path / "v1/new").iterdir())
    assert disk._coming == 0
    with monkeypatch.context() as patch:
        patch.setattr(module.os, "preadv", fails)
        with pytest.raises(TierError):
            read(disk, 2)
    assert read(disk, 2)
    write(disk, 1)
    assert read(disk, 1)


def test_short_writes_and_reads_are_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = DiskTier(tmp_path, MB)
    writev, write_, preadv = os.writev, os.write, os.preadv
    monkeypatch.setattr(module.os, "writev", lambda f, parts: writev(f, [parts[0], parts[1][:7]]))
    monkeypatch.setattr(module.os, "write", lambda f, data: write_(f, data[:9_000]))
    write(disk, 2)
    monkeypatch.setattr(
        module.os, "preadv", lambda f, parts, at: preadv(f, [*parts[:-1], parts[-1][:11_000]], at)
    )
    assert read(disk, 2)


def test_a_full_disk(small_disk: Path) -> None:
    disk = DiskTier(small_disk / "kv", 64 * MB)
    written = []
    with pytest.raises(TierError, match="No space left"):
        for n in range(2, 302, 3):
            write(disk, n)
            written.append(n)
    assert written
    assert all(read(disk, n) for n in written)
    assert not list((small_disk / "kv/v1/new").iterdir())


def test_two_share_a_folder(tmp_path: Path) -> None:
    a, b = (DiskTier(tmp_path, 500_000) for _ in range(2))
    for n in range(2, 302, 6):
        write(a, n)
        write(b, n)
        write(b, n + 3)
        assert read(a, n)
        assert read(a, n + 3)
    held = sum(f.stat().st_size for f in files(tmp_path))
    assert held <= 500_000 * (1 + 2 / 8)


_WRITER = """
import sys
from pathlib import Path
from tiers import content, key
from elinvar.kv.tiers.disk import DiskTier
disk = DiskTier(Path(sys.argv[1]), 1 << 20)
print("ready", flush=True)
number = int(sys.argv[2])
while True:
    number += 1
    disk.write(key(number), memoryview(content(number)))
"""


def test_killed_amid_writes_nothing_wrong_is_found_nor_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STALE_SECONDS", -1)
    for attempt in range(20):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path), str(1000 * attempt)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parent,
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(0.002 * (attempt % 5) + 0.0007 * attempt)
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        disk = DiskTier(tmp_path, MB)
        assert not list((tmp_path / "v1/new").iterdir())
        for path in files(tmp_path):
            assert read(disk, int.from_bytes(bytes.fromhex(path.stem)[:4], "little"))
        assert disk.num_damaged == 0
    assert files(tmp_path)
