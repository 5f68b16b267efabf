"""Deadlines, retries, keepalive and the mesh secret, against real servers."""

import asyncio
import json
import time

import grpc
import pytest

from engine.errors import MuxtuneError, NotFoundError, OverloadedError, UnavailableError
from muxtune.v1 import (
    admission_pb2,
    admission_pb2_grpc,
    alignment_pb2,
    execution_pb2,
    key_pb2,
    ledger_pb2,
    scheduling_pb2,
)
from services.rpc import client_channel
from services.rpc.client_channel import (
    DEADLINE_SECONDS,
    UPLOAD_DEADLINE_SECONDS,
    open_channel,
    translate_rpc_errors,
)
from services.rpc.transport_options import MAX_MESSAGE_BYTES, SERVER_OPTIONS, service_config

GET = admission_pb2.GetTaskRequest()


class Flaky:
    """A servicer that fails its first `failures` calls."""

    def __init__(self, failures: int, error: MuxtuneError) -> None:
        self.calls, self._failures, self._error = 0, failures, error

    def _count(self) -> None:
        self.calls += 1
        if self.calls <= self._failures:
            raise self._error

    async def unary(self, request, context):
        self._count()
        return admission_pb2.GetTaskResponse(task={"name": "answered"})

    async def stream(self, request, context):
        self._count()
        yield admission_pb2.DownloadAdapterResponse()

    async def upload(self, requests, context):
        self._count()
        return admission_pb2.UploadDatasetResponse()


async def test_unavailable_is_retried_and_then_raised(start_mesh) -> None:
    flaky = Flaky(2, UnavailableError("the store is away"))
    mesh = await start_mesh(GetTask=flaky.unary)
    assert (await (await mesh.admission()).GetTask(GET)).task.name == "answered"
    assert flaky.calls == 3
    hopeless = Flaky(100, UnavailableError("the store is away"))
    mesh = await start_mesh(GetTask=hopeless.unary)
    with pytest.raises(UnavailableError, match="the store is away"):
        await (await mesh.admission()).GetTask(GET)
    assert hopeless.calls == 5


async def test_the_reader_reopens_a_server_stream(start_mesh) -> None:
    flaky = Flaky(1, UnavailableError("not yet"))
    mesh = await start_mesh(DownloadAdapter=flaky.stream)
    stub = await mesh.admission()
    with pytest.raises(UnavailableError):
        await anext(stub.DownloadAdapter(admission_pb2.DownloadAdapterRequest()))
    assert flaky.calls == 1
    again = stub.DownloadAdapter(admission_pb2.DownloadAdapterRequest())
    assert len([piece async for piece in again]) == 1 and flaky.calls == 2


@pytest.mark.parametrize("error", [OverloadedError("x"), NotFoundError("x"), MuxtuneError("x"), ValueError("x")])
async def test_nothing_else_is_retried(start_mesh, error: Exception) -> None:
    flaky = Flaky(1, error)
    mesh = await start_mesh(GetTask=flaky.unary)
    with pytest.raises(MuxtuneError):
        await (await mesh.admission()).GetTask(GET)
    assert flaky.calls == 1


async def test_an_upload_is_not_retried(start_mesh) -> None:
    flaky = Flaky(1, UnavailableError("x"))
    mesh = await start_mesh(UploadDataset=flaky.upload)
    with pytest.raises(UnavailableError):
        await (await mesh.admission()).UploadDataset(iter([admission_pb2.UploadDatasetRequest()]))
    assert flaky.calls == 1


def test_the_service_config_names_every_stream() -> None:
    modules = (admission_pb2, alignment_pb2, execution_pb2, key_pb2, ledger_pb2, scheduling_pb2)
    services = [service for module in modules for service in module.DESCRIPTOR.services_by_name.values()]
    streamed = {(s.full_name, m.name) for s in services for m in s.methods if m.client_streaming or m.server_streaming}
    [everything, never] = json.loads(service_config())["methodConfig"]
    assert everything["name"] == [{}]
    assert everything["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE", "CANCELLED"]
    assert {(name["service"], name["method"]) for name in never["name"]} == streamed
    assert "retryPolicy" not in never


