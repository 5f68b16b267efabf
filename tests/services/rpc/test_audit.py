"""The interceptor writes audit entries before the caller gets its answer, and even if the caller cancels."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import InvalidInputError
from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import admission_pb2_grpc, artifact_pb2, task_pb2
from services.rpc.audit import AuditEntry, resource_name_in
from services.rpc.authorization import Principal, Role
from services.rpc.interceptor import RpcInterceptor

TENANT = Principal("tenants/a", Role.TENANT, "key 1")
NAME = "tenants/a/tasks/t"


@dataclass
class Log:
    """An audit log that blocks each entry until `may_write` is set."""

    entries: list[AuditEntry] = field(default_factory=list)
    called: asyncio.Event = field(default_factory=asyncio.Event)
    may_write: asyncio.Event = field(default_factory=asyncio.Event)
    written: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, entry: AuditEntry) -> None:
        self.called.set()
        await self.may_write.wait()
        self.entries.append(entry)
        self.written.set()


class Servicer(admission_pb2_grpc.AdmissionServiceServicer):
    def __init__(self) -> None:
        self.began = asyncio.Event()

    async def CancelTask(self, request: pb.CancelTaskRequest, context: object) -> pb.CancelTaskResponse:
        self.began.set()
        if request.name == "forever":
            await asyncio.Event().wait()
        if request.name == "wrong":
            raise InvalidInputError.of_field("name", "is wrong")
        return pb.CancelTaskResponse(task=task_pb2.Task(name=NAME))

    async def GetTask(self, request: pb.GetTaskRequest, context: object) -> pb.GetTaskResponse:
        return pb.GetTaskResponse()

    async def UploadDataset(self, requests: AsyncIterator[object], context: object) -> pb.UploadDatasetResponse:
        async for _ in requests:
            pass
        return pb.UploadDatasetResponse(dataset={"name": "tenants/a/datasets/d"})


@dataclass
class Served:
    stub: "admission_pb2_grpc.AdmissionServiceAsyncStub"
    log: Log
    servicer: Servicer


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async def authenticate(method: str, token: str) -> Principal:
        return Principal("tenants/a", Role.VIEWER, "key 2") if token == "viewer" else TENANT

    log, servicer = Log(), Servicer()
    server = grpc.aio.server(interceptors=[RpcInterceptor(authenticate, audit=log)])
    admission_pb2_grpc.add_AdmissionServiceServicer_to_server(servicer, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        yield Served(admission_pb2_grpc.AdmissionServiceStub(channel), log, servicer)
    await server.stop(None)


def metadata(token: str = "tenant") -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {token}")]


@pytest.mark.parametrize(
    ("name", "token", "code", "resource"),
    [("x", "tenant", "OK", NAME), ("wrong", "tenant", "INVALID_ARGUMENT", "wrong"),
     ("x", "viewer", "PERMISSION_DENIED", "x")],
)  # fmt: skip
async def test_the_entry_is_written_before_the_caller_gets_its_answer(
    served: Served, name: str, token: str, code: str, resource: str
) -> None:
    call = served.stub.CancelTask(pb.CancelTaskRequest(name=name), metadata=metadata(token), timeout=20)
    await served.log.called.wait()
    assert not call.done()
    served.log.may_write.set()
    assert (await call.code()).name == code
    (entry,) = served.log.entries
    assert (entry.method.rpartition("/")[2], entry.resource, entry.status_code) == ("CancelTask", resource, code)
    assert entry.principal.subject == ("key 2" if token == "viewer" else "key 1")


async def test_the_entry_is_written_although_the_caller_cancels(served: Served) -> None:
    call = served.stub.CancelTask(pb.CancelTaskRequest(name="forever"), metadata=metadata(), timeout=20)
    await served.servicer.began.wait()
    call.cancel()
    await served.log.called.wait()
    served.log.may_write.set()
    await asyncio.wait_for(served.log.written.wait(), 20)
    assert served.log.entries == [AuditEntry(TENANT, "/muxtune.v1.AdmissionService/CancelTask", "forever", "CANCELLED")]


async def test_reads_leave_no_entry_and_uploads_name_the_dataset(served: Served) -> None:
    served.log.may_write.set()
    await served.stub.GetTask(pb.GetTaskRequest(name=NAME), metadata=metadata(), timeout=20)
    upload = iter([pb.UploadDatasetRequest(chunk=artifact_pb2.FileChunk(data=b"secret row"))])
    await served.stub.UploadDataset(upload, metadata=metadata(), timeout=20)
    (entry,) = served.log.entries
    assert (entry.resource, entry.status_code) == ("tenants/a/datasets/d", "OK")


@given(st.text(max_size=300), st.text(max_size=20), st.binary(max_size=50))
def test_a_resource_is_a_name_and_no_other_text_of_the_request(name: str, label: str, data: bytes) -> None:
    spec = task_pb2.TaskSpec(labels={"secret": label}, backbone="secret")
    assert resource_name_in(pb.CreateTaskRequest(parent=name, spec=spec)) == name[:200]
    chunk = artifact_pb2.FileChunk(data=data)
    assert resource_name_in(pb.UploadDatasetRequest(chunk=chunk)) == ""
    assert resource_name_in(pb.GetTaskResponse(task={"name": "n"}), pb.GetTaskRequest(name=name)) == "n"
