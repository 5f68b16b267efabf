"""Traces, metrics and logs of a service, and the span conventions all of them share.

One trace a task: its context is stored as a W3C `traceparent` and everything done for it later joins that trace; work
for many tasks is a span of its own with links to theirs. Spans and logs never hold a tenant's data.
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

from services.resource_names import tenant_of
from services.settings import SettingsError

_NAME = "muxtune"
_EXPORT_SECONDS = 3
_SHUTDOWN_SECONDS = 4.0
_BATCH_MILLIS = 1000
_MAX_CONTEXT_BYTES = 512  # what W3C asks everyone to carry


@dataclass(frozen=True, kw_only=True)
class TelemetrySettings:
    """Settings of a process's telemetry. `listen` is its service's "host:port": Prometheus is served on that host.

    `otlp_endpoint` receives traces and metrics; `trace_file` receives traces as lines of JSON.
    """

    listen: str = "127.0.0.1:0"
    otlp_endpoint: str | None = None
    trace_file: Path | None = None
    prometheus_port: int | None = None
    log_level: str = "INFO"


@dataclass(frozen=True)
class Telemetry:
    """What a process exports with."""

    tracer_provider: TracerProvider
    meter_provider: MeterProvider
    closers: Sequence[Callable[[], Any]] = ()

    def shutdown(self) -> None:
        """Sends what is waiting, for a few seconds at most: where nobody listens, the rest is lost."""
        parts = (self.tracer_provider.shutdown, self.meter_provider.shutdown, *self.closers)
        threads = [threading.Thread(target=part, daemon=True) for part in parts]
        for thread in threads:
            thread.start()
        end = time.monotonic() + _SHUTDOWN_SECONDS
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))


def configure(service_name: str, settings: TelemetrySettings) -> Telemetry:
    """Sets the process's tracer and meter providers and its JSON logs. Exporting is done by threads behind bounded
    queues: it never blocks a call, and what does not fit is dropped."""
    _configure_logs(service_name, settings.log_level)
    resource = Resource.create({"service.name": f"muxtune-{service_name}", "service.namespace": "muxtune"})
    provider = TracerProvider(resource=resource)
    for exporter in _span_exporters(settings):
        provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=_BATCH_MILLIS))
    readers, closers = _metric_readers(settings)
    telemetry = Telemetry(provider, MeterProvider(resource=resource, metric_readers=readers), closers)
    trace.set_tracer_provider(telemetry.tracer_provider)
    if readers:  # measured for nobody, a call's time costs as much as a statement of SQL
        metrics.set_meter_provider(telemetry.meter_provider)
    return telemetry


def _span_exporters(settings: TelemetrySettings) -> Iterator[Any]:
    if settings.otlp_endpoint:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        insecure = not settings.otlp_endpoint.startswith("https")
        yield OTLPSpanExporter(settings.otlp_endpoint, insecure=insecure, timeout=_EXPORT_SECONDS)
    if settings.trace_file:
        from muxtune.span_file_exporter import FileSpanExporter

        yield FileSpanExporter(settings.trace_file)


def _metric_readers(settings: TelemetrySettings) -> tuple[list[Any], list[Callable[[], Any]]]:
    readers: list[Any] = []
    closers: list[Callable[[], Any]] = []
    if settings.otlp_endpoint:
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

        insecure = not settings.otlp_endpoint.startswith("https")
        exporter = OTLPMetricExporter(settings.otlp_endpoint, insecure=insecure, timeout=_EXPORT_SECONDS)
        readers.append(PeriodicExportingMetricReader(exporter))
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


@lru_cache(4)  # the SDK makes another each time
def _tracer(provider: trace.TracerProvider) -> trace.Tracer:
    return provider.get_tracer(_NAME)


@lru_cache(4)
def _meter(provider: metrics.MeterProvider) -> metrics.Meter:
    return provider.get_meter(_NAME)


def current_trace_parent() -> str:
    """W3C traceparent of the span in force; empty if there is none."""
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return ""
    ids = trace.format_trace_id(context.trace_id), trace.format_span_id(context.span_id)
    return f"00-{ids[0]}-{ids[1]}-{context.trace_flags:02x}"


@contextmanager
def task_span(name: str, task: str, trace_parent: str, **attributes: str | int | float) -> Iterator[Span]:
    """A span in the task's own trace. An exception marks it failed, by its class only, and goes on."""
    context = propagate.extract({"traceparent": trace_parent}) if trace_parent else None
    whose = {"muxtune.task": task, "muxtune.tenant": tenant_of(task)}
    with tracer().start_as_current_span(
        name,
        context=context,
        attributes={**whose, **attributes},
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
    """Links to the traces of (task, traceparent) pairs, for a span that serves them all."""
    contexts = ((task, trace.get_current_span(propagate.extract({"traceparent": p}))) for task, p in trace_parents if p)
    return [Link(span.get_span_context(), {"muxtune.task": task}) for task, span in contexts]


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
    if level.upper() not in logging.getLevelNamesMapping():
        raise SettingsError(f'MUXTUNE_LOG_LEVEL: "{level}" is none of {", ".join(logging.getLevelNamesMapping())}')
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter(service_name))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def carrier_of(metadata: Iterable[tuple[str, str | bytes]] | None) -> dict[str, str]:
    """The trace context of a call's metadata. A caller's baggage, or a state of any length, goes no further: what we
    take we send on with every call."""
    return {
        key: value
        for key, value in metadata or ()
        if key in ("traceparent", "tracestate") and isinstance(value, str) and len(value) <= _MAX_CONTEXT_BYTES
    }
