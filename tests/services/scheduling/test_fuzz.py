"""Fuzzes every RPC of scheduling: each call gets a documented status, and the cycle goes on."""

from collections.abc import AsyncIterator

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from hypothesis import given
from hypothesis import strategies as st

from muxtune.v1 import plan_pb2, scheduling_pb2
from tests.hostile_messages import FAIR, FUZZING, PATIENT, answer_of, messages
from tests.services.scheduling.mesh_fakes import SECRET, SchedulingMesh

pytestmark = PATIENT

METHODS = list(scheduling_pb2.DESCRIPTOR.services_by_name["SchedulingService"].methods)
NAMES = ["executors/x", "i1", "tiny", "tenants/a/tasks/t", "q_proj"]


@pytest.fixture
async def address(mesh: SchedulingMesh) -> AsyncIterator[str]:
    await mesh.add_executor()
    async with mesh.scheduler():
        yield mesh.address


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
@FUZZING
@given(data=st.data())
async def test_nonsense_is_refused_fairly(address: str, method: MethodDescriptor, data: st.DataObject) -> None:
    sent = data.draw(messages(method.input_type, NAMES))
    async with grpc.aio.insecure_channel(address) as channel:
        code, text, answers = await answer_of(channel, method, sent, SECRET)
    assert code in FAIR, (code, text, sent)
    assert len(text.encode()) < 1000 and sum(answer.ByteSize() for answer in answers) < 5_000_000


async def test_an_address_is_a_host_and_a_port(address: str) -> None:
    """Addresses that gRPC would read as a socket, a resolver or a file are refused."""
    register = next(m for m in METHODS if m.name == "RegisterExecutor")
    fine = plan_pb2.Executor(name="executors/y", incarnation="i", backbone=plan_pb2.Backbone(name="tiny"))
    cases = {text: grpc.StatusCode.INVALID_ARGUMENT for text in (
        "unix:/run/docker.sock", "unix-abstract:x", "dns://evil/host:1", "xds:///x", "http://169.254.169.254:80/",
        "file:///etc/passwd", "host", ":1", "host:", "host:port", "host:1,other:2", "host:1/x", "a b:1", "host:1\n",
    )}  # fmt: skip
    cases |= dict.fromkeys(("executor-0.execution:7404", "127.0.0.1:1", "[::1]:7404"), grpc.StatusCode.OK)
    async with grpc.aio.insecure_channel(address) as channel:
        for text, expected in cases.items():
            fine.address = text
            sent = scheduling_pb2.RegisterExecutorRequest(executor=fine)
            code, said, _ = await answer_of(channel, register, sent, SECRET)
            assert code is expected, (text, said)
