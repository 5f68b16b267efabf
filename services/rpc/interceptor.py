"""What stands before every RPC of a server: its span, who calls and whether they may, and domain errors as statuses.

So a servicer only reads, decides, and raises.
"""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_status import rpc_status
from opentelemetry.trace import SpanKind

from engine.errors import InvalidInputError, MuxtuneError, OverloadedError
from services.rpc.audit import Audit, AuditedCall, resource_name_in, set_call
from services.rpc.authentication import Authenticate, certificate_principal, set_principal
from services.rpc.authorization import Principal, Role, check_access, rule_for
from services.rpc.errors import status_of
from services.rpc.tracing import RpcSpan
from services.rpc.unauthenticated_limiter import UnauthenticatedCallLimiter
from services.telemetry import carrier_of

_DRAIN_SECONDS, _PROOF_SECONDS = 1.0, 30.0
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_UNREADABLE = object()
T = TypeVar("T")
_HANDLERS = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


class RpcInterceptor(grpc.aio.ServerInterceptor):
    """`address`: what the spans name as the server's. `audit` hears of calls that change something and of refused ones,
    before their caller has the answer; `strangers` of those that prove nothing. More calls or streams at once are
    refused, and may come again."""

    def __init__(
        self,
        authenticate: Authenticate,
        address: str = "",
        audit: Audit | None = None,
        max_calls: int = 256,
        max_streams: int = 1024,
        strangers: UnauthenticatedCallLimiter | None = None,
    ) -> None:
        self._authenticate, self._address, self._audit = authenticate, address, audit
        self._strangers = strangers or UnauthenticatedCallLimiter()
        self._calls, self._streams = _Places("calls", max_calls), _Places("streams", max_streams)
        self._telling: set[asyncio.Future[None]] = set()
        self._guarded: dict[str, Any] = {}  # handlers by method

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        method = handler_call_details.method
        if (guarded := self._guarded.get(method)) is not None:
            return guarded
        handler = await continuation(handler_call_details)
        if handler is not None:
            self._guarded[method] = handler = self._guard(handler, method)
        return handler

    def _guard(self, handler: Any, method: str) -> Any:
        if Role.ANYONE in rule_for(method).roles:
            return handler
        behaviour = self._streaming(handler, method) if handler.response_streaming else self._unary(handler, method)
        make: Any = _HANDLERS[handler.request_streaming, handler.response_streaming]
        return make(behaviour, _forgiving(handler), handler.response_serializer)

    def _unary(self, handler: Any, method: str) -> Any:
        inner = handler.stream_unary if handler.request_streaming else handler.unary_unary

        async def serve(request: Any, context: Any) -> Any:
            named = [request] if isinstance(request, Message) else []

            async def work(span: RpcSpan) -> Any:
                _check_read(request)
                try:
                    response = await inner(request, context)
                    named.insert(0, response)  # what was made, rather than where
                    return response
                except MuxtuneError:
                    if handler.request_streaming:
                        await _drain(request)
                    raise

            return await self._call(method, context, named, self._calls, work)

        return serve

    def _streaming(self, handler: Any, method: str) -> Any:
        inner = handler.stream_stream if handler.request_streaming else handler.unary_stream

        # A coroutine that writes, not a generator: gRPC leaves the generator of an abandoned stream to the garbage
        # collector, and its span and its servicer's clean-up with it.
        async def serve(request: Any, context: Any) -> None:
            async def work(span: RpcSpan) -> None:
                _check_read(request)
                answer = inner(request, context)
                if inspect.isawaitable(answer):  # a servicer that writes by itself
                    await answer
                    return
                proved_at = time.monotonic()
                async with aclosing(answer) as responses:
                    async for response in responses:
                        if time.monotonic() - proved_at > _PROOF_SECONDS:  # the key may be revoked by now
                            await self._prove(method, context)
                            proved_at = time.monotonic()
                        await context.write(response)
                        span.establish()

            named = [request] if isinstance(request, Message) else []
            await self._call(method, context, named, self._streams, work)

        return serve

    async def _call(
        self,
        method: str,
        context: Any,
        named: Sequence[Message],
        places: "_Places",
        work: Callable[[RpcSpan], Awaitable[T]],
    ) -> T | None:
        """What the work returns; None where it is refused. `named`: messages that name the call's resource, for the
        audit log."""
        metadata = context.invocation_metadata()
        span = RpcSpan(method, SpanKind.SERVER, carrier_of(metadata), self._address)
        code, call, refuse, done = grpc.StatusCode.UNKNOWN, None, None, None
        try:
            with places, span.activate():
                principal = await self._prove(method, context)
                set_principal(principal)
                set_call(call := AuditedCall(principal, method))
                check_access(method, principal.role)
                if principal.tenant:
                    span.set_tenant(principal.tenant)
                span.establish_soon()
                done = await work(span)
            code = _code_of(context)
        except grpc.aio.AbortError:
            code = _code_of(context)
            raise
        except asyncio.CancelledError:
            is_late = context.time_remaining() is not None and context.time_remaining() <= 0
            code = grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED
            raise
        except NotImplementedError:  # a generated servicer's own answer
            code = grpc.StatusCode.UNIMPLEMENTED
            refuse = partial(context.abort, code, f"{method} is not implemented")
        except Exception as error:
            with span.activate():
                status = status_of(error)
            code = _CODES[status.code]
            refuse = partial(context.abort_with_status, rpc_status.to_status(status))
        finally:
            span.end(code)
            await self._tell(call, named, code)
        if refuse is not None:
            await refuse()
        return done

    async def _prove(self, method: str, context: Any) -> Principal:
        """Who calls, by certificate or else by token. Raises UnauthenticatedError, or OverloadedError to strangers."""
        return certificate_principal(context) or await self._strangers.prove(
            context.peer(), method, context.invocation_metadata(), self._authenticate
        )

    async def _tell(self, call: AuditedCall | None, named: Sequence[Message], code: grpc.StatusCode) -> None:
        """In a task of its own: a caller who leaves does not take the entry along. Who leaves while a change is
        committed has two: that it was done, and that they had left."""
        if self._audit is None or call is None or call.told == code.name:
            return
        if rule_for(call.method).is_audited or code is grpc.StatusCode.PERMISSION_DENIED:
            entry = call.entry(resource_name_in(*named), code.name)
            telling = asyncio.ensure_future(self._audit(entry))
            self._telling.add(telling)
            telling.add_done_callback(self._telling.discard)
            await asyncio.shield(telling)


