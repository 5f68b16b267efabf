"""Quotas, budgets, usage and the audit log."""

import math
import random
from collections.abc import Callable

import grpc
import pytest
import sqlalchemy as sa
from google.rpc import error_details_pb2

from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import budget_pb2, key_pb2, ledger_pb2, operator_pb2, plan_pb2, task_pb2
from services.admission.policy import quotas
from services.admission.store.audit_log import create_audit_writer
from services.admission.store.change_notifier import ANY_CHANGE
from services.rpc.audit import AuditEntry
from services.rpc.authorization import Principal, Role
from tests.services.admission.admission_mesh import (
    DATABASES,
    TEN_ROWS,
    Admission,
    adapter_files,
    adapter_parts,
    dataset_parts,
    refused,
    spec,
    step,
)
from tests.services.admission.work_reports import evaluation, in_progress

pytestmark = pytest.mark.parametrize("database_url", DATABASES, indirect=True)
EXHAUSTED = (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
INVALID = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT")
DENIED = (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")


def two_steps(task: str) -> list[plan_pb2.TaskResult]:
    return [step(task, 1, 1), step(task, 1, 2)]


def an_evaluation(task: str) -> list[plan_pb2.TaskResult]:
    return [evaluation(task, 1, 0, (20, 0, 1.0))]


def an_evaluation_in_progress(task: str) -> list[plan_pb2.TaskResult]:
    return [
        in_progress(task, 1, 0, (15, 0, 0.75), is_evaluation=True),
        in_progress(task, 1, 0, (20, 0, 1.0), is_evaluation=True),
    ]


def a_step_in_progress(task: str) -> list[plan_pb2.TaskResult]:
    return [step(task, 1, 1), in_progress(task, 1, 1, (10, 0, 0.5))]


WORK = [two_steps, an_evaluation, an_evaluation_in_progress, a_step_in_progress]  # 20 tokens, 1 second
BUDGETS = 2 * [{"max_tokens": 20}, {"max_device_seconds": 1.0}]
DAY_LIMITS = 2 * [{"max_device_seconds_per_day": 1.0}, {"max_tokens_per_day": 20}]


async def set_quota(admission: Admission, tenant: str = "acme", **limits: float) -> None:
    quota = operator_pb2.Quota(**limits)
    await admission.operator().SetQuota(operator_pb2.SetQuotaRequest(tenant=f"tenants/{tenant}", quota=quota))


async def list_planned(admission: Admission) -> set[str]:
    """Return the tasks that scheduling sees."""
    return {entry.task.name for entry in (await admission.ledger().GetSnapshot(ledger_pb2.GetSnapshotRequest())).tasks}


async def test_a_quota_is_the_services_until_a_tenant_has_its_own(admission: Admission) -> None:
    request = operator_pb2.GetQuotaRequest(tenant="tenants/acme")
    before = (await admission.operator().GetQuota(request)).quota
    assert before.max_unfinished_tasks == 1000
    await set_quota(admission, max_tokens_per_day=7)
    after = (await admission.operator().GetQuota(request)).quota
    assert (after.max_tokens_per_day, after.max_unfinished_tasks) == (7, 1000)
    await set_quota(admission, max_unfinished_tasks=0)  # no limit; and the other is the service's again
    after = (await admission.operator().GetQuota(request)).quota
    assert (after.max_tokens_per_day, after.max_unfinished_tasks) == (0, 0)
    other = await admission.operator().GetQuota(operator_pb2.GetQuotaRequest(tenant="tenants/other"))
    assert other.quota == before
    for limits in ({"max_tokens_per_day": -1}, {"max_device_seconds_per_day": math.nan},
                   {"max_device_seconds_per_day": math.inf}, {"max_unfinished_tasks": -5}):  # fmt: skip
        with refused(*INVALID) as refusal:
            await set_quota(admission, **limits)
        assert refusal.fields == [f"quota.{next(iter(limits))}"]
    with refused(*INVALID):
        await set_quota(admission, "../x", max_tokens_per_day=1)


async def test_a_mask_says_which_limits_are_set(admission: Admission) -> None:
    async def change(*paths: str, **limits: float) -> dict[str, float]:
        request = operator_pb2.SetQuotaRequest(tenant="tenants/acme", quota=operator_pb2.Quota(**limits))
        request.update_mask.paths.extend(paths)
        quota = (await admission.operator().SetQuota(request)).quota
        return {
            field.name: getattr(quota, field.name) for field in quota.DESCRIPTOR.fields if getattr(quota, field.name)
        }

    service = {"max_unfinished_tasks": 1000}
    first = await change("max_tokens_per_day", max_tokens_per_day=7, max_dataset_bytes=99)
    assert first == {**service, "max_tokens_per_day": 7}  # what is not in the mask does not count
    second = await change("max_unfinished_tasks", "max_adapter_bytes", max_unfinished_tasks=3, max_adapter_bytes=5)
    assert second == {"max_tokens_per_day": 7, "max_unfinished_tasks": 3, "max_adapter_bytes": 5}
    assert await change("max_tokens_per_day", max_tokens_per_day=0) == {
        "max_unfinished_tasks": 3,
        "max_adapter_bytes": 5,
    }
    assert await change("max_unfinished_tasks") == {**service, "max_adapter_bytes": 5}  # unset: the service's again
    for path in ("tenant", "max_tokens_per_day.x", "*", "", "x" * 10_000):
        with refused(*INVALID) as refusal:
            await change("max_tokens_per_day", path)
        assert all(field.startswith("update_mask") for field in refusal.fields)
    assert await change(max_dataset_bytes=9) == {**service, "max_dataset_bytes": 9}  # none: as a whole


async def test_datasets_of_all_names_count_in_bytes(admission: Admission) -> None:
    await set_quota(admission, max_dataset_bytes=2 * len(TEN_ROWS))
    first = await admission.upload(TEN_ROWS, "one")
    await admission.upload(TEN_ROWS, "two")
    before = admission.files()
    with refused(*EXHAUSTED) as refusal:
        await admission.upload(b'{"text": "x"}\n', "three")
    assert refusal.has(error_details_pb2.QuotaFailure) and str(2 * len(TEN_ROWS)) in refusal.message
    assert admission.files() == before
    await admission.upload(TEN_ROWS, "two")  # existing contents add no bytes
    await admission.tenant("other").UploadDataset(dataset_parts(TEN_ROWS))
    await admission.tenant().DeleteDataset(pb.DeleteDatasetRequest(name=first.name))
    await admission.upload(b'{"text": "x"}\n', "three")


async def test_tasks_at_once(admission: Admission) -> None:
    dataset = (await admission.upload()).name
    await set_quota(admission, max_unfinished_tasks=1)
    task = await admission.create(dataset)
    with refused(*EXHAUSTED) as refusal:
        await admission.create(dataset)
    assert "1 unfinished tasks" in refusal.message
    await admission.tenant().CancelTask(pb.CancelTaskRequest(name=task.name))
    await admission.create(dataset)


@pytest.mark.parametrize("limit", [{"max_tokens_per_day": 20}, {"max_device_seconds_per_day": 1.0}], ids=str)
async def test_a_day_used_up_makes_tasks_wait_and_tomorrow_they_go_on(
    admission: Admission, monkeypatch: pytest.MonkeyPatch, limit: dict[str, float]
) -> None:
    """A step has ten tokens and half a second: two steps use up the day's limit."""
    task = await admission.create((await admission.upload()).name)
    cancelled = await admission.create(task.spec.dataset)
    for name in (task.name, cancelled.name):
        await admission.run(name)
    await set_quota(admission, **limit)
    admission.limits.check()
    with admission.notifier.subscribe(ANY_CHANGE) as hinted:
        await admission.commit(step(task.name, 1, 1))
        hinted.clear()
        admission.limits.check()
        assert not hinted.is_set() and await list_planned(admission) == {task.name, cancelled.name}
        await admission.commit(step(task.name, 1, 2))
        await admission.tenant().CancelTask(pb.CancelTaskRequest(name=cancelled.name))
        hinted.clear()
        admission.limits.check()
        assert hinted.is_set()
        # What is being cancelled still gets its adapter exported; the rest waits.
        assert await list_planned(admission) == {cancelled.name}
        with refused(*EXHAUSTED) as refusal:
            await admission.create(task.spec.dataset)
        assert "tomorrow" in refusal.message
        assert (await admission.commit(step(task.name, 1, 3))) == ["COMMITTED"]  # nothing trained is lost
        tomorrow = quotas.today() + 1
        monkeypatch.setattr(quotas, "today", lambda: tomorrow)
        hinted.clear()
        admission.limits.check()
        assert hinted.is_set() and await list_planned(admission) == {task.name, cancelled.name}
    await admission.create(task.spec.dataset)


@pytest.mark.parametrize(("work", "limit"), list(zip(WORK, DAY_LIMITS, strict=True)))
async def test_all_work_uses_up_the_day_of_its_tenant_alone(
    admission: Admission, limit: dict[str, float], work: Callable[[str], list[plan_pb2.TaskResult]]
) -> None:
    """Once a tenant's steps or evaluations have used up its day, also in progress, another tenant's task runs alone."""
    task = (await admission.create((await admission.upload()).name)).name
    other_dataset = (await admission.tenant("other").UploadDataset(dataset_parts(TEN_ROWS))).dataset.name
    created = await admission.tenant("other").CreateTask(pb.CreateTaskRequest(spec=spec(other_dataset)))
    other = created.task.name
    await admission.run(task, other)
    for tenant in ("acme", "other"):
        await set_quota(admission, tenant, **limit)
    results = work(task)
    await admission.commit(*results[:-1], step(other, 1, 1))
    assert await list_planned(admission) == {task, other}
    admission.limits.check()
    with admission.notifier.subscribe(ANY_CHANGE) as hinted:
        await admission.commit(results[-1])
        hinted.clear()
        admission.limits.check()
        assert hinted.is_set() and await list_planned(admission) == {other}
    with refused(*EXHAUSTED):
        await admission.create((await admission.upload()).name)
    assert (await admission.tenant("other").CreateTask(pb.CreateTaskRequest(spec=spec(other_dataset)))).task.name


@pytest.mark.parametrize(("work", "limit"), list(zip(WORK, BUDGETS, strict=True)))
async def test_a_task_over_its_budget_is_cancelled_without_an_error(
    admission: Admission, limit: dict[str, float], work: Callable[[str], list[plan_pb2.TaskResult]]
) -> None:
    dataset = (await admission.upload()).name
    budget = budget_pb2.Budget(**limit)
    task = await admission.create(dataset, budget=budget)
    neighbour = await admission.create(dataset)
    for name in (task.name, neighbour.name):
        await admission.run(name)
        *first, last = work(name)
        await admission.commit(*first)
        assert await admission.state(name) == "RUNNING"
        await admission.commit(last)
    read = (await admission.tenant().GetTask(pb.GetTaskRequest(name=task.name))).task
    assert read.state == task_pb2.TASK_STATE_CANCELLING and read.spec.budget == budget
    with admission.notifier.subscribe(ANY_CHANGE) as hinted:
        admission.limits.check()
        assert hinted.is_set()
    other = (await admission.tenant().GetTask(pb.GetTaskRequest(name=neighbour.name))).task
    assert other.state == task_pb2.TASK_STATE_RUNNING
    assert await admission.commit(step(task.name, 1, 3)) == ["COMMITTED"]  # a step that was on its way
    events = []
    async for answer in admission.tenant().WatchTask(pb.WatchTaskRequest(name=task.name)):
        events.append(answer.event)
        if "used up" in answer.event.state_changed.message:
            break
    assert events[-1].state_changed.state == task_pb2.TASK_STATE_CANCELLING


async def test_an_invalid_budget_is_refused(admission: Admission) -> None:
    dataset = (await admission.upload()).name
    for field, value in (("max_tokens", -1), ("max_device_seconds", math.nan), ("max_device_seconds", -0.5)):
        with refused(*INVALID) as refusal:
            await admission.create(dataset, budget=budget_pb2.Budget(**{field: value}))
        assert refusal.fields == [f"spec.budget.{field}"]


async def test_lost_work_counts_against_the_tasks_budget(admission: Admission) -> None:
    """Ten tokens and half a second of a step were done when its executor died; the step is done again."""
    dataset = (await admission.upload()).name
    budgets = {"max_tokens": budget_pb2.Budget(max_tokens=20), "max_seconds": budget_pb2.Budget(max_device_seconds=1.0)}
    names = [(await admission.create(dataset, budget=budget)).name for budget in budgets.values()]
    await admission.run(*names)
    await admission.commit(*(in_progress(name, 1, 0, (10, 0, 0.5)) for name in names))
    await admission.register(incarnation="i2")
    await admission.run(*names, lease_term=2)
    for name in names:
        assert await admission.state(name) == "RUNNING"
        await admission.commit(step(name, 3, 1), lease_term=2)
        assert await admission.state(name) == "CANCELLING"


async def test_accounts_are_the_sum_of_committed_work(admission: Admission, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test keeps its own sums, over repeated and stale steps and evaluations, three days and two tenants."""
    random_numbers = random.Random(5)
    first_day, expected = quotas.today(), {}
    dataset = await admission.upload()
    other = (await admission.tenant("other").UploadDataset(dataset_parts(TEN_ROWS))).dataset.name
    created = await admission.tenant("other").CreateTask(pb.CreateTaskRequest(spec=spec(other)))
    tasks = {"tenants/acme": (await admission.create(dataset.name)).name, "tenants/other": created.task.name}
    for name in tasks.values():
        await admission.run(name)
    done = dict.fromkeys(tasks, 0)
    for _ in range(30):
        day = first_day + random_numbers.randrange(3)
        monkeypatch.setattr(quotas, "today", lambda day=day: day)
        tenant = random_numbers.choice(list(tasks))
        task, line = tasks[tenant], expected.setdefault((day, tenant), [0, 0, 0.0, 0])
        if random_numbers.random() < 0.3:
            sent = evaluation(task, 1, done[tenant], (30, 1, 0.25))
            await admission.commit(sent, sent, evaluation(task, 7, done[tenant] + 1, (30, 1, 0.25)))
            line[:] = [old + new for old, new in zip(line, (30, 1, 0.25, 0), strict=True)]
        done[tenant] += 1
        sent = step(task, 1, done[tenant])
        await admission.commit(sent, sent, step(task, 7, done[tenant] + 1))
        line[:] = [old + new for old, new in zip(line, (10, 2, 0.5, 1), strict=True)]
    listed, token = [], ""
    while True:
        request = operator_pb2.ListUsageRequest(page_size=2, page_token=token)
        answer = await admission.operator().ListUsage(request)
        listed += answer.days
        if not (token := answer.next_page_token):
            break
    usage = [(d.tenant, [d.effective_tokens, d.padding_tokens, d.device_seconds, d.num_steps]) for d in listed]
    wanted = sorted(expected.items(), reverse=True)
    assert usage == [(tenant, line) for (_, tenant), line in wanted]
    assert len({d.date for d in listed}) == 3
    of_acme = await admission.operator().ListUsage(operator_pb2.ListUsageRequest(tenant="tenants/acme"))
    assert {d.tenant for d in of_acme.days} == {"tenants/acme"}


async def audit_lines(admission: Admission, **fields: object) -> list[tuple[str, str, str, str, str]]:
    request = operator_pb2.ListAuditEventsRequest(**fields)
    events = (await admission.operator().ListAuditEvents(request)).events
    assert [e.sequence for e in events] == sorted(e.sequence for e in events)
    assert all(e.HasField("time") for e in events)
    return [(e.subject.split()[0], e.tenant, e.method.split("/")[2], e.resource, e.status_code) for e in events]


async def test_the_audit_log_has_caller_method_and_status(admission: Admission) -> None:
    dataset = (await admission.upload(dataset_id="d")).name
    task = await admission.create(dataset, "t")
    await admission.tenant().GetTask(pb.GetTaskRequest(name=task.name))  # reads leave no line
    await admission.tenant().UploadAdapter(adapter_parts(adapter_files(), "a"))
    with refused(*DENIED):
        await admission.tenant("rival").GetTask(pb.GetTaskRequest(name=task.name))  # but refused ones do
    with refused(*INVALID):
        await admission.create(dataset, "T!")
    with refused(*DENIED):
        await admission.keys(admission.key_store.create("tenants/rival", None)[1]).ListApiKeys(
            key_pb2.ListApiKeysRequest()
        )
    key = (await admission.keys().CreateApiKey(key_pb2.CreateApiKeyRequest(tenant="tenants/acme"))).key
    await admission.keys().RevokeApiKey(key_pb2.RevokeApiKeyRequest(id=key.id))
    with refused(
        grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"
    ):  # unauthenticated calls are counted and logged once a minute
        await admission.with_token("mxt_0_x").CancelTask(pb.CancelTaskRequest(name=task.name))
    acme, rival = ("key", "tenants/acme"), ("key", "tenants/rival")
    assert await audit_lines(admission) == [
        (*acme, "UploadDataset", dataset, "OK"),
        (*acme, "CreateTask", task.name, "OK"),
        (*acme, "UploadAdapter", "tenants/acme/adapters/a", "OK"),
        (*rival, "GetTask", task.name, "PERMISSION_DENIED"),
        (*acme, "CreateTask", "", "INVALID_ARGUMENT"),
        (*rival, "ListApiKeys", "", "PERMISSION_DENIED"),
        ("mesh", "", "CreateApiKey", key.id, "OK"),
        ("mesh", "", "RevokeApiKey", key.id, "OK"),
    ]
    assert len(await audit_lines(admission, tenant="tenants/rival")) == 2
    assert len(await audit_lines(admission, after_sequence=3, page_size=2)) == 2
    with refused(*DENIED):
        await admission.operator(admission.key_store.create("tenants/acme", None)[1]).ListAuditEvents(
            operator_pb2.ListAuditEventsRequest()
        )


async def test_unauthenticated_calls_are_in_the_audit_log(admission: Admission) -> None:
    admission.refusals_per_second = 1.0
    await admission.restart()
    nobody, codes = admission.with_token("mxt_0_x"), []
    assert await audit_lines(admission) == []  # and now the operator is known there
    for _ in range(5):
        codes.append(await nobody.ListTasks(pb.ListTasksRequest()).code())
    assert codes == [grpc.StatusCode.UNAUTHENTICATED] * 2 + [grpc.StatusCode.RESOURCE_EXHAUSTED] * 3
    await admission.unauthenticated_limiter.write_audit_entries()
    (event,) = (await admission.operator().ListAuditEvents(operator_pb2.ListAuditEventsRequest())).events
    assert event.subject in ("nobody, 5 calls from 127.0.0.1", "nobody, 5 calls from ::/64")
    assert (event.tenant, event.method) == ("", "/muxtune.v1.AdmissionService/ListTasks")


async def test_scheduling_has_lines_of_its_own_written(admission: Admission) -> None:
    event = operator_pb2.AuditEvent(
        sequence=77, subject="certificate operator", method="/muxtune.v1.SchedulingService/DrainExecutor",
        resource="executors/one", status_code="OK",
    )  # fmt: skip
    request = ledger_pb2.RecordAuditEventRequest(event=event)
    await admission.ledger().RecordAuditEvent(request)
    assert await audit_lines(admission) == [("certificate", "", "DrainExecutor", "executors/one", "OK")]
    for field in ("subject", "method"):
        wrong = ledger_pb2.RecordAuditEventRequest(event=event)
        wrong.event.ClearField(field)  # type: ignore[arg-type]
        with refused(*INVALID) as refusal:
            await admission.ledger().RecordAuditEvent(wrong)
        assert refusal.fields == [f"event.{field}"]
    with refused(*DENIED):  # nor does a tenant write there but by what it does
        await admission.ledger(admission.key_store.create("tenants/acme", None)[1]).RecordAuditEvent(request)
    assert (await audit_lines(admission))[1:] == [("key", "tenants/acme", "RecordAuditEvent", "", "PERMISSION_DENIED")]


@pytest.mark.parametrize(
    "statement", ["UPDATE audit_events SET tenant = 'x'", "DELETE FROM audit_events", "TRUNCATE audit_events"]
)
async def test_the_audit_log_is_not_changed_and_keeps_young_entries(admission: Admission, statement: str) -> None:
    await admission.upload()
    before = await audit_lines(admission)
    is_sqlite = admission.database_url.startswith("sqlite")
    if is_sqlite and "TRUNCATE" in statement:
        pytest.skip("SQLite has no such statement")
    with pytest.raises(sa.exc.DBAPIError, match="the audit log"), admission.database.write() as connection:
        connection.execute(sa.text(statement.format("audit_events")))
    assert await audit_lines(admission) == before != []


async def test_an_entry_is_stored_whatever_its_text(admission: Admission) -> None:
    entry = AuditEntry(
        Principal("tenants/a", Role.TENANT, "oidc x\n'; DROP TABLE audit_events; --"), "/a/B", "\0\n", "OK"
    )
    await create_audit_writer(admission.database)(entry)
    assert (await audit_lines(admission))[-1] == ("oidc", "tenants/a", "B", "\n", "OK")
