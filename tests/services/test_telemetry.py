"""Traces, logs and metrics as their receivers get them."""

import asyncio
import base64
import json
import logging
import math
import os
import subprocess
import sys
import time
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from google.protobuf import json_format
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.propagate import extract
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Link, SpanKind, StatusCode

from muxtune.span_file_exporter import FileSpanExporter, RotatingFile
from services import telemetry
from services.rpc.server_settings import ServerSettings
from services.settings import SettingsError
from services.telemetry import configure, current_trace_parent, links_to, task_span, tracer

ROOT = Path(__file__).parents[2]
TASK = "tenants/a/tasks/b"


@pytest.fixture(autouse=True)
def own_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the test run's global providers and logs; `configure` returns its providers."""
    monkeypatch.setattr("opentelemetry.trace.set_tracer_provider", lambda provider: None)
    monkeypatch.setattr("opentelemetry.metrics.set_meter_provider", lambda provider: None)
    monkeypatch.setattr("services.telemetry._configure_logs", lambda name, level: None)


def test_work_for_a_task_joins_its_trace(spans) -> None:
    with tracer().start_as_current_span("CreateTask") as root:
        stored = current_trace_parent()
    version, trace_id, span_id, flags = stored.split("-")
    assert version == "00" and int(flags, 16) & 1  # sampled
    assert int(trace_id, 16) == root.get_span_context().trace_id and int(span_id, 16) == root.get_span_context().span_id
    with tracer().start_as_current_span("something else"), task_span("train", TASK, stored, step=3):
        pass
    span = spans.wait_for("train", SpanKind.INTERNAL)
    assert span.context.trace_id == root.get_span_context().trace_id
    assert span.parent.span_id == root.get_span_context().span_id
    assert span.attributes == {"muxtune.task": TASK, "muxtune.tenant": "tenants/a", "step": 3}


def test_without_a_stored_trace_the_span_in_force_is_the_parent(spans) -> None:
    assert current_trace_parent() == ""
    with tracer().start_as_current_span("outer") as outer, task_span("inner", TASK, ""):
        pass
    assert spans.wait_for("inner", SpanKind.INTERNAL).parent.span_id == outer.get_span_context().span_id