def _forgiving(handler: Any) -> Callable[[bytes], Any]:
    """Reads requests, and takes bytes that are none as the caller's mistake: gRPC would call them our own (UNKNOWN).

    In a stream they are a message without a part, which every servicer refuses in its place.
    """
    read = handler.request_deserializer

    def deserialize(data: bytes) -> Any:
        try:
            return read(data)
        except DecodeError:
            return read(b"") if handler.request_streaming else _UNREADABLE

    return deserialize


def _check_read(request: Any) -> None:
    if request is _UNREADABLE:
        raise InvalidInputError.of_field("request", "is no message of this RPC: its bytes do not parse")


class _Places:
    """So many at once and no more. Entering raises OverloadedError where none is free."""

    def __init__(self, what: str, limit: int) -> None:
        self._what, self._limit, self._num_taken = what, limit, 0

    def __enter__(self) -> None:
        if self._num_taken >= self._limit:
            raise OverloadedError(f"{self._limit} {self._what} are in progress already: call again later")
        self._num_taken += 1

    def __exit__(self, *error: object) -> None:
        self._num_taken -= 1


async def _drain(requests: Any) -> None:
    """Reads what a client still sends, for a while, before it is refused: a send that fails because the answer is there
    already makes grpc.aio clients report INTERNAL in place of that answer."""
    with suppress(TimeoutError, RuntimeError):  # RuntimeError: someone else still reads them
        async with asyncio.timeout(_DRAIN_SECONDS):
            async for _ in requests:
                pass


def _code_of(context: Any) -> grpc.StatusCode:
    """What the servicer set on the context; OK if it set nothing."""
    code = context.code()
    return code if isinstance(code, grpc.StatusCode) else _CODES.get(code or 0, grpc.StatusCode.UNKNOWN)
