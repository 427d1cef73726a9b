"""Whatever lies below fails, requests go on: the same bits, one line in the log, no long wait."""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from elinvar.kv.tiers import hierarchy
from elinvar.kv.tiers.hierarchy import Tiers
from engines import answers
from kv_servers import fake_server, kv_server
from test_tiers_bits import PARAMS, PROMPTS, ask_all, engine_above, expected, hits, push_out

SMALL = {"num_blocks": 8, "max_context": 160, "kv_disk_size": 2**30}
TIMEOUT_S = 0.5
"""Of a ticket, where a test waits for it."""


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.message for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_killed_engine_leaves_a_folder_that_serves(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom test_tiers_faults import SMALL\n"
        "from test_tiers_bits import ask_all, engine_above\n"
        "with engine_above('llama', kv_tiers=(sys.argv[1],), **SMALL) as engine:\n"
        "    print('ready', flush=True)\n    while True:\n        ask_all(engine)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=environment
        )
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        until = time.monotonic() + 10
        while not list(tmp_path.rglob("*.kv")) and time.monotonic() < until:
            time.sleep(0.001)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    with engine_above("llama", kv_tiers=(str(tmp_path),), **SMALL) as engine:
        assert ask_all(engine) == expected("llama")
        assert hits(engine, 1) > 0


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """As a full disk: what is longer cannot be written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with engine_above("llama", kv_tiers=(str(tmp_path),), **SMALL) as engine:
        with files_of_at_most(1000):
            for _ in range(3):
                assert ask_all(engine) == expected("llama")
                push_out(engine)
            assert engine.tiers is not None and engine.tiers.stats()[1].errors > 0
        assert len([text for text in said(caplog) if "writing" in text]) == 1


@pytest.mark.parametrize("cut", [False, True])
def test_damaged_files(tmp_path: Path, cut: bool, caplog: pytest.LogCaptureFixture) -> None:
    with engine_above("gemma3", kv_tiers=(str(tmp_path),), **SMALL) as engine:
        ask_all(engine)
        push_out(engine)
        assert engine.tiers is not None and engine.tiers.flush()
    files = list(tmp_path.rglob("*.kv"))
    assert len(files) > 5
    for path in files:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2) if cut else (file.seek(600), file.write(b"?!"))
    with engine_above("gemma3", kv_tiers=(str(tmp_path),), **SMALL) as engine:
        assert ask_all(engine) == expected("gemma3")
        assert engine.tiers is not None and engine.tiers.stats()[1].damaged > 1
    assert len(said(caplog)) == 1


def test_damaged_host_memory(caplog: pytest.LogCaptureFixture) -> None:
    with engine_above("llama", num_blocks=8, max_context=160) as engine:
        assert ask_all(engine) == expected("llama")
        push_out(engine)
        assert engine.tiers is not None
        segment = engine.tiers._host._segment
        for at in range(segment._data_at, len(segment._view), 1000):
            segment._view[at] ^= 1
        assert ask_all(engine) == expected("llama")
        assert engine.tiers.stats()[0].damaged > 1
    assert len(said(caplog)) == 1


def test_a_server_that_vanishes(caplog: pytest.LogCaptureFixture) -> None:
    with kv_server("--memory", "64M") as server:
        options = {**SMALL, "kv_tiers": (server.address,), "kv_host_memory": 2**17}
        with engine_above("llama", **options) as engine:
            assert ask_all(engine) == expected("llama")
            server.process.kill()
            server.process.wait()
            for _ in range(3):
                push_out(engine)
                assert ask_all(engine) == expected("llama")
    assert 1 <= len(said(caplog)) <= 2, "reading, and writing"


def hang(sock: socket.socket) -> None:
    time.sleep(30)


def babble(sock: socket.socket) -> None:
    while True:
        sock.sendall(b"\x17garbage" * 1000)


@pytest.mark.parametrize("answer", [hang, babble])
def test_a_server_that_is_none(
    answer: Callable[[socket.socket], None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hierarchy, "Tiers", partial(Tiers, timeout_s=TIMEOUT_S))
    with (
        fake_server(answer) as address,
        engine_above("llama", kv_tiers=(address,), **SMALL) as engine,
    ):
        took = []
        for _ in range(3):
            for ids, params, wanted in zip(PROMPTS, PARAMS, expected("llama"), strict=True):
                began = time.monotonic()
                assert answers(engine, [ids], [params]) == [wanted]
                took.append(time.monotonic() - began)
        # The last may ask in the moment before the tier counts as hanging.
        assert sum(seconds > TIMEOUT_S for seconds in took) <= 2
        assert max(took) < 2 * TIMEOUT_S
        said_so = said(caplog)
    assert 1 <= len(said_so) <= 2, "reading, and writing"
