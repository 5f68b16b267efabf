"""Old rows go in small transactions; what is kept, other tenants' rows, usage and adapters stay exactly as they are."""

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import sqlalchemy as sa

from engine.errors import UnavailableError
from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import event_pb2, ledger_pb2, operator_pb2, task_pb2
from services.admission.cleanup import retention
from services.admission.cleanup.garbage_collector import GarbageCollector
from services.admission.cleanup.retention import OldRows, RetentionPolicy
from services.admission.store.clock import now
from services.admission.store.tables import audit_events, plans, requests, task_events, tasks
from services.settings import SettingsError
from tests.services.admission.admission_mesh import (
    BOTH_DATABASES,
    TEN_ROWS,
    Admission,
    adapter_files,
    dataset_parts,
    finished,
    refused,
    spec,
    step,
)

DENIED = (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
DAY = 86_400_000_000
EVERYTHING = RetentionPolicy(events_days=0, tasks_days=0, num_tasks=0, requests_days=0, num_requests=0)
both = pytest.mark.parametrize("database_url", BOTH_DATABASES, indirect=True)


def delete(admission: Admission, **policy: Any) -> list[int]:
    """Delete what the policy does not keep; return the number of rows of each transaction."""
    collector = GarbageCollector(admission.database, admission.artifacts)
    return list(OldRows(admission.database, collector, RetentionPolicy(**{**vars(EVERYTHING), **policy})).delete())


def age(admission: Admission, days: float, *names: str) -> None:
    """Move the tasks' times, and those of the requests that created them, into the past."""
    with admission.database.write() as connection:
        for table, key in ((tasks, tasks.c.name), (requests, requests.c.resource)):
            for column in ("created", "started", "ended"):
                if column in table.c:
                    changed = {column: table.c[column] - int(days * DAY)}
                    connection.execute(sa.update(table).where(key.in_(names)).values(changed))


def count(admission: Admission, table: sa.Table, **equal: Any) -> int:
    with admission.database.read() as connection:
        query = sa.select(sa.func.count()).select_from(table).filter_by(**equal)
        return int(connection.execute(query).scalar_one())


async def train(admission: Admission, task_id: str, tenant: str = "acme", num_steps: int = 3) -> str:
    """Run a task from its creation to its end, with an adapter; return its name."""
    caller = admission.tenant(tenant)
    dataset = (await caller.UploadDataset(dataset_parts(TEN_ROWS, "d"))).dataset.name
    created = await caller.CreateTask(pb.CreateTaskRequest(task_id=task_id, spec=spec(dataset), request_id=task_id))
    name: str = created.task.name
    (attempt,) = await admission.run(name)
    key = f"tenants/{tenant}/adapters/{task_id}/{attempt}"
    files = admission.artifacts.commit_folder(key, adapter_files(), {})
    results = [step(name, attempt, number) for number in range(1, num_steps + 1)]
    assert set(await admission.commit(*results, finished(name, attempt, files.key))) == {"COMMITTED"}
    return name


async def watch(admission: Admission, name: str, tenant: str = "acme", after: int = 0) -> list[event_pb2.TaskEvent]:
    request = pb.WatchTaskRequest(name=name, after_sequence=after)
    return [answer.event async for answer in admission.tenant(tenant).WatchTask(request)]


@both
async def test_old_events_go_but_the_last_one_which_ends_a_watch(admission: Admission) -> None:
    old, young = await train(admission, "old"), await train(admission, "young")
    other = await train(admission, "other", "globex")
    before = {name: await watch(admission, name, tenant) for name, tenant in ((young, "acme"), (other, "globex"))}
    task = (await admission.tenant().GetTask(pb.GetTaskRequest(name=old))).task
    last = (await watch(admission, old))[-1]
    age(admission, 31, old)
    age(admission, 29, young)
    assert sum(delete(admission, events_days=30)) == last.sequence - 1
    for after in (0, 2, last.sequence - 1):
        assert await watch(admission, old, after=after) == [last]
    assert last.state_changed.state == task_pb2.TASK_STATE_SUCCEEDED
    assert await watch(admission, young) == before[young] and await watch(admission, other, "globex") == before[other]
    kept = (await admission.tenant().GetTask(pb.GetTaskRequest(name=old))).task
    assert kept.progress == task.progress and kept.adapter == task.adapter
    assert delete(admission, events_days=30) == []


@both
async def test_unfinished_tasks_keep_everything_however_old(admission: Admission) -> None:
    name = (await admission.create((await admission.upload()).name)).name
    (attempt,) = await admission.run(name)
    await admission.commit(step(name, attempt, 1))
    age(admission, 1000, name)
    num_events = count(admission, task_events)
    delete(admission, events_days=1, tasks_days=1, num_tasks=1, requests_days=1)
    assert count(admission, task_events) == num_events and await admission.state(name) == "RUNNING"
    assert await admission.commit(step(name, attempt, 2)) == ["COMMITTED"]


@both
async def test_a_task_goes_and_its_adapter_and_usage_stay(admission: Admission) -> None:
    name, other = await train(admission, "t"), await train(admission, "t", "globex")
    usage = (await admission.operator().ListUsage(operator_pb2.ListUsageRequest())).days
    assert {day.tenant: day.num_steps for day in usage} == {"tenants/acme": 3, "tenants/globex": 3}
    admission.artifacts.commit_folder(f"{name}/checkpoints/00000002-1", {"state": b"x"}, {})
    age(admission, 91, name)
    delete(admission, tasks_days=90)
    acme = admission.tenant()
    for call in (acme.GetTask(pb.GetTaskRequest(name=name)), acme.CancelTask(pb.CancelTaskRequest(name=name))):
        with refused(*DENIED):
            await call
    with refused(*DENIED):
        await watch(admission, name)
    assert not (await acme.ListTasks(pb.ListTasksRequest())).tasks
    assert count(admission, task_events, task=name) == 0
    for adapter in ("tenants/acme/adapters/t", name):
        parts = [part async for part in acme.DownloadAdapter(pb.DownloadAdapterRequest(name=adapter))]
        assert b"".join(part.chunk.data for part in parts) == b"".join(dict(sorted(adapter_files().items())).values())
    assert not any("checkpoints" in file for file in admission.files())
    assert (await admission.operator().ListUsage(operator_pb2.ListUsageRequest())).days == usage
    assert [task.name async for task in listed(admission, "globex")] == [other]
    assert len(await watch(admission, other, "globex")) == 6
    with refused(grpc.StatusCode.ALREADY_EXISTS, "ALREADY_EXISTS"):  # it would replace the adapter
        await admission.create("tenants/acme/datasets/d", "t")


async def listed(admission: Admission, tenant: str) -> Any:
    for task in (await admission.tenant(tenant).ListTasks(pb.ListTasksRequest(page_size=1000))).tasks:
        yield task


@both
async def test_a_tenant_with_many_tasks_keeps_the_newest_and_others_keep_theirs(admission: Admission) -> None:
    bad, good = admission.tenant("bad"), admission.tenant("good")
    names = []
    for caller, number in ((good, 3), (bad, 12)):
        dataset = (await caller.UploadDataset(dataset_parts(TEN_ROWS, "d"))).dataset.name
        for index in range(number):
            task_id = f"t{index:02}"
            task = (await caller.CreateTask(pb.CreateTaskRequest(task_id=task_id, spec=spec(dataset)))).task
            if index != 1:  # which waits for ever
                await caller.CancelTask(pb.CancelTaskRequest(name=task.name))
            names.append(task.name)
    assert delete(admission, num_tasks=5) == []  # all have just ended
    age(admission, 0.01, *names)
    delete(admission, num_tasks=5)
    kept = [task.name.rpartition("/")[2] async for task in listed(admission, "bad")]
    assert kept == ["t11", "t10", "t09", "t08", "t07", "t01"]
    assert len([task async for task in listed(admission, "good")]) == 3
    assert count(admission, task_events) == sum([2 * 5 + 1, 2 * 2 + 1])


@both
async def test_a_request_is_recognised_until_its_id_is_old(admission: Admission) -> None:
    dataset, acme = (await admission.upload()).name, admission.tenant()
    request = pb.CreateTaskRequest(spec=spec(dataset), request_id="r")
    first = (await acme.CreateTask(request)).task.name
    age(admission, 1.9, first)
    delete(admission, requests_days=2)
    assert (await acme.CreateTask(request)).task.name == first
    age(admission, 0.2, first)
    delete(admission, requests_days=2)
    assert (await acme.CreateTask(request)).task.name != first


@both
async def test_the_newest_requests_of_each_tenant_are_kept(admission: Admission) -> None:
    with admission.database.write() as connection:
        for tenant, number in (("tenants/bad", 50), ("tenants/good", 5)):
            values = {"method": "CreateTask", "body_sha256": "", "resource": ""}
            rows = [{"tenant": tenant, "request_id": f"r{i}", "created": i, **values} for i in range(number)]
            connection.execute(sa.insert(requests), rows)
    delete(admission, num_requests=10)
    with admission.database.read() as connection:
        kept = connection.execute(sa.select(requests.c.tenant, requests.c.request_id)).all()
    bad = {row.request_id for row in kept if row.tenant == "tenants/bad"}
    assert bad == {f"r{i}" for i in range(40, 50)} and len(kept) == 15


@both
async def test_the_newest_plans_are_kept_and_a_plan_must_still_be_newer(
    admission: Admission, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "_NUM_PLANS", 2)
    for _ in range(5):
        await admission.run()
    delete(admission)
    with admission.database.read() as connection:
        assert list(connection.scalars(sa.select(plans.c.version).order_by(plans.c.version))) == [4, 5]
    with refused(grpc.StatusCode.ABORTED, "SUPERSEDED"):
        await admission.ledger().CommitPlan(
            ledger_pb2.CommitPlanRequest(executor="executors/one", lease_term=1, version=5)
        )
    await admission.run()


@both
async def test_audit_entries_go_after_the_operators_days_and_the_database_keeps_young_ones(
    admission: Admission,
) -> None:
    await admission.upload()
    num_young = count(admission, audit_events)
    values = {"subject": "s", "tenant": "tenants/acme", "method": "m", "resource": "", "status_code": "OK"}
    with admission.database.write() as connection:
        for days in (29, 31, 400):
            connection.execute(sa.insert(audit_events).values(time=now() - days * DAY, **values))
    assert delete(admission) == []
    delete(admission, audit_days=365)
    assert count(admission, audit_events) == num_young + 2
    with pytest.raises(sa.exc.DBAPIError, match="for 30 days"), admission.database.write() as connection:
        connection.execute(sa.delete(audit_events).where(audit_events.c.time < now() - 28 * DAY))
    assert count(admission, audit_events) == num_young + 2
    delete(admission, audit_days=30)
    assert count(admission, audit_events) == num_young + 1


@pytest.mark.parametrize("wrong", [{"audit_days": 29}, {"num_tasks": -1}, {"events_days": float("inf")}], ids=str)
def test_a_policy_that_cannot_be_kept_names_its_setting(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=f"MUXTUNE_KEEP_{next(iter(wrong)).upper()}"):
        RetentionPolicy(**wrong)


@both
async def test_a_transaction_deletes_few_rows_and_others_write_in_between(admission: Admission) -> None:
    name = await train(admission, "t")
    with admission.database.write() as connection:
        rows = [{"task": name, "sequence": number, "event": b"x"} for number in range(10, 2010)]
        connection.execute(sa.insert(task_events), rows)
        connection.execute(sa.update(tasks).where(tasks.c.name == name).values(last_sequence=2010))
    age(admission, 31, name)
    collector = GarbageCollector(admission.database, admission.artifacts)
    batches: Iterator[int] = OldRows(admission.database, collector, RetentionPolicy()).delete()
    sizes = []
    for size in batches:
        sizes.append(size)
        await admission.tenant("globex").UploadDataset(dataset_parts(TEN_ROWS, f"d{len(sizes)}"))
    assert max(sizes) == 500 and sum(sizes) == 2006 + 1  # events, and the request that created the task


async def test_tasks_whose_files_cannot_be_deleted_are_kept(
    admission: Admission, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = await train(admission, "t")
    age(admission, 91, name)

    def away(prefix: str) -> list[str]:
        raise UnavailableError("the store is away")

    with monkeypatch.context() as broken:
        broken.setattr(admission.artifacts, "list", away)
        delete(admission, tasks_days=90)
    assert await admission.state(name) == "SUCCEEDED"
    delete(admission, tasks_days=90)
    assert count(admission, tasks) == 0
