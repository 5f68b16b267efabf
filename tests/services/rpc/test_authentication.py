"""Authentication over the wire, before the request is read."""

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine.errors import UnauthenticatedError
from muxtune.v1 import admission_pb2, admission_pb2_grpc
from services.rpc import interceptor
from services.rpc.authentication import bearer_token, current_principal, mesh_authenticator, set_principal
from services.rpc.authorization import Principal, Role


async def answer(request, context):
    return admission_pb2.GetTaskResponse()


async def code_for(address: str, metadata: list[tuple[str, str]]) -> grpc.StatusCode:
    async with grpc.aio.insecure_channel(address) as channel:
        call = admission_pb2_grpc.AdmissionServiceStub(channel).GetTask(
            admission_pb2.GetTaskRequest(name="not a name at all"), metadata=metadata
        )
        return await call.code()


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("authorization", "")],
        [("authorization", "Bearer")],
        [("authorization", "Bearer ")],
        [("authorization", "Basic bWVzaDpz")],
        [("authorization", "Bearer wrong")],
        [("authorization", "Bearer mesh_of-the-tes")],
        [("authorization", "Bearer mesh_of-the-test mesh_of-the-test")],
        [("x-authorization", "Bearer mesh_of-the-test")],
    ],
)
async def test_without_the_secret_nothing_is_served(start_mesh, metadata) -> None:
    served = []

    async def count(request, context):
        served.append(request)
        return await answer(request, context)

    mesh = await start_mesh(GetTask=count)
    assert await code_for(mesh.address, metadata) is grpc.StatusCode.UNAUTHENTICATED
    assert not served


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
async def test_with_the_secret_all_is_served(start_mesh, scheme: str) -> None:
    mesh = await start_mesh(GetTask=answer)
    assert await code_for(mesh.address, [("authorization", f"{scheme} {mesh.secret}")]) is grpc.StatusCode.OK


async def test_streams_are_authenticated_too(start_mesh) -> None:
    async def stream(request, context):
        yield admission_pb2.DownloadAdapterResponse()

    async def upload(requests, context):
        return admission_pb2.UploadDatasetResponse()

    mesh = await start_mesh(DownloadAdapter=stream, UploadDataset=upload)
    stub = await mesh.admission("mesh_wrong")
    with pytest.raises(UnauthenticatedError):
        async for _ in stub.DownloadAdapter(admission_pb2.DownloadAdapterRequest()):
            pass
    with pytest.raises(UnauthenticatedError):
        await stub.UploadDataset(iter([admission_pb2.UploadDatasetRequest()]))


async def test_a_stream_ends_after_its_key_is_revoked(monkeypatch) -> None:
    """The key is revoked while the stream is open: the next authentication ends it."""
    monkeypatch.setattr(interceptor, "_REAUTHENTICATE_SECONDS", 0.0)
    revoked, sent = asyncio.Event(), asyncio.Event()

    async def authenticate(method: str, token: str) -> Principal:
        if revoked.is_set():
            raise UnauthenticatedError("revoked")
        return Principal("tenants/a", Role.TENANT, "key 1")

    class Servicer(admission_pb2_grpc.AdmissionServiceServicer):
        async def WatchTask(self, request, context):
            yield admission_pb2.WatchTaskResponse(event={"sequence": 1})
            yield admission_pb2.WatchTaskResponse(event={"sequence": 2})
            await sent.wait()
            yield admission_pb2.WatchTaskResponse(event={"sequence": 3})

    server = grpc.aio.server(interceptors=[interceptor.RpcInterceptor(authenticate)])
    admission_pb2_grpc.add_AdmissionServiceServicer_to_server(Servicer(), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        request, token = admission_pb2.WatchTaskRequest(), [("authorization", "Bearer x")]
        call = admission_pb2_grpc.AdmissionServiceStub(channel).WatchTask(request, metadata=token, timeout=20)
        assert [(await call.read()).event.sequence for _ in range(2)] == [1, 2]
        revoked.set()
        sent.set()
        assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
    await server.stop(None)


async def test_health_is_open(start_mesh) -> None:
    mesh = await start_mesh(GetTask=answer)
    async with grpc.aio.insecure_channel(mesh.address) as channel:
        call = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert await call.code() is grpc.StatusCode.UNIMPLEMENTED  # asked without a key; this server has none


async def test_each_call_has_its_own_principal(start_mesh) -> None:
    seen = []

    async def look(request, context):
        seen.append(current_principal())
        set_principal(Principal("tenants/changed"))
        return admission_pb2.GetTaskResponse()

    mesh = await start_mesh(GetTask=look)
    stub = await mesh.admission()
    for _ in range(2):
        await stub.GetTask(admission_pb2.GetTaskRequest())
    assert seen == [Principal(None), Principal(None)]


async def test_the_secret_is_compared_whole() -> None:
    authenticate = mesh_authenticator("mesh_ä")
    assert await authenticate("/x/Y", "mesh_ä") == Principal(None)
    for wrong in ("", "mesh_", "mesh_ä ", "mesh_a"):
        with pytest.raises(UnauthenticatedError):
            await authenticate("/x/Y", wrong)


async def test_an_empty_secret_accepts_nothing() -> None:
    with pytest.raises(UnauthenticatedError):
        await mesh_authenticator("")("/x/Y", "")


def test_the_message_says_what_to_send() -> None:
    with pytest.raises(UnauthenticatedError, match="authorization: Bearer"):
        bearer_token([("other", "x"), ("authorization", b"binary")])
