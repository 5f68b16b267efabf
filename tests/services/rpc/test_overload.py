"""A tenant that holds all the calls, uploads and streams it can refuses nothing to another tenant or to the mesh."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_status import rpc_status

from engine.errors import UnauthenticatedError
from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import admission_pb2_grpc, artifact_pb2
from services.rpc.authorization import Principal, Role
from services.rpc.call_limits import CallLimits
from services.rpc.interceptor import RpcInterceptor

CHUNK = b"x" * (1 << 20)
LIMITS = CallLimits(max_calls=64, max_uploads=32, max_streams=32, max_internal_calls=8, max_unauthenticated_calls=16)
NUM_ALONE = {"GetTask": 8, "UploadDataset": 4, "DownloadAdapter": 4}  # a ninth of each limit, rounded up
PRINCIPALS = {
    "bad": Principal("tenants/bad", Role.TENANT),
    "good": Principal("tenants/good", Role.TENANT),
    "operator": Principal(None, Role.OPERATOR),
    "mesh": Principal(None),
}
TIMEOUT_SECONDS = 20.0


async def authenticate(method: str, token: str) -> Principal:
    if token == "slow":  # as a token whose key cannot be read now
        await asyncio.Event().wait()
    if token not in PRINCIPALS:
        raise UnauthenticatedError("the API key is unknown")
    return PRINCIPALS[token]


class Slow(admission_pb2_grpc.AdmissionServiceServicer):
    """A servicer whose calls wait for `may_answer`, and whose download never ends and counts its chunks."""

    def __init__(self) -> None:
        self.may_answer, self.num_waiting, self.num_chunks = asyncio.Event(), 0, 0
        self.is_waiting = asyncio.Condition()

    async def GetTask(self, request: pb.GetTaskRequest, context: Any) -> pb.GetTaskResponse:
        await self._arrive()
        await self.may_answer.wait()
        return pb.GetTaskResponse()

    async def UploadDataset(self, request_iterator: Any, context: Any) -> pb.UploadDatasetResponse:
        await self._arrive()
        async for _ in request_iterator:
            pass
        return pb.UploadDatasetResponse()

    async def DownloadAdapter(self, request: Any, context: Any) -> AsyncIterator[pb.DownloadAdapterResponse]:
        await self._arrive()
        while True:
            self.num_chunks += 1
            yield pb.DownloadAdapterResponse(chunk=artifact_pb2.FileChunk(data=CHUNK))

    async def _arrive(self) -> None:
        async with self.is_waiting:
            self.num_waiting += 1
            self.is_waiting.notify_all()

    async def has_waiting(self, count: int) -> None:
        async with asyncio.timeout(TIMEOUT_SECONDS), self.is_waiting:
            await self.is_waiting.wait_for(lambda: self.num_waiting >= count)


@pytest.fixture
async def slow() -> Slow:
    return Slow()


Start = Callable[[CallLimits], Awaitable[str]]


@pytest.fixture
async def start(slow: Slow) -> AsyncIterator[Start]:
    """Return a function that starts a server with these limits and returns its address."""
    async with AsyncExitStack() as stack:

        async def start_server(limits: CallLimits) -> str:
            server = grpc.aio.server(interceptors=[RpcInterceptor(authenticate, limits=limits)])
            admission_pb2_grpc.add_AdmissionServiceServicer_to_server(slow, server)
            health_pb2_grpc.add_HealthServicer_to_server(health_aio.HealthServicer(), server)
            address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
            await server.start()
            stack.push_async_callback(server.stop, None)
            stack.callback(slow.may_answer.set)
            return address

        yield start_server


class Calls:
    """Opens calls with the key of a caller, each of a kind that does not end by itself."""

    def __init__(self, channel: grpc.aio.Channel, token: str) -> None:
        self._channel, self._stub = channel, admission_pb2_grpc.AdmissionServiceStub(channel)
        self._options = {"metadata": (("authorization", f"Bearer {token}"),), "timeout": TIMEOUT_SECONDS}
        self.open: list[Any] = []

    def begin(self, method: str) -> Any:
        """Begin a call: an upload sends a header and then nothing, a stream is not read."""
        request = {
            "GetTask": pb.GetTaskRequest(),
            "UploadDataset": self._stalled(),
            "DownloadAdapter": pb.DownloadAdapterRequest(),
        }[method]
        self.open.append(getattr(self._stub, method)(request, **self._options))
        return self.open[-1]

    def send_no_message(self, method: str) -> Any:
        """Begin a call of one request without the request."""
        call = self._channel.stream_unary(f"/muxtune.v1.AdmissionService/{method}")(self._silent(), **self._options)
        self.open.append(call)
        return call

    async def refusal(self, method: str) -> grpc.aio.AioRpcError:
        """Return the error of a call that is refused."""
        call = self.begin(method)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await (anext(aiter(call)) if method == "DownloadAdapter" else call)
        self.open.remove(call)
        return refused.value

    def close(self) -> None:
        for call in self.open:
            call.cancel()
        self.open.clear()

    @staticmethod
    async def _stalled() -> AsyncIterator[pb.UploadDatasetRequest]:
        yield pb.UploadDatasetRequest(header=artifact_pb2.UploadHeader())
        await asyncio.Event().wait()

    @staticmethod
    async def _silent() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""


@pytest.fixture
async def connect() -> AsyncIterator[Callable[[str, str], Calls]]:
    """Return a function that connects a caller, by its token, to the server at an address."""
    async with AsyncExitStack() as stack:
        made: list[Calls] = []

        def connect_caller(address: str, token: str) -> Calls:
            channel = grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
            stack.push_async_callback(channel.close)
            made.append(Calls(channel, token))
            return made[-1]

        yield connect_caller
        for calls in made:
            calls.close()


async def fill(slow: Slow, calls: Calls, method: str) -> None:
    """Hold all that the caller may hold."""
    before = slow.num_waiting
    for _ in range(NUM_ALONE[method]):
        calls.begin(method)
    await slow.has_waiting(before + NUM_ALONE[method])


@pytest.mark.parametrize("method", list(NUM_ALONE))
async def test_a_tenant_that_holds_all_it_can_keeps_nobody_else_out(
    slow: Slow, start: Start, connect: Callable[[str, str], Calls], method: str
) -> None:
    address = await start(LIMITS)
    bad = connect(address, "bad")
    await fill(slow, bad, method)
    for _ in range(20):
        error = await bad.refusal(method)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "tenants/bad has" in error.details()
        assert retry_seconds(error) > 0
    assert slow.num_waiting == NUM_ALONE[method]
    for token in ("good", "operator", "mesh"):  # the operator may call none of these: only its role refuses it
        other = connect(address, token)
        for kind in NUM_ALONE:
            if token == "operator":
                assert (await other.refusal(kind)).code() is grpc.StatusCode.PERMISSION_DENIED
            else:
                before = slow.num_waiting
                other.begin(kind)
                await slow.has_waiting(before + 1)
        other.close()
    other_kinds = [kind for kind in NUM_ALONE if kind != method]
    for kind in other_kinds:  # of the same tenant, too
        await fill(slow, bad, kind)


async def test_the_mesh_that_holds_all_it_can_keeps_no_operator_and_no_tenant_out(
    slow: Slow, start: Start, connect: Callable[[str, str], Calls]
) -> None:
    address = await start(LIMITS)
    mesh, good, operator = (connect(address, token) for token in ("mesh", "good", "operator"))
    for _ in range(LIMITS.max_internal_calls):
        mesh.begin("GetTask")
    await slow.has_waiting(LIMITS.max_internal_calls)
    assert (await mesh.refusal("GetTask")).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    good.begin("GetTask")
    await slow.has_waiting(LIMITS.max_internal_calls + 1)
    assert (await operator.refusal("GetTask")).code() is grpc.StatusCode.PERMISSION_DENIED


async def test_calls_without_a_message_are_counted_by_tenant(
    slow: Slow, start: Start, connect: Callable[[str, str], Calls]
) -> None:
    """A call is authenticated and counted when it begins: a message that never comes is nobody else's loss."""
    address = await start(LIMITS)
    bad, good, nobody = (connect(address, token) for token in ("bad", "good", "unknown"))
    for _ in range(NUM_ALONE["GetTask"]):
        bad.send_no_message("GetTask")
    bad.begin("DownloadAdapter")
    await slow.has_waiting(1)  # on the same connection: the calls before it have been counted
    assert (await bad.refusal("GetTask")).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    good.begin("GetTask")
    await slow.has_waiting(2)
    assert await nobody.send_no_message("GetTask").code() is grpc.StatusCode.UNAUTHENTICATED


