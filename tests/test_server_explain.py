"""Explaining requests over HTTP: the endpoint, the header Server-Timing, the trace file."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from elinvar.base.config import EngineConfig
from elinvar.base.errors import ElinvarError
from elinvar.base.plan import StepPlan
from elinvar.run.ahead import Begun
from elinvar.server.trace import TraceFile
from serving import Serving, eventually, serving

BODY: dict[str, Any] = {
    "model": "tiny",
    "prompt": "For ever and ever",
    "max_tokens": 8,
    "ignore_eos": True,
    "seed": 1,
}


@pytest.fixture(scope="module")
def tiny(tiny_gguf: Path) -> Iterator[Serving]:
    with serving(tiny_gguf, "tiny") as running:
        yield running


def explain(tiny: Serving, name: str, **options: Any) -> dict[str, Any]:
    response = httpx.get(f"{tiny.url}/v1/requests/{name}/explain", timeout=30, **options)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    for choice in body["choices"]:
        assert sum(choice["parts_ns"].values()) == choice["wall_ns"]
        for state, causes in choice["causes_ns"].items():
            assert sum(causes.values()) == choice["parts_ns"][state]
    return body


def timing(response: httpx.Response) -> dict[str, float]:
    parts = (part.split(";dur=") for part in response.headers["server-timing"].split(", "))
    return {name: float(ms) for name, ms in parts}


def test_a_finished_answer(tiny: Serving) -> None:
    tiny.post("/v1/completions", BODY)
    response = tiny.post("/v1/completions", BODY, headers={"x-request-id": "turn/7"})
    answer = response.json()
    found = explain(tiny, answer["id"])
    assert found == explain(tiny, "turn/7")
    assert (found["id"], found["request_id"]) == (answer["id"], "turn/7")
    assert found["object"] == "request.explanation"
    (choice,) = found["choices"]
    usage = answer["usage"]
    assert choice["id"] == answer["id"] and choice["index"] == 0
    assert choice["state"] == "finished" and choice["finish_reason"] == "length"
    assert choice["prompt_tokens"] == usage["prompt_tokens"]
    assert choice["generated_tokens"] == choice["steps"] + choice["drafts"]["accepted"] == 8
    assert choice["prefill"]["chunks"] == choice["largest_batch"] == 1
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert choice["cached_tokens"] == {"memory": cached}
    assert choice["prefill"]["tokens"] == usage["prompt_tokens"] - cached
    assert [event["state"] for event in choice["events"]] == ["queued", "prefill", "decode"]
    shown = timing(response)
    assert list(shown) == ["queue", "prefill", "decode", "total"]
    assert shown["total"] == pytest.approx(choice["wall_ns"] / 1e6, abs=1e-3)
    assert sum(list(shown.values())[:-1]) == pytest.approx(shown["total"], abs=3e-3)


def test_each_choice_has_a_record(tiny: Serving) -> None:
    body = BODY | {"prompt": ["one", "two"], "n": 2}
    answer = tiny.post("/v1/completions", body).json()
    found = explain(tiny, answer["id"])
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    assert max(choice["largest_batch"] for choice in found["choices"]) == 4


def test_a_stream_says_what_is_known_at_its_first_byte(tiny: Serving) -> None:
    response = tiny.post("/v1/completions", BODY | {"stream": True})
    assert list(timing(response)) == ["queue", "prefill"]
    name = json.loads(response.text.partition("\n")[0].removeprefix("data: "))["id"]
    (choice,) = explain(tiny, name)["choices"]
    parts = choice["parts_ns"]
    assert timing(response)["queue"] == pytest.approx(parts["queued"] / 1e6, abs=1e-3)
    assert timing(response)["prefill"] == pytest.approx(parts["prefill"] / 1e6, abs=1e-3)


def test_unknown_ids(tiny: Serving) -> None:
    for name in ("cmpl-1", "x" * 5000, "%00/..%2f", "cmpl-1-0"):
        response = httpx.get(f"{tiny.url}/v1/requests/{name}/explain")
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "request_not_found"
        assert len(response.content) < 1000


def test_a_client_that_left_is_explained(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And those that run, or wait because all rows are taken."""
    config = EngineConfig(kv_memory=64 * 2**20, max_rows=1)
    with serving(tiny_gguf, "tiny", config) as running:
        begin = running.core.runner.begin

        def slow(plan: StepPlan) -> Begun:
            time.sleep(0.02)
            return begin(plan)

        monkeypatch.setattr(running.core.runner, "begin", slow)
        url, many = f"{running.url}/v1/completions", BODY | {"stream": True, "max_tokens": 1000}
        waiting = threading.Thread(
            target=running.post,
            args=("/v1/completions", BODY),
            kwargs={"headers": {"x-request-id": "b"}},
        )
        with httpx.stream("POST", url, json=many, headers={"x-request-id": "a"}) as answer:
            lines = answer.iter_lines()
            next(lines)
            waiting.start()
            assert eventually(lambda: running.core.scheduler.num_waiting == 1)
            (runs,), (waits,) = explain(running, "a")["choices"], explain(running, "b")["choices"]
            assert (runs["state"], runs["finish_reason"]) == ("decode", None)
            assert waits["state"] == "queued" and waits["parts_ns"]["decode"] == 0
        waiting.join(20)
        (left,) = explain(running, "a")["choices"]
        assert (left["state"], left["finish_reason"]) == ("finished", "abort")
        (waited,) = explain(running, "b")["choices"]
        assert waited["causes_ns"]["queued"]["rows"] > 0


