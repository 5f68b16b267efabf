"""The trainer's blocking channel has the same deadlines, errors and spans, in threads."""

import asyncio
import threading

import pytest
from opentelemetry.trace import SpanKind

from engine.errors import InvalidInputError, MuxtuneError, NotFoundError, UnavailableError
from muxtune.v1 import admission_pb2, admission_pb2_grpc, alignment_pb2, alignment_pb2_grpc
from services.rpc.client_channel import open_sync_channel

GET, DOWNLOAD = admission_pb2.GetTaskRequest(), admission_pb2.DownloadAdapterRequest()
PIECE = admission_pb2.DownloadAdapterResponse()
CLIENT = SpanKind.CLIENT


class Blocking:
    """A client in a thread that streams through a blocking channel, as the trainer does."""

    def __init__(self, address: str, secret: str) -> None:
        self.channel = open_sync_channel(address, secret)
        self.stub = admission_pb2_grpc.AdmissionServiceStub(self.channel)

    def read(self, limit: int | None = None) -> int:
        count = 0
        for _ in self.stub.DownloadAdapter(DOWNLOAD):
            count += 1
            if count == limit:
                break
        return count


async def test_a_sync_channel(start_mesh, spans, endless) -> None:
    started = threading.Event()

    async def get(request, context):
        if request.name == "bad":
            raise InvalidInputError("bad name")
        return admission_pb2.GetTaskResponse()

    async def download(request, context):
        yield PIECE
        if started.is_set():
            raise NotFoundError("no more")

    mesh = await start_mesh(GetTask=get, DownloadAdapter=download, WatchTask=endless.stream)
    client = Blocking(mesh.address, mesh.secret)
    await asyncio.to_thread(client.stub.GetTask, GET)
    for span in await spans.both("GetTask"):
        spans.check(span, "OK", is_error=False)
    with pytest.raises(InvalidInputError, match="bad name"):
        await asyncio.to_thread(client.stub.GetTask, admission_pb2.GetTaskRequest(name="bad"))
    spans.check(await spans.ended("GetTask", CLIENT, 2), "INVALID_ARGUMENT", is_error=True)
    assert await asyncio.to_thread(client.read) == 1
    for span in await spans.both("DownloadAdapter"):
        spans.check(span, "OK", is_error=False)
    started.set()
    with pytest.raises(NotFoundError):
        await asyncio.to_thread(client.read)
    spans.check(await spans.ended("DownloadAdapter", CLIENT, 2), "NOT_FOUND", is_error=True)
    client.channel.close()


async def test_an_abandoned_sync_stream(start_mesh, spans, endless) -> None:
    mesh = await start_mesh(DownloadAdapter=endless.stream)
    client = Blocking(mesh.address, mesh.secret)
    assert await asyncio.to_thread(client.read, 1) == 1
    await asyncio.wait_for(endless.ended.wait(), 10)
    client_span, server_span = await spans.both("DownloadAdapter")
    spans.check(client_span, "CANCELLED", is_error=True)
    spans.check(server_span, "CANCELLED", is_error=False)
    client.channel.close()


async def test_a_sync_stream_cancelled_by_another_thread(start_mesh, spans, endless) -> None:
    mesh = await start_mesh(DownloadAdapter=endless.stream)
    client = Blocking(mesh.address, mesh.secret)
    call = client.stub.DownloadAdapter(DOWNLOAD)
    await asyncio.to_thread(next, call)
    waiting = asyncio.create_task(asyncio.to_thread(lambda: next(call)))
    call.cancel()
    with pytest.raises(UnavailableError):
        await waiting
    await asyncio.wait_for(endless.ended.wait(), 10)
    spans.check((await spans.both("DownloadAdapter"))[0], "CANCELLED", is_error=True)
    client.channel.close()


async def test_the_alignment_stub_takes_both_channels(start_mesh) -> None:
    mesh = await start_mesh()
    request = alignment_pb2.StreamMicrobatchesRequest()
    with pytest.raises(MuxtuneError, match="UNIMPLEMENTED"):
        await anext(alignment_pb2_grpc.AlignmentServiceStub(await mesh.channel()).StreamMicrobatches(request))
    with open_sync_channel(mesh.address, mesh.secret) as channel, pytest.raises(MuxtuneError, match="UNIMPLEMENTED"):
        stream = alignment_pb2_grpc.AlignmentServiceStub(channel).StreamMicrobatches(request)
        await asyncio.to_thread(next, stream)
