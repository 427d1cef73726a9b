"""The server under load, in short: benchmarks/server_load.py does the same at length."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import signal
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from elinvar.base.config import EngineConfig
from elinvar.base.plan import StepPlan
from elinvar.engine.aio import AsyncEngine
from elinvar.run.ahead import Begun
from elinvar.server import connection
from elinvar.server.service import Service
from processes import assert_fails, run
from serving import eventually, serving
from test_cli_serve import served

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ASK: dict[str, Any] = {"model": "tiny", "prompt": "The sky is", "ignore_eos": True}


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> list[Service]:
    """Of the servers that the test starts, each of which remembers 50 answers."""
    made: list[Service] = []
    begin = Service.__init__

    def remember(self: Service, engine: AsyncEngine, max_live: int) -> None:
        begin(self, engine, max_live)
        self.explanations._max_records = 50
        made.append(self)

    monkeypatch.setattr(Service, "__init__", remember)
    return made


def whole(chunks: Sequence[list[Any]]) -> dict[str, Any]:
    """Of chunks, which are cut as drafts happened to be accepted."""
    told: dict[str, Any] = {"text": "", "logprobs": {}, "finish_reason": None}
    for choice in (one for chunk in chunks for one in chunk):
        told["text"] += choice["text"]
        told["finish_reason"] = choice["finish_reason"] or told["finish_reason"]
        for name, values in (choice.get("logprobs") or {}).items():
            told["logprobs"].setdefault(name, []).extend(values)
    return told


def all_at_once(url: str, bodies: Sequence[dict[str, Any]], clients: int) -> list[str]:
    """What they stream, without what no two answers share."""

    async def work() -> list[str]:
        limits = httpx.Limits(max_connections=clients)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as client:

            async def one(body: dict[str, Any]) -> str:
                answer = await client.post(COMPLETIONS, json=body)
                assert answer.status_code == 200
                events = [one[6:] for one in answer.text.split("\n\n") if one.startswith("data: {")]
                assert answer.text.endswith("data: [DONE]\n\n")
                return json.dumps(whole([json.loads(event)["choices"] for event in events]))

            return list(await asyncio.gather(*map(one, bodies)))

    return asyncio.run(work())


def test_streams_at_once_are_those_of_each_alone(tiny_gguf: Path) -> None:
    bodies = [
        ASK | {"seed": i, "max_tokens": 3 + i % 20, "logprobs": 2, "stream": True}
        for i in range(40)
    ]
    with serving(tiny_gguf, "tiny") as tiny:
        together = all_at_once(tiny.url, bodies, 40)
        assert together == all_at_once(tiny.url, bodies, 1)


def test_many_wait_while_others_are_answered(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams that wait for the engine hold up nothing that needs no engine."""
    with serving(tiny_gguf, "tiny") as tiny:
        go_on, begin = threading.Event(), tiny.core.runner.begin

        def hold(plan: StepPlan) -> Begun:
            go_on.wait(60)
            return begin(plan)

        monkeypatch.setattr(tiny.core.runner, "begin", hold)
        body = json.dumps(ASK | {"max_tokens": 1, "stream": True}).encode()
        head = b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        held = [socket.create_connection(("127.0.0.1", tiny.port)) for _ in range(300)]
        for one in held:
            one.sendall(head % (COMPLETIONS.encode(), len(body)) + body)
        assert eventually(lambda: "elinvar_http_answers 300.0" in tiny.get_metrics(), 60)
        assert httpx.get(f"{tiny.url}/health").status_code == 200
        assert tiny.post("/tokenize", {"model": "tiny", "prompt": "x"}).status_code == 200
        go_on.set()
        for one in held:
            with one, one.makefile("rb") as answer:
                assert b"data: [DONE]" in answer.read()
        assert eventually(tiny.idle)


def test_nothing_grows(tiny_gguf: Path, services: list[Service]) -> None:
    """Requests of all kinds leave as many objects behind as were there before them."""
    messages = [{"role": "user", "content": "x"}]
    kinds: list[tuple[str, dict[str, Any]]] = [
        (COMPLETIONS, ASK | {"max_tokens": 2}),
        (COMPLETIONS, ASK | {"max_tokens": 2, "stream": True, "n": 2}),
        (CHAT, {"model": "tiny", "messages": messages, "max_tokens": 2}),
        (CHAT, {"model": "tiny", "messages": messages, "max_tokens": 2, "stream": True}),
        ("/v1/messages", {"model": "tiny", "messages": messages, "max_tokens": 2}),
        ("/v1/responses", {"model": "tiny", "input": "x", "max_output_tokens": 2, "store": False}),
        (CHAT, {"model": "tiny", "messages": [], "max_tokens": 2}),
        (COMPLETIONS, {"model": "none", "prompt": "x"}),
        ("/tokenize", {"model": "tiny", "prompt": "x"}),
    ]
    config = EngineConfig(kv_memory=64 * 2**20, prefix_cache=False)  # it grows until it is full
    with (
        serving(tiny_gguf, "tiny", config) as tiny,
        httpx.Client(base_url=tiny.url, timeout=60) as client,
    ):

        def some(first: int, count: int) -> int:
            for i in range(first, first + count):
                path, body = kinds[i % len(kinds)]
                if path != "/tokenize":
                    body = body | {"seed": i} if path in (CHAT, COMPLETIONS) else body
                client.post(path, json=body)
            assert eventually(lambda: tiny.idle() and services[0].num_live == 0)
            gc.collect()
            return len(gc.get_objects())

        before = some(0, 200)
        after = some(200, 300)
        assert after - before < 300, f"{after - before} objects more after 300 requests"
        assert len(services[0].explanations._entries) <= 51


