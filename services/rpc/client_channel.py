"""Channels between services: they authenticate, retry, carry the trace, set deadlines and raise domain errors.

gRPC's service config retries UNAVAILABLE (AIP-194) and a closing server's CANCELLED for about two seconds. A caller
that can wait longer for a service passes `wait_for_ready=True`.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import grpc
from opentelemetry.trace import SpanKind

from muxtune.transport import proxy_options, target
from muxtune.upload_status import upload_response
from services.rpc.authentication import bearer_metadata
from services.rpc.certificates import ClientTls, RotatingChannel
from services.rpc.errors import from_rpc_error
from services.rpc.tracing import RpcSpan
from services.rpc.transport_options import channel_options

DEADLINE_SECONDS = 30.0
UPLOAD_DEADLINE_SECONDS = 3600.0


def open_channel(address: str, secret: str, tls: ClientTls | None = None, health_service: str = "") -> grpc.aio.Channel:
    """Open an asyncio channel. Its calls raise `engine.errors`, never grpc.RpcError. The caller closes it.

    `address`: "host:port", or those of several replicas (`muxtune.transport.target`). With `health_service`, calls go
    only to replicas that report this gRPC service as SERVING. With `tls` the channel uses mutual TLS and connects again
    when the certificates are replaced; without it the secret is sent in plain text.
    """

    def connect() -> grpc.aio.Channel:
        options = [*channel_options(health_service), *proxy_options(address)]
        if tls is None:
            return grpc.aio.insecure_channel(target(address), options)
        return grpc.aio.secure_channel(target(address), tls.credentials(), [*options, *tls.channel_options()])

    return MeshChannel(RotatingChannel(connect, tls), address, secret)


def open_sync_channel(address: str, secret: str, tls: ClientTls | None = None) -> grpc.Channel:
    """Open a blocking channel for threads: unary calls and server streams.

    Stubs made after the certificates were replaced use the new ones.
    """

    def connect() -> grpc.Channel:
        options = [*channel_options(), *proxy_options(address)]
        if tls is None:
            return grpc.insecure_channel(address, options)
        return grpc.secure_channel(address, tls.credentials(), [*options, *tls.channel_options()])

    channel = _SyncChannel(RotatingChannel(connect, tls))
    return grpc.intercept_channel(channel, _SyncInterceptor(address, secret))


@contextmanager
def translate_rpc_errors() -> Iterator[None]:
    """Raise the domain error that the peer raised in place of a grpc.RpcError."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error


