"""Every text, list and map of every client's request has a largest size, and no request or answer is larger than a
message may be."""

import logging

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor

from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import artifact_pb2, dataset_pb2, key_pb2, operator_pb2
from services.rpc import message_checks
from tests.hostile_messages import answer_of
from tests.oversized_messages import oversized_requests
from tests.services.admission.admission_mesh import SECRET, Admission, refused

METHODS = [
    method
    for module in (pb, key_pb2, operator_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
INVALID = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT")
FIELDS = {
    "CreateTaskRequest": {"parent", "task_id", "spec.lora.target_modules", "spec.labels", "request_id"},
    "UploadDatasetRequest": {"header.id", "file.sha256", "chunk.data"},
    "SetQuotaRequest": {"tenant", "update_mask.paths"},
}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
async def test_every_field_of_a_clients_request_has_a_largest_size(
    admission: Admission, method: MethodDescriptor
) -> None:
    token = admission.key_store.create("tenants/acme", None)[1]
    token = token if method.containing_service.name == "AdmissionService" else SECRET
    rows, paths = admission.num_rows(), set()
    for path, request in oversized_requests(method.input_type):
        paths.add(path)
        code, text, _ = await answer_of(admission.channel, method, request, token)
        assert code is grpc.StatusCode.INVALID_ARGUMENT, (path, code, text)
        named = [path, "spec: must have at most"] if path.startswith("spec.") else [path]
        assert any(name in text for name in named) and "shorten it" in text, (path, text)
    assert FIELDS.get(method.input_type.name, set()) <= paths
    assert admission.num_rows() == rows


async def test_a_large_request_is_not_even_parsed(admission: Admission) -> None:
    """8 million empty names are 16 MB on the wire and ten times that in memory."""
    method = next(m for m in METHODS if m.name == "EstimateTask")
    token = admission.key_store.create("tenants/acme", None)[1]
    raw = pb.EstimateTaskRequest(parent="x" * (2 << 20)).SerializeToString()
    code, text, _ = await answer_of(admission.channel, method, raw, token)
    assert code is grpc.StatusCode.INVALID_ARGUMENT and "bytes, at most 1048576 are allowed" in text
    upload = next(m for m in METHODS if m.name == "UploadDataset")
    chunk = artifact_pb2.FileChunk(data=b"x" * (7 << 19))
    code, text, _ = await answer_of(admission.channel, upload, pb.UploadDatasetRequest(chunk=chunk), token)
    assert code is grpc.StatusCode.INVALID_ARGUMENT and "send less in one message" in text


async def test_an_answer_that_is_too_large_is_a_clear_refusal_without_a_stack(
    admission: Admission, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await admission.upload()
    monkeypatch.setattr(message_checks, "MAX_MESSAGE_BYTES", 100)
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED") as refusal, caplog.at_level(logging.WARNING):
        await admission.tenant().ListDatasets(pb.ListDatasetsRequest())
    assert "at most 100" in refusal.message and "Ask for less" in refusal.message
    assert [record.levelname for record in caplog.records] == ["WARNING"] and not caplog.records[0].exc_info


async def test_an_option_that_a_preflight_does_not_know_is_refused(admission: Admission) -> None:
    dataset = await admission.upload()
    options = dataset_pb2.PreflightOptions(backbone="tiny")
    options.training.MergeFromString(bytes.fromhex("fa3f03616263"))  # field 1023
    with refused(*INVALID) as refusal:
        await admission.tenant().PreflightDataset(pb.PreflightDatasetRequest(name=dataset.name, options=options))
    assert refusal.fields == ["options.training.1023"]
