"""Exports the spans of the command and the demo, the roots of their tasks' traces."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from muxtune.local.errors import MeshError
from muxtune.span_file_exporter import FileSpanExporter, RotatingFile
from muxtune.transport import url_proxy_options

_EXPORT_SECONDS = 1


@contextmanager
def traced(data: Path) -> Iterator[TracerProvider]:
    """Export spans of the block to MUXTUNE_OTLP_ENDPOINT, or to the data folder's trace file.

    They are flushed when the block ends, which waits at most a second for the endpoint.
    """
    endpoint = os.environ.get("MUXTUNE_OTLP_ENDPOINT", "")
    provider = TracerProvider(resource=Resource.create({"service.name": "muxtune-client"}))
    if endpoint:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        exporter = OTLPSpanExporter(
            endpoint,
            insecure="https" not in endpoint,
            timeout=_EXPORT_SECONDS,
            channel_options=tuple(url_proxy_options(endpoint)),
        )
        provider.add_span_processor(BatchSpanProcessor(exporter))
    elif data.exists():
        try:
            file = RotatingFile(data / "traces" / "spans.jsonl")  # the services rotate it
        except OSError as error:
            raise MeshError(f"{error.filename} cannot be written: {error.strerror}: choose another --data") from None
        provider.add_span_processor(BatchSpanProcessor(FileSpanExporter(file)))
    trace.set_tracer_provider(provider)
    try:
        yield provider
    finally:
        provider.force_flush()
