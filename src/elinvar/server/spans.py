"""OpenTelemetry: a span for each request, with OpenTelemetry's names for generative AI, and below it one
for each state that the ledger of its answer tells of.

Spans are made when a request has ended, by a thread of their own; another one, OpenTelemetry's, sends
them. Neither steps nor answers ever wait for a collector, and one that is away costs spans alone.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from queue import Full, Queue
from typing import TYPE_CHECKING, Any

from elinvar import __version__
from elinvar.base.errors import ElinvarError
from elinvar.server.seen import Answered, Seen

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    from elinvar.engine.watch import Record

log = logging.getLogger(__name__)

CLOSE_S = 5.0
"""For what has not been sent at the end."""
EXPORT_S = 5.0
"""How long a collector may take with what it is sent."""
MAX_PENDING = 4096
MAX_STATES = 64
"""Spans below that of a request; one that is preempted again and again has no more."""
_VARIABLES = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
_OPERATIONS = {
    "completions": "text_completion",
    "generate": "text_completion",
    "embeddings": "embeddings",
    "embed": "embeddings",
    "rerank": "rerank",
    "score": "score",
}
"""By route; what else asks a model is a chat."""


def wanted(endpoint: str | None) -> bool:
    """Whether spans are asked for, by --otlp-endpoint or OpenTelemetry's own variables."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    return endpoint is not None or any(os.environ.get(name) for name in _VARIABLES)


