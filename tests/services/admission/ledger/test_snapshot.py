"""The scheduler's snapshot has pages of one state, without specs; specs come on request, damaged ones too."""

import grpc
import pytest
import sqlalchemy as sa

from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import ledger_pb2, task_pb2
from services.admission.store import tables
from services.message_parts import MAX_PART_BYTES
from tests.services.admission.admission_mesh import DATABASES, Admission, refused, spec

pytestmark = pytest.mark.parametrize("database_url", DATABASES, indirect=True)
OLD_SPEC_BYTES = 256 << 10  # the largest that earlier versions accepted


def insert_copies(admission: Admission, task: str, number: int, tenant: str, **columns: object) -> None:
    """Insert copies of the task, as `tenants/{tenant}/tasks/copy-N`."""
    with admission.database.write() as connection:
        row = connection.execute(sa.select(tables.tasks).where(tables.tasks.c.name == task)).one()
        values = {**row._mapping, "tenant": f"tenants/{tenant}", **columns}
        rows = [{**values, "name": f"tenants/{tenant}/tasks/copy-{i:05}"} for i in range(number)]
        connection.execute(sa.insert(tables.tasks), rows)


def old_spec(dataset: str) -> bytes:
    """Return a spec as an earlier version may have stored it."""
    large = spec(dataset)
    large.lora.target_modules.extend(["q_proj", "v_proj"] * ((OLD_SPEC_BYTES - 400) // 16))
    return large.SerializeToString()


async def read_pages(admission: Admission) -> list[ledger_pb2.GetSnapshotResponse]:
    pages = [await admission.ledger().GetSnapshot(ledger_pb2.GetSnapshotRequest())]
    while pages[-1].next_page_token:
        request = ledger_pb2.GetSnapshotRequest(page_token=pages[-1].next_page_token)
        pages.append(await admission.ledger().GetSnapshot(request))
    return pages


async def test_a_snapshot_of_many_tasks_has_pages_of_one_state(admission: Admission) -> None:
    task = await admission.create((await admission.upload()).name, "first")
    traced = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01" + "x" * 1000
    insert_copies(admission, task.name, 8000, "other", trace_parent=traced)
    first = await admission.ledger().GetSnapshot(ledger_pb2.GetSnapshotRequest())
    assert first.next_page_token and len(first.executors) == 1
    await admission.tenant().CancelTask(pb.CancelTaskRequest(name=task.name))
    insert_copies(admission, task.name, 1, "late", state="QUEUED")
    pages = [first]
    while pages[-1].next_page_token:
        request = ledger_pb2.GetSnapshotRequest(page_token=pages[-1].next_page_token)
        pages.append(await admission.ledger().GetSnapshot(request))
    names = [entry.task.name for page in pages for entry in page.tasks]
    assert len(names) == len(set(names)) == 8001 and task.name in names
    assert max(page.ByteSize() for page in pages) < MAX_PART_BYTES + 1000
    with refused(grpc.StatusCode.ABORTED, "SUPERSEDED"):
        await admission.ledger().GetSnapshot(ledger_pb2.GetSnapshotRequest(page_token="0123456789abcdef.1"))


async def test_a_snapshot_has_no_specs_and_they_come_a_message_at_a_time(admission: Admission) -> None:
    """70 tasks of 250 KiB were more than one message, and nothing was scheduled for anybody, over restarts."""
    dataset = (await admission.upload()).name
    good = await admission.create(dataset, "good")
    insert_copies(admission, good.name, 100, "bad", spec=old_spec(dataset))
    await admission.restart()
    pages = await read_pages(admission)
    assert sum(page.ByteSize() for page in pages) < 100_000
    entries = {entry.task.name: entry for page in pages for entry in page.tasks}
    assert len(entries) == 101
    assert not any(entry.task.HasField("spec") or entry.task.HasField("estimate") for entry in entries.values())
    names, read = [*sorted(entries), "tenants/bad/tasks/none", good.name], list[ledger_pb2.StoredTaskSpec]()
    while names:
        request = ledger_pb2.BatchGetTaskSpecsRequest(tasks=names)
        answer = await admission.ledger().BatchGetTaskSpecs(request)
        assert answer.ByteSize() < MAX_PART_BYTES + OLD_SPEC_BYTES and answer.num_read >= 1
        read += answer.specs
        names = names[answer.num_read :]
    assert [stored.task for stored in read] == [*sorted(entries), good.name]
    assert read[-1].spec == good.spec and read[-1].estimate == good.estimate
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT"):
        await admission.ledger().BatchGetTaskSpecs(ledger_pb2.BatchGetTaskSpecsRequest(tasks=["x"] * 1001))


async def test_a_damaged_spec_hides_no_other_task(admission: Admission) -> None:
    dataset = (await admission.upload()).name
    damaged, good = await admission.create(dataset, "damaged"), await admission.create(dataset, "good")
    with admission.database.write() as connection:
        is_damaged = tables.tasks.c.name == damaged.name
        connection.execute(sa.update(tables.tasks).where(is_damaged).values(spec=b"\xff\xff"))
    assert {entry.task.name for page in await read_pages(admission) for entry in page.tasks} == {
        damaged.name,
        good.name,
    }
    request = ledger_pb2.BatchGetTaskSpecsRequest(tasks=[damaged.name, good.name])
    first, second = (await admission.ledger().BatchGetTaskSpecs(request)).specs
    assert "damaged" in first.unreadable and second.spec == good.spec and not second.unreadable
    listed = (await admission.tenant().ListTasks(pb.ListTasksRequest())).tasks
    assert [task.name for task in listed] == [good.name, damaged.name] and listed[0] == good
    assert (await admission.tenant().GetTask(pb.GetTaskRequest(name=damaged.name))).task.spec == task_pb2.TaskSpec()
    await admission.tenant().CancelTask(pb.CancelTaskRequest(name=damaged.name))


async def test_pages_of_tasks_are_cut_by_bytes(admission: Admission) -> None:
    """A page was cut by number alone: of 100 tasks with specs of 250 KiB it was larger than a message."""
    dataset = (await admission.upload()).name
    first = await admission.create(dataset, "first")
    insert_copies(admission, first.name, 60, "acme", spec=old_spec(dataset), created=1)
    names, request, num_pages = list[str](), pb.ListTasksRequest(page_size=1000), 0
    while True:
        answer = await admission.tenant().ListTasks(request)
        assert answer.ByteSize() < MAX_PART_BYTES + OLD_SPEC_BYTES
        names += [task.name for task in answer.tasks]
        num_pages += 1
        if not answer.next_page_token:
            break
        request.page_token = answer.next_page_token
    assert names == [first.name, *(f"tenants/acme/tasks/copy-{i:05}" for i in reversed(range(60)))]
    assert 5 <= num_pages <= 6
