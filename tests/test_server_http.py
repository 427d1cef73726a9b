"""The server below the API: errors, limits, clients that leave, overload, start and end."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from elinvar.base.config import EngineConfig
from elinvar.base.plan import StepPlan
from elinvar.run.ahead import Begun
from elinvar.server import connection, watchdog
from elinvar.server.process import listen
from serving import Serving, eventually, serving

LONG: dict[str, Any] = {
    "model": "tiny",
    "prompt": "For ever and ever",
    "max_tokens": 1500,
    "ignore_eos": True,
    "seed": 1,
}
SHORT: dict[str, Any] = LONG | {"max_tokens": 4}


@pytest.fixture(scope="module")
def tiny(tiny_gguf: Path) -> Iterator[Serving]:
    with serving(tiny_gguf, "tiny", max_body_bytes=100_000) as running:
        yield running


def error_of(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return dict(body["error"])


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[1, 2]",
        b'"text"',
        b'{"model": "tiny"',
        b'{"model": "tiny", "prompt": "\\ud83d", "messages": "\\ud83d"}',
        b"\xff\xfe\x00",
        os.urandom(50_000),
        b"[" * 90_000,
        b'{"a":' * 15_000,
        b"1" * 90_000,
    ],
)
def test_junk(tiny: Serving, path: str, body: bytes) -> None:
    response = tiny.post(path, content=body)
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize("depth", [300, 500, 900, 930, 960, 980])
def test_what_is_nested_deeply(tiny: Serving, depth: int) -> None:
    """It may be decoded, and still be too deep for a template or a schema."""
    deep = '{"a":' * depth + "1" + "}" * depth
    chat = '{"model":"tiny","max_tokens":1,"messages":[{"role":"user","content":"x"}],%s}'
    schema = '"response_format":{"type":"json_schema","json_schema":{"name":"x","schema":%s}}'
    for field in ('"chat_template_kwargs":%s', schema):
        answer = tiny.post("/v1/chat/completions", content=chat % (field % deep))
        assert answer.status_code in (200, 400)


def test_megabyte_of_junk_in_a_field(tiny_gguf: Path) -> None:
    with serving(tiny_gguf, "tiny") as running:
        for junk in ("x" * 2**20, "\x00\x1b🙂" * 2**17):
            response = running.post("/v1/completions", {"model": "tiny", "prompt": junk})
            assert response.status_code == 400
            assert error_of(response)["code"] == "context_length_exceeded"
        for field in ("model", "user", "seed", "x" * 2**20):
            response = running.post("/v1/completions", SHORT | {field: "y" * 2**20})
            assert response.status_code in (200, 400, 404)
            assert len(response.content) < 2000


def test_nan(tiny: Serving) -> None:
    for value in ("NaN", "Infinity", '"NaN"', "1e999"):
        raw = b'{"model": "tiny", "prompt": "x", "temperature": %b}' % value.encode()
        response = tiny.post("/v1/completions", content=raw)
        assert response.status_code == 400
        assert error_of(response)["param"] == "temperature"


def test_odd_texts_are_served(tiny: Serving) -> None:
    for text in (
        "\x00",
        "\x1b[2J\r\n",
        "\u2028\ufffe",
        "\U0010ffff",
        " ",
        "</s><s>",
        "data: [DONE]",
    ):
        assert tiny.post("/v1/completions", SHORT | {"prompt": text}).status_code == 200
        messages = [{"role": "user", "content": text}]
        body = {"model": "tiny", "messages": messages, "max_tokens": 2, "stream": True}
        response = tiny.post("/v1/chat/completions", body)
        assert response.text.endswith("data: [DONE]\n\n")


def test_content_type_does_not_matter(tiny: Serving) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "nonsense"):
        content = json.dumps(SHORT).encode()
        response = tiny.post("/v1/completions", content=content, headers={"content-type": kind})
        assert response.status_code == 200


def test_unknown_paths_and_methods(tiny: Serving) -> None:
    for path in ("/v1", "/v1/embeddings", "/v1/models/", "/v1/completions/", "/%ff%00"):
        response = httpx.get(tiny.url + path)
        assert response.status_code == 404, path
        error_of(response)
    response = httpx.get(f"{tiny.url}/v1/completions")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert error_of(response)["code"] == "method_not_allowed"
    assert tiny.post("/v1/models", {}).status_code == 405


def test_request_ids(tiny: Serving) -> None:
    echoed = httpx.get(f"{tiny.url}/health", headers={"x-request-id": "abc-1"})
    assert echoed.headers["x-request-id"] == "abc-1"
    made = httpx.get(f"{tiny.url}/health", headers={"x-request-id": "a b" * 99})
    assert made.headers["x-request-id"].startswith("req_")
    assert tiny.post("/v1/completions", SHORT).headers["x-request-id"].startswith("req_")


def test_body_limit(tiny: Serving) -> None:
    body = json.dumps(SHORT | {"prompt": "x" * 100_000}).encode()
    response = tiny.post("/v1/completions", content=body)
    assert response.status_code == 413
    assert "100000 bytes" in error_of(response)["message"]

    def chunks() -> Iterator[bytes]:
        for _ in range(50):
            yield b"x" * 10_000

    # No content-length: counted while it is read.
    response = tiny.post("/v1/completions", content=chunks())
    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"


def test_limit_is_told_before_the_body_is_sent(tiny: Serving) -> None:
    with socket.create_connection(("127.0.0.1", tiny.port), timeout=10) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n"
            b"Expect: 100-continue\r\n\r\n"
        )
        assert raw.recv(100).startswith(b"HTTP/1.1 413 ")


def test_health_and_metrics(tiny: Serving) -> None:
    assert httpx.get(f"{tiny.url}/health").json() == {"status": "ok"}
    tiny.post("/v1/completions", SHORT)
    tiny.post("/v1/completions", content=b"junk")
    response = httpx.get(f"{tiny.url}/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = response.text.splitlines()
    ok = 'elinvar_http_requests_total{route="completions",status="200"} '
    bad = 'elinvar_http_requests_total{route="completions",status="400"} '
    assert any(line.startswith(ok) for line in lines)
    assert any(line.startswith(bad) for line in lines)
    assert any(
        line.startswith('elinvar_generated_tokens_total{model_name="tiny"} ') for line in lines
    )


def _send(port: int, path: str, body: dict[str, Any]) -> socket.socket:
    raw = socket.create_connection(("127.0.0.1", port), timeout=20)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    raw.sendall(head.encode() + content)
    return raw


class Brake:
    """Makes the engine's steps slow, or fail, on demand."""

    def __init__(self, tiny: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        self.fail_after: int | None = None
        self.held = threading.Event()
        self.held.set()
        begin = tiny.core.runner.begin

        def slow(plan: StepPlan) -> Begun:
            # Not for ever: a test that fails must end all the same.
            self.held.wait(10)
            time.sleep(self.seconds)
            if self.fail_after is not None:
                self.fail_after -= 1
                if self.fail_after < 0:
                    raise RuntimeError("out of luck")
            return begin(plan)

        monkeypatch.setattr(tiny.core.runner, "begin", slow)


@pytest.fixture
def brake(tiny: Serving, monkeypatch: pytest.MonkeyPatch) -> Brake:
    assert eventually(tiny.idle)
    return Brake(tiny, monkeypatch)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_client_that_leaves_frees_the_blocks(
    tiny: Serving, brake: Brake, stream: bool, n: int
) -> None:
    brake.seconds = 0.05
    raw = _send(tiny.port, "/v1/completions", LONG | {"stream": stream, "n": n})
    if stream:
        assert b"data: " in raw.recv(4096) + raw.recv(4096)
    assert eventually(lambda: tiny.core.scheduler.num_running == n)
    assert not tiny.idle()
    steps = tiny.core.metrics.steps
    raw.close()
    # The step in progress ends, then the requests are gone: a few steps of 50 ms at most.
    assert eventually(tiny.idle, 2)
    assert tiny.core.metrics.steps - steps <= 3
    assert "elinvar_http_answers 0.0" in httpx.get(f"{tiny.url}/metrics").text


def test_clients_that_leave_while_waiting(tiny: Serving, brake: Brake) -> None:
    brake.held.clear()
    sockets = [_send(tiny.port, "/v1/completions", LONG | {"seed": i}) for i in range(20)]
    time.sleep(0.1)
    for raw in sockets:
        raw.close()
    time.sleep(0.1)
    brake.held.set()
    assert eventually(tiny.idle, 5)


def test_failed_step_in_a_stream(
    tiny: Serving, brake: Brake, caplog: pytest.LogCaptureFixture
) -> None:
    brake.fail_after = 3
    with caplog.at_level(logging.CRITICAL, "elinvar"):
        response = tiny.post("/v1/completions", LONG | {"stream": True})
    assert response.status_code == 200
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    error = json.loads(events[-1])["error"]
    assert error["type"] == "server_error"
    assert "out of luck" in error["message"]
    assert 2 <= len(events) <= 4
    brake.fail_after = 3
    with pytest.raises(openai.APIError, match="out of luck"):
        list(tiny.client().completions.create(**_plain(LONG), stream=True))
    brake.fail_after = None
    assert tiny.post("/v1/completions", SHORT).status_code == 200


def _plain(body: dict[str, Any]) -> dict[str, Any]:
    """The same request in the official client's words."""
    known = {k: v for k, v in body.items() if k != "ignore_eos"}
    return known | {"extra_body": {"ignore_eos": True}}


def test_failed_step_of_a_whole_answer(tiny: Serving, brake: Brake) -> None:
    brake.fail_after = 2
    response = tiny.post("/v1/completions", LONG | {"n": 2})
    assert response.status_code == 500
    assert error_of(response)["type"] == "server_error"
    brake.fail_after = None
    assert eventually(tiny.idle)


def test_bug_is_logged_and_not_shown(
    tiny: Serving, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(messages: object, options: object) -> str:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(tiny.core, "render_chat", broken)
    messages = [{"role": "user", "content": "x"}]
    response = tiny.post("/v1/chat/completions", {"model": "tiny", "messages": messages})
    assert response.status_code == 500
    assert "secret" not in response.text
    assert error_of(response)["code"] == "internal_error"
    assert "secret detail" in caplog.text


def test_overload(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(kv_memory=64 * 2**20, max_rows=2)
    with serving(tiny_gguf, "tiny", config, max_waiting=1) as running:
        brake = Brake(running, monkeypatch)
        brake.held.clear()
        sockets = [_send(running.port, "/v1/completions", SHORT | {"seed": i}) for i in range(3)]
        live = "elinvar_http_answers 3.0"
        assert eventually(lambda: live in httpx.get(f"{running.url}/metrics").text)
        for body in (SHORT, SHORT | {"stream": True}, SHORT | {"n": 2}):
            response = running.post("/v1/completions", body)
            assert response.status_code == 429
            assert int(response.headers["retry-after"]) >= 1
            assert error_of(response)["code"] == "rate_limit_exceeded"
        for many, field in (
            ({"n": 4}, "n"),
            ({"prompt": ["a"] * 100_000, "n": 128}, "prompt"),
        ):
            response = running.post("/v1/completions", SHORT | many)
            assert response.status_code == 400
            assert error_of(response)["param"] == field
        brake.held.set()
        for raw in sockets:
            assert raw.recv(100).startswith(b"HTTP/1.1 200 ")
            raw.close()
        assert eventually(running.idle)
        assert running.post("/v1/completions", SHORT).status_code == 200


def test_dead_engine(tiny_gguf: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(tiny_gguf, "tiny") as running:

        def broken() -> StepPlan:
            raise RuntimeError("the plan is lost")

        running.core.scheduler.plan = broken  # type: ignore[method-assign]
        for _ in range(2):
            response = running.post("/v1/completions", SHORT)
            assert response.status_code == 503
            assert error_of(response)["type"] == "server_error"
        assert httpx.get(f"{running.url}/health").status_code == 503
        assert httpx.get(f"{running.url}/v1/models").status_code == 200


def test_end_of_the_grace(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that is cut off says so; it does not look like a finished one."""
    with serving(tiny_gguf, "tiny", grace=1) as running:
        brake = Brake(running, monkeypatch)
        brake.seconds = 0.05
        url = f"{running.url}/v1/completions"
        with httpx.stream("POST", url, json=LONG | {"stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            whole = _send(running.port, "/v1/completions", LONG)
            assert eventually(lambda: running.core.scheduler.num_running == 2)
            running.server.should_exit = True
            last = [line for line in lines if line][-1]
            assert whole.recv(100).startswith(b"HTTP/1.1 503 ")
            whole.close()
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["code"] == "service_unavailable"


def test_bytes_that_are_no_http(tiny: Serving) -> None:
    for junk in (b"\x16\x03\x01\x02\x00" * 100, b"GET\r\n\r\n", b"\r\n" * 1000, b"a" * 100_000):
        with socket.create_connection(("127.0.0.1", tiny.port), timeout=10) as raw:
            raw.sendall(junk)
            raw.shutdown(socket.SHUT_WR)
            answer = raw.recv(1000)
            assert answer == b"" or answer.startswith(b"HTTP/1.1 400 ")
    assert httpx.get(f"{tiny.url}/health").status_code == 200


SERVER = """
import sys
from elinvar.base.config import EngineConfig
from elinvar.engine.aio import AsyncEngine
from elinvar.engine.core import Engine
from elinvar.server.app import create_app
from elinvar.server.process import listen, serve

core = Engine.load(sys.argv[1], EngineConfig(kv_memory=64 * 2**20))
app = create_app(AsyncEngine(core), "tiny")
sys.exit(serve(app, [listen("127.0.0.1", int(sys.argv[2]))], drain_s=float(sys.argv[3])))
"""


@contextmanager
def process_of(model: Path, drain_s: float = 0.0) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVER, str(model), str(port), str(drain_s)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        url = f"http://127.0.0.1:{port}"
        assert eventually(lambda: status(url, "/ready") == 200, 30)
        yield url, child
    finally:
        child.kill()
        child.wait()


def status(url: str, path: str) -> int | None:
    """None: nobody listens."""
    try:
        return httpx.get(url + path).status_code
    except httpx.TransportError:
        return None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_open_streams_finish(tiny_gguf: Path, number: signal.Signals) -> None:
    with process_of(tiny_gguf) as (url, child):
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG | {"stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            child.send_signal(number)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        _, errors = child.communicate(timeout=20)
        assert child.returncode == (0 if number == signal.SIGTERM else 130)
        assert "Traceback" not in errors
        assert status(url, "/health") is None


def test_not_ready_before_the_door_closes(tiny_gguf: Path) -> None:
    """Whoever sends requests learns first, and what it sends until then is served."""
    with process_of(tiny_gguf, drain_s=3600) as (url, child):
        child.send_signal(signal.SIGTERM)
        assert eventually(lambda: status(url, "/ready") == 503)
        assert status(url, "/health") == 200
        assert httpx.post(f"{url}/v1/completions", json=LONG | {"max_tokens": 2}).status_code == 200


def test_a_second_signal_ends_at_once(tiny_gguf: Path) -> None:
    endless = LONG | {"stream": True, "max_tokens": 3000}
    with process_of(tiny_gguf, drain_s=3600) as (url, child):
        with httpx.stream("POST", f"{url}/v1/completions", json=endless) as answer:
            next(answer.iter_lines())
            child.send_signal(signal.SIGTERM)
            assert eventually(lambda: status(url, "/ready") == 503)
            child.send_signal(signal.SIGTERM)
            _, errors = child.communicate(timeout=20)
        assert child.returncode == 128 + signal.SIGTERM
        assert "Traceback" not in errors


def test_listen() -> None:
    with listen("127.0.0.1", 0) as listener:
        # What asyncio looks at before it switches Nagle's algorithm off.
        assert listener.proto == socket.IPPROTO_TCP
        listener.listen()
        with pytest.raises(OSError):
            listen("127.0.0.1", listener.getsockname()[1])


def test_a_head_that_does_not_come(tiny: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then gives no more time, also on a connection that was used before; an answer
    that takes long does."""
    monkeypatch.setattr(connection, "HEAD_S", 0.3)
    body = json.dumps(SHORT).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    for first in (b"", head + body):
        with socket.create_connection(("127.0.0.1", tiny.port), timeout=10) as slow:
            slow.sendall(first)
            if first:
                assert slow.recv(10_000).startswith(b"HTTP/1.1 200 ")
            try:
                for _ in range(100):
                    slow.sendall(b"G")
                    time.sleep(0.02)
            except (BrokenPipeError, ConnectionResetError):
                continue
            pytest.fail("the connection was kept")
    answer = tiny.post("/v1/completions", LONG | {"max_tokens": 1000})
    assert answer.json()["usage"]["completion_tokens"] == 1000


def test_a_step_that_hangs(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Said once, with where it is; the server is well again when the step ends."""
    monkeypatch.setattr(watchdog, "_LOOK_S", 0.02)
    go_on = threading.Event()
    with serving(tiny_gguf, "tiny", hung_s=0.1) as running:
        begin = running.core.runner.begin

        def hang(plan: StepPlan) -> Begun:
            go_on.wait(30)
            return begin(plan)

        monkeypatch.setattr(running.core.runner, "begin", hang)
        asking = threading.Thread(target=running.post, args=("/v1/completions", SHORT))
        asking.start()
        assert eventually(lambda: status(running.url, "/health") == 503)
        assert eventually(lambda: any("in hang" in one.message for one in caplog.records))
        go_on.set()
        asking.join()
        assert eventually(lambda: status(running.url, "/health") == 200)
        assert eventually(lambda: any("goes on" in one.message for one in caplog.records))
    assert sum("may hang" in one.message for one in caplog.records) == 1


def test_pages_of_other_sites_may_not_ask(tiny: Serving) -> None:
    """Browsers send what looks like a form without asking first; they say where it comes from."""
    foreign = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    foreign |= {"Content-Type": "text/plain", "Origin": "https://evil.example"}
    answer = tiny.post("/v1/completions", SHORT, headers=foreign)
    assert (answer.status_code, error_of(answer)["code"]) == (403, "foreign_origin")
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert httpx.get(f"{tiny.url}/health", headers=link).status_code == 200
    own = {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}
    assert tiny.post("/v1/completions", SHORT, headers=own).status_code == 200
