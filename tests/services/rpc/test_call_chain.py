"""The chain of steps around a call: each step runs around those after it, and sees their outcome."""

from typing import Any

import pytest
from opentelemetry.trace import SpanKind

from services.rpc.call_chain import Handler, ServerCall, Step, chain
from services.rpc.tracing import RpcSpan


def server_call() -> ServerCall:
    return ServerCall("/muxtune.v1.AdmissionService/GetTask", "request", None, RpcSpan("x/y", SpanKind.SERVER))


def recording_step(name: str, log: list[str]) -> Step:
    async def step(call: ServerCall, proceed: Handler) -> Any:
        log.append(f"{name} before")
        try:
            return await proceed(call)
        finally:
            log.append(f"{name} after")

    return step


@pytest.mark.parametrize("fails", [False, True])
async def test_steps_run_in_order_and_end_in_reverse(fails: bool) -> None:
    log: list[str] = []

    async def serve(call: ServerCall) -> str:
        log.append("serve")
        if fails:
            raise ValueError("no answer")
        return f"answer to {call.request}"

    handle = chain([recording_step("first", log), recording_step("second", log)], serve)
    for _ in range(2):  # a chain is made once and used for every call
        log.clear()
        if fails:
            with pytest.raises(ValueError, match="no answer"):
                await handle(server_call())
        else:
            assert await handle(server_call()) == "answer to request"
        assert log == ["first before", "second before", "serve", "second after", "first after"]


async def test_a_step_that_raises_ends_the_call_before_the_next_one() -> None:
    log: list[str] = []

    async def refuse(call: ServerCall, proceed: Handler) -> Any:
        raise PermissionError

    async def serve(call: ServerCall) -> None:
        log.append("serve")

    with pytest.raises(PermissionError):
        await chain([recording_step("first", log), refuse], serve)(server_call())
    assert log == ["first before", "first after"]
