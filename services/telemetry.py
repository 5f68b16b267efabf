"""Traces, metrics and logs of a service, and the conventions for spans that all services share.

Each task has one trace: its context is stored as a W3C `traceparent`, and all later work for the task joins it. Work
for many tasks is a span with links to their traces. Spans and logs never contain a tenant's data.
"""

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from opentelemetry import metrics, propagate, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, Span, Status, StatusCode

from muxtune.transport import url_proxy_options
from services.resource_names import tenant_of
from services.settings import SettingsError

_NAME = "muxtune"
_EXPORT_SECONDS = 3
_SHUTDOWN_SECONDS = 4.0
_BATCH_MILLIS = 1000
_MAX_WARNINGS = 1000  # different ones that are remembered
_MAX_CONTEXT_BYTES = 512  # the length that W3C requires everyone to propagate


@dataclass(frozen=True, kw_only=True)
class TelemetrySettings:
    """Settings of a process's telemetry. `listen` is its service's "host:port": Prometheus is served on that host.

    `otlp_endpoint` receives traces and metrics; `trace_file` receives traces as lines of JSON. At `trace_file_bytes` it
    is renamed to TRACE_FILE.1 and so on; of `trace_files` files in all the oldest is deleted.
    """

    listen: str = "127.0.0.1:0"
    otlp_endpoint: str | None = None
    trace_file: Path | None = None
    trace_file_bytes: int = 64 << 20
    trace_files: int = 8
    prometheus_port: int | None = None
    log_level: str = "INFO"


@dataclass(frozen=True)
class Telemetry:
    """The exporters of a process."""

    tracer_provider: TracerProvider
    meter_provider: MeterProvider
    closers: Sequence[Callable[[], Any]] = ()

    def shutdown(self) -> None:
        """Export what is queued, for a few seconds at most; the rest is lost."""
        parts = (self.tracer_provider.shutdown, self.meter_provider.shutdown, *self.closers)
        threads = [threading.Thread(target=part, daemon=True) for part in parts]
        for thread in threads:
            thread.start()
        end = time.monotonic() + _SHUTDOWN_SECONDS
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))


def configure(service_name: str, settings: TelemetrySettings) -> Telemetry:
    """Set the process's tracer and meter providers and its JSON logs.

    Threads export from bounded queues: a call never waits, and what does not fit into a queue is dropped.
    """
    _configure_logs(service_name, settings.log_level)
    resource = Resource.create({"service.name": f"muxtune-{service_name}", "service.namespace": "muxtune"})
    provider = TracerProvider(resource=resource)
    for exporter in _span_exporters(settings):
        provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=_BATCH_MILLIS))
    readers, closers = _metric_readers(settings)
    telemetry = Telemetry(provider, MeterProvider(resource=resource, metric_readers=readers), closers)
    trace.set_tracer_provider(telemetry.tracer_provider)
    if readers:  # without a reader, recording a call's duration would still cost as much as one SQL statement
        metrics.set_meter_provider(telemetry.meter_provider)
    return telemetry


def _span_exporters(settings: TelemetrySettings) -> Iterator[Any]:
    if settings.otlp_endpoint:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        yield OTLPSpanExporter(**_otlp_options(settings.otlp_endpoint))
    if settings.trace_file:
        from muxtune.span_file_exporter import FileSpanExporter, RotatingFile

        yield FileSpanExporter(RotatingFile(settings.trace_file, settings.trace_file_bytes, settings.trace_files))


def _otlp_options(endpoint: str) -> dict[str, Any]:
    return {
        "endpoint": endpoint,
        "insecure": not endpoint.startswith("https"),
        "timeout": _EXPORT_SECONDS,
        "channel_options": tuple(url_proxy_options(endpoint)),
    }


def _metric_readers(settings: TelemetrySettings) -> tuple[list[Any], list[Callable[[], Any]]]:
    readers: list[Any] = []
    closers: list[Callable[[], Any]] = []
    if settings.otlp_endpoint:
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

        readers.append(PeriodicExportingMetricReader(OTLPMetricExporter(**_otlp_options(settings.otlp_endpoint))))
    if settings.prometheus_port:
        from opentelemetry.exporter.prometheus import PrometheusMetricReader
        from prometheus_client import start_http_server

        host = settings.listen.rpartition(":")[0].strip("[]")
        try:
            server, _ = start_http_server(settings.prometheus_port, addr=host)
        except OSError as error:
            raise SettingsError(
                f"MUXTUNE_PROMETHEUS_PORT: cannot listen on {settings.prometheus_port}: {error}"
            ) from None
        closers.append(server.shutdown)
        readers.append(PrometheusMetricReader())
    return readers, closers


def tracer() -> trace.Tracer:
    return _tracer(trace.get_tracer_provider())


def meter() -> metrics.Meter:
    return _meter(metrics.get_meter_provider())


@lru_cache(4)  # the SDK makes a new one at each call
def _tracer(provider: trace.TracerProvider) -> trace.Tracer:
    return provider.get_tracer(_NAME)


@lru_cache(4)
def _meter(provider: metrics.MeterProvider) -> metrics.Meter:
    return provider.get_meter(_NAME)


def current_trace_parent() -> str:
    """Return the W3C traceparent of the current span; "" if there is none."""
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return ""
    ids = trace.format_trace_id(context.trace_id), trace.format_span_id(context.span_id)
    return f"00-{ids[0]}-{ids[1]}-{context.trace_flags:02x}"


@contextmanager
def task_span(name: str, task: str, trace_parent: str, **attributes: str | int | float) -> Iterator[Span]:
    """Open a span in the task's trace. An exception marks it failed, with its class only, and propagates."""
    context = propagate.extract({"traceparent": trace_parent}) if trace_parent else None
    task_attributes = {"muxtune.task": task, "muxtune.tenant": tenant_of(task)}
    with tracer().start_as_current_span(
        name,
        context=context,
        attributes={**task_attributes, **attributes},
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        try:
            yield span
        except Exception as error:
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(Status(StatusCode.ERROR))
            raise


def links_to(trace_parents: Iterable[tuple[str, str]]) -> list[Link]:
    """Return links to the traces of (task, traceparent) pairs, for a span of work for all of them."""
    contexts = ((task, trace.get_current_span(propagate.extract({"traceparent": p}))) for task, p in trace_parents if p)
    return [Link(span.get_span_context(), {"muxtune.task": task}) for task, span in contexts]


class _JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON with the ids of its trace and span."""

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


class _WarningsOnce(logging.Filter):
    """Passes each warning of a library once: some warn for every task, and a tenant can create many."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name != "py.warnings":
            return True
        message = record.getMessage()
        if message in self._seen:
            return False
        if len(self._seen) >= _MAX_WARNINGS:
            self._seen.clear()
        self._seen.add(message)
        return True


def _configure_logs(service_name: str, level: str) -> None:
    if level.upper() not in logging.getLevelNamesMapping():
        raise SettingsError(f'MUXTUNE_LOG_LEVEL: "{level}" must be one of {", ".join(logging.getLevelNamesMapping())}')
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter(service_name))
    handler.addFilter(_WarningsOnce())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def carrier_of(metadata: Iterable[tuple[str, str | bytes]] | None) -> dict[str, str]:
    """Return the trace context in a call's metadata, without the caller's baggage and without an overlong state.

    The context is sent on with every further call, so it must stay small.
    """
    return {
        key: value
        for key, value in metadata or ()
        if key in ("traceparent", "tracestate") and isinstance(value, str) and len(value) <= _MAX_CONTEXT_BYTES
    }
