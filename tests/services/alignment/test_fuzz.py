"""Fuzzes every RPC of alignment: each call gets a documented status."""

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from hypothesis import given
from hypothesis import strategies as st

from muxtune.v1 import alignment_pb2
from tests.hostile_messages import FAIR, FUZZING, PATIENT, answer_of, messages, streams
from tests.services.alignment.conftest import SECRET, TASK, TEN_ROWS, TENANT, Alignment

pytestmark = PATIENT

METHODS = list(alignment_pb2.DESCRIPTOR.services_by_name["AlignmentService"].methods)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
@FUZZING
@given(data=st.data())
async def test_nonsense_is_refused_fairly(alignment: Alignment, method: MethodDescriptor, data: st.DataObject) -> None:
    sha256 = (await alignment.store(TEN_ROWS)).sha256
    names = [TENANT, TASK, sha256, "tiny", "tenants/rival"]
    sent = data.draw((streams if method.client_streaming else messages)(method.input_type, names))
    if data.draw(st.booleans()) and method.name == "StreamMicrobatches":
        sent.backbone, sent.token_budget, sent.chunk_tokens = "tiny", 256, 16  # type: ignore[union-attr]
        for member in sent.members:  # type: ignore[union-attr]
            member.task, member.dataset_version = TASK, sha256
    async with grpc.aio.insecure_channel(alignment.address) as channel:
        code, text, answers = await answer_of(channel, method, sent, SECRET)
    assert code in FAIR, (code, text, sent)
    assert len(text.encode()) < 1000 and sum(answer.ByteSize() for answer in answers) < 5_000_000
