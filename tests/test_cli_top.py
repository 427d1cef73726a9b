"""`elinvar top`: the picture, and the command as a process at a terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import struct
import termios
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import StringIO
from pathlib import Path
from subprocess import PIPE, Popen
from threading import Thread
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from elinvar.cli.feed import Feed
from elinvar.cli.picture import Picture, sparkline
from processes import ELINVAR, ENVIRONMENT, assert_fails, run
from serving import eventually, serving

COUNTS = st.integers(0, 10**6)


def live(requests: int = 0, **blocks: int) -> dict[str, Any]:
    states = {"free": 10, "held": 5, "cached": 3, "leased": 2, **blocks}
    one = {
        "id": "chatcmpl-0123456789abcdef", "tenant": "al\x1bice", "state": "decode", "age_s": 1.25,
        "prompt_tokens": 1200, "cached_tokens": 800, "output_tokens": 7, "session": None,
    }  # fmt: skip
    model = {
        "name": "tiny", "state": "ready", "rows": {"running": requests, "waiting": 0, "max": 8},
        "kv": {"blocks": {"total": sum(states.values()), **states}, "tokens": 640},
        "prefix_hit_rate": 0.5, "tokens_per_s": {"prompt": 10.0, "output": 123.4},
        "ttft_ms": {"p50": 12.0, "p95": 13.0, "p99": None},
        "itl_ms": {"p50": 1.0, "p95": 2.0, "p99": 3.0}, "step_ms": {"p50": 1.0, "p95": 2.0, "p99": 3.0},
        "requests": [one] * requests,
    }  # fmt: skip
    memory = {"rss": 3 * 2**29, "kv": 2**20}
    return {"time": 0, "uptime_s": 3700, "version": "1", "models": [model], "memory": memory}


def drawn(picture: Picture, width: int = 100, height: int = 24) -> str:
    console = Console(width=width, height=height, file=StringIO())
    console.print(picture)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_the_picture_tells_what_there_is() -> None:
    picture = Picture()
    picture.push(live(3))
    text = drawn(picture)
    for part in ("123.4 tok/s", "running 3 of 8", "prefix hits 50%", "12.0 / 13.0 / –", "5 held"):
        assert part in text
    assert "al?ice" in text and "1,200" in text and "1.5 GiB" in text and "up 1 h 1 min" in text


@given(st.integers(20, 200), st.integers(5, 60), st.integers(0, 80), COUNTS, COUNTS)
def test_it_fits_any_terminal(width: int, height: int, requests: int, free: int, held: int) -> None:
    picture = Picture()
    picture.push(live(requests, free=free, held=held))
    lines = drawn(picture, width, height).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) <= max(height, 14)


@given(st.lists(st.floats(0, 1e6), max_size=400), st.integers(1, 300))
def test_a_sparkline_fits_and_shows_the_highest(values: list[float], width: int) -> None:
    line = sparkline(values, width)
    assert len(line) <= width
    assert bool(values and max(values) > 0) == ("█" in line)


def test_one_picture_as_json(tiny_gguf: Path) -> None:
    with serving(tiny_gguf, "tiny") as tiny:
        done = run("top", "--url", f"{tiny.url}/v1", "--json")
        assert done.returncode == 0 and json.loads(done.stdout)["models"][0]["name"] == "tiny"
        assert_fails(run("top", "--url", tiny.url), 2, "top needs a terminal; --json")


def test_full_screen_until_q(tiny_gguf: Path) -> None:
    """It goes on when the server goes away, and says so."""
    terminal, its_end = pty.openpty()
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    seen = b""

    def see(wanted: bytes) -> bool:
        nonlocal seen
        end = time.monotonic() + 60
        while wanted not in seen and time.monotonic() < end:
            if select.select([terminal], [], [], 0.2)[0]:
                seen += os.read(terminal, 65536)
        return wanted in seen

    with serving(tiny_gguf, "tiny", grace=1) as tiny:
        command = [ELINVAR, "top", "--url", tiny.url]
        process = Popen(command, stdin=its_end, stdout=its_end, stderr=PIPE, env=ENVIRONMENT)
        assert see(b"Nothing runs.") and see(b"tok/s")
        seen = b""
    assert see(b"rying again")
    os.write(terminal, b"q")
    assert process.wait(30) == 0 and process.stderr is not None and process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (401, b"{}", "asks for an API key that it knows; give it with --api-key."),
        (403, b"{}", "give the key of one with --api-key."),
        (404, b"{}", "has no live picture"),
        (500, b"{}", "answered with status 500."),
        (200, b"<html>", "answers, but not as an Elinvar server does."),
        (200, b"[]", "answers, but not as an Elinvar server does."),
    ],
)
def test_servers_that_are_no_use(status: int, body: bytes, told: str) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        log_message: Callable[..., None] = lambda *_: None

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        done = run("top", "--url", f"http://127.0.0.1:{server.server_port}", "--json")
        server.shutdown()
    assert_fails(done, 1, told)


def test_it_connects_again() -> None:
    """Each connection brings one picture and ends."""

    class Brief(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"data: " + json.dumps(live()).encode() + b"\n\n")

        log_message: Callable[..., None] = lambda *_: None

    with HTTPServer(("127.0.0.1", 0), Brief) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        feed = Feed(f"http://127.0.0.1:{server.server_port}", None)
        feed.start()
        seen = [feed.take(60) for _ in range(6)]
        server.shutdown()
    assert sum(one is not None for one in seen) >= 2
    assert eventually(lambda: "rying again" in feed.problem, 60)


def test_no_server() -> None:
    done = run("top", "--url", "http://127.0.0.1:9", "--json")
    assert_fails(done, 1, "Cannot reach http://127.0.0.1:9: ", "--url")
    assert_fails(run("top", "--url", "ftp://there"), 2, "is no http:// or https:// address")
