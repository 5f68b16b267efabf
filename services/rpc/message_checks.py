"""Checks of messages around a servicer: requests of clients have limits (services/message_limits.py), and no answer is
larger than a message may be."""

import logging
from collections.abc import AsyncIterable, AsyncIterator, Callable
from itertools import islice
from typing import Any

from google.protobuf.message import DecodeError, Message

from engine.errors import InvalidInputError, QuotaExceededError
from services.message_limits import oversized_fields
from services.rpc.authorization import Role, rule_for
from services.rpc.call_chain import Handler, ServerCall
from services.rpc.transport_options import MAX_MESSAGE_BYTES

# A tenant's message is not even parsed above these: parsed, short strings take sixteen times their bytes. The largest
# specs that were ever accepted have 256 KiB, and calls that created them may be repeated; a chunk of a file has 2 MiB.
_MAX_CALL_BYTES, _MAX_UPLOAD_BYTES = 1 << 20, 3 << 20
_CLIENTS = frozenset({Role.TENANT, Role.VIEWER, Role.OPERATOR})
_SPEC = "muxtune.v1.TaskSpec"  # services/conversion/spec_limits.py checks it, after idempotency
_MAX_VIOLATIONS = 10
_log = logging.getLogger(__name__)


class UnreadableRequest:
    """Stands for a request that was not parsed, with the reason."""

    def __init__(self, reason: str, num_bytes: int) -> None:
        self.reason, self._num_bytes = reason, num_bytes

    def ByteSize(self) -> int:
        return self._num_bytes


def tolerant_deserializer(handler: Any, method: str) -> Callable[[bytes], Any]:
    """Return a deserializer that returns an UnreadableRequest for malformed bytes and for too many of them, so that the
    call fails with INVALID_ARGUMENT, not UNKNOWN. In a stream both ways, malformed bytes become an empty message, which
    the servicer ignores."""
    deserialize, limit = handler.request_deserializer, MAX_MESSAGE_BYTES
    if rule_for(method).roles & {Role.TENANT, Role.VIEWER}:
        limit = _MAX_UPLOAD_BYTES if handler.request_streaming else _MAX_CALL_BYTES

    def deserialize_or_mark(data: bytes) -> Any:
        if len(data) > limit:
            reason = f"has {len(data)} bytes, at most {limit} are allowed: send less in one message"
            return UnreadableRequest(reason, len(data))
        try:
            return deserialize(data)
        except DecodeError:
            if handler.request_streaming and handler.response_streaming:
                return deserialize(b"")
            return UnreadableRequest(f"does not parse as a request message of {method}", len(data))

    return deserialize_or_mark


async def check_requests(call: ServerCall, proceed: Handler) -> Any:
    """Refuse a request that cannot be read, and a client's request with a field that is too large."""
    is_clients = bool(rule_for(call.method).roles & _CLIENTS)
    if isinstance(call.request, AsyncIterable):
        call.request = _checked(call.request, is_clients)
    else:
        _check(call.request, is_clients)
    return await proceed(call)


async def _checked(requests: AsyncIterable[Any], is_clients: bool) -> AsyncIterator[Any]:
    async for request in requests:
        _check(request, is_clients)
        yield request


def _check(request: Any, is_clients: bool) -> None:
    if isinstance(request, UnreadableRequest):
        raise InvalidInputError.of_field("request", request.reason)
    if is_clients and (violations := list(islice(oversized_fields(request, except_type=_SPEC), _MAX_VIOLATIONS))):
        raise InvalidInputError.of_fields(violations)


def check_response(method: str, response: Message) -> None:
    """Raise QuotaExceededError for an answer that is larger than gRPC would send. Lists and reports are cut before, so
    this is a last resort."""
    if (size := response.ByteSize()) > MAX_MESSAGE_BYTES:
        _log.warning("The answer of %s has %d bytes, more than a message may have", method, size)
        raise QuotaExceededError(
            f"The answer has {size} bytes, a message at most {MAX_MESSAGE_BYTES}. Ask for less at once.", subject=method
        )
