"""Specs have a largest size and no unknown fields, lists are normal, and a tenant's specs have a largest sum."""

import dataclasses

import grpc
import pytest
import sqlalchemy as sa

from engine.errors import InvalidInputError
from engine.methods import Lora
from engine.methods.base import Site
from engine.planning.types import BackboneView
from engine.task import TaskSpec, Training
from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import budget_pb2, operator_pb2, task_pb2
from services.admission.policy.validation import validate
from services.admission.store import idempotency, tables
from services.conversion.spec_limits import MAX_SPEC_BYTES, check_spec_limits, normalize_spec
from tests.services.admission.admission_mesh import DATABASES, TEN_ROWS, Admission, dataset_parts, refused, spec

INVALID = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT")
UNKNOWN = bytes.fromhex("fa3f03616263")  # field 1023, "abc"


def widest_spec(dataset: str) -> task_pb2.TaskSpec:
    """Return a spec of nearly the largest size that is accepted. Half of it are names that its normal form has once."""
    wide = spec(dataset)
    for index in range(64):
        wide.labels[f"label-{index:02}".ljust(63, "x")] = "y" * 63
    while wide.ByteSize() < MAX_SPEC_BYTES - 16:
        wide.lora.target_modules.append("q_proj")
    return wide


async def test_a_spec_that_is_too_large_is_refused_and_its_largest_field_named(admission: Admission) -> None:
    dataset = (await admission.upload()).name
    large = spec(dataset)
    large.lora.target_modules.extend(["q_proj", "down_proj"] * 13_500)
    for request in (pb.CreateTaskRequest(spec=large), pb.EstimateTaskRequest(spec=large)):
        method = type(request).__name__.removesuffix("Request")
        with refused(*INVALID) as refusal:
            await getattr(admission.tenant(), method)(request)
        assert refusal.fields == ["spec"]
        assert f"at most {MAX_SPEC_BYTES} bytes" in refusal.message and "spec.lora.target_modules" in refusal.message
    assert admission.num_rows()["tasks"] == 0
    await admission.tenant().CreateTask(pb.CreateTaskRequest(spec=widest_spec(dataset)))


@pytest.mark.parametrize("path", ["", "training", "lora", "deadline", "budget"])
async def test_an_unknown_field_of_a_spec_is_refused_by_its_path(admission: Admission, path: str) -> None:
    """An option of a newer client must not be ignored: another model would be trained than the tenant asked for."""
    odd = spec((await admission.upload()).name, budget=budget_pb2.Budget(max_tokens=5))
    odd.deadline.GetCurrentTime()
    part = getattr(odd, path) if path else odd
    part.MergeFromString(UNKNOWN)
    with refused(*INVALID) as refusal:
        await admission.tenant().CreateTask(pb.CreateTaskRequest(spec=odd))
    assert refusal.fields == [f"spec.{path}.1023" if path else "spec.1023"]
    assert "1023" in refusal.message and "remove it" in refusal.message
    assert admission.num_rows()["tasks"] == 0


def test_an_unknown_field_inside_an_unknown_part_of_a_map_is_found() -> None:
    odd = spec("tenants/acme/datasets/d")
    odd.MergeFromString(b"\x3a\x09\x0a\x01a\x12\x01b\x1a\x01c")  # labels: an entry with a third field
    with pytest.raises(Exception, match=r"spec\.7"):
        check_spec_limits(odd)


async def test_lists_are_sorted_and_name_nothing_twice(admission: Admission) -> None:
    dataset = (await admission.upload()).name
    sent = spec(dataset)
    sent.lora.target_modules[:] = ["v_proj", "q_proj", "v_proj"]
    request = pb.CreateTaskRequest(spec=sent, request_id="once")
    created = (await admission.tenant().CreateTask(request)).task
    assert created.spec.lora.target_modules == ["q_proj", "v_proj"]
    assert (await admission.tenant().GetTask(pb.GetTaskRequest(name=created.name))).task == created
    assert (await admission.tenant().CreateTask(request)).task == created  # the same body: the same answer
    request.spec.lora.target_modules[:] = ["q_proj", "v_proj"]
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_ID_REUSED"):
        await admission.tenant().CreateTask(request)


