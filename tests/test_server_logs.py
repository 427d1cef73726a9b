"""The log of a server: a line for each request, in text and in JSON, without what clients ask."""

from __future__ import annotations

import json
import logging
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from elinvar.server.logs import JsonLines, RequestLog, TextLines
from processes import ELINVAR, ENVIRONMENT, assert_fails, run
from serving import Serving, eventually, serving

BODY: dict[str, Any] = {
    "model": "tiny",
    "prompt": "A secret\nthat nobody logs",
    "max_tokens": 5,
    "ignore_eos": True,
}


def fields_of(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [vars(record)["fields"] for record in caplog.records if "fields" in vars(record)]


@pytest.fixture
def seen(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="elinvar.server.logs")
    return caplog


def test_a_line_for_each_request(tiny_gguf: Path, seen: pytest.LogCaptureFixture) -> None:
    with serving(tiny_gguf, "tiny", tellers=(RequestLog(),)) as server:
        answer = server.post("/v1/completions", BODY, headers={"x-request-id": "turn/7"}).json()
        two = server.post("/v1/completions", BODY | {"n": 2, "stream": True})
        assert two.is_success
        assert server.post("/v1/completions", content=b"junk").status_code == 400
        whole, stream, bad = fields_of(seen)
        _, record, _ = (r for r in seen.records if "fields" in vars(r))
        assert "secret" not in seen.text
    assert whole["request_id"] == "turn/7" and whole["id"] == answer["id"]
    assert (whole["model"], whole["route"], whole["status"]) == ("tiny", "completions", 200)
    assert whole["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert (whole["output_tokens"], whole["finish_reason"]) == (5, "length")
    parts = [whole[f"{name}_ms"] for name in ("queued", "prefill", "decode", "preempted")]
    assert 0 < sum(parts) <= whole["total_ms"] and whole["decode_ms"] > 0
    assert stream["output_tokens"] == 10
    assert (bad["status"], bad["tenant"]) == (400, "") and "model" not in bad
    assert "route=completions status=200" in record.getMessage()


def test_prompts_where_they_are_asked_for(tiny_gguf: Path, seen: pytest.LogCaptureFixture) -> None:
    with serving(tiny_gguf, "tiny", tellers=(RequestLog(prompts=True),)) as server:
        assert server.post("/v1/completions", BODY | {"n": 2}).is_success
    (fields,) = fields_of(seen)
    assert [text.strip() for text in fields["prompts"]] == [BODY["prompt"]]
    (line,) = (TextLines().format(r) for r in seen.records if "fields" in vars(r))
    assert "\n" not in line and r"secret\nthat" in line


def test_a_client_that_left(tiny_gguf: Path, seen: pytest.LogCaptureFixture) -> None:
    with serving(tiny_gguf, "tiny", tellers=(RequestLog(),)) as server:
        leave(server)
        assert eventually(lambda: bool(fields_of(seen)))
    (fields,) = fields_of(seen)
    assert fields["status"] == 200 and fields["finish_reason"] == "abort"
    assert fields["output_tokens"] > 0 and fields["total_ms"] > 0


def test_a_client_that_left_before_it_was_told_anything(
    tiny_gguf: Path, seen: pytest.LogCaptureFixture
) -> None:
    """What was done for it is told nevertheless."""
    with serving(tiny_gguf, "tiny", tellers=(RequestLog(),)) as server:
        content = json.dumps(BODY | {"max_tokens": 1500, "ignore_eos": True}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.sendall(head % len(content) + content)
            assert eventually(lambda: server.core.metrics.generated_tokens > 2)
        assert eventually(lambda: bool(fields_of(seen)))
    (fields,) = fields_of(seen)
    assert (fields["status"], fields["finish_reason"]) == (499, "abort")
    assert fields["output_tokens"] > 2 and fields["prompt_tokens"] > 0


def leave(server: Serving) -> None:
    body = BODY | {"stream": True, "max_tokens": 1500}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as response:
        next(response.iter_lines())


def test_what_runs_at_the_end_is_told_too(tiny_gguf: Path, seen: pytest.LogCaptureFixture) -> None:
    """One that its client left a moment before."""
    with serving(tiny_gguf, "tiny", tellers=(RequestLog(),)) as server:
        leave(server)
    assert [one["finish_reason"] for one in fields_of(seen)] in (["abort"], ["length"])


def test_a_line_is_one_line() -> None:
    record = logging.makeLogRecord(
        {"name": "n", "msg": "a %s", "args": ('"\n',), "levelname": "ERROR", "request_id": "req_1"}
    )
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        record.exc_info = (ValueError, error, error.__traceback__)
    line = JsonLines().format(record)
    found = json.loads(line)
    assert "\n" not in line and found["message"] == 'a "\n' and found["request_id"] == "req_1"
    assert "two\nlines" in found["exception"] and found["level"] == "error"
    assert TextLines().format(record).splitlines()[0].endswith("[req_1]")


def test_json_from_the_first_line_to_the_last(tiny_gguf: Path) -> None:
    """uvicorn's own, too: a request that it cuts off at the end."""
    command = [ELINVAR, "serve", str(tiny_gguf), "--port", "0", "--served-model-name", "tiny"]
    command += ["--log-format", "json", "--log-level", "info", "--kv-memory", "64M", "--grace", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as child:
        assert child.stderr is not None
        lines = []
        while not lines or "serves tiny" not in lines[-1]["message"]:
            lines.append(json.loads(child.stderr.readline()))
        url = lines[-1]["message"].split()[4]
        assert httpx.post(f"{url}/completions", json=BODY, timeout=30).is_success
        lines.append(json.loads(child.stderr.readline()))
        assert lines[-1]["message"] == "request" and lines[-1]["output_tokens"] == 5
        child.send_signal(signal.SIGTERM)
        lines += map(json.loads, child.communicate(timeout=60)[1].splitlines())
    assert child.returncode == 0
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)


def test_prompts_need_lines_to_be_in(tiny_gguf: Path) -> None:
    assert_fails(run("serve", tiny_gguf, "--log-prompts"), 2, "--log-level info")
