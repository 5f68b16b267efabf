"""The span and the metrics of one RPC, on either side of the wire.

Streams that may last hours end their span when they are established (first message, or a few seconds); how they end is
then a short span of its own below it. Source: OpenTelemetry RPC semantic conventions (stable).
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
)  # a caller's mistake is no error of the server's span


class RpcSpan:
    """Started when made; `end` may be called from any thread, and only the first call counts.

    `method`: "/package.Service/Method". `carrier`: the caller's trace context (server side); without it the span in
    force is the parent. `address`: "host:port" of the server.
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
        self._ending = threading.Lock()
        self._is_established = self._is_ended = False

    @property
    def is_long_lived(self) -> bool:
        return self._name.rpartition("/")[2] in _LONG_LIVED

    @property
    def carrier(self) -> dict[str, str]:
        """The W3C entries that tell the other side this span is its parent."""
        entries: dict[str, str] = {}
        propagate.inject(entries, trace.set_span_in_context(self._span))
        return entries

    def activate(self) -> "_ActiveSpan":
        """Makes it the parent of what is started inside."""
        return _ActiveSpan(trace.set_span_in_context(self._span))

    def set_tenant(self, tenant: str) -> None:
        self._span.set_attribute("muxtune.tenant", tenant)

    def establish(self) -> None:
        """A message has passed: a long-lived stream's span ends here, any other goes on."""
        with self._ending:
            if not self.is_long_lived or self._is_ended or self._is_established:
                return
            self._is_established = True
        self._span.set_attribute("muxtune.stream_established", True)
        self._span.end()

    def establish_soon(self) -> None:
        """The same after a few seconds without a message. Needs a running event loop."""
        if self.is_long_lived:
            self._timer = asyncio.get_running_loop().call_later(_ESTABLISHED_SECONDS, self.establish)

    def end(self, code: grpc.StatusCode) -> None:
        with self._ending:
            if self._is_ended:
                return
            self._is_ended = True
        if self._timer is not None:
            self._timer.cancel()
        outcome = {"rpc.response.status_code": code.name}
        if is_error := code in _SERVER_ERRORS if self._kind is SpanKind.SERVER else code is not _CODE.OK:
            outcome["error.type"] = code.name
        span = self._start_end_of_stream() if self._is_established else self._span
        span.set_attributes(outcome)
        if is_error:
            span.set_status(Status(StatusCode.ERROR, code.name))
        span.end()
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
    """A context that holds inside. A generator as context manager takes twice as long."""

    def __init__(self, inside: context.Context) -> None:
        self._inside = inside

    def __enter__(self) -> None:
        self._token = context.attach(self._inside)

    def __exit__(self, *error: object) -> None:
        context.detach(self._token)


@lru_cache(4)
def _duration(meter: metrics.Meter, side: str) -> metrics.Histogram:
    return meter.create_histogram(
        f"rpc.{side}.call.duration", unit="s", explicit_bucket_boundaries_advisory=_BUCKETS_SECONDS
    )


@lru_cache(1024)
def _attributes(name: str, address: str) -> Mapping[str, str | int]:
    host, _, port = address.rpartition(":")
    server: dict[str, str | int] = {"server.address": host} if host else {}
    if host and port.isdigit():
        server["server.port"] = int(port)
    return {"rpc.system.name": "grpc", "rpc.method": name, **server}