def otlp(endpoint: str | None) -> SpanExporter:
    """Sends spans to a collector by HTTP. endpoint: as OTEL_EXPORTER_OTLP_ENDPOINT; None: the variables
    say. Raises ElinvarError where the packages are missing."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ModuleNotFoundError:
        raise ElinvarError(
            "Traces of requests need OpenTelemetry; install it with 'pip install elinvar[otel]', or "
            "leave --otlp-endpoint and OTEL_EXPORTER_OTLP_ENDPOINT out."
        ) from None
    own = "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT" in os.environ
    timeout = None if own or "OTEL_EXPORTER_OTLP_TIMEOUT" in os.environ else EXPORT_S
    url = None if endpoint is None else _traces_url(endpoint)
    return OTLPSpanExporter(endpoint=url, timeout=timeout)


def _traces_url(endpoint: str) -> str:
    if not endpoint.startswith(("http://", "https://")):
        raise ElinvarError(
            f"{endpoint!r} is no address of a collector; --otlp-endpoint is as http://localhost:4318."
        )
    path = "/v1/traces"
    return endpoint if endpoint.endswith(path) else endpoint.rstrip("/") + path


class Spans:
    """A Teller. exporter: where spans go (see `otlp`)."""

    def __init__(self, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        # It says each failure, with a traceback; `_Patient` says the first one.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        resource = Resource.create({"service.version": __version__, **_service()})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(_patient(exporter)))
        self._tracer = self._provider.get_tracer("elinvar", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._pending: Queue[Seen | None] = Queue(MAX_PENDING)
        self._lost = False
        self._thread = threading.Thread(target=self._run, name="elinvar-spans", daemon=True)
        self._thread.start()

    def tell(self, seen: Seen) -> None:
        if not seen.answers and seen.texts is None and seen.route not in _OPERATIONS:
            return  # asks no model
        try:
            self._pending.put_nowait(seen)
        except Full:
            if not self._lost:
                log.warning("Requests end more quickly than spans are made; some have none.")
            self._lost = True

    def close(self) -> None:
        """Sends what there is; a collector that is away does not hold the end up for long."""
        with suppress(Full):
            self._pending.put(None, timeout=CLOSE_S)
        self._thread.join(CLOSE_S)
        ending = threading.Thread(target=self._provider.shutdown, daemon=True)
        ending.start()
        ending.join(CLOSE_S)

    def _run(self) -> None:
        while (seen := self._pending.get()) is not None:
            try:
                self._make(seen)
            except Exception:
                log.exception("No span of request %s.", seen.request_id)

    def _make(self, seen: Seen) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in _trace(seen)}
        attributes = attributes_of(seen)
        operation, model = (
            attributes["gen_ai.operation.name"],
            attributes.get("gen_ai.request.model"),
        )
        span = self._tracer.start_span(
            operation if model is None else f"{operation} {model}",
            self._propagator.extract(headers),
            SpanKind.SERVER,
            attributes,
            start_time=seen.began_ns,
        )
        if "error.type" in attributes:
            span.set_status(Status(StatusCode.ERROR))
        if span.is_recording():
            below = set_span_in_context(span)
            for name, start, end, more in _states(seen.answers):
                child = self._tracer.start_span(name, below, attributes=more, start_time=start)
                child.end(end)
        span.end(seen.began_ns + int(1e9 * (seen.seconds or 0.0)))


def _service() -> dict[str, str]:
    """Its name, where the variables have none: what is given here would win over them."""
    named = "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    return {} if named or "OTEL_SERVICE_NAME" in os.environ else {"service.name": "elinvar"}


def _trace(seen: Seen) -> list[tuple[bytes, bytes]]:
    """W3C's headers of the client's trace."""
    return [(n, v) for n, v in seen.scope["headers"] if n in (b"traceparent", b"tracestate")]


def attributes_of(seen: Seen) -> dict[str, Any]:
    """Of the span of a request: no texts."""
    found: dict[str, Any] = {
        "gen_ai.operation.name": _OPERATIONS.get(seen.route, "chat"),
        "gen_ai.provider.name": "elinvar",
        "http.request.method": seen.scope["method"],
        "url.path": seen.scope["path"],
        "http.response.status_code": seen.status,
        "elinvar.request_id": seen.request_id,
        "elinvar.tenant": seen.tenant,
    }
    reasons = [reason for one in seen.answers for reason in one.reasons]
    if seen.status >= 400:
        found["error.type"] = str(seen.status)
    elif bad := set(reasons) & {"error", "abort"}:
        found["error.type"] = min(bad)
    if seen.texts is not None:
        model, tokens = seen.texts
        found |= {"gen_ai.request.model": model, "gen_ai.response.model": model}
        found["gen_ai.usage.input_tokens"] = tokens
    if seen.answers:
        found |= _of_answer(seen.answers[-1], reasons)
    return found


def _of_answer(answer: Answered, reasons: Sequence[str]) -> dict[str, Any]:
    params, usage, handling = answer.choices[0].params, answer.used, answer.handling
    found: dict[str, Any] = {
        "gen_ai.request.model": answer.model,
        "gen_ai.response.model": answer.model,
        "gen_ai.response.id": answer.id,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k,
        "gen_ai.request.choice.count": len(answer.choices),
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.reasoning.output_tokens": usage.reasoning_tokens,
        "gen_ai.response.finish_reasons": list(reasons),
        "gen_ai.conversation.id": handling.session,
    }
    return {name: value for name, value in found.items() if value is not None}


State = tuple[str, int, int, Mapping[str, Any]]
"""(name, when it began, when it ended, attributes); Unix time in ns."""


def _states(answers: Sequence[Answered]) -> Iterator[State]:
    many = sum(len(one.records) for one in answers) > 1
    left = MAX_STATES
    for answer in answers:
        for index, record in sorted(answer.records.items()):
            more = {"elinvar.choice": index} if many else {}
            for state in _of_record(record, more):
                if not left:
                    return
                left -= 1
                yield state


def _of_record(record: Record, more: Mapping[str, Any]) -> Iterator[State]:
    """What it waited for does not part a state."""
    began, events = int(1e9 * record["arrived"]), record["events"]
    starts: list[tuple[str, int, dict[str, Any]]] = []
    for event in events:
        if not starts or starts[-1][0] != event["state"]:
            causes = {"elinvar.cause": event["cause"]} if "cause" in event else {}
            starts.append((event["state"], event["at_ns"], {**more, **causes}))
    ends = [at for _, at, _ in starts[1:]] + [record["wall_ns"]]
    for (name, start, attributes), end in zip(starts, ends, strict=True):
        yield name, began + start, began + end, attributes


def _patient(inner: SpanExporter) -> SpanExporter:
    """The same, which says once when spans are lost, and once when they are not any more."""
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class Patient(SpanExporter):
        num_lost = 0

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            try:
                result = inner.export(spans)
            except Exception:
                result = SpanExportResult.FAILURE
            if result is SpanExportResult.SUCCESS:
                if self.num_lost:
                    log.warning("The collector takes spans again; %d were lost.", self.num_lost)
                self.num_lost = 0
            else:
                if not self.num_lost:
                    log.warning("The collector of traces does not answer; spans are lost.")
                self.num_lost += len(spans)
            return result

        def shutdown(self) -> None:
            inner.shutdown()

    return Patient()
