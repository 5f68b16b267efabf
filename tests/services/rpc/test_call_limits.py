"""A client that sends too slowly loses its call, and so its place: an upload by its rate, any call by its silence."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from engine.errors import TransferTooSlowError
from muxtune.errors import TransferTooSlowError as ClientTransferTooSlowError
from muxtune.errors import raising
from muxtune.upload_status import upload_response
from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import admission_pb2_grpc, artifact_pb2
from services.rpc.authorization import Principal, Role
from services.rpc.call_chain import ServerCall
from services.rpc.call_limits import CallLimits, PacedUpload, RequestReceiver
from services.rpc.interceptor import RpcInterceptor

KIB = 1 << 10


async def authenticate(method: str, token: str) -> Principal:
    return Principal(None) if token == "mesh" else Principal(f"tenants/{token}", Role.TENANT)


class Admission(admission_pb2_grpc.AdmissionServiceServicer):
    """Reads uploads to their end; `left` has the outcome of each."""

    def __init__(self) -> None:
        self.left: list[str] = []

    async def UploadDataset(self, request_iterator: Any, context: Any) -> pb.UploadDatasetResponse:
        try:
            async for _ in request_iterator:
                pass
        except asyncio.CancelledError:
            self.left.append("cancelled")
            raise
        self.left.append("complete")
        return pb.UploadDatasetResponse()


@pytest.fixture
async def servicer() -> Admission:
    return Admission()


@pytest.fixture
async def stub(servicer: Admission) -> AsyncIterator[Any]:
    limits = CallLimits(request_seconds=0.3, max_upload_seconds=1.0)
    server = grpc.aio.server(interceptors=[RpcInterceptor(authenticate, limits=limits)])
    admission_pb2_grpc.add_AdmissionServiceServicer_to_server(servicer, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        yield admission_pb2_grpc.AdmissionServiceStub(channel)
    await server.stop(None)


def options(token: str) -> dict[str, Any]:
    return {"metadata": (("authorization", f"Bearer {token}"),), "timeout": 20}


def chunk(size: int) -> pb.UploadDatasetRequest:
    return pb.UploadDatasetRequest(chunk=artifact_pb2.FileChunk(data=b"x" * size))


async def silent() -> AsyncIterator[pb.UploadDatasetRequest]:
    await asyncio.Event().wait()
    yield chunk(0)


async def stalled() -> AsyncIterator[pb.UploadDatasetRequest]:
    for size in (0, 100 * KIB):
        yield chunk(size)
    await asyncio.Event().wait()


async def dripping() -> AsyncIterator[pb.UploadDatasetRequest]:
    while True:
        yield chunk(1)
        await asyncio.sleep(0.01)


async def endless() -> AsyncIterator[pb.UploadDatasetRequest]:
    while True:
        yield chunk(64 * KIB)
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("requests", "complaint"),
    [
        (silent, "less than 32768 bytes per second"),
        (stalled, "less than 32768 bytes per second"),
        (dripping, "less than 32768 bytes per second"),
        (endless, "was not complete after 1 s"),
    ],
)
async def test_an_upload_that_is_too_slow_or_too_long_is_ended(
    stub: Any, servicer: Admission, requests: Callable[[], AsyncIterator[Any]], complaint: str
) -> None:
    with pytest.raises(ClientTransferTooSlowError, match=complaint) as ended, raising():
        await upload_response(stub.UploadDataset(requests(), **options("bad")))
    assert ended.value.code is grpc.StatusCode.DEADLINE_EXCEEDED and ended.value.reason == "TRANSFER_TOO_SLOW"
    assert "Send the whole upload again" in ended.value.message
    assert servicer.left == ["cancelled"]


async def test_a_service_may_wait_for_its_own_client(stub: Any, servicer: Admission) -> None:
    """Admission passes uploads on to alignment as they come, and ends those that stall itself."""
    go_on = asyncio.Event()

    async def pausing() -> AsyncIterator[pb.UploadDatasetRequest]:
        yield chunk(1)
        await go_on.wait()
        yield chunk(1)

    upload = stub.UploadDataset(pausing(), **options("mesh"))
    with pytest.raises(ClientTransferTooSlowError), raising():
        await upload_response(stub.UploadDataset(silent(), **options("bad")))  # begun later, ended first
    go_on.set()
    await upload
    assert servicer.left == ["cancelled", "complete"]


class SlowClient:
    """An upload of messages of one size that come after these waits, by a clock that the test drives."""

    def __init__(self, size: int, waits: list[float]) -> None:
        self.seconds, self._size, self._waits, self._deadline = 0.0, size, waits, math.inf

    def reschedule(self, when: float | None) -> None:
        self._deadline = math.inf if when is None else when

    async def _messages(self) -> AsyncIterator[Any]:
        for seconds in self._waits:
            self.seconds += seconds
            if self.seconds >= self._deadline:
                raise TimeoutError
            yield chunk(self._size)

    async def ended_after(self, limits: CallLimits) -> float:
        """Return the time at which the upload is ended, or infinity if all of it arrives."""
        upload = PacedUpload(self._messages(), limits, self, lambda: self.seconds)
        try:
            async for _ in upload.messages():
                self.seconds += 100.0 / len(self._waits)  # the server's own time does not count
        except TimeoutError:
            return self.seconds
        return math.inf


@pytest.mark.parametrize(
    ("size", "waits", "expected"),
    [
        (32 * KIB, [1.0] * 3000, math.inf),  # the least rate
        (1024 * KIB, [29.0] * 60, math.inf),  # a message of a mebibyte now and then
        (1024 * KIB, [31.0], 31.0),
        (64 * KIB, [1.0] * 100 + [29.0] + [1.0] * 100, math.inf),  # a pause, made up for
        (32 * KIB, [1.0] * 10 + [20.0] + [1.0] * 10 + [20.0], pytest.approx(160.0, abs=10)),  # not made up for
        (1 << 20, [10.0] * 1000, pytest.approx(3600.0, abs=20)),  # the longest that an upload may take
    ],
)
async def test_the_least_rate_is_an_average(size: int, waits: list[float], expected: float) -> None:
    assert await SlowClient(size, waits).ended_after(CallLimits()) == expected


async def test_without_a_least_rate_only_silence_ends_an_upload() -> None:
    limits = CallLimits(min_upload_bytes_per_second=0)
    assert await SlowClient(1, [29.0] * 100).ended_after(limits) == math.inf
    assert await SlowClient(1, [29.0, 31.0]).ended_after(limits) == pytest.approx(160.0, abs=100)


async def test_many_small_messages_of_a_tenant_wait_and_do_not_fail() -> None:
    """2,400 messages, of which a thousand a second may come after the first two thousand."""
    receiver, waits = RequestReceiver(CallLimits(upload_messages_per_second=1000.0)), []

    async def many() -> AsyncIterator[Any]:
        for _ in range(2400):
            yield chunk(1)

    async def read(call: ServerCall) -> None:
        async for _ in call.request:
            pass
        waits.append(asyncio.get_running_loop().time())

    began = asyncio.get_running_loop().time()
    call = ServerCall("/muxtune.v1.AdmissionService/UploadDataset", many(), None)
    call.principal = Principal("tenants/bad", Role.TENANT)
    await receiver.pace_upload(call, read)
    assert waits[0] - began > 0.3


async def test_a_call_whose_message_does_not_come_is_ended() -> None:
    class SilentContext:
        async def read(self) -> None:
            await asyncio.Event().wait()

    async def serve(call: ServerCall) -> None:
        raise AssertionError("nothing was received")

    receiver = RequestReceiver(CallLimits(request_seconds=0.05))
    with pytest.raises(TransferTooSlowError, match=r"did not arrive within 0\.05 s"):
        await receiver.receive_message(ServerCall("/muxtune.v1.AdmissionService/GetTask", None, SilentContext()), serve)


async def test_large_messages_of_a_tenant_count_as_their_bytes() -> None:
    """26 messages of 1 MiB, where 100 of 128 KiB may come a second after the first 200."""
    receiver, seconds = RequestReceiver(CallLimits(upload_messages_per_second=100.0)), list[float]()
    reserve = receiver._messages.reserve

    def record(tenant: str, num_messages: int) -> float:
        seconds.append(reserve(tenant, num_messages))
        return 0.0

    receiver._messages.reserve = record  # type: ignore[method-assign]

    async def many() -> AsyncIterator[Any]:
        for _ in range(26):
            yield chunk(1 << 20)

    async def read(call: ServerCall) -> None:
        async for _ in call.request:
            pass

    call = ServerCall("/muxtune.v1.AdmissionService/UploadDataset", many(), None)
    call.principal = Principal("tenants/bad", Role.TENANT)
    await receiver.pace_upload(call, read)
    assert seconds[24] == 0 and 0 < seconds[25] <= 0.08