async def test_checks_of_unknown_keys_are_limited_and_services_need_none(
    slow: Slow, start: Start, connect: Callable[[str, str], Calls]
) -> None:
    """All come from one address here, so a flood of keys that take long to check delays others of that address only;
    tests/test_mesh_stalled_clients.py has callers with certificates."""
    address = await start(LIMITS)
    stranger = connect(address, "slow")
    codes = {asyncio.ensure_future(stranger.begin("GetTask").code()) for _ in range(LIMITS.max_unauthenticated_calls)}
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while len(codes) > 2:  # a ninth of the limit
            done, codes = await asyncio.wait(codes, return_when=asyncio.FIRST_COMPLETED)
            assert {code.result() for code in done} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    stranger.close()
    good = connect(address, "good")
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while not slow.num_waiting:  # until the server has heard that the strangers left
            call = good.begin("GetTask")
            with suppress(TimeoutError):
                await asyncio.wait_for(call.code(), 0.1)


async def test_health_watches_without_a_key_are_limited_by_address(start: Start) -> None:
    async with grpc.aio.insecure_channel(await start(LIMITS)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
        for watch in watches:
            await watch.read()
        third = stub.Watch(health_pb2.HealthCheckRequest())
        assert await third.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status  # unary calls are counted apart
        for watch in watches:
            watch.cancel()


def retry_seconds(error: Any) -> float:
    """Return the seconds in the error's RetryInfo."""
    info = error_details_pb2.RetryInfo()
    (packed,) = (d for d in rpc_status.from_call(error).details if d.Is(error_details_pb2.RetryInfo.DESCRIPTOR))
    assert packed.Unpack(info)
    return info.retry_delay.ToTimedelta().total_seconds()


async def test_an_unread_stream_uses_bounded_memory_and_frees_its_place(
    slow: Slow, start: Start, connect: Callable[[str, str], Calls]
) -> None:
    """Of an endless download one chunk is read: the server makes a few more and then stops."""
    bad = connect(await start(CallLimits(max_streams=1)), "bad")
    unread = bad.begin("DownloadAdapter")
    await anext(aiter(unread))
    num_chunks = -1
    while num_chunks != slow.num_chunks:  # until no more are made
        num_chunks = slow.num_chunks
        await asyncio.sleep(0.5)
    assert num_chunks < 64  # gRPC buffers more on a slow connection
    assert (await bad.refusal("DownloadAdapter")).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    unread.cancel()
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while True:
            try:
                await anext(aiter(bad.begin("DownloadAdapter")))
                break
            except grpc.aio.AioRpcError:  # the server has not heard yet that the first has gone
                await asyncio.sleep(0.05)
