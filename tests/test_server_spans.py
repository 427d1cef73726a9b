"""Traces of requests, as a collector gets them over HTTP."""

from __future__ import annotations

import http.server
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from processes import assert_fails, run
from serving import eventually, serving

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
)
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from elinvar.server.spans import MAX_STATES, Spans, _of_record, otlp, wanted

BODY: dict[str, Any] = {"model": "tiny", "prompt": "Once", "max_tokens": 5, "ignore_eos": True}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """Keeps what it gets; answers with `status`."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.status = 200

    @property
    def spans(self) -> list[Any]:
        found = []
        for body in self.bodies:
            request = ExportTraceServiceRequest.FromString(body)
            for resource in request.resource_spans:
                self.resource = {a.key: a.value.string_value for a in resource.resource.attributes}
                found += [span for scope in resource.scope_spans for span in scope.spans]
        return found


@contextmanager
def collector() -> Iterator[tuple[str, Collector]]:
    kept = Collector()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["content-length"]))
            if kept.status == 200:
                kept.bodies.append(body)
            self.send_response(kept.status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", kept
    finally:
        server.shutdown()
        server.server_close()


def values(span: Any) -> dict[str, Any]:
    def value(one: Any) -> Any:
        kind = one.WhichOneof("value")
        found = getattr(one, kind)
        return [value(item) for item in found.values] if kind == "array_value" else found

    return {attribute.key: value(attribute.value) for attribute in span.attributes}


def test_a_trace_of_each_request(tiny_gguf: Path) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
    with collector() as (url, kept):
        with serving(tiny_gguf, "tiny", tellers=(Spans(otlp(url)),)) as server:
            before = time.time_ns()
            answer = server.post("/v1/completions", BODY, headers=headers).json()
            messages = [{"role": "user", "content": "Once"}]
            chat = {"model": "tiny", "messages": messages, "max_tokens": 3, "n": 2}
            assert server.post("/v1/chat/completions", chat).is_success
            assert server.post("/v1/completions", BODY | {"max_tokens": -1}).status_code == 400
            httpx.get(f"{server.url}/v1/models")
        # All was sent when the server ended.
        spans = kept.spans
    roots = [span for span in spans if span.kind == 2]
    assert [span.name for span in roots] == ["text_completion tiny", "chat tiny", "text_completion"]
    first, second, bad = roots
    assert first.trace_id.hex() == TRACE and first.parent_span_id.hex() == PARENT
    assert second.trace_id != first.trace_id and second.parent_span_id == b""
    found = values(first)
    assert found["gen_ai.operation.name"] == "text_completion"
    assert found["gen_ai.request.model"] == "tiny" and found["gen_ai.provider.name"] == "elinvar"
    assert found["gen_ai.usage.input_tokens"] == answer["usage"]["prompt_tokens"]
    assert found["gen_ai.usage.output_tokens"] == 5 == found["gen_ai.request.max_tokens"]
    assert found["gen_ai.response.finish_reasons"] == ["length"]
    assert found["gen_ai.response.id"] == answer["id"] and found["elinvar.request_id"] == "mine"
    assert values(second)["gen_ai.request.choice.count"] == 2
    assert values(bad)["error.type"] == "400" and bad.status.code == 2
    assert "Once" not in str(spans) and kept.resource["service.name"] == "elinvar"
    # Its states follow each other without a gap, within it.
    states = [span for span in spans if span.parent_span_id == first.span_id]
    assert [span.name for span in states] == ["queued", "prefill", "decode"]
    ends = [span.end_time_unix_nano for span in states]
    assert [span.start_time_unix_nano for span in states[1:]] == ends[:-1]
    assert before <= first.start_time_unix_nano <= first.end_time_unix_nano
    of_chat = [span for span in spans if span.parent_span_id == second.span_id]
    assert {values(span)["elinvar.choice"] for span in of_chat} == {0, 1}


def test_a_dead_collector_costs_nothing_and_is_told_once(
    tiny_gguf: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody listens there."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with serving(tiny_gguf, "tiny", tellers=(Spans(otlp("http://127.0.0.1:9")),)) as server:
        for _ in range(3):
            assert server.post("/v1/completions", BODY).status_code == 200
            assert eventually(server.idle)
        assert eventually(lambda: "does not answer" in caplog.text)
    said = [r for r in caplog.records if r.levelno >= logging.WARNING and "spans" in r.message]
    assert len(said) == 1


class Moody(SpanExporter):
    def __init__(self, *results: SpanExportResult) -> None:
        self.results = list(results)

    def export(self, spans: Any) -> SpanExportResult:
        return self.results.pop(0)


def test_a_collector_that_comes_back(caplog: pytest.LogCaptureFixture, tiny_gguf: Path) -> None:
    lost, kept = SpanExportResult.FAILURE, SpanExportResult.SUCCESS
    moody = Moody(lost, lost, kept)
    spans = Spans(moody)

    def sent(left: int) -> bool:
        spans._provider.force_flush()
        return len(moody.results) == left

    with serving(tiny_gguf, "tiny", tellers=(spans,)) as server:
        for left in (2, 1, 0):
            assert server.post("/v1/completions", BODY).is_success
            assert eventually(partial(sent, left))
    said = [r.getMessage() for r in caplog.records if "lost" in r.getMessage()]
    assert len(said) == 2 and "8 were lost" in said[1]


def test_a_request_has_so_many_states_and_no_more() -> None:
    events = [{"at_ns": i, "state": ("decode", "preempted")[i % 2]} for i in range(256)]
    record = {"arrived": 1.0, "wall_ns": 300, "events": events}
    states = list(_of_record(record, {}))
    assert len(states) == 256 > MAX_STATES
    assert states[-1][2] == 1_000_000_300


def test_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert not wanted(None) and wanted("http://a")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://a:4318")
    assert wanted(None)
    exporter: Any = otlp(None)
    assert exporter._endpoint == "http://a:4318/v1/traces"
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert not wanted("http://a")


def test_an_endpoint_that_is_none(tiny_gguf: Path) -> None:
    done = run("serve", tiny_gguf, "--otlp-endpoint", "localhost:4318")
    assert_fails(done, 1, "localhost:4318", "http://localhost:4318")
