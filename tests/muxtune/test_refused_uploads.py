"""An upload that the server ends while the client still sends: the client gets the server's answer."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status

from engine.errors import MalformedDatasetError, MuxtuneError, QuotaExceededError, UnauthenticatedError
from muxtune import errors, transport
from muxtune.aio import AsyncClient
from muxtune.client import Client
from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import admission_pb2_grpc, artifact_pb2, dataset_pb2
from services.rpc.client_channel import open_channel
from services.rpc.errors import TABLE, to_status
from tests.muxtune.admission_fake import CONFIG, KEY, WEIGHTS

DATA = b"x" * (4 << 20)
REFUSALS = [UnauthenticatedError("no such key"), MalformedDatasetError("no JSON", line=7), QuotaExceededError("full")]
BEFORE_READING, AT_THE_END = 0, 10_000
POINTS = (BEFORE_READING, 1, 2, 3, 5, 20, AT_THE_END)  # messages read before the end
CHUNKS_BYTES = (1 << 20, 1 << 16, 1 << 13)
REPETITIONS = 4


class EarlyServer(admission_pb2_grpc.AdmissionServiceServicer):
    """Reads `num_read` messages of an upload, then answers with `refusal`, or with a response if it is None."""

    def __init__(self) -> None:
        self.num_read, self.refusal = 0, None

    async def _read(self, requests: AsyncIterator[Any], context: Any) -> None:
        num_left = self.num_read
        while num_left and await anext(requests, None) is not None:
            num_left -= 1
        if self.refusal is not None:
            status = rpc_status.to_status(to_status(self.refusal))
            await context.abort(status.code, status.details, status.trailing_metadata)

    async def UploadDataset(self, requests: AsyncIterator[Any], context: Any) -> pb.UploadDatasetResponse:
        await self._read(requests, context)
        return pb.UploadDatasetResponse(dataset=dataset_pb2.Dataset(name="tenants/a/datasets/d"))

    async def UploadAdapter(self, requests: AsyncIterator[Any], context: Any) -> pb.UploadAdapterResponse:
        await self._read(requests, context)
        return pb.UploadAdapterResponse(adapter=artifact_pb2.Adapter(name="tenants/a/adapters/x"))


@pytest.fixture
async def server() -> AsyncIterator[tuple[EarlyServer, str]]:
    servicer, server = EarlyServer(), grpc.aio.server()
    admission_pb2_grpc.add_AdmissionServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield servicer, f"127.0.0.1:{port}"
    await server.stop(None)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    (tmp_path / CONFIG).write_text("{}")
    (tmp_path / WEIGHTS).write_bytes(DATA)
    return tmp_path


def check(raised: errors.MuxtuneError, refusal: MuxtuneError) -> None:
    row = TABLE[type(refusal)]
    assert (raised.code, raised.reason, raised.message) == (row.code, row.reason, refusal.message)
    assert raised.metadata == refusal.metadata and type(raised).__name__ == type(refusal).__name__


@pytest.mark.parametrize("chunk_bytes", CHUNKS_BYTES)
@pytest.mark.parametrize("client", ["blocking", "asyncio"])
async def test_the_servers_answer_arrives_at_any_point_of_an_upload(
    server: tuple[EarlyServer, str], adapter: Path, client: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "CHUNK_BYTES", chunk_bytes)
    servicer, address = server
    async with AsyncClient(address, KEY) as awaited:
        with Client(address, KEY) as blocking:
            for number, servicer.num_read in enumerate(POINTS * REPETITIONS):
                servicer.refusal = refusal = REFUSALS[number % len(REFUSALS)]
                for method, argument in (("upload_dataset", DATA), ("upload_adapter", adapter)):
                    with pytest.raises(errors.MuxtuneError) as raised:
                        if client == "asyncio":
                            await getattr(awaited, method)(argument)
                        else:
                            await asyncio.to_thread(getattr(blocking, method), argument)
                    check(raised.value, refusal)


@pytest.mark.parametrize("chunk_bytes", CHUNKS_BYTES)
async def test_an_early_response_is_an_answer_too(
    server: tuple[EarlyServer, str], chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server answers early if the `request_id` has created its dataset already."""
    monkeypatch.setattr(transport, "CHUNK_BYTES", chunk_bytes)
    servicer, address = server
    async with AsyncClient(address, KEY) as client:
        for servicer.num_read in POINTS * REPETITIONS:
            assert (await client.upload_dataset(DATA)).name == "tenants/a/datasets/d"


@pytest.mark.parametrize("chunk_bytes", CHUNKS_BYTES)
async def test_services_get_the_early_answer_of_a_peer(
    server: tuple[EarlyServer, str], chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Admission forwards an upload to alignment; when alignment refuses a row, the tenant must get its reason."""
    monkeypatch.setattr(transport, "CHUNK_BYTES", chunk_bytes)
    servicer, address = server
    async with open_channel(address, "mesh_x") as channel:
        stub = admission_pb2_grpc.AdmissionServiceStub(channel)
        for number, servicer.num_read in enumerate(POINTS * REPETITIONS):
            servicer.refusal = refusal = REFUSALS[number % len(REFUSALS)]
            with pytest.raises(type(refusal), match=refusal.message):
                await stub.UploadDataset(transport.dataset_requests(artifact_pb2.UploadHeader(), DATA))