async def test_every_unary_call_has_a_deadline(start_mesh) -> None:
    left: dict[str, float | None] = {}

    async def get(request, context):
        left["unary"] = context.time_remaining()
        return admission_pb2.GetTaskResponse()

    async def upload(requests, context):
        left["upload"] = context.time_remaining()
        return admission_pb2.UploadDatasetResponse()

    async def stream(request, context):
        left["stream"] = context.time_remaining()
        yield admission_pb2.DownloadAdapterResponse()

    mesh = await start_mesh(GetTask=get, UploadDataset=upload, DownloadAdapter=stream)
    stub = await mesh.admission()
    await stub.GetTask(GET)
    assert DEADLINE_SECONDS - 5 < left["unary"] < DEADLINE_SECONDS + 1
    await stub.GetTask(GET, timeout=7)
    assert 5 < left["unary"] < 8
    await stub.UploadDataset(iter([]))
    assert UPLOAD_DEADLINE_SECONDS - 5 < left["upload"] < UPLOAD_DEADLINE_SECONDS + 60
    _ = [piece async for piece in stub.DownloadAdapter(admission_pb2.DownloadAdapterRequest())]
    assert left["stream"] is None


async def test_a_missing_server_is_unavailable_within_seconds() -> None:
    started = time.monotonic()
    async with open_channel("127.0.0.1:1", "mesh_x") as channel:
        with pytest.raises(UnavailableError):
            await admission_pb2_grpc.AdmissionServiceStub(channel).GetTask(GET)
    assert time.monotonic() - started < 10


async def test_wait_for_ready_gets_the_answer_of_a_later_start(start_mesh, unused_tcp_port: int) -> None:
    async def get(request, context):
        return admission_pb2.GetTaskResponse()

    address = f"127.0.0.1:{unused_tcp_port}"
    async with open_channel(address, "mesh_x") as channel:
        call = asyncio.ensure_future(admission_pb2_grpc.AdmissionServiceStub(channel).GetTask(GET, wait_for_ready=True))
        while channel.get_state() is not grpc.ChannelConnectivity.TRANSIENT_FAILURE:
            await channel.wait_for_state_change(channel.get_state())
        server = grpc.aio.server(options=SERVER_OPTIONS)
        servicer = type("Admission", (admission_pb2_grpc.AdmissionServiceServicer,), {"GetTask": staticmethod(get)})
        admission_pb2_grpc.add_AdmissionServiceServicer_to_server(servicer(), server)
        server.add_insecure_port(address)
        await server.start()
        await call
        await server.stop(None)


async def test_metadata_of_the_caller_is_kept(start_mesh, spans) -> None:
    seen = {}

    async def get(request, context):
        seen.update(context.invocation_metadata())
        return admission_pb2.GetTaskResponse()

    mesh = await start_mesh(GetTask=get)
    await (await mesh.admission()).GetTask(GET, metadata=[("x-mine", "1")])
    assert seen["x-mine"] == "1" and seen["authorization"] == f"Bearer {mesh.secret}"
    assert seen["traceparent"].startswith("00-")


async def test_an_idle_stream_outlives_many_pings(start_mesh, monkeypatch) -> None:
    """A server with gRPC's defaults would end the stream with GOAWAY too_many_pings after four seconds. All intervals
    are a tenth of the real ones."""
    fast = [(k, 1000 if k == "grpc.keepalive_time_ms" else v) for k, v in client_channel.channel_options()]
    monkeypatch.setattr(client_channel, "channel_options", lambda *of: fast)  # gRPC pings once a second at most
    interval = "grpc.http2.min_ping_interval_without_data_ms"
    server_options = {**dict(SERVER_OPTIONS), interval: dict(SERVER_OPTIONS)[interval] // 10}
    may_end = asyncio.Event()

    async def run_plan(requests, context):
        yield execution_pb2.RunPlanResponse(sequence=1)
        await may_end.wait()
        yield execution_pb2.RunPlanResponse(sequence=2)

    mesh = await start_mesh(options=tuple(server_options.items()), RunPlan=run_plan)
    call = (await mesh.execution()).RunPlan(iter([execution_pb2.RunPlanRequest()]))
    await anext(call)
    asyncio.get_running_loop().call_later(4.5, may_end.set)
    assert [response.sequence async for response in call] == [2]


async def test_a_message_over_the_size_limit_is_not_an_overload(start_mesh) -> None:
    async def get(request, context):
        return admission_pb2.GetTaskResponse(task={"name": "x" * (MAX_MESSAGE_BYTES + 1)})

    mesh = await start_mesh(options=(("grpc.max_send_message_length", -1),), GetTask=get)
    with pytest.raises(MuxtuneError) as caught:
        await (await mesh.admission()).GetTask(GET)
    assert not isinstance(caught.value, OverloadedError | UnavailableError)


def test_translation_leaves_other_errors_alone() -> None:
    with pytest.raises(KeyError), translate_rpc_errors():
        raise KeyError("x")
    with pytest.raises(MuxtuneError), translate_rpc_errors():
        raise grpc.RpcError
