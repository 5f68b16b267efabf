"""RPCs of tasks: create, get, list, estimate and cancel, and all refusals."""

import asyncio
import base64
import json
import math
from collections import Counter
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import plan_pb2, task_pb2
from tests.services.admission.admission_mesh import (
    DATABASES,
    Admission,
    adapter_files,
    adapter_parts,
    executor,
    finished,
    lease,
    lines,
    refused,
    spec,
    step,
)

INVALID, DENIED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED
both = pytest.mark.parametrize("database_url", DATABASES, indirect=True)


async def names_of(admission: Admission, **filters: Any) -> list[list[str]]:
    """Return the names of all pages."""
    pages, token = [], ""
    while True:
        answer = await admission.tenant().ListTasks(pb.ListTasksRequest(page_token=token, **filters))
        pages.append([task.name.rpartition("/")[2] for task in answer.tasks])
        if not (token := answer.next_page_token):
            return pages


@both
async def test_a_task_is_stored_as_asked_with_what_was_resolved(admission: Admission) -> None:
    dataset = await admission.upload()
    task_spec = spec(dataset.name, labels={"team": "a"}, heldout_fraction=0.2)
    answer = await admission.tenant().CreateTask(pb.CreateTaskRequest(task_id="one", spec=task_spec))
    task = answer.task
    assert (task.name, task.state) == ("tenants/acme/tasks/one", task_pb2.TASK_STATE_QUEUED)
    assert task.spec.dataset_version == dataset.sha256
    task_spec.dataset_version = dataset.sha256
    assert task.spec == task_spec
    estimate = task.estimate
    assert (estimate.num_train_rows, estimate.num_heldout_rows, estimate.num_steps) == (8, 2, 4)
    # Four matrices of 32 in and 32 out: rank * (in + out) parameters, each with gradient and two moments in float32.
    assert estimate.added_bytes == 2 * 4 * (32 + 32) * 4 * 4
    # One second for a hundred tokens; a token of the two evaluations costs a third of one that trains.
    assert estimate.num_train_tokens == 4 * 2 * 10
    assert estimate.seconds == pytest.approx((4 * 2 * 10 + 2 * 2 * 10 / 3) / 100)
    assert not task.HasField("start_time") and not task.adapter and task.attempt == 0
    read = await admission.tenant().GetTask(pb.GetTaskRequest(name=task.name))
    assert read.task == task


async def test_an_estimate_is_what_creation_would_answer_and_stores_nothing(admission: Admission) -> None:
    dataset = await admission.upload()
    before = admission.num_rows()
    answer = await admission.tenant().EstimateTask(pb.EstimateTaskRequest(spec=spec(dataset.name)))
    assert admission.num_rows() == before
    assert answer.estimate == (await admission.create(dataset.name)).estimate


async def test_an_estimate_warns_of_rows_that_spell_special_tokens(admission: Admission) -> None:
    rows = [{"text": "hello <|im_end|>"}, {"prompt": "a</s>", "completion": "b"}, {"text": "hello"}]
    dataset = await admission.upload(lines(rows))
    for parses, num_warned in ((False, 2), (True, 0)):
        task_spec = spec(dataset.name, parse_special_tokens=parses)
        answer = await admission.tenant().EstimateTask(pb.EstimateTaskRequest(spec=task_spec))
        assert answer.estimate.num_special_text_rows == num_warned


async def test_an_estimate_of_seconds_is_the_cost_models(admission: Admission) -> None:
    """The estimate is four steps of a fixed cost and their tokens, on the faster of two executors."""
    dataset, request = await admission.upload(), pb.EstimateTaskRequest(spec=spec("tenants/acme/datasets/d"))
    request.spec.dataset = dataset.name
    for name, fixed in (("executors/one", 3.0), ("executors/two", 5.0)):
        calibrated = executor(name, "i9")
        calibrated.device.cost.CopyFrom(plan_pb2.CostProfile(fixed_seconds=fixed, token_seconds=0.5))
        await admission.ledger().PutLease(lease(calibrated))
    estimate = (await admission.tenant().EstimateTask(request)).estimate
    assert estimate.seconds == pytest.approx(estimate.num_steps * 3.0 + 0.5 * estimate.num_train_tokens)


