"""How many threads a process gets, and what happens when the system has no more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from elinvar.base import cpus


@pytest.mark.parametrize(
    ("files", "granted"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu.max": "junk"}, None),
        ({}, None),
    ],
)
def test_what_a_container_grants(
    tmp_path: Path, files: dict[str, str], granted: float | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpus.cgroup_quota(tmp_path) == granted


def test_threads_fit_the_grant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus.os, "sched_getaffinity", lambda pid: set(range(64)))
    for quota, threads in ((None, 64), (0.5, 1), (2.5, 3), (128.0, 64)):
        monkeypatch.setattr(cpus, "cgroup_quota", lambda quota=quota: quota)
        assert cpus.usable_cpus() == threads


def test_too_many_threads_are_one_sentence() -> None:
    """The address space ends before the thread stacks do: the pool takes back what it began."""
    code = (
        "import resource; from elinvar.ops import load_provider; "
        "from elinvar.base.errors import ElinvarError; "
        "load_provider('cpu', 2); "
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize(); "
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))\n"
        "try: load_provider('cpu', 1000)\n"
        "except ElinvarError as error: print(error)\n"
        "print(load_provider('cpu', 2).num_threads)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sentence, threads = done.stdout.splitlines()
    assert sentence.startswith("1000 threads cannot be started") and threads == "2"