def test_old_records_are_forgotten(tiny: Serving) -> None:
    # Reaches for the limit, since a thousand requests would take long.
    service = next(w for w in tiny.core.watchers if hasattr(w, "following"))
    before: Any = service
    before._max_records, kept = 2, before._max_records
    try:
        ids = [tiny.post("/v1/completions", BODY).json()["id"] for _ in range(3)]
        assert httpx.get(f"{tiny.url}/v1/requests/{ids[0]}/explain").status_code == 404
        assert explain(tiny, ids[1]) and explain(tiny, ids[2])
        assert len(before._entries) == len(before._by_request) == 2
    finally:
        before._max_records = kept


def test_trace_file(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"older": 1}\n')
    with serving(tiny_gguf, "tiny", trace=TraceFile(path)) as running:
        names = [running.post("/v1/completions", BODY | {"n": 2}).json()["id"] for _ in range(3)]
    # All is there once the server ended.
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"older": 1}
    assert sorted(line["id"] for line in lines[1:]) == sorted(
        f"{name}-{index}" for name in names for index in (0, 1)
    )
    for line in lines[1:]:
        assert sum(line["parts_ns"].values()) == line["wall_ns"]
        assert "events" not in line
    assert "For ever" not in path.read_text()


def test_trace_with_events(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    with serving(tiny_gguf, "tiny", trace=TraceFile(path, events=True)) as running:
        running.post("/v1/completions", BODY)
    events = json.loads(path.read_text())["events"]
    assert [event["state"] for event in events] == ["queued", "prefill", "decode"]


def test_a_full_disk_costs_lines_and_is_told_once(
    tiny_gguf: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(tiny_gguf, "tiny", trace=TraceFile(Path("/dev/full"))) as running:
        for _ in range(3):
            assert running.post("/v1/completions", BODY).status_code == 200
            assert eventually(running.idle)
    told = [r for r in caplog.records if "/dev/full" in r.message and r.levelno >= logging.WARNING]
    assert len(told) == 1 and "No space left" in told[0].message


def test_a_torn_line_stays_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that takes half a line, then nothing, then has room again."""
    path, trace = tmp_path / "trace.jsonl", TraceFile(tmp_path / "trace.jsonl")
    write, left = os.write, [10, None, None]

    def torn(file: int, data: bytes) -> int:
        if left:
            count = left.pop(0)
            if count is None:
                raise OSError(28, "No space left on device")
            return write(file, data[:count])
        return write(file, data)

    monkeypatch.setattr("elinvar.server.trace.os.write", torn)
    for name in ("first", "second", "third"):
        trace._write([b'{"id": "%b"}' % name.encode()])
    trace.close()
    assert path.read_text() == '{"id": "fi\n{"id": "third"}\n'
    assert [r.message.partition(": ")[2] for r in caplog.records if r.levelname == "ERROR"] == [
        "No space left on device."
    ]
    assert caplog.records[-1].message.endswith("goes on; 2 lines were lost.")


def test_a_trace_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ElinvarError, match="cannot be written: Is a directory"):
        TraceFile(tmp_path)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ElinvarError, match="a pipe that nobody reads"):
        TraceFile(pipe)