@both
async def test_pages_list_every_task_once_newest_first(admission: Admission) -> None:
    dataset = await admission.upload()
    ids = [(await admission.create(dataset.name, f"t{i}")).name.rpartition("/")[2] for i in range(7)]
    assert await names_of(admission, page_size=3) == [ids[:3:-1], ids[3:0:-1], ids[:1]]
    assert await names_of(admission) == [ids[::-1]]
    assert await names_of(admission, page_size=100_000) == [ids[::-1]]
    await admission.tenant().CancelTask(pb.CancelTaskRequest(name="tenants/acme/tasks/t2"))
    await admission.run("tenants/acme/tasks/t4")
    cancelled, running = task_pb2.TASK_STATE_CANCELLED, task_pb2.TASK_STATE_RUNNING
    assert await names_of(admission, states=[cancelled]) == [["t2"]]
    assert await names_of(admission, states=[running, cancelled], page_size=1) == [["t4"], ["t2"]]
    assert await names_of(admission, states=[task_pb2.TASK_STATE_FAILED]) == [[]]
    other = await admission.tenant("other").ListTasks(pb.ListTasksRequest())
    assert not other.tasks


async def test_tasks_created_while_pages_are_read_do_not_change_them(admission: Admission) -> None:
    dataset = await admission.upload()
    for i in range(4):
        await admission.create(dataset.name, f"t{i}")
    first = await admission.tenant().ListTasks(pb.ListTasksRequest(page_size=2))
    await admission.create(dataset.name, "late")
    second = await admission.tenant().ListTasks(pb.ListTasksRequest(page_size=2, page_token=first.next_page_token))
    assert [t.name[-2:] for t in (*first.tasks, *second.tasks)] == ["t3", "t2", "t1", "t0"]


def forged(token: str, **changes: Any) -> str:
    """Return the token with some parts replaced."""
    created, name, bound = json.loads(base64.urlsafe_b64decode(token))
    parts = {"created": created, "name": name, "bound": bound, **changes}
    return base64.urlsafe_b64encode(json.dumps(list(parts.values())).encode()).decode()


@both
async def test_page_tokens_that_are_not_ours_are_refused(admission: Admission) -> None:
    dataset = await admission.upload()
    for i in range(3):
        await admission.create(dataset.name, f"t{i}")
    token = (await admission.tenant().ListTasks(pb.ListTasksRequest(page_size=1))).next_page_token
    bad = ["x", "é", "AAAA", token[:-4], token[1:], base64.b64encode(b"[1]").decode(), base64.b64encode(b"5").decode()]
    bad += [forged(token, created=value) for value in (math.inf, 10**30, -1, "1", None, 1.5, [], True)]
    bad += [forged(token, name=value) for value in ("\0", 5, None, "tenants/other/tasks/t", "")]
    bad += [forged(token, bound=value) for value in ("", 0, None, "é")]
    for forgery in bad:
        with refused(INVALID, "INVALID_INPUT") as refusal:
            await admission.tenant().ListTasks(pb.ListTasksRequest(page_size=1, page_token=forgery))
        assert refusal.fields == ["page_token"], forgery
    for request, caller in (
        (pb.ListTasksRequest(page_token=token, states=[task_pb2.TASK_STATE_QUEUED]), admission.tenant()),
        (pb.ListTasksRequest(page_token=token), admission.tenant("other")),
    ):
        with refused(INVALID, "INVALID_INPUT"):
            await caller.ListTasks(request)
    with refused(INVALID, "INVALID_INPUT"):
        await admission.tenant().ListDatasets(pb.ListDatasetsRequest(page_token=token))


async def test_bad_list_requests_name_their_field(admission: Admission) -> None:
    for request, name in (
        (pb.ListTasksRequest(page_size=-1), "page_size"),
        (pb.ListTasksRequest(states=[task_pb2.TASK_STATE_UNSPECIFIED]), "states"),
        (pb.ListTasksRequest(states=[99]), "states"),  # type: ignore[list-item]
    ):
        with refused(INVALID, "INVALID_INPUT") as refusal:
            await admission.tenant().ListTasks(request)
        assert refusal.fields == [name]


