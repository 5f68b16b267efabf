"""Clients of the mesh: channels that retry, keep alive, carry the mesh secret and the trace, and raise domain errors.

Only UNAVAILABLE is retried by itself (AIP-194), by gRPC's own service config. Every unary call has a deadline.
"""

import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from opentelemetry import propagate
from opentelemetry.trace import SpanKind

from services.auth import bearer_metadata
from services.errors import from_rpc_error
from services.server import MAX_MESSAGE_BYTES
from services.telemetry import rpc_span

DEADLINE_SECONDS = 30.0
UPLOAD_DEADLINE_SECONDS = 3600.0
_RETRY_POLICY = {
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
OPTIONS: list[tuple[str, Any]] = [
    ("grpc.service_config", json.dumps(_RETRY_POLICY)),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.use_local_subchannel_pool", 1),
]


def open_channel(address: str, secret: str) -> grpc.aio.Channel:
    """An asyncio channel. Calls on it raise `engine.errors`, never grpc.RpcError; close it when done."""
    interceptors: list[Any] = [
        _UnaryUnary(address, secret),
        _StreamUnary(address, secret),
        _UnaryStream(address, secret),
        _StreamStream(address, secret),
    ]
    return grpc.aio.insecure_channel(address, options=OPTIONS, interceptors=interceptors)


def open_sync_channel(address: str, secret: str) -> grpc.Channel:
    """A blocking channel for the trainer: metadata only; wrap its calls in `translated_errors`."""
    return grpc.intercept_channel(grpc.insecure_channel(address, options=OPTIONS), _SyncMetadata(secret))


@contextmanager
def translated_errors() -> Iterator[None]:
    """grpc.RpcError inside comes out as the domain error the peer raised."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error


class _Outgoing:
    """What every client interceptor does to a call before it leaves."""

    def __init__(self, address: str, secret: str) -> None:
        self._address, self._secret = address, secret

    def _details(self, details: Any, default_seconds: float | None) -> Any:
        return grpc.aio.ClientCallDetails(
            method=details.method,
            timeout=details.timeout if details.timeout is not None else default_seconds,
            metadata=grpc.aio.Metadata(*(details.metadata or ()), *_metadata(self._secret)),
            credentials=details.credentials,
            wait_for_ready=details.wait_for_ready,
        )

    async def _unary(self, continuation: Callable[..., Any], details: Any, request: Any, seconds: float) -> Any:
        with translated_errors(), rpc_span(_method(details), SpanKind.CLIENT, address=self._address):
            call = await continuation(self._details(details, seconds), request)
            return await call

    async def _stream(self, continuation: Callable[..., Any], details: Any, request: Any) -> AsyncIterator[Any]:
        return self._responses(continuation, details, request)

    async def _responses(self, continuation: Callable[..., Any], details: Any, request: Any) -> AsyncIterator[Any]:
        with translated_errors(), rpc_span(_method(details), SpanKind.CLIENT, address=self._address) as span:
            call = await continuation(self._details(details, None), request)
            async for response in call:
                if span.is_long_lived:
                    span.end(grpc.StatusCode.OK)  # established
                yield response


class _UnaryUnary(_Outgoing, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._unary(continuation, client_call_details, request, DEADLINE_SECONDS)


class _StreamUnary(_Outgoing, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await self._unary(continuation, client_call_details, request_iterator, UPLOAD_DEADLINE_SECONDS)


class _UnaryStream(_Outgoing, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._stream(continuation, client_call_details, request)


class _StreamStream(_Outgoing, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await self._stream(continuation, client_call_details, request_iterator)


class _SyncMetadata(grpc.UnaryStreamClientInterceptor, grpc.UnaryUnaryClientInterceptor):
    def __init__(self, secret: str) -> None:
        self._secret = secret

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._with_metadata(client_call_details), request)

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._with_metadata(client_call_details), request)

    def _with_metadata(self, details: Any) -> Any:
        return details._replace(metadata=[*(details.metadata or ()), *_metadata(self._secret)])


def _metadata(secret: str) -> list[tuple[str, str]]:
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return [bearer_metadata(secret), *carrier.items()]


def _method(details: Any) -> str:
    method = details.method
    return method.decode() if isinstance(method, bytes) else method
