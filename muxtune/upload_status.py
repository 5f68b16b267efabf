"""The server's own status of an upload that it ends while an asyncio client still sends.

If a message can no longer be sent, grpc.aio replaces the server's status, which has arrived already, by INTERNAL,
"Internal error from Core" (grpc/grpc#36066, in grpcio 1.85). Blocking calls are not affected.
"""

from collections.abc import Coroutine
from typing import Any, TypeVar

import grpc

_SEND_FAILED = "Internal error from Core"
Response = TypeVar("Response")
Result = TypeVar("Result")


async def upload_response(call: "grpc.aio.StreamUnaryCall[Any, Response]") -> Response:
    """Return the response of an upload. Raises grpc.aio.AioRpcError with the status that the server sent.

    Pass the call as soon as it is created: grpc.aio reports each status once, when it sets it.
    """
    statuses: list[grpc.aio.AioRpcError] = []
    call.add_done_callback(lambda done: statuses.append(_status(done)))
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        of_server = [status for status in statuses if status.details() != _SEND_FAILED]
        raise of_server[0] if of_server else error from None


def _status(call: Any) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        _result(call.code()),
        _result(call.initial_metadata()),
        _result(call.trailing_metadata()),
        _result(call.details()),
        _result(call.debug_error_string()),
    )


def _result(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Return the result of a coroutine that has nothing to wait for, as the call is done."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: Result = end.value
        return result
    raise AssertionError("the call is not done")
