"""The interceptor of every server: it takes each RPC through one chain of steps before and after its servicer.

So a servicer only reads the request, decides, and raises domain errors.
"""

import asyncio
import inspect
import time
from collections.abc import Callable
from contextlib import aclosing, suppress
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from opentelemetry.trace import SpanKind

from engine.errors import InvalidInputError, MuxtuneError
from services.rpc.audit import Audit
from services.rpc.authentication import Authenticate
from services.rpc.authorization import Role, rule_for
from services.rpc.call_chain import (
    AuditRecorder,
    Authentication,
    ConcurrencyLimit,
    Handler,
    ServerCall,
    Step,
    annotate_span,
    answer_refusal,
    authorize_role,
    chain,
    map_errors,
    open_audit_entry,
    trace,
)
from services.rpc.tracing import RpcSpan
from services.rpc.unauthenticated_limiter import UnauthenticatedCallLimiter
from services.telemetry import carrier_of

_DRAIN_SECONDS, _REAUTHENTICATE_SECONDS = 1.0, 30.0
_UNDECODABLE = object()
_METHOD_HANDLERS = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


class RpcInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every method that is not open to anyone. `address` is the server's, for spans.

    `audit` writes entries of changes and of refusals, before their caller gets the answer. `unauthenticated_limiter`
    limits and counts calls without a valid key. More than `max_calls` or `max_streams` at once are refused.
    """

    def __init__(
        self,
        authenticate: Authenticate,
        address: str = "",
        audit: Audit | None = None,
        max_calls: int = 256,
        max_streams: int = 1024,
        unauthenticated_limiter: UnauthenticatedCallLimiter | None = None,
    ) -> None:
        self._address, self._audit = address, AuditRecorder(audit)
        self._authentication = Authentication(authenticate, unauthenticated_limiter or UnauthenticatedCallLimiter())
        self._calls, self._streams = ConcurrencyLimit("calls", max_calls), ConcurrencyLimit("streams", max_streams)
        self._handlers: dict[str, Any] = {}  # wrapped, by method

    def _steps(self, limit: ConcurrencyLimit) -> tuple[Step, ...]:
        """Return the steps of a call in their order; each runs around those after it."""
        return (
            answer_refusal,
            self._audit,
            trace,
            map_errors,
            limit,
            self._authentication,
            open_audit_entry,
            authorize_role,
            annotate_span,
        )

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        method = handler_call_details.method
        if (wrapped := self._handlers.get(method)) is not None:
            return wrapped
        handler = await continuation(handler_call_details)
        if handler is not None:
            self._handlers[method] = handler = self._wrap(handler, method)
        return handler

    def _wrap(self, handler: Any, method: str) -> Any:
        if Role.ANYONE in rule_for(method).roles:
            return handler
        if handler.response_streaming:
            handle = chain(self._steps(self._streams), self._serve_stream(handler))
        else:
            handle = chain(self._steps(self._calls), _serve_unary(handler))

        # For streams too a coroutine, which writes, and not a generator: gRPC leaves the generator of an abandoned
        # stream to the garbage collector, and its span and its servicer's clean-up with it.
        async def serve(request: Any, context: Any) -> Any:
            carrier = carrier_of(context.invocation_metadata())
            span = RpcSpan(method, SpanKind.SERVER, carrier, self._address)
            return await handle(ServerCall(method, request, context, span))

        make: Any = _METHOD_HANDLERS[handler.request_streaming, handler.response_streaming]
        return make(serve, _tolerant_deserializer(handler), handler.response_serializer)

    def _serve_stream(self, handler: Any) -> Handler:
        """Return a handler that writes the servicer's responses.

        It authenticates again from time to time, because the caller's key may have been revoked.
        """
        servicer_method = handler.stream_stream if handler.request_streaming else handler.unary_stream

        async def serve(call: ServerCall) -> None:
            _check_decoded(call)
            answer = servicer_method(call.request, call.context)
            if inspect.isawaitable(answer):  # this servicer writes to the context itself
                await answer
                return
            authenticated_at = time.monotonic()
            async with aclosing(answer) as responses:
                async for response in responses:
                    if time.monotonic() - authenticated_at > _REAUTHENTICATE_SECONDS:
                        await self._authentication.principal_of(call)
                        authenticated_at = time.monotonic()
                    await write_response(call.context, response)
                    call.span.establish()

        return serve


async def write_response(context: Any, response: Any) -> None:
    """Write one response of a stream. Raises CancelledError if the call has ended.

    gRPC fails the write of a call whose end has not yet reached the servicer's task.
    """
    try:
        await context.write(response)
    except grpc.aio.InternalError as error:
        raise asyncio.CancelledError from error


def _serve_unary(handler: Any) -> Handler:
    servicer_method = handler.stream_unary if handler.request_streaming else handler.unary_unary

    async def serve(call: ServerCall) -> Any:
        _check_decoded(call)
        try:
            call.response = await servicer_method(call.request, call.context)
        except MuxtuneError:
            if handler.request_streaming:
                await _drain(call.request)
            raise
        return call.response

    return serve


def _tolerant_deserializer(handler: Any) -> Callable[[bytes], Any]:
    """Return a deserializer that marks malformed bytes, so that the call fails with INVALID_ARGUMENT, not UNKNOWN.

    In a stream of requests they become an empty message, which every servicer refuses in its place.
    """
    deserialize = handler.request_deserializer

    def deserialize_or_mark(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return deserialize(b"") if handler.request_streaming else _UNDECODABLE

    return deserialize_or_mark


def _check_decoded(call: ServerCall) -> None:
    if call.request is _UNDECODABLE:
        raise InvalidInputError.of_field("request", f"does not parse as the request message of {call.method}")


async def _drain(requests: Any) -> None:
    """Read for a while what the client still sends, before the call is refused.

    A grpc.aio client whose send fails because the call has ended reports INTERNAL in place of the call's status.
    """
    with suppress(TimeoutError, RuntimeError):  # RuntimeError: another reader is active
        async with asyncio.timeout(_DRAIN_SECONDS):
            async for _ in requests:
                pass