def test_every_list_of_a_spec_becomes_normal() -> None:
    """A new list in a method is either a set, as all are, or needs a thought here."""
    lists = {"lora": ["target_modules"], "vera": ["target_modules"], "ia3": ["target_modules", "feedforward_modules"],
             "bottleneck": ["target_modules"], "selective": ["parameters"], "miss": ["target_modules"]}  # fmt: skip
    methods = task_pb2.TaskSpec.DESCRIPTOR.oneofs_by_name["method"].fields
    repeated = {
        method.name: [f.name for f in method.message_type.fields if f.is_repeated and f.message_type is None]
        for method in methods
    }
    assert {name: fields for name, fields in repeated.items() if fields} == lists
    for name, fields in lists.items():
        for field in fields:
            given = task_pb2.TaskSpec()
            getattr(getattr(given, name), field)[:] = ["b", "a", "b"]
            assert list(getattr(getattr(normalize_spec(given), name), field)) == ["a", "b"]
            assert list(getattr(getattr(given, name), field)) == ["b", "a", "b"]


@pytest.mark.parametrize("database_url", DATABASES, indirect=True)
async def test_the_specs_of_a_tenants_unfinished_tasks_have_a_largest_sum(admission: Admission) -> None:
    wide = widest_spec((await admission.upload()).name)
    limit = 2 * normalize_spec(wide).ByteSize() + 200  # the version of the dataset is added
    quota = operator_pb2.Quota(max_unfinished_spec_bytes=limit)
    for tenant in ("acme", "good"):
        await admission.operator().SetQuota(operator_pb2.SetQuotaRequest(tenant=f"tenants/{tenant}", quota=quota))
    first = (await admission.tenant().CreateTask(pb.CreateTaskRequest(spec=wide))).task
    await admission.tenant().CreateTask(pb.CreateTaskRequest(spec=wide))
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED") as refusal:
        await admission.tenant().CreateTask(pb.CreateTaskRequest(spec=wide))
    assert f"at most {limit}" in refusal.message and "cancel one" in refusal.message
    good = admission.tenant("good")
    dataset = (await good.UploadDataset(dataset_parts(TEN_ROWS))).dataset.name
    await good.CreateTask(pb.CreateTaskRequest(spec=spec(dataset)))
    await admission.tenant().CancelTask(pb.CancelTaskRequest(name=first.name))
    await admission.tenant().CreateTask(pb.CreateTaskRequest(spec=wide))


async def test_a_request_from_before_the_limit_is_still_answered_as_before(admission: Admission) -> None:
    """The database may hold larger specs, with unknown fields: a client that repeats its call must get its task."""
    large = spec((await admission.upload()).name)
    created = (await admission.tenant().CreateTask(pb.CreateTaskRequest(spec=large, request_id="old"))).task
    large.lora.target_modules.extend(["q_proj"] * 25_000)
    large.MergeFromString(UNKNOWN)
    raw = large.SerializeToString(deterministic=True)
    with admission.database.write() as connection:
        connection.execute(sa.update(tables.tasks).values(spec=raw))
        connection.execute(sa.update(tables.requests).values(body_sha256=idempotency.hash_parts(b"", raw)))
    again = (await admission.tenant().CreateTask(pb.CreateTaskRequest(spec=large, request_id="old"))).task
    assert again.name == created.name and again.spec.ByteSize() > 10 * MAX_SPEC_BYTES


def test_a_slice_of_more_tokens_than_a_message_carries_is_refused() -> None:
    backbone = BackboneView("long", 1, 1, 8, 8, 1 << 20, 1, "float32", (Site("q_proj", 8, 8),))
    training = Training(1e-3, num_steps=1, micro_batch_size=4, max_sequence_tokens=1 << 19)
    task = TaskSpec("long", Lora(2, 2.0, ("q_proj",)), "tenants/acme/datasets/d", training)
    with pytest.raises(InvalidInputError, match=r"spec.training.micro_batch_size: .4. .*reduce it"):
        validate(task, [backbone])
    validate(dataclasses.replace(task, training=dataclasses.replace(training, micro_batch_size=2)), [backbone])
