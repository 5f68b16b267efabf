"""Span and metrics of one RPC, on the client's and the server's side.

The span of a stream that may last hours ends when the stream is established: at its first message, or after a few
seconds. A second, short span below it records how the stream ended.
Source: OpenTelemetry RPC semantic conventions (stable).
"""

import asyncio
import threading
import time
from collections.abc import Mapping
from functools import lru_cache

import grpc
from opentelemetry import context, metrics, propagate, trace
from opentelemetry.trace import Link, SpanKind, Status, StatusCode

from services.telemetry import meter, tracer

_LONG_LIVED = frozenset({"WatchTask", "WatchChanges", "RunPlan", "StreamMicrobatches"})
_ESTABLISHED_SECONDS = 5.0
_BUCKETS_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_CODE = grpc.StatusCode
_SERVER_ERRORS = frozenset(
    {_CODE.UNKNOWN, _CODE.DEADLINE_EXCEEDED, _CODE.UNIMPLEMENTED, _CODE.INTERNAL, _CODE.UNAVAILABLE, _CODE.DATA_LOSS}
)  # a caller's mistake is not an error of the server


class RpcSpan:
    """Span of one RPC, started at construction. `end` may be called from any thread; only its first call counts.

    `method`: "/package.Service/Method". `carrier`: the caller's trace context (server side); without it the current
    span is the parent. `address`: "host:port" of the server.
    """

    def __init__(
        self, method: str, kind: SpanKind, carrier: Mapping[str, str] | None = None, address: str = ""
    ) -> None:
        self._name, self._kind = method.lstrip("/"), kind
        self._attributes = _attributes(self._name, address)
        parent = propagate.extract(carrier) if carrier else None
        self._span = tracer().start_span(self._name, context=parent, kind=kind, attributes=self._attributes)
        self._started = time.perf_counter()
        self._timer: asyncio.TimerHandle | None = None
        self._lock = threading.Lock()
        self._is_established = self._is_ended = False

    @property
    def is_long_lived(self) -> bool:
        return self._name.rpartition("/")[2] in _LONG_LIVED

    @property
    def carrier(self) -> dict[str, str]:
        """Return the W3C metadata entries that make this span the parent on the other side."""
        entries: dict[str, str] = {}
        propagate.inject(entries, trace.set_span_in_context(self._span))
        return entries

    def activate(self) -> "_ActiveSpan":
        """Return a context manager inside which this span is the current one."""
        return _ActiveSpan(trace.set_span_in_context(self._span))

    def set_tenant(self, tenant: str) -> None:
        self._span.set_attribute("muxtune.tenant", tenant)

    def establish(self) -> None:
        """End the span of a long-lived stream at its first message; other spans go on."""
        with self._lock:
            if not self.is_long_lived or self._is_ended or self._is_established:
                return
            self._is_established = True
        self._span.set_attribute("muxtune.stream_established", True)
        self._span.end()

    def establish_soon(self) -> None:
        """End the span of a long-lived stream after a few seconds without a message. Needs a running event loop."""
        if self.is_long_lived:
            self._timer = asyncio.get_running_loop().call_later(_ESTABLISHED_SECONDS, self.establish)

    def end(self, code: grpc.StatusCode, *, is_exported: bool = True) -> None:
        """End the span with the call's status code and record the call's duration.

        A span that is not exported is only counted.
        """
        with self._lock:
            if self._is_ended:
                return
            self._is_ended = True
        if self._timer is not None:
            self._timer.cancel()
        outcome = _outcome(code, self._kind)
        if is_exported:
            span = self._start_end_of_stream() if self._is_established else self._span
            span.set_attributes(outcome)
            if "error.type" in outcome:
                span.set_status(Status(StatusCode.ERROR, code.name))
            span.end()
        else:  # a span that never ends is never exported
            _dropped_spans(meter()).add(1, outcome)
        self._record(outcome)

    def _start_end_of_stream(self) -> trace.Span:
        return tracer().start_span(
            f"{self._name} ended",
            context=trace.set_span_in_context(self._span),
            links=[Link(self._span.get_span_context())],
            attributes={**self._attributes, "muxtune.stream_seconds": time.perf_counter() - self._started},
        )

    def _record(self, outcome: Mapping[str, str]) -> None:
        side = "server" if self._kind is SpanKind.SERVER else "client"
        duration = _duration(meter(), side)
        duration.record(time.perf_counter() - self._started, {**self._attributes, **outcome})


class _ActiveSpan:
    """Context manager that makes a span the current one; twice as fast as one made from a generator."""

    def __init__(self, context_inside: context.Context) -> None:
        self._context = context_inside

    def __enter__(self) -> None:
        self._token = context.attach(self._context)

    def __exit__(self, *error: object) -> None:
        context.detach(self._token)


@lru_cache(4)
def _duration(meter: metrics.Meter, side: str) -> metrics.Histogram:
    return meter.create_histogram(
        f"rpc.{side}.call.duration", unit="s", explicit_bucket_boundaries_advisory=_BUCKETS_SECONDS
    )


@lru_cache(4)
def _dropped_spans(meter: metrics.Meter) -> metrics.Counter:
    return meter.create_counter("muxtune.rpc.dropped_spans", description="Spans of refused calls that are not exported")


def _outcome(code: grpc.StatusCode, kind: SpanKind) -> dict[str, str]:
    is_error = code in _SERVER_ERRORS if kind is SpanKind.SERVER else code is not _CODE.OK
    return {"rpc.response.status_code": code.name, **({"error.type": code.name} if is_error else {})}


@lru_cache(1024)
def _attributes(name: str, address: str) -> Mapping[str, str | int]:
    host, _, port = address.rpartition(":")
    server: dict[str, str | int] = {"server.address": host} if host else {}
    if host and port.isdigit():
        server["server.port"] = int(port)
    return {"rpc.system.name": "grpc", "rpc.method": name, **server}
