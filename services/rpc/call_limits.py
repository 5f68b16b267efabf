"""Limits of a server's calls: how many are in progress at once, and how long a client may take to send a request.

Calls of tenants, of each role of the mesh's own callers (services, operators) and of callers that are not known yet are
counted apart, and so are unary calls, uploads and streams of responses: what fills one never refuses another.
"""

import asyncio
import math
from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import grpc
from google.protobuf.message import Message

from engine.errors import InvalidInputError, TransferTooSlowError
from services.rpc.authentication import certificate_principal
from services.rpc.authorization import Role
from services.rpc.call_chain import Handler, ServerCall
from services.rpc.fair_limit import FairLimit
from services.rpc.rate_limit import RateLimit
from services.rpc.unauthenticated_limiter import client_address

_LARGE_MESSAGE_BYTES = 128 << 10  # a larger message takes the event loop as long as several of this size


class CallKind(StrEnum):
    """Kinds of calls by how they hold a server's resources, with the name that errors use."""

    UNARY = "calls"
    UPLOAD = "uploads"  # a stream of requests
    STREAM = "streams"  # a stream of responses, or of both

    @classmethod
    def of_handler(cls, handler: Any) -> "CallKind":
        if handler.response_streaming:
            return cls.STREAM
        return cls.UPLOAD if handler.request_streaming else cls.UNARY


@dataclass(frozen=True)
class CallLimits:
    """The limits of one server; services/rpc/server_settings.py describes each."""

    max_calls: int = 1024
    max_uploads: int = 256
    max_streams: int = 1024
    max_internal_calls: int = 4096
    max_unauthenticated_calls: int = 4096
    request_seconds: float = 30.0
    min_upload_bytes_per_second: float = 32768.0
    max_upload_seconds: float = 3600.0
    upload_messages_per_second: float = 500.0


class ConcurrencyLimits:
    """Counts the calls in progress of one server."""

    def __init__(self, limits: CallLimits) -> None:
        most = {
            CallKind.UNARY: limits.max_calls,
            CallKind.UPLOAD: limits.max_uploads,
            CallKind.STREAM: limits.max_streams,
        }
        self._tenants = {kind: FairLimit(kind, most[kind]) for kind in CallKind}
        self._internal = {
            (role, kind): FairLimit(kind, limits.max_internal_calls, is_shared_fairly=False)
            for role in Role
            for kind in CallKind
        }
        most_open = limits.max_unauthenticated_calls
        self._open_to_anyone = {kind: FairLimit(f"{kind} without a key", most_open) for kind in CallKind}

    async def limit_known(self, call: ServerCall, proceed: Handler, kind: CallKind) -> Any:
        """Count the call of an authenticated caller: by tenant, or by role. Raises OverloadedError."""
        assert call.principal is not None
        tenant, role = call.principal.tenant, call.principal.role
        with self._internal[role, kind].hold(role) if tenant is None else self._tenants[kind].hold(tenant):
            return await proceed(call)

    async def limit_open(self, call: ServerCall, proceed: Handler, kind: CallKind) -> Any:
        """Count a call that anyone may make: by the role in its certificate, or by the address it comes from."""
        principal = certificate_principal(call.context)
        if principal is None:
            holding = self._open_to_anyone[kind].hold(client_address(call.context.peer()))
        else:
            holding = self._internal[principal.role, kind].hold(principal.role)
        with holding:
            return await proceed(call)


class RequestReceiver:
    """Receives what a client sends, and ends its call if that takes too long: TransferTooSlowError."""

    def __init__(self, limits: CallLimits) -> None:
        self._limits, self._messages = limits, RateLimit(limits.upload_messages_per_second)

    async def receive_message(self, call: ServerCall, proceed: Handler) -> Any:
        """Read the one message of a call; the call is authenticated and counted by then."""
        try:
            async with asyncio.timeout(self._limits.request_seconds):
                call.request = await call.context.read()
        except TimeoutError:
            seconds = self._limits.request_seconds
            raise TransferTooSlowError(
                f"The request did not arrive within {seconds:g} s. Send it again over a faster connection."
            ) from None
        if call.request is grpc.aio.EOF:
            raise InvalidInputError.of_field("request", "is missing: send one message")
        return await proceed(call)

    async def pace_upload(self, call: ServerCall, proceed: Handler) -> Any:
        """End a tenant's upload that is too slow, and delay the messages of a tenant that sends very many."""
        assert call.principal is not None
        tenant = call.principal.tenant
        if tenant is None:  # a service, which may have to wait for its own client
            return await proceed(call)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(None) as deadline:
                upload = PacedUpload(call.request, self._limits, deadline, loop.time)
                call.request = self._delayed(upload.messages(), tenant)
                return await proceed(call)
        except TimeoutError:
            if not deadline.expired():
                raise
            raise upload.too_slow() from None

    async def _delayed(self, messages: AsyncIterator[Message], tenant: str) -> AsyncIterator[Message]:
        async for message in messages:
            if seconds := self._messages.reserve(tenant, max(1, message.ByteSize() // _LARGE_MESSAGE_BYTES)):
                await asyncio.sleep(seconds)
            yield message


class PacedUpload:
    """Reads an upload, with a deadline that runs only while it waits for the client.

    The client has a credit of `request_seconds`. Waiting uses it up; bytes that arrive refill it, by a second
    for what the least rate brings in one. So the rate is an average: a client may pause, and send faster then.
    """

    def __init__(
        self, requests: AsyncIterable[Message], limits: CallLimits, deadline: asyncio.Timeout, now: Callable[[], float]
    ) -> None:
        self._requests, self._limits, self._deadline, self._now = requests, limits, deadline, now
        self._credit_seconds, self._end = limits.request_seconds, now() + limits.max_upload_seconds

    async def messages(self) -> AsyncIterator[Message]:
        """Yield the upload's messages."""
        requests = aiter(self._requests)
        while True:
            began = self._now()
            self._deadline.reschedule(min(began + self._credit_seconds, self._end))
            try:
                message = await anext(requests, None)
            finally:
                with suppress(RuntimeError):  # the deadline has passed, or the call has ended
                    self._deadline.reschedule(None)
            if message is None:
                return
            least_rate = self._limits.min_upload_bytes_per_second
            earned = message.ByteSize() / least_rate if least_rate else math.inf
            credit = self._credit_seconds - (self._now() - began) + earned
            self._credit_seconds = min(credit, self._limits.request_seconds)
            yield message

    def too_slow(self) -> TransferTooSlowError:
        """Return the error of an upload whose deadline has passed."""
        limits, remedy = self._limits, "Nothing is stored. Send the whole upload again over a faster connection."
        if self._now() >= self._end:
            return TransferTooSlowError(
                f"The upload was not complete after {limits.max_upload_seconds:g} s, the longest that one may take. "
                f"{remedy}"
            )
        return TransferTooSlowError(
            f"The upload brought less than {limits.min_upload_bytes_per_second:g} bytes per second: its client used up "
            f"the {limits.request_seconds:g} s that it may fall behind. {remedy}"
        )
