"""Traces of a job by OTLP: a span per run, a span below it per stage, and an event per commit.

Route: `RunReport` -> `Trace` -> OpenTelemetry's SDK -> OTLP over HTTP. Nothing happens, and nothing is imported, unless
the environment names a receiver: OTEL_EXPORTER_OTLP_ENDPOINT, or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT. The SDK reads
OpenTelemetry's other variables too (headers, certificates, OTEL_SERVICE_NAME, sampling). With TRACEPARENT, which a
scheduler may set, the run is a part of the scheduler's own trace. Spans hold names, counts and ids, and no texts.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_HTTP = "http/protobuf"
log = logging.getLogger(__name__)


def _first(names: tuple[str, ...]) -> str:
    """The value of the first of these variables that is set."""
    return next((value for name in names if (value := os.environ.get(name))), "")


def are_sent() -> bool:
    """Says whether the environment names a receiver that can be spoken to."""
    if not _first(ENDPOINTS) or os.environ.get("OTEL_TRACES_EXPORTER") == "none":
        return False
    protocol = _first(_PROTOCOLS) or _HTTP
    if protocol != _HTTP:
        log.warning("no traces are sent by %s; set OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=%s", protocol, _HTTP)
    return protocol == _HTTP


class Trace:
    """The trace of one run."""

    def __init__(self, job: str, run_id: str) -> None:
        self._provider: Any = None
        if not are_sent():
            return
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        service = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "pplug"}
        self._provider = TracerProvider(resource=Resource.create(service), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("pplug")
        parent = TraceContextTextMapPropagator().extract({"traceparent": os.environ.get("TRACEPARENT", "")})
        self._run = self._tracer.start_span(job, parent, attributes={"pplug.job": job, "pplug.run_id": run_id})

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, int]]:
        """A span around a stage; what is put into the mapping becomes attributes."""
        counts: dict[str, int] = {}
        if self._provider is None:
            yield counts
            return
        from opentelemetry.trace import StatusCode, set_span_in_context

        span = self._tracer.start_span(name, set_span_in_context(self._run))
        try:
            yield counts
        except BaseException as error:
            span.set_status(StatusCode.ERROR, type(error).__name__)  # its words may quote a user
            raise
        finally:
            span.set_attributes({f"pplug.{key}": value for key, value in counts.items()})
            span.end()

    def commit(self, table: str, version: int) -> None:
        """Notes a commit as an event of the run."""
        if self._provider is not None:
            self._run.add_event("commit", {"pplug.table": table, "pplug.version": version})

    def end(self, exit_code: int, counts: Mapping[str, int]) -> None:
        """Ends the run and waits until its spans are sent, or the receiver's time is over (10 s by default)."""
        if self._provider is None:
            return
        from opentelemetry.trace import StatusCode

        self._run.set_attributes({f"pplug.{key}": value for key, value in counts.items()})
        self._run.set_attribute("pplug.exit_code", exit_code)
        self._run.set_status(StatusCode.OK if exit_code == 0 else StatusCode.ERROR)
        self._run.end()
        self._provider.shutdown()
        self._provider = None