@pytest.mark.parametrize("broken", ["00-zz-1-01", "garbage", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_a_broken_trace_parent_costs_only_the_link(spans, broken: str) -> None:
    with task_span("work", TASK, broken):
        pass
    assert spans.wait_for("work", SpanKind.INTERNAL).context.is_valid


def test_a_fused_step_links_to_all_its_tasks(spans) -> None:
    parents = []
    for name in ("x", "y"):
        with tracer().start_as_current_span(name):
            parents.append((name, current_trace_parent()))
    with tracer().start_as_current_span("step", links=links_to([*parents, ("no trace", "")])):
        pass
    links = spans.wait_for("step", SpanKind.INTERNAL).links
    assert [link.attributes["muxtune.task"] for link in links] == ["x", "y"]
    ids = [trace.format_span_id(link.context.span_id) for link in links]
    assert ids == [parent.split("-")[2] for _, parent in parents]


def test_an_exceptions_text_enters_no_span(spans) -> None:
    with pytest.raises(KeyError), task_span("work", TASK, ""):
        raise KeyError("a tenant's row")
    span = spans.wait_for("work", SpanKind.INTERNAL)
    assert span.status.status_code is StatusCode.ERROR and span.attributes["error.type"] == "KeyError"
    assert "row" not in span.to_json()


def test_logs_are_json_lines_with_the_trace(spans) -> None:
    formatter = telemetry._JsonFormatter("alignment")
    record = logging.makeLogRecord({"msg": "line\n%s ü", "args": (3,), "levelname": "INFO", "name": "x.y"})
    outside = formatter.format(record)
    assert "\n" not in outside and "trace_id" not in json.loads(outside)
    with tracer().start_as_current_span("work") as span:
        line = json.loads(formatter.format(record))
    context = span.get_span_context()
    assert line["trace_id"] == trace.format_trace_id(context.trace_id)
    assert line["span_id"] == trace.format_span_id(context.span_id)
    assert (line["service"], line["level"], line["logger"]) == ("alignment", "INFO", "x.y")
    assert line["message"] == "line\n3 ü"


def test_a_warning_of_a_library_is_logged_once_and_our_own_lines_always() -> None:
    passes = telemetry._WarningsOnce().filter
    records = [logging.makeLogRecord({"name": name, "msg": "old"}) for name in ("py.warnings", "services.x") * 3]
    assert [passes(record) for record in records] == [True, True, False, True, False, True]
    others = [logging.makeLogRecord({"name": "py.warnings", "msg": str(n)}) for n in range(3000)]
    assert all(map(passes, others))  # what is remembered is bounded


def test_an_unknown_log_level_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(SettingsError, match=r"MUXTUNE_LOG_LEVEL.*LOUD"):
        configure("test", ServerSettings(mesh_secret="s", log_level="LOUD"))


class Collector(trace_service_pb2_grpc.TraceServiceServicer, metrics_service_pb2_grpc.MetricsServiceServicer):
    """An OTLP receiver. Both services have a method Export; the request tells which one was called."""

    def __init__(self) -> None:
        self.spans, self.metrics = [], []

    def Export(self, request, context):
        if isinstance(request, trace_service_pb2.ExportTraceServiceRequest):
            self.spans += [
                (r.resource, span) for r in request.resource_spans for s in r.scope_spans for span in s.spans
            ]
            return trace_service_pb2.ExportTraceServiceResponse()
        self.metrics += [m for r in request.resource_metrics for s in r.scope_metrics for m in s.metrics]
        return metrics_service_pb2.ExportMetricsServiceResponse()


@pytest.fixture
def collector():
    servicer = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(servicer, server)
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(servicer, server)
    servicer.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield servicer
    server.stop(None)


def test_a_collector_gets_spans_and_metrics(collector: Collector) -> None:
    exporting = configure("admission", ServerSettings(mesh_secret="s", otlp_endpoint=collector.endpoint))
    with exporting.tracer_provider.get_tracer("x").start_as_current_span("hello") as span:
        pass
    exporting.meter_provider.get_meter("x").create_counter("muxtune.things").add(2)
    exporting.shutdown()
    [(resource, received)] = collector.spans
    assert received.name == "hello"
    assert received.trace_id == span.get_span_context().trace_id.to_bytes(16, "big")
    attributes = {a.key: a.value.string_value for a in resource.attributes}
    assert attributes["service.name"] == "muxtune-admission"
    assert [metric.name for metric in collector.metrics] == ["muxtune.things"]


def test_a_collector_that_is_down_blocks_nothing() -> None:
    exporting = configure("x", ServerSettings(mesh_secret="s", otlp_endpoint="http://127.0.0.1:1"))
    tracer = exporting.tracer_provider.get_tracer("x")
    started = time.monotonic()
    for _ in range(5000):  # more than the queue holds
        tracer.start_span("span").end()
    assert time.monotonic() - started < 3
    exporting.shutdown()
    assert time.monotonic() - started < 8


WRITER = """
import sys
from pathlib import Path
from services.rpc.server_settings import ServerSettings
from services.telemetry import configure
telemetry = configure(sys.argv[1], ServerSettings(mesh_secret="s", trace_file=Path(sys.argv[2])))
tracer = telemetry.tracer_provider.get_tracer("x")
for i in range(300):
    with tracer.start_as_current_span(f"{sys.argv[1]}-{i}", attributes={"text": "x" * 500, "count": 2**60}):
        with tracer.start_as_current_span("child"):
            pass
telemetry.shutdown()
"""


def read_otlp_json(line: str) -> trace_service_pb2.ExportTraceServiceRequest:
    """Read with protobuf's parser, which expects base64 where OTLP's JSON has hexadecimal ids."""

    def with_base64(value):
        if isinstance(value, dict):
            ids = ("traceId", "spanId", "parentSpanId")
            return {
                k: base64.b64encode(bytes.fromhex(v)).decode() if k in ids else with_base64(v) for k, v in value.items()
            }
        return [with_base64(item) for item in value] if isinstance(value, list) else value

    return json_format.ParseDict(with_base64(json.loads(line)), trace_service_pb2.ExportTraceServiceRequest())


def test_processes_share_a_trace_file(tmp_path: Path) -> None:
    path = tmp_path / "made" / "trace.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, name, str(path)], cwd=ROOT) for name in ("one", "two")]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    requests = [read_otlp_json(line) for line in path.read_text().splitlines()]
    spans = [span for r in requests for rs in r.resource_spans for ss in rs.scope_spans for span in ss.spans]
    assert len(spans) == 2 * 2 * 300
    roots = {span.span_id: span for span in spans if not span.parent_span_id}
    assert {span.name for span in roots.values()} == {f"{name}-{i}" for name in ("one", "two") for i in range(300)}
    for span in spans:
        assert len(span.trace_id) == 16 and len(span.span_id) == 8
        assert not span.parent_span_id or roots[span.parent_span_id].trace_id == span.trace_id
    assert path.stat().st_mode & 0o077 == 0


def test_a_trace_file_is_rotated_by_all_its_writers_and_loses_only_the_oldest(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    limits = {"max_bytes": 10_000, "num_files": 4}
    writers = [RotatingFile(path, **limits) for _ in range(3)]
    lines = [b"%05d " % number + b"x" * 90 + b"\n" for number in range(3000)]
    for number, line in enumerate(lines):
        writers[number % 3].append(line)
    names = ["trace.jsonl.3", "trace.jsonl.2", "trace.jsonl.1", "trace.jsonl"]  # the oldest first
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)
    assert all((tmp_path / name).stat().st_size <= 10_000 for name in names)
    kept = b"".join((tmp_path / name).read_bytes() for name in names).splitlines(keepends=True)
    # A writer whose file another one has renamed fills it up first.
    assert sorted(kept) == lines[len(lines) - len(kept) :] and len(kept) > 300
    huge = b"y" * 20_000 + b"\n"
    writers[0].append(huge)
    writers[0].append(lines[0])
    assert path.read_bytes() == lines[0] and (tmp_path / "trace.jsonl.1").read_bytes() == huge
    assert {p.stat().st_mode & 0o077 for p in tmp_path.iterdir()} == {0}
    for writer in writers:
        writer.close()


def test_processes_that_rotate_a_trace_file_tear_no_line(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    environment = {**os.environ, "MUXTUNE_TRACE_FILE_BYTES": "100000", "MUXTUNE_TRACE_FILES": "3"}
    program = WRITER.replace(
        'ServerSettings(mesh_secret="s", trace_file=Path(sys.argv[2]))',
        'from_environment(ServerSettings, {**os.environ, "MUXTUNE_TRACE_FILE": sys.argv[2]})',
    ).replace("import sys", "import os, sys\nfrom services.settings import from_environment")
    writers = [
        subprocess.Popen([sys.executable, "-c", program, name, str(path)], cwd=ROOT, env=environment)
        for name in ("one", "two")
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["trace.jsonl", "trace.jsonl.1", "trace.jsonl.2"]
    for file in files:
        assert all(read_otlp_json(line).resource_spans for line in file.read_text().splitlines())


def test_a_file_holds_what_a_collector_would_get(tmp_path: Path) -> None:
    """Compare with OpenTelemetry's encoder: attributes of every kind, events, links, remote parents, two scopes."""
    memory_exporter = InMemorySpanExporter()
    provider = TracerProvider(resource=Resource({"service.name": "x", "ids": (1, 2)}))
    provider.add_span_processor(SimpleSpanProcessor(memory_exporter))
    one, other = provider.get_tracer("one", "1.2"), provider.get_tracer("other")
    remote = extract({"traceparent": f"00-{'a' * 32}-{'0' * 15}1-01", "tracestate": "vendor=x,more=y"})
    values = [
        "t\u00e9xt\n",
        True,
        False,
        0,
        -(2**62),
        1.5,
        math.inf,
        -math.inf,
        math.nan,
        ("a", "b"),
        (1.0, math.nan),
        (),
    ]
    with one.start_as_current_span(
        "root", remote, SpanKind.SERVER, {f"key{i}": v for i, v in enumerate(values)}
    ) as root:
        root.add_event("event", {"n": 1}, timestamp=5)
        with other.start_as_current_span(
            "child",
            links=[Link(root.get_span_context(), {"l": True}), *links_to([("t", f"00-{'b' * 32}-{'0' * 15}2-00")])],
        ) as child:
            child.set_status(StatusCode.ERROR, "why")
        for kind in SpanKind:
            one.start_span("", kind=kind).end()
    path = tmp_path / "trace.jsonl"
    exporter = FileSpanExporter(RotatingFile(path))
    exporter.export(memory_exporter.get_finished_spans())
    exporter.shutdown()
    read = read_otlp_json(path.read_text())
    assert spans_by_id(read) == spans_by_id(encode_spans(memory_exporter.get_finished_spans()))


def spans_by_id(request: trace_service_pb2.ExportTraceServiceRequest) -> dict[bytes, tuple[str, str, str]]:
    """Return each span with its resource and scope, by id."""
    return {
        span.span_id: (str(resource.resource), str(scope.scope), str(span))
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    }


async def test_a_span_does_not_leak_between_tasks(spans) -> None:
    async def work(name: str) -> str:
        with task_span(name, TASK, ""):
            await asyncio.sleep(0)
            return current_trace_parent()

    one, two = await asyncio.gather(work("one"), work("two"))
    assert one.split("-")[1] != two.split("-")[1]
