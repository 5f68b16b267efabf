"""Hypothesis sends nonsense to every RPC of admission: each call is refused, none ends as INTERNAL or hangs."""

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from hypothesis import given
from hypothesis import strategies as st

from muxtune.v1 import admission_pb2, key_pb2, ledger_pb2, operator_pb2
from muxtune.v1 import admission_pb2 as pb
from tests.hostile_messages import FAIR, FUZZING, PATIENT, answer_of, messages, streams
from tests.services.admission.admission_mesh import SECRET, TEN_ROWS, Admission, adapter_files, adapter_parts, spec

pytestmark = PATIENT

SERVICES = [
    service
    for module in (admission_pb2, key_pb2, ledger_pb2, operator_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
]
METHODS = [method for service in SERVICES for method in service.methods]
WAITING = {"WatchChanges", "WatchTask"}  # end when their caller leaves
NAMES = ["tenants/acme", "tenants/acme/tasks/t", "tenants/acme/datasets/d", "tenants/acme/adapters/a", "executors/one",
         "tiny", "t", "d", "q_proj", "i1"]  # fmt: skip


async def furnish(admission: Admission) -> str:
    """Create resources that requests may hit; return the tenant's key."""
    dataset = await admission.upload(TEN_ROWS, "d")
    await admission.create(dataset.name, "t")
    await admission.tenant().UploadAdapter(adapter_parts(adapter_files(), "a"))
    return admission.key_store.create("tenants/acme", None)[1]


@pytest.mark.parametrize("method", [m for m in METHODS if m.name not in WAITING], ids=lambda method: method.full_name)
@FUZZING
@given(data=st.data())
async def test_nonsense_is_refused_fairly(admission: Admission, method: MethodDescriptor, data: st.DataObject) -> None:
    token = await prepared(admission, method)
    kind = messages if not method.client_streaming else streams
    sent = data.draw(kind(method.input_type, NAMES))
    code, text, answers = await answer_of(admission.channel, method, sent, token)
    assert code in FAIR, (code, text, sent)
    assert len(text.encode()) < 1000 and sum(answer.ByteSize() for answer in answers) < 5_000_000


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
@FUZZING
@given(raw=st.binary(max_size=300))
async def test_bytes_that_are_no_message_are_refused_fairly(
    admission: Admission, method: MethodDescriptor, raw: bytes
) -> None:
    token = await prepared(admission, method)
    if method.name in WAITING:
        raw = b"\xff" + raw  # surely no message: else it would wait
    code, text, _ = await answer_of(admission.channel, method, raw, token)
    assert code in FAIR, (code, text, raw)


async def prepared(admission: Admission, method: MethodDescriptor) -> str:
    if not hasattr(admission, "fuzzing_key"):
        admission.fuzzing_key = await furnish(admission)  # type: ignore[attr-defined]
    is_client = method.containing_service.name == "AdmissionService"
    return admission.fuzzing_key if is_client else SECRET  # type: ignore[attr-defined,no-any-return]


@FUZZING
@given(data=st.data())
async def test_a_valid_request_with_one_invalid_field(admission: Admission, data: st.DataObject) -> None:
    """Nonsense rarely passes the first check; a valid task with one odd field gets further."""
    await prepared(admission, METHODS[0])
    good = spec("tenants/acme/datasets/d")
    odd = data.draw(messages(good.DESCRIPTOR, NAMES))
    for field in data.draw(st.lists(st.sampled_from([f for f, _ in odd.ListFields()] or [None]), max_size=2)):
        if field is not None:
            part = type(good)()
            part.CopyFrom(odd)
            for other, _ in odd.ListFields():
                if other is not field:
                    part.ClearField(other.name)
            good.MergeFrom(part)
    method = next(m for m in METHODS if m.name == "EstimateTask")
    code, text, _ = await answer_of(
        admission.channel,
        method,
        pb.EstimateTaskRequest(spec=good),
        admission.fuzzing_key,  # type: ignore[attr-defined]
    )
    assert code in FAIR, (code, text, good)


async def test_a_message_over_the_limit_is_refused(admission: Admission) -> None:
    token = await prepared(admission, METHODS[0])
    method = next(m for m in METHODS if m.name == "GetTask")
    code, text, _ = await answer_of(admission.channel, method, pb.GetTaskRequest(name="x" * (20 << 20)), token)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED and len(text) < 1000
