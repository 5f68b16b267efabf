"""Too many calls at once are refused with a retry time; a client that does not read uses only its place."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from engine.errors import OverloadedError
from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import admission_pb2_grpc, artifact_pb2
from services.rpc.authentication import mesh_authenticator
from services.rpc.client_channel import open_channel
from services.rpc.interceptor import RpcInterceptor

SECRET, CHUNK = "mesh_s", b"x" * (1 << 20)


class Slow(admission_pb2_grpc.AdmissionServiceServicer):
    """A servicer whose calls wait for `may_answer`, and whose download never ends and counts its chunks."""

    def __init__(self) -> None:
        self.may_answer, self.num_waiting, self.num_chunks = asyncio.Event(), 0, 0
        self.is_waiting = asyncio.Condition()

    async def GetTask(self, request: pb.GetTaskRequest, context: Any) -> pb.GetTaskResponse:
        async with self.is_waiting:
            self.num_waiting += 1
            self.is_waiting.notify_all()
        await self.may_answer.wait()
        return pb.GetTaskResponse()

    async def DownloadAdapter(self, request: Any, context: Any) -> AsyncIterator[pb.DownloadAdapterResponse]:
        while True:
            self.num_chunks += 1
            yield pb.DownloadAdapterResponse(chunk=artifact_pb2.FileChunk(data=CHUNK))

    async def has_waiting(self, count: int) -> None:
        async with asyncio.timeout(20), self.is_waiting:
            await self.is_waiting.wait_for(lambda: self.num_waiting >= count)


@pytest.fixture
async def slow() -> Slow:
    return Slow()


@pytest.fixture
async def address(slow: Slow) -> AsyncIterator[str]:
    """Start a server that serves three calls and one stream at once; yield its address."""
    server = grpc.aio.server(interceptors=[RpcInterceptor(mesh_authenticator(SECRET), max_calls=3, max_streams=1)])
    admission_pb2_grpc.add_AdmissionServiceServicer_to_server(slow, server)
    bound = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield bound
    slow.may_answer.set()
    await server.stop(None)


async def test_calls_over_the_limit_are_refused_with_a_retry_time(slow: Slow, address: str) -> None:
    async with open_channel(address, SECRET) as channel, grpc.aio.insecure_channel(address) as bare:
        stub, plain = (admission_pb2_grpc.AdmissionServiceStub(c) for c in (channel, bare))
        held = [asyncio.ensure_future(stub.GetTask(pb.GetTaskRequest())) for _ in range(3)]
        await slow.has_waiting(3)
        for _ in range(20):
            with pytest.raises(OverloadedError):
                await stub.GetTask(pb.GetTaskRequest())
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await plain.GetTask(pb.GetTaskRequest(), metadata=(("authorization", f"Bearer {SECRET}"),))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert retry_seconds(refused.value) > 0
        assert slow.num_waiting == 3
        slow.may_answer.set()
        await asyncio.gather(*held)
        await stub.GetTask(pb.GetTaskRequest())  # there is room again


def retry_seconds(error: Any) -> float:
    """Return the seconds in the error's RetryInfo."""
    info = error_details_pb2.RetryInfo()
    (packed,) = (d for d in rpc_status.from_call(error).details if d.Is(error_details_pb2.RetryInfo.DESCRIPTOR))
    assert packed.Unpack(info)
    return info.retry_delay.ToTimedelta().total_seconds()


async def test_an_unread_stream_uses_bounded_memory_and_frees_its_place(slow: Slow, address: str) -> None:
    """Of an endless download one chunk is read: the server makes a few more and then stops."""
    async with open_channel(address, SECRET) as channel:
        stub = admission_pb2_grpc.AdmissionServiceStub(channel)
        unread = stub.DownloadAdapter(pb.DownloadAdapterRequest())
        await anext(unread)
        num_chunks = -1
        while num_chunks != slow.num_chunks:  # until no more are made
            num_chunks = slow.num_chunks
            await asyncio.sleep(0.5)
        assert num_chunks < 64  # gRPC buffers more on a slow connection
        second = stub.DownloadAdapter(pb.DownloadAdapterRequest())
        with pytest.raises(OverloadedError):
            await anext(second)
        unread.cancel()
        async with asyncio.timeout(20):
            while True:
                try:
                    await anext(stub.DownloadAdapter(pb.DownloadAdapterRequest()))
                    break
                except OverloadedError:  # the server has not heard yet that the first has gone
                    await asyncio.sleep(0.05)
