"""Traces, metrics and logs of a service, and the span conventions all of them share.

One trace a task: its context is stored as a W3C `traceparent` and everything done for it later joins that trace; work
for many tasks is a span of its own with links to theirs. Spans and logs never hold a tenant's data.
Source: OpenTelemetry RPC semantic conventions (stable).
"""

import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
from opentelemetry import metrics, propagate, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode

from services.config import ServerSettings

_NAME = "muxtune"
_SLOW_STARTING_STREAMS = ("WatchTask", "WatchChanges", "RunPlan", "StreamMicrobatches")


def configure(service_name: str, settings: ServerSettings) -> TracerProvider:
    """Sets the process's tracer and meter providers and its JSON logs. Exporting never blocks a call."""
    _configure_logs(service_name, settings.log_level)
    resource = Resource.create({"service.name": f"muxtune-{service_name}", "service.namespace": "muxtune"})
    provider = TracerProvider(resource=resource)
    readers: list[Any] = []
    if settings.otlp_endpoint:
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

        insecure = not settings.otlp_endpoint.startswith("https")
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(settings.otlp_endpoint, insecure=insecure)))
        readers.append(PeriodicExportingMetricReader(OTLPMetricExporter(settings.otlp_endpoint, insecure=insecure)))
    if settings.trace_file:
        from muxtune.trace_file import FileSpanExporter

        provider.add_span_processor(BatchSpanProcessor(FileSpanExporter(settings.trace_file)))
    if settings.prometheus_port:
        from opentelemetry.exporter.prometheus import PrometheusMetricReader
        from prometheus_client import start_http_server

        start_http_server(settings.prometheus_port)
        readers.append(PrometheusMetricReader())
    trace.set_tracer_provider(provider)
    metrics.set_meter_provider(MeterProvider(resource=resource, metric_readers=readers))
    return provider


def tracer() -> trace.Tracer:
    return trace.get_tracer(_NAME)


def meter() -> metrics.Meter:
    return metrics.get_meter(_NAME)


def current_trace_parent() -> str:
    """W3C traceparent of the span in force; empty if there is none."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier.get("traceparent", "")


@contextmanager
def task_span(name: str, task: str, trace_parent: str, **attributes: str | int | float) -> Iterator[Span]:
    """A span in the task's own trace. An exception marks it failed and goes on."""
    context = propagate.extract({"traceparent": trace_parent}) if trace_parent else None
    whose = {"muxtune.task": task, "muxtune.tenant": task.rpartition("/tasks/")[0]}
    with tracer().start_as_current_span(name, context=context, attributes={**whose, **attributes}) as span:
        yield span


def links_to(trace_parents: Iterable[tuple[str, str]]) -> list[Link]:
    """Links to the traces of (task, traceparent) pairs, for a span that serves them all."""
    contexts = ((task, trace.get_current_span(propagate.extract({"traceparent": p}))) for task, p in trace_parents if p)
    return [Link(span.get_span_context(), {"muxtune.task": task}) for task, span in contexts]


class RpcSpan:
    """One call's span, on either side. Streams that may last hours end theirs when established."""

    def __init__(self, span: Span, method: str, side: str) -> None:
        self._span, self._method, self._side = span, method, side
        self._started = time.perf_counter()
        self._ended = False

    @property
    def is_long_lived(self) -> bool:
        return self._method.rpartition("/")[2] in _SLOW_STARTING_STREAMS

    def end(self, code: grpc.StatusCode) -> None:
        """Records the status and ends the span; later calls change nothing."""
        if self._ended:
            return
        self._ended = True
        self._span.set_attribute("rpc.response.status_code", code.name)
        if code is not grpc.StatusCode.OK:
            self._span.set_attribute("error.type", code.name)
            self._span.set_status(Status(StatusCode.ERROR, code.name))
        self._span.end()
        labels = {"rpc.method": self._method.lstrip("/"), "rpc.response.status_code": code.name}
        duration = meter().create_histogram(f"rpc.{self._side}.call.duration", unit="s")
        duration.record(time.perf_counter() - self._started, labels)


@contextmanager
def rpc_span(
    method: str, kind: SpanKind, metadata: Mapping[str, str] | None = None, address: str = ""
) -> Iterator[RpcSpan]:
    """Starts a client or server span and makes it current; ends it CANCELLED or UNKNOWN if nobody said otherwise."""
    context = propagate.extract(metadata) if metadata else None
    attributes = {"rpc.system.name": "grpc", "rpc.method": method.lstrip("/")}
    if address:
        attributes["server.address"] = address
    span = tracer().start_span(method.lstrip("/"), context=context, kind=kind, attributes=attributes)
    call = RpcSpan(span, method, "server" if kind is SpanKind.SERVER else "client")
    with trace.use_span(span, end_on_exit=False, record_exception=False, set_status_on_exception=False):
        try:
            yield call
        except grpc.RpcError as error:
            call.end(error.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN)
            raise
        except Exception:
            call.end(grpc.StatusCode.UNKNOWN)
            raise
        except BaseException:  # cancelled, or its stream abandoned
            call.end(grpc.StatusCode.CANCELLED)
            raise
        else:
            call.end(grpc.StatusCode.OK)


class _JsonFormatter(logging.Formatter):
    """One JSON object a line, with the ids that find the trace."""

    def __init__(self, service_name: str) -> None:
        super().__init__()
        self._service_name = service_name

    def format(self, record: logging.LogRecord) -> str:
        context = trace.get_current_span().get_span_context()
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname,
            "service": self._service_name,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if context.is_valid:
            line |= {"trace_id": format(context.trace_id, "032x"), "span_id": format(context.span_id, "016x")}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def _configure_logs(service_name: str, level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter(service_name))
    logging.basicConfig(level=level, handlers=[handler], force=True)


def carrier_of(metadata: Sequence[tuple[str, str | bytes]] | None) -> dict[str, str]:
    """The text entries of a call's metadata, for extracting a trace context."""
    return {key: value for key, value in metadata or () if isinstance(value, str)}
