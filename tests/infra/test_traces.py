"""Traces of a run, as a receiver of OTLP gets them."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from infra import traces
from infra.report import RunReport


class Receiver(HTTPServer):
    """Keeps the spans that come, by name."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.paths: set[str] = set()
        self.headers: list[str | None] = []
        self.spans: dict[str, list] = {}
        self.services: set[str] = set()

    def take(self, body: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.services |= {one.value.string_value for one in resource.resource.attributes
                              if one.key == "service.name"}  # fmt: skip
            for span in (span for scope in resource.scope_spans for span in scope.spans):
                self.spans.setdefault(span.name, []).append(span)


class Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        self.server.paths.add(self.path)
        self.server.headers.append(self.headers.get("x-team"))
        self.server.take(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver(monkeypatch) -> Iterator[Receiver]:
    with Receiver() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", server.address)
        yield server
        server.shutdown()


def attributes(span) -> dict[str, object]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


def night(folder, rejected: int = 0) -> RunReport:
    report = RunReport("refresh", "night-1", {}, str(folder), max_reject_fraction=0.1, planned=10)
    with report.stage("embed") as stage:
        stage.rows = 7
    with report.stage("personas") as stage:
        stage.rows = 3
        report.table_written("personas", 4)
    report.written = 10 - rejected
    report.reject("empty", rejected)
    report.finish()
    return report


def test_a_run_is_a_span_with_its_stages_below_it_and_its_commits_in_it(receiver, tmp_path, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-team=search")
    monkeypatch.setenv("TRACEPARENT", f"00-{'ab' * 16}-{'cd' * 8}-01")
    night(tmp_path)
    assert receiver.paths == {"/v1/traces"} and set(receiver.headers) == {"search"} and receiver.services == {"pplug"}
    assert {name: len(spans) for name, spans in receiver.spans.items()} == {"refresh": 1, "embed": 1, "personas": 1}
    (run,), (embed,), (personas,) = (receiver.spans[name] for name in ("refresh", "embed", "personas"))
    assert run.trace_id.hex() == "ab" * 16 and run.parent_span_id.hex() == "cd" * 8
    assert embed.parent_span_id == personas.parent_span_id == run.span_id
    assert run.start_time_unix_nano <= embed.start_time_unix_nano <= embed.end_time_unix_nano
    assert embed.end_time_unix_nano <= personas.start_time_unix_nano <= run.end_time_unix_nano
    assert attributes(embed) == {"pplug.rows": 7} and attributes(personas) == {"pplug.rows": 3}
    counts = {"planned": 10, "written": 10, "already_there": 0, "failed": 0, "rejected": 0, "exit_code": 0}
    wanted = {"job": "refresh", "run_id": "night-1"} | counts
    assert attributes(run) == {f"pplug.{name}": value for name, value in wanted.items()}
    assert [(one.name, attributes(one)) for one in run.events] == [
        ("commit", {"pplug.table": "personas", "pplug.version": 4})
    ]
    assert run.status.code == run.status.STATUS_CODE_OK


def test_a_run_that_failed_is_marked_so(receiver, tmp_path):
    assert night(tmp_path, rejected=5).exit_code == 3
    (run,) = receiver.spans["refresh"]
    assert run.status.code == run.status.STATUS_CODE_ERROR and attributes(run)["pplug.exit_code"] == 3


def test_an_error_ends_its_stage_and_its_run_without_its_words(receiver, tmp_path):
    report = RunReport("refresh", "night-1", {}, str(tmp_path))
    with pytest.raises(OSError), report.stage("embed"):
        raise OSError("a user's own words")
    report.abandon(OSError("a user's own words"), 1)
    (run,), (embed,) = receiver.spans["refresh"], receiver.spans["embed"]
    assert run.status.code == embed.status.code == run.status.STATUS_CODE_ERROR
    assert b"own words" not in run.SerializeToString() + embed.SerializeToString()


def test_a_run_whose_report_cannot_be_written_ends_in_the_traces(receiver, tmp_path):
    (tmp_path / "report.json").mkdir()
    report = RunReport("refresh", "night-1", {}, str(tmp_path))
    with pytest.raises(OSError, match="report.json"):
        report.abandon(ValueError("boom"), 1)
    (run,) = receiver.spans["refresh"]
    assert attributes(run)["pplug.exit_code"] == 1


def test_a_receiver_that_is_gone_costs_the_traces_and_not_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    assert night(tmp_path).exit_code == 0 and (tmp_path / "report.json").exists()


@pytest.mark.parametrize(
    ("more", "sent"),
    [
        ({}, True),
        ({"OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, False),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
    ],
)
def test_the_environment_says_whether_traces_are_sent(monkeypatch, more, sent):
    for name, value in ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"} | more).items():
        monkeypatch.setenv(name, value)
    assert traces.are_sent() is sent
