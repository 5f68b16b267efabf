"""Nonsense by hypothesis at every RPC of scheduling: a fair refusal each time, and the cycle goes on."""

from collections.abc import AsyncIterator

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from hypothesis import given
from hypothesis import strategies as st

from muxtune.v1 import scheduling_pb2
from tests.hostile_messages import FAIR, FUZZING, answer_of, messages
from tests.services.scheduling.mesh_fakes import SECRET, World

METHODS = list(scheduling_pb2.DESCRIPTOR.services_by_name["SchedulingService"].methods)
NAMES = ["executors/x", "i1", "tiny", "tenants/a/tasks/t", "q_proj"]


@pytest.fixture
async def address(world: World) -> AsyncIterator[str]:
    await world.add_executor()
    async with world.scheduler():
        yield world.address


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
@FUZZING
@given(data=st.data())
async def test_nonsense_is_refused_fairly(address: str, method: MethodDescriptor, data: st.DataObject) -> None:
    sent = data.draw(messages(method.input_type, NAMES))
    async with grpc.aio.insecure_channel(address) as channel:
        code, text, answers = await answer_of(channel, method, sent, SECRET)
    assert code in FAIR, (code, text, sent)
    assert len(text.encode()) < 1000 and sum(answer.ByteSize() for answer in answers) < 5_000_000