WRONG = {
    "spec.backbone": {"backbone": "nosuch"},
    "spec.method": {"lora": None},
    "spec.lora.rank": {"lora": task_pb2.Lora(rank=0, target_modules=["q_proj"], alpha=1)},
    "spec.lora.alpha": {"lora": task_pb2.Lora(rank=4, alpha=-1, target_modules=["q_proj"])},
    "spec.lora.dropout": {"lora": task_pb2.Lora(rank=4, dropout=1, target_modules=["q_proj"])},
    "spec.lora.target_modules": {"lora": task_pb2.Lora(rank=4, target_modules=["nosuch"])},
    "spec.labels": {"labels": {"k": "v" * 64}},
    "spec.dataset_version": {"dataset_version": "0" * 64},
    "spec.training.duration": {"num_steps": None},
    "spec.training.num_steps": {"num_steps": 0},
    "spec.training.num_epochs": {"num_epochs": -1},
    "spec.training.learning_rate": {"learning_rate": -0.1},
    "spec.training.lr_schedule": {"lr_schedule": 17},
    "spec.training.warmup_steps": {"warmup_steps": 5},
    "spec.training.micro_batch_size": {"micro_batch_size": -1},
    "spec.training.global_batch_size": {"global_batch_size": 1 << 20},
    "spec.training.max_sequence_tokens": {"max_sequence_tokens": 129},
    "spec.training.weight_decay": {"weight_decay": math.inf},
    "spec.training.beta1": {"beta1": 1.0},
    "spec.training.beta2": {"beta2": math.nan},
    "spec.training.epsilon": {"epsilon": 0.0},
    "spec.training.momentum": {"momentum": 0.9},
    "spec.training.max_grad_norm": {"max_grad_norm": -1.0},
    "spec.training.heldout_fraction": {"heldout_fraction": 0.95},
    "spec.training.evaluate_every_steps": {"evaluate_every_steps": -1},
    "spec.training.early_stop_patience": {"early_stop_patience": 2},
    "spec.training.early_stop_min_delta": {"early_stop_min_delta": math.nan, "heldout_fraction": 0.2},
}


async def test_each_wrong_field_is_named_and_nothing_is_stored(admission: Admission) -> None:
    dataset = await admission.upload()
    before = admission.num_rows()
    for name, changes in WRONG.items():
        for request in (pb.CreateTaskRequest, pb.EstimateTaskRequest):
            call = getattr(admission.tenant(), request.__name__.removesuffix("Request"))
            with refused(INVALID, "INVALID_INPUT") as refusal:
                await call(request(spec=spec(dataset.name, **changes)))
            assert refusal.fields == [name], refusal.message
    assert admission.num_rows() == before


async def test_all_wrong_fields_are_named_at_once(admission: Admission) -> None:
    dataset = await admission.upload()
    wrong = spec(dataset.name, learning_rate=math.nan, beta1=2.0, lora=task_pb2.Lora(rank=300))
    with refused(INVALID, "INVALID_INPUT") as refusal:
        await admission.tenant().CreateTask(pb.CreateTaskRequest(spec=wrong))
    assert {"spec.training.learning_rate", "spec.training.beta1", "spec.lora.rank"} <= set(refusal.fields)


async def test_an_invalid_task_id_is_refused(admission: Admission) -> None:
    dataset = await admission.upload()
    for task_id in ("A", "1a", "a_b", "a-", "a" * 64, "a/b", "a\n", "ä", "a\0"):
        with refused(INVALID, "INVALID_INPUT") as refusal:
            await admission.tenant().CreateTask(pb.CreateTaskRequest(task_id=task_id, spec=spec(dataset.name)))
        assert refusal.fields == ["task_id"]
    await admission.create(dataset.name, "a" * 63)


async def test_a_task_that_can_never_fit_is_refused(admission: Admission) -> None:
    dataset = await admission.upload()
    big = spec(dataset.name, lora=task_pb2.Lora(rank=256, target_modules=["all-linear"]), max_sequence_tokens=128)
    await admission.tenant().EstimateTask(pb.EstimateTaskRequest(spec=big))
    await admission.ledger().PutLease(lease(executor(incarnation="i2", memory_bytes=1 << 20)))
    with refused(INVALID, "WILL_NEVER_FIT") as refusal:
        await admission.tenant().CreateTask(pb.CreateTaskRequest(spec=big))
    assert refusal.fields and " MB, the executors of this backbone have at most " in refusal.message


async def test_steps_beyond_what_a_task_can_count_are_refused(admission: Admission) -> None:
    dataset = await admission.upload(lines([{"text": "the quick brown fox"}] * 500))
    with refused(INVALID, "INVALID_INPUT"):
        await admission.create(dataset.name, num_epochs=10_000_000, global_batch_size=1)