def test_clients_that_leave_at_any_time(tiny_gguf: Path, services: list[Service]) -> None:
    """Before the head is whole, while they wait, between chunks: nothing of theirs stays."""
    rng = random.Random(6)
    with serving(tiny_gguf, "tiny") as tiny:
        body = ASK | {"max_tokens": 200, "stream": True, "n": 2}
        assert tiny.post("/tokenize", {"model": "tiny", "prompt": "x"}).status_code == 200
        fds = len(list(Path("/proc/self/fd").iterdir()))

        def leave(seed: int) -> None:
            content = json.dumps(body | {"seed": seed}).encode()
            head = b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
            data = head % (COMPLETIONS.encode(), len(content)) + content
            with socket.create_connection(("127.0.0.1", tiny.port), timeout=30) as raw:
                if seed % 4 == 0:
                    raw.sendall(data[: rng.randrange(len(data))])
                    return
                raw.sendall(data)
                left = rng.choice([0, 0, 100, 2_000, 10_000])
                while left > 0 and (got := raw.recv(left)):
                    left -= len(got)

        with ThreadPoolExecutor(12) as pool:
            list(pool.map(leave, range(100)))
        engine, explanations = services[0]._engine, services[0].explanations
        assert eventually(lambda: tiny.idle() and services[0].num_live == 0)
        assert eventually(lambda: not tiny.server.server_state.tasks)
        assert eventually(lambda: not tiny.server.server_state.connections)
        assert not engine._streams and not tiny.core._live and len(explanations._entries) <= 51
        assert eventually(lambda: len(list(Path("/proc/self/fd").iterdir())) <= fds)
        tiny.core.scheduler.check()


def test_who_does_not_read_is_not_waited_for(
    tiny_gguf: Path, services: list[Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor are others held up. The answer is larger than what systems keep for a connection."""
    monkeypatch.setattr(connection, "UNREAD_S", 0.3)
    body = ASK | {"max_tokens": 1500, "n": 8, "logprobs": 20, "stream": True}
    content = json.dumps(body).encode()
    head = b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
    with serving(tiny_gguf, "tiny") as tiny, socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", tiny.port))
        deaf.sendall(head % (COMPLETIONS.encode(), len(content)) + content)
        assert eventually(lambda: services[0].num_live == 8)
        assert tiny.post(COMPLETIONS, ASK | {"max_tokens": 2}).status_code == 200
        assert eventually(lambda: services[0].num_live == 0 and tiny.idle(), 60)
        assert eventually(lambda: not tiny.server.server_state.tasks)
        deaf.settimeout(30)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while got := deaf.recv(2**20):
                answer += got
        assert answer.startswith(b"HTTP/1.1 200 OK") and b"[DONE]" not in answer


def test_heads_that_are_too_large(tiny_gguf: Path) -> None:
    """Whole, and never ending; a connection that asks for several things at once is served."""
    with serving(tiny_gguf, "tiny") as tiny:
        begun = b"GET /health HTTP/1.1\r\nhost: x\r\nx-long: "
        for pieces in ([begun + b"y" * 2**17 + b"\r\n\r\n"], [begun, *[b"y" * 2**14] * 40]):
            with socket.create_connection(("127.0.0.1", tiny.port), timeout=30) as raw:
                answer = b""
                try:
                    for piece in pieces:
                        raw.sendall(piece)
                    while got := raw.recv(4096):
                        answer += got
                except OSError:  # it may have been closed while we wrote
                    pass
                assert answer == b"" or answer.startswith(b"HTTP/1.1 400 ")
        with socket.create_connection(("127.0.0.1", tiny.port), timeout=30) as raw:
            ask = b"GET /health HTTP/1.1\r\nhost: x\r\n%b\r\n"
            raw.sendall(ask % b"" * 5 + ask % b"connection: close\r\n")
            with raw.makefile("rb") as answers:
                assert answers.read().count(b"HTTP/1.1 200 OK") == 6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_all_that_was_accepted_is_answered(tiny_gguf: Path, number: signal.Signals) -> None:
    bodies = [ASK | {"seed": i, "max_tokens": 300, "stream": True} for i in range(30)]
    with served(tiny_gguf) as (url, process, _):
        base = url.removesuffix("/v1")
        expected = all_at_once(base, bodies, 30)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(all_at_once, base, bodies, 30)
            there = "elinvar_http_answers 30.0"
            assert eventually(lambda: there in httpx.get(f"{base}/metrics").text, 30)
            process.send_signal(number)
            assert asked.result() == expected
        assert process.stderr is not None and "Traceback" not in process.stderr.read()
        assert process.wait(60) == (0 if number == signal.SIGTERM else 130)


def test_places_that_cannot_be_used(tiny_gguf: Path, tmp_path: Path) -> None:
    """A port of somebody else, a file that is a folder, a folder that is a file: one sentence."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("serve", tiny_gguf, "--port", port, "--kv-memory", "64M")
        assert_fails(done, 1, str(port), "in use")
    for file in (tmp_path, tmp_path / "none"):
        assert_fails(run("serve", "./none.gguf", "--tenants", file), 2, "--tenants", str(file))
    file = tmp_path / "file"
    file.write_text("")
    assert_fails(run("serve", "./none.gguf", "--state-dir", file), 2, "--state-dir", str(file))
