"""The interceptor of every server: it takes each RPC through one chain of steps before and after its servicer.

So a servicer only reads the request, decides, and raises domain errors.
"""

import asyncio
import inspect
import time
from contextlib import aclosing, suppress
from functools import partial
from typing import Any

import grpc

from engine.errors import MuxtuneError
from services.rpc.audit import Audit
from services.rpc.authentication import Authenticate
from services.rpc.authorization import Role, rule_for
from services.rpc.call_chain import (
    AuditRecorder,
    Authentication,
    Handler,
    ServerCall,
    Step,
    Tracing,
    annotate_span,
    answer_refusal,
    authorize_role,
    chain,
    map_errors,
    open_audit_entry,
)
from services.rpc.call_limits import CallKind, CallLimits, ConcurrencyLimits, RequestReceiver
from services.rpc.fair_limit import FairLimit
from services.rpc.message_checks import check_requests, check_response, tolerant_deserializer
from services.rpc.unauthenticated_limiter import UnauthenticatedCallLimiter

_DRAIN_SECONDS, _REAUTHENTICATE_SECONDS = 1.0, 30.0


class RpcInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every method. `address` is the server's, for spans.

    `audit` writes entries of changes and of refusals, before their caller gets the answer. `unauthenticated_limiter`
    limits and counts calls without a valid key. `limits`: how many calls may be in progress, and how slowly a client
    may send.
    """

    def __init__(
        self,
        authenticate: Authenticate,
        address: str = "",
        audit: Audit | None = None,
        limits: CallLimits | None = None,
        unauthenticated_limiter: UnauthenticatedCallLimiter | None = None,
    ) -> None:
        limits = limits or CallLimits()
        self._tracing, self._audit = Tracing(address), AuditRecorder(audit)
        in_progress = FairLimit("calls without a known key", limits.max_unauthenticated_calls)
        self._authentication = Authentication(
            authenticate, unauthenticated_limiter or UnauthenticatedCallLimiter(), in_progress
        )
        self._concurrency, self._receiver = ConcurrencyLimits(limits), RequestReceiver(limits)
        self._handlers: dict[str, Any] = {}  # wrapped, by method

    def _steps(self, handler: Any) -> tuple[Step, ...]:
        """Return the steps of a call in their order; each runs around those after it.

        A message is read only when its caller is known and may have one more call in progress.
        """
        kind = CallKind.of_handler(handler)
        return (
            answer_refusal,
            self._audit,
            self._tracing,
            map_errors,
            self._authentication,
            partial(self._concurrency.limit_known, kind=kind),
            self._receive_step(handler),
            open_audit_entry,
            authorize_role,
            check_requests,
            annotate_span,
        )

    def _steps_for_anyone(self, handler: Any) -> tuple[Step, ...]:
        """Return the steps of a call that needs no key, such as a health check. It is not traced."""
        limit = partial(self._concurrency.limit_open, kind=CallKind.of_handler(handler))
        return answer_refusal, map_errors, limit, self._receive_step(handler), check_requests

    def _receive_step(self, handler: Any) -> Step:
        if not handler.request_streaming:
            return self._receiver.receive_message
        return _receive_stream if handler.response_streaming else self._receiver.pace_upload

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        method = handler_call_details.method
        if (wrapped := self._handlers.get(method)) is not None:
            return wrapped
        handler = await continuation(handler_call_details)
        if handler is not None:
            self._handlers[method] = handler = self._wrap(handler, method)
        return handler

    def _wrap(self, handler: Any, method: str) -> Any:
        is_open = Role.ANYONE in rule_for(method).roles
        steps = self._steps_for_anyone(handler) if is_open else self._steps(handler)
        handle = chain(steps, self._serve_stream(handler) if handler.response_streaming else _serve_unary(handler))

        # For streams too a coroutine, which writes, and not a generator: gRPC leaves the generator of an abandoned
        # stream to the garbage collector, and its span and its servicer's clean-up with it.
        async def serve(requests: Any, context: Any) -> Any:
            return await handle(ServerCall(method, requests, context))

        # A stream of requests for gRPC, also where one message comes: gRPC would else read that message before it
        # passes the call on, whoever sends it and however slowly.
        make: Any = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        return make(serve, tolerant_deserializer(handler, method), handler.response_serializer)

    def _serve_stream(self, handler: Any) -> Handler:
        """Return a handler that writes the servicer's responses.

        It authenticates again from time to time, because the caller's key may have been revoked.
        """
        servicer_method = handler.stream_stream if handler.request_streaming else handler.unary_stream

        async def serve(call: ServerCall) -> None:
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
                    check_response(call.method, response)
                    await write_response(call.context, response)
                    if call.span is not None:
                        call.span.establish()

        return serve


async def _receive_stream(call: ServerCall, proceed: Handler) -> Any:
    """Leave it to the servicer to read, as it answers meanwhile."""
    return await proceed(call)


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
        try:
            call.response = await servicer_method(call.request, call.context)
            check_response(call.method, call.response)
        except MuxtuneError:
            if handler.request_streaming:
                await _drain(call.request)
            raise
        return call.response

    return serve


async def _drain(requests: Any) -> None:
    """Read for a while what the client still sends, before the call is refused.

    A grpc.aio client whose send fails because the call has ended reports INTERNAL in place of the call's status.
    """
    with suppress(TimeoutError, RuntimeError):  # RuntimeError: another reader is active
        async with asyncio.timeout(_DRAIN_SECONDS):
            async for _ in requests:
                pass