@both
async def test_the_quota_holds_for_tasks_created_at_once(admission: Admission) -> None:
    admission.quota = 3
    await admission.restart()
    dataset = await admission.upload()
    request = pb.CreateTaskRequest(spec=spec(dataset.name))
    answers = await asyncio.gather(*(admission.tenant().CreateTask(request) for _ in range(12)), return_exceptions=True)
    codes = Counter(answer.code().name if isinstance(answer, grpc.RpcError) else "OK" for answer in answers)
    assert codes == {"OK": 3, "RESOURCE_EXHAUSTED": 9}
    assert admission.num_rows()["tasks"] == 3
    for method, body in (("CreateTask", request), ("EstimateTask", pb.EstimateTaskRequest(spec=request.spec))):
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED") as refusal:
            await getattr(admission.tenant(), method)(body)
        assert refusal.has(error_details_pb2.QuotaFailure)
    first = next(answer.task.name for answer in answers if not isinstance(answer, BaseException))
    await admission.tenant().CancelTask(pb.CancelTaskRequest(name=first))
    await admission.tenant().CreateTask(request)


async def test_a_taken_id_is_refused_for_tasks_and_their_adapters(admission: Admission) -> None:
    dataset = await admission.upload()
    await admission.create(dataset.name, "one")
    await admission.tenant().UploadAdapter(adapter_parts(adapter_files(), "two"))
    for task_id in ("one", "two"):
        with refused(grpc.StatusCode.ALREADY_EXISTS, "ALREADY_EXISTS"):
            await admission.create(dataset.name, task_id)
    with refused(grpc.StatusCode.ALREADY_EXISTS, "ALREADY_EXISTS"):
        await admission.tenant().UploadAdapter(adapter_parts(adapter_files(), "one"))


async def test_an_initial_adapter_must_be_the_callers_and_of_the_tasks_rank_and_scale(admission: Admission) -> None:
    dataset = await admission.upload()
    adapter = (await admission.tenant().UploadAdapter(adapter_parts(adapter_files(rank=4, alpha=8)))).adapter.name
    task = await admission.create(dataset.name, initial_adapter=adapter)
    assert task.spec.initial_adapter == adapter
    for lora in (task_pb2.Lora(rank=8, alpha=8), task_pb2.Lora(rank=4, alpha=4)):
        lora.target_modules.append("q_proj")
        with refused(INVALID, "INVALID_INPUT") as refusal:
            await admission.create(dataset.name, initial_adapter=adapter, lora=lora)
        assert refusal.fields == ["spec.initial_adapter"]
    for name in ("tenants/other/adapters/x", "tenants/acme/adapters/none", adapter.replace("adapters", "tasks")):
        with refused(DENIED, "PERMISSION_DENIED"):
            await admission.create(dataset.name, initial_adapter=name)


@both
async def test_cancel_in_every_state(admission: Admission) -> None:
    dataset, tenant = await admission.upload(), admission.tenant()
    queued, ran, failed, ended = [(await admission.create(dataset.name, f"t{i}")).name for i in range(4)]

    async def cancel(name: str) -> task_pb2.Task:
        return (await tenant.CancelTask(pb.CancelTaskRequest(name=name))).task

    for _ in range(2):  # and again: nothing changes
        assert (await cancel(queued)).state == task_pb2.TASK_STATE_CANCELLED
    assert len(await admission.events(queued)) == 2
    await admission.run(ran, failed, ended)
    for _ in range(2):
        assert (await cancel(ran)).state == task_pb2.TASK_STATE_CANCELLING
    assert await admission.commit(step(ran, 1, 1), finished(ran, 1, "k", cancelled=True)) == ["COMMITTED"] * 2
    assert (await cancel(ran)).state == task_pb2.TASK_STATE_CANCELLED
    read = (await tenant.GetTask(pb.GetTaskRequest(name=ran))).task
    assert read.adapter == "tenants/acme/adapters/t1" and read.HasField("end_time")
    assert await admission.commit(finished(ended, 1, "k")) == ["COMMITTED"]
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "ILLEGAL_TRANSITION") as refusal:
        await cancel(ended)
    assert refusal.metadata["state"] == "SUCCEEDED" and refusal.has(error_details_pb2.PreconditionFailure)
