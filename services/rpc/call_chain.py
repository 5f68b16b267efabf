"""The steps that a server takes around each RPC; services/rpc/interceptor.py puts them in order.

A step does its one duty, awaits the next step, and sees how the call ended. It writes what others need into the call.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import grpc
from google.protobuf.message import Message
from grpc_status import rpc_status
from opentelemetry.trace import SpanKind

from services.rpc.audit import Audit, AuditedCall, resource_name_in, set_call
from services.rpc.authentication import Authenticate, certificate_principal, set_principal
from services.rpc.authorization import Principal, check_access, rule_for
from services.rpc.errors import status_of
from services.rpc.fair_limit import FairLimit
from services.rpc.rate_limit import RateLimit
from services.rpc.tracing import RpcSpan
from services.rpc.unauthenticated_limiter import UnauthenticatedCallLimiter, client_address
from services.telemetry import carrier_of

_EXPORTED_REFUSALS_PER_SECOND = 1.0
_CODES = {code.value[0]: code for code in grpc.StatusCode}


@dataclass
class ServerCall:
    """One RPC being served. `code` is how it ended; `send_refusal` sends the status of a refused call to its caller.

    `request`: the message, once it is read, or the messages of a stream. `span`: None where calls are not traced.
    """

    method: str
    request: Any
    context: Any
    span: RpcSpan | None = None
    response: Message | None = None
    principal: Principal | None = None
    audited: AuditedCall | None = None
    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN
    send_refusal: Callable[[], Awaitable[None]] | None = None

    @property
    def resource(self) -> str:
        """Name of the resource that the call created, or else of the one that it was made on."""
        return resource_name_in(*(part for part in (self.response, self.request) if isinstance(part, Message)))


Handler = Callable[[ServerCall], Awaitable[Any]]


class Step(Protocol):
    """Returns what `proceed` returns; raises to refuse the call."""

    async def __call__(self, call: ServerCall, proceed: Handler) -> Any: ...


def chain(steps: Sequence[Step], serve: Handler) -> Handler:
    """Return a handler that takes the steps in order and then serves the call."""
    for step in reversed(steps):
        serve = partial(step, proceed=serve)
    return serve


async def answer_refusal(call: ServerCall, proceed: Handler) -> Any:
    """Send the status of a refused call, once everything about the call is recorded."""
    response = await proceed(call)
    if call.send_refusal is not None:
        await call.send_refusal()
    return response


class AuditRecorder:
    """Records calls that change something, and calls that the caller's role may not make, in the audit log."""

    def __init__(self, audit: Audit | None) -> None:
        self._audit = audit
        self._writing: set[asyncio.Future[None]] = set()

    async def __call__(self, call: ServerCall, proceed: Handler) -> Any:
        try:
            return await proceed(call)
        finally:
            await self._record(call)

    async def _record(self, call: ServerCall) -> None:
        """Write the entry in a task of its own, so that it is written even if the caller cancels.

        A caller that cancels while its change is committed leaves two entries: the change, and the cancellation.
        """
        if self._audit is None or call.audited is None or call.audited.recorded_code == call.code.name:
            return
        if rule_for(call.method).is_audited or call.code is grpc.StatusCode.PERMISSION_DENIED:
            entry = call.audited.entry(call.resource, call.code.name)
            writing = asyncio.ensure_future(self._audit(entry))
            self._writing.add(writing)
            writing.add_done_callback(self._writing.discard)
            await asyncio.shield(writing)


class Tracing:
    """Starts the call's span, makes it the current one, and ends it with the call's status code.

    Of unknown callers' refused calls one a second is exported, and of a tenant's calls over a limit: such calls come as
    fast as anyone sends them, and their spans would replace all others in a file of limited size.
    """

    def __init__(self, address: str) -> None:
        self._address, self._refusals = address, RateLimit(_EXPORTED_REFUSALS_PER_SECOND)

    async def __call__(self, call: ServerCall, proceed: Handler) -> Any:
        carrier = carrier_of(call.context.invocation_metadata())
        call.span = RpcSpan(call.method, SpanKind.SERVER, carrier, self._address)
        try:
            with call.span.activate():
                return await proceed(call)
        finally:
            call.span.end(call.code, is_exported=self._is_exported(call))

    def _is_exported(self, call: ServerCall) -> bool:
        if call.principal is None:
            return self._refusals.try_acquire("unknown callers")
        is_over_limit = call.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        return not is_over_limit or self._refusals.try_acquire(call.principal.tenant or call.principal.subject)


async def map_errors(call: ServerCall, proceed: Handler) -> Any:
    """Set the call's status code; turn an exception into the refusal to send."""
    try:
        response = await proceed(call)
        call.code = _status_code_of(call.context)
        return response
    except grpc.aio.AbortError:
        call.code = _status_code_of(call.context)
        raise
    except asyncio.CancelledError:
        seconds_left = call.context.time_remaining()
        is_late = seconds_left is not None and seconds_left <= 0
        call.code = grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED
        raise
    except NotImplementedError:  # raised by a generated servicer's own method
        call.code = grpc.StatusCode.UNIMPLEMENTED
        call.send_refusal = partial(call.context.abort, call.code, f"{call.method} is not implemented")
    except Exception as error:
        status = status_of(error)
        call.code = _CODES[status.code]
        call.send_refusal = partial(call.context.abort_with_status, rpc_status.to_status(status))
    return None


class Authentication:
    """Authenticates the caller by its certificate, or else by its token.

    `in_progress` limits the calls whose tokens are being checked, by the address they come from.
    """

    def __init__(self, authenticate: Authenticate, limiter: UnauthenticatedCallLimiter, in_progress: FairLimit) -> None:
        self._authenticate, self._limiter, self._in_progress = authenticate, limiter, in_progress

    async def __call__(self, call: ServerCall, proceed: Handler) -> Any:
        if (principal := certificate_principal(call.context)) is None:
            with self._in_progress.hold(client_address(call.context.peer())):
                principal = await self.principal_of(call)
        call.principal = principal
        set_principal(principal)
        return await proceed(call)

    async def principal_of(self, call: ServerCall) -> Principal:
        """Raises UnauthenticatedError, and OverloadedError for an address with too many unauthenticated calls."""
        return certificate_principal(call.context) or await self._limiter.authenticate(
            call.context.peer(), call.method, call.context.invocation_metadata(), self._authenticate
        )


async def open_audit_entry(call: ServerCall, proceed: Handler) -> Any:
    """Let the servicer see the call's audit entry, so that it can record it together with its change."""
    assert call.principal is not None
    set_call(audited := AuditedCall(call.principal, call.method))
    call.audited = audited
    return await proceed(call)


async def authorize_role(call: ServerCall, proceed: Handler) -> Any:
    """Refuse a caller whose role may not call the method."""
    assert call.principal is not None
    check_access(call.method, call.principal.role)
    return await proceed(call)


async def annotate_span(call: ServerCall, proceed: Handler) -> Any:
    """Name the tenant on the span; end the span of a long stream after a few seconds."""
    assert call.principal is not None and call.span is not None
    if call.principal.tenant:
        call.span.set_tenant(call.principal.tenant)
    call.span.establish_soon()
    return await proceed(call)


def _status_code_of(context: Any) -> grpc.StatusCode:
    """Return the code that the servicer set on the context; OK if it set none."""
    code = context.code()
    return code if isinstance(code, grpc.StatusCode) else _CODES.get(code or 0, grpc.StatusCode.UNKNOWN)
