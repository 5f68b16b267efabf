"""Spans as OTLP JSON lines in a file: the embedded default where no collector is configured.

One ExportTraceServiceRequest a line, ids in hex, as the OTLP file exporter specification asks. Each line is one
append, so several processes may share a file.
"""

import json
import os
from base64 import b64decode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

_IDS = ("traceId", "spanId", "parentSpanId")


class FileSpanExporter(SpanExporter):
    """Appends to `path`; a write that fails loses those spans, never a call."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        line = json.dumps(_with_hex_ids(MessageToDict(encode_spans(spans), use_integers_for_enums=True)))
        try:
            os.write(self._file, line.encode() + b"\n")
        except OSError:
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        os.close(self._file)


def _with_hex_ids(value: Any) -> Any:
    """Protobuf's JSON writes bytes in base64; OTLP's wants ids in hex."""
    if isinstance(value, list):
        return [_with_hex_ids(item) for item in value]
    if isinstance(value, dict):
        return {
            k: b64decode(v).hex() if k in _IDS and isinstance(v, str) else _with_hex_ids(v) for k, v in value.items()
        }
    return value
