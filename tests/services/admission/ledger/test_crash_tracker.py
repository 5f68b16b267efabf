"""Executors that die: all their tasks are suspected; a task fails only if it was alone, several times in a row."""

from typing import Any

import pytest

from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import errors_pb2, event_pb2, ledger_pb2, plan_pb2
from tests.services.admission.admission_mesh import DATABASES, Admission, executor, lease, step

pytestmark = pytest.mark.parametrize("database_url", DATABASES, indirect=True)
MAX_CRASHES = 3


async def create(admission: Admission, *ids: str) -> list[str]:
    dataset = (await admission.upload()).name
    return [(await admission.create(dataset, name)).name for name in ids]


def died(attempts: dict[str, int]) -> list[plan_pb2.TaskResult]:
    """Return the results of an executor whose trainer died with these tasks."""
    released = plan_pb2.TaskReleased(reason="its trainer ended with status -9", num_suspects=len(attempts))
    return [plan_pb2.TaskResult(task=t, attempt=e, released=released) for t, e in attempts.items()]


async def crashes(admission: Admission) -> dict[str, int]:
    snapshot = await admission.ledger().GetSnapshot(ledger_pb2.GetSnapshotRequest())
    return {entry.task.name.rpartition("/")[2]: entry.num_crashes for entry in snapshot.tasks}


async def test_the_task_that_kills_its_trainer_fails_and_those_beside_it_do_not(admission: Admission) -> None:
    poison, good = await create(admission, "poison", "good")
    for attempt in (1, 2, 3, 4):
        await admission.run(poison, good)
        await admission.commit(*died({poison: attempt, good: attempt}))
    assert await crashes(admission) == {"poison": 4, "good": 4}  # never alone, so no task fails
    await admission.run(good)
    await admission.commit(step(good, 5, 1))
    assert await crashes(admission) == {"poison": 4, "good": 0}
    await admission.run(poison)
    assert await admission.commit(*died({poison: 5})) == ["COMMITTED"]
    assert await admission.commit(*died({poison: 5})) == ["DUPLICATE"]
    assert (await admission.state(poison), await admission.state(good)) == ("FAILED", "RUNNING")
    failure = (await admission.tenant().GetTask(pb.GetTaskRequest(name=poison))).task.failure
    assert failure.reason == errors_pb2.ERROR_REASON_INTERNAL
    assert "died 5 times" in failure.message and "status -9" in failure.message


async def test_steps_before_the_crash_do_not_clear_a_suspect(admission: Admission) -> None:
    """After a crash the steps since the last checkpoint are repeated: they do not clear the task."""
    (task,) = await create(admission, "t")
    await admission.run(task)
    await admission.commit(step(task, 1, 1), step(task, 1, 2))
    for attempt in (1, 2):
        await admission.commit(*died({task: attempt}))
        await admission.run(task)
        assert await admission.commit(step(task, attempt + 1, 1), step(task, attempt + 1, 2)) == ["DUPLICATE"] * 2
    assert await crashes(admission) == {"t": 2}
    await admission.commit(*died({task: 3}))
    assert await admission.state(task) == "FAILED"


async def test_crashes_of_whole_executors_count_too(admission: Admission) -> None:
    """An expired lease and a restart without EndLease count; a restart after EndLease does not."""
    (task,) = await create(admission, "t")
    await admission.run(task)
    assert await admission.register(incarnation="i2") == 2
    assert await crashes(admission) == {"t": 1}
    await admission.run(task, lease_term=2)
    admission.clock.seconds += 31
    assert await crashes(admission) == {"t": 2}
    assert await admission.register(incarnation="i3") == 3
    await admission.run(task, lease_term=3)
    await admission.ledger().EndLease(ledger_pb2.EndLeaseRequest(executor="executors/one", incarnation="i3"))
    assert await crashes(admission) == {"t": 2}
    assert await admission.register(incarnation="i4") == 4
    await admission.run(task, lease_term=4)
    await admission.register(incarnation="i5")
    assert await admission.state(task) == "FAILED"


async def test_a_cancelled_task_fails_rather_than_kill_executors_for_ever(admission: Admission) -> None:
    (task,) = await create(admission, "t")
    await admission.run(task)
    await admission.commit(step(task, 1, 1), checkpoint(task, 1))
    await admission.tenant().CancelTask(pb.CancelTaskRequest(name=task))
    for attempt in range(1, MAX_CRASHES + 1):
        assert await admission.state(task) == "CANCELLING"
        await admission.commit(*died({task: attempt}))
        if attempt < MAX_CRASHES:
            await admission.run(task)
    assert await admission.state(task) == "FAILED"


def checkpoint(task: str, attempt: int) -> plan_pb2.TaskResult:
    committed = event_pb2.CheckpointCommitted(
        step=1, manifest_key=f"{task}/checkpoints/00000001-{attempt}/manifest.json"
    )
    return plan_pb2.TaskResult(task=task, attempt=attempt, checkpoint_committed=committed)


async def test_scheduling_is_notified_when_a_suspect_is_cleared(admission: Admission) -> None:
    (task,) = await create(admission, "t")
    await admission.run(task)
    await admission.commit(*died({task: 1}))
    await admission.run(task)
    call: Any = admission.ledger().WatchChanges(ledger_pb2.WatchChangesRequest())
    changes = aiter(call)
    first = (await anext(changes)).revision
    await admission.ledger().PutLease(lease(executor("executors/one", "i1", lease_term=1)))  # no news for a plan
    await admission.commit(step(task, 2, 1))
    assert (await anext(changes)).revision == first + 1
    call.cancel()
