"""The gRPC server every service runs in: gate, health, reflection, graceful stop.

The gate stands before every RPC: it opens the call's span, authenticates, and turns domain errors into statuses. So a
servicer only reads, decides, and raises.
"""

import asyncio
import json
import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status
from opentelemetry.trace import SpanKind

from engine.errors import MuxtuneError
from services.auth import OPEN_SERVICES, Authenticate, bearer, set_principal
from services.config import ServerSettings
from services.errors import mapped, to_status, to_status_of_bug
from services.telemetry import carrier_of, configure, rpc_span

MAX_MESSAGE_BYTES = 16 << 20
_OPTIONS = [
    ("grpc.so_reuseport", 0),  # a second server on this port must fail, not share it silently
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Clients ping every 30 s, on idle connections too (services/mesh.py): allow it, or they end in GOAWAY.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
]
_log = logging.getLogger(__name__)

Register = Callable[[grpc.aio.Server], Sequence[str]]


class Gate(grpc.aio.ServerInterceptor):
    """Span, identity and errors around every RPC of the server."""

    def __init__(self, authenticate: Authenticate) -> None:
        self._authenticate = authenticate

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        if handler is None or details.method.startswith(OPEN_SERVICES):
            return handler
        return self._wrapped(handler, details.method)

    def _wrapped(self, handler: Any, method: str) -> Any:
        async def unary(request: Any, context: Any) -> Any:
            async with self._call(method, context):
                inner = handler.stream_unary if handler.request_streaming else handler.unary_unary
                return await inner(request, context)

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            async with self._call(method, context):
                inner = handler.stream_stream if handler.request_streaming else handler.unary_stream
                async with aclosing(inner(request, context)) as responses:
                    async for response in responses:
                        yield response

        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        behaviour = stream if handler.response_streaming else unary
        return make(behaviour, handler.request_deserializer, handler.response_serializer)

    @asynccontextmanager
    async def _call(self, method: str, context: Any) -> AsyncIterator[None]:
        metadata = context.invocation_metadata()
        with rpc_span(method, SpanKind.SERVER, carrier_of(metadata)) as span:
            try:
                set_principal(await self._authenticate(method, bearer(metadata)))
                if span.is_long_lived:
                    span.end(grpc.StatusCode.OK)  # established: what follows may last hours
                yield
            except MuxtuneError as error:
                span.end(mapped(error).code)
                await context.abort_with_status(rpc_status.to_status(to_status(error)))
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                status = to_status_of_bug(error)
                span.end(grpc.StatusCode.INTERNAL)
                await context.abort_with_status(rpc_status.to_status(status))


async def serve(
    service_name: str,
    settings: ServerSettings,
    register: Register,
    *,
    authenticate: Authenticate,
    on_ready: Callable[[str], Awaitable[None]] | None = None,
    on_stop: Callable[[], Awaitable[None]] | None = None,
    stopping: asyncio.Event | None = None,
    grace_seconds: float = 5,
) -> None:
    """Serves until SIGTERM, SIGINT or `stopping`; then health says NOT_SERVING, `on_stop` runs, calls get the grace.

    `register` adds servicers and returns their full names. Exits with a clear error if the port is taken.
    """
    provider = configure(service_name, settings)
    server = grpc.aio.server(interceptors=[Gate(authenticate)], options=_OPTIONS)
    health = health_aio.HealthServicer()
    names = [*register(server), health_pb2.DESCRIPTOR.services_by_name["Health"].full_name]
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], server)
    address = _bind(server, settings.listen)
    await server.start()
    stop = stopping or asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    if on_ready is not None:
        await on_ready(address)
    await _announce(health, names, health_pb2.HealthCheckResponse.SERVING)
    _write_ready_file(settings, address)
    _log.info("%s listens on %s", service_name, address)
    await stop.wait()
    await _announce(health, names, health_pb2.HealthCheckResponse.NOT_SERVING)
    if on_stop is not None:
        await on_stop()
    await server.stop(grace_seconds)
    await asyncio.to_thread(provider.shutdown)


def _bind(server: grpc.aio.Server, listen: str) -> str:
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise SystemExit(f"cannot listen on {listen}: {error}; is another service on that port?") from error
    return f"{listen.rpartition(':')[0]}:{port}"


async def _announce(health: Any, names: Sequence[str], status: Any) -> None:
    for name in ("", *names):
        await health.set(name, status)


def _write_ready_file(settings: ServerSettings, address: str) -> None:
    if settings.ready_file is not None:
        partial = settings.ready_file.with_suffix(".partial")
        partial.write_text(json.dumps({"address": address, "pid": os.getpid()}))
        partial.replace(settings.ready_file)