class MeshChannel(grpc.aio.Channel):
    """An asyncio channel for stubs that wraps gRPC's own.

    It does not use gRPC's asyncio interceptors, because they lose streams that are cancelled or abandoned.
    """

    def __init__(self, rotating: RotatingChannel[grpc.aio.Channel], address: str, secret: str) -> None:
        self._rotating, self._address, self._secret = rotating, address, secret
        self._closing: set[asyncio.Task[None]] = set()

    def unary_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        start = self._starter("unary_unary", method, *args, **kwargs)
        return partial(self._unary, UnaryCall, start, method, DEADLINE_SECONDS)

    def stream_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        start = self._starter("stream_unary", method, *args, **kwargs)
        return partial(self._unary, UploadCall, start, method, UPLOAD_DEADLINE_SECONDS)

    def unary_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return partial(self._stream, self._starter("unary_stream", method, *args, **kwargs), method)

    def stream_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return partial(self._stream, self._starter("stream_stream", method, *args, **kwargs), method)

    def _starter(self, kind: str, method: str, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """Return a function that starts a call on the newest channel."""
        callables: dict[int, Any] = {}  # one at most, by the channel's id

        def start(request: Any, **options: Any) -> Any:
            channel = self._newest()
            if id(channel) not in callables:
                callables.clear()
                callables[id(channel)] = getattr(channel, kind)(method, *args, **kwargs)
            return callables[id(channel)](request, **options)

        return start

    def _newest(self) -> grpc.aio.Channel:
        if (outdated := self._rotating.renew()) is not None:
            task = asyncio.ensure_future(outdated.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        return self._rotating.channel

    def _unary(
        self,
        kind: "type[UnaryCall]",
        start: Callable[..., Any],
        method: str,
        seconds: float,
        request: Any = None,
        **options: Any,
    ) -> "UnaryCall":
        span = RpcSpan(method, SpanKind.CLIENT, address=self._address)
        options["timeout"] = seconds if options.get("timeout") is None else options["timeout"]
        options["metadata"] = _metadata(options.get("metadata"), self._secret, span)
        return kind(start(request, **options), span)

    def _stream(self, start: Callable[..., Any], method: str, request: Any = None, **options: Any) -> "StreamCall":
        span = RpcSpan(method, SpanKind.CLIENT, address=self._address)
        options["metadata"] = _metadata(options.get("metadata"), self._secret, span)
        span.establish_soon()
        return StreamCall(start(request, **options), span)

    async def __aenter__(self) -> "MeshChannel":
        return self

    async def __aexit__(self, *exception: Any) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        for channel in (self._rotating.channel, self._rotating.previous):
            if channel is not None:
                await channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._newest().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._newest().wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._newest().channel_ready()


class _SyncChannel(grpc.Channel):
    """A blocking channel whose stubs use the newest of the rotating channels."""

    def __init__(self, rotating: RotatingChannel[grpc.Channel]) -> None:
        self._rotating = rotating

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._newest().unary_unary(*args, **kwargs)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._newest().unary_stream(*args, **kwargs)

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._newest().stream_unary(*args, **kwargs)

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._newest().stream_stream(*args, **kwargs)

    def subscribe(self, callback: Any, try_to_connect: bool | None = False) -> None:
        self._newest().subscribe(callback, bool(try_to_connect))

    def unsubscribe(self, callback: Any) -> None:
        self._rotating.channel.unsubscribe(callback)

    def close(self) -> None:
        for channel in (self._rotating.channel, self._rotating.previous):
            if channel is not None:
                channel.close()

    def __enter__(self) -> "_SyncChannel":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _newest(self) -> grpc.Channel:
        if (outdated := self._rotating.renew()) is not None:
            outdated.close()
        return self._rotating.channel


class _Call:
    """A running call with its span; other attributes are the wrapped call's. Garbage collection cancels it."""

    def __init__(self, call: Any, span: RpcSpan) -> None:
        self._call, self._span = call, span

    def cancel(self) -> bool:
        self._span.end(grpc.StatusCode.CANCELLED)
        return bool(self._call.cancel())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    def __del__(self) -> None:
        self._span.end(grpc.StatusCode.CANCELLED)
        if not self._call.done():
            self._call.cancel()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            self._span.end(error.code())
            raise from_rpc_error(error) from error
        except asyncio.CancelledError:
            self._span.end(grpc.StatusCode.CANCELLED)
            raise


class UnaryCall(_Call):
    """A unary call; awaiting it returns the response."""

    def __await__(self) -> Any:
        return self._response().__await__()

    async def _response(self) -> Any:
        with self._translated():
            response = await self._receive()
        self._span.end(grpc.StatusCode.OK)
        return response

    async def _receive(self) -> Any:
        return await self._call


class UploadCall(UnaryCall):
    """A client stream; awaiting it returns the response, or raises the status that the server sent before the end."""

    async def _receive(self) -> Any:
        return await upload_response(self._call)


class StreamCall(_Call):
    """A stream of responses for asyncio."""

    def __init__(self, call: Any, span: RpcSpan) -> None:
        super().__init__(call, span)
        self._responses = call.__aiter__()

    def __aiter__(self) -> "StreamCall":
        return self

    async def __anext__(self) -> Any:
        with self._translated():
            try:
                response = await anext(self._responses)
            except StopAsyncIteration:
                self._span.end(grpc.StatusCode.OK)
                raise
        self._span.establish()
        return response


class SyncStreamCall(_Call):
    """A stream of responses for threads; `cancel` may be called from any thread."""

    def __iter__(self) -> "SyncStreamCall":
        return self

    def __next__(self) -> Any:
        with self._translated():
            try:
                response = next(self._call)
            except StopIteration:
                self._span.end(grpc.StatusCode.OK)
                raise
        self._span.establish()
        return response


class _SyncInterceptor(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    def __init__(self, address: str, secret: str) -> None:
        self._address, self._secret = address, secret

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        span, details = self._start(client_call_details)
        timeout = DEADLINE_SECONDS if details.timeout is None else details.timeout
        call = continuation(details._replace(timeout=timeout), request)
        code = call.code()
        span.end(code)
        if code is not grpc.StatusCode.OK:
            raise from_rpc_error(call)
        return call

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        span, details = self._start(client_call_details)
        return SyncStreamCall(continuation(details, request), span)

    def _start(self, details: Any) -> tuple[RpcSpan, Any]:
        method = details.method.decode() if isinstance(details.method, bytes) else details.method
        span = RpcSpan(method, SpanKind.CLIENT, address=self._address)
        return span, details._replace(metadata=_metadata(details.metadata, self._secret, span))


def _metadata(metadata: Any, secret: str, span: RpcSpan) -> list[tuple[str, Any]]:
    token = [bearer_metadata(secret)] if secret else []  # without a secret the certificate authenticates
    return [*(metadata or ()), *token, *span.carrier.items()]
