"""Executors that die: all their tasks are suspected; a task fails only if it was alone, several times in a row.
Executors that lose their lease and live: none of their tasks is."""

from typing import Any

import pytest

from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import errors_pb2, event_pb2, ledger_pb2, plan_pb2
from muxtune.v1.executor_history_pb2 import ExecutorHistory
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
    """A restart without EndLease counts, before and after the lease expired; a restart after EndLease does not."""
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


async def register(
    admission: Admission, incarnation: str, *deaths: plan_pb2.TaskResult, stopped: str = "", name: str = "one"
) -> int:
    """Register an executor that reports deaths of its trainer, or that the process before it was stopped."""
    request = lease(executor(f"executors/{name}", incarnation))
    request.history.CopyFrom(ExecutorHistory(trainer_deaths=deaths, stopped_incarnation=stopped))
    return int((await admission.ledger().PutLease(request)).lease_term)


@pytest.mark.parametrize("is_admission_restarted", [False, True])
async def test_an_executor_that_lost_its_lease_and_lives_is_no_crash(
    admission: Admission, is_admission_restarted: bool
) -> None:
    """Many times in a row, with the task alone: the network was away, or admission, or both."""
    (task,) = await create(admission, "t")
    for term in range(1, 2 * MAX_CRASHES + 1):
        await admission.run(task, lease_term=term)
        admission.clock.seconds += 31
        if is_admission_restarted:
            await admission.restart()
        assert await crashes(admission) == {"t": int(not is_admission_restarted)}  # it may have died
        assert await register(admission, "i1") == term + 1
        assert await crashes(admission) == {"t": 0}
    assert await admission.state(task) == "QUEUED"
    await admission.run(task, lease_term=2 * MAX_CRASHES + 1)
    await admission.commit(*died({task: await attempt_of(admission, task)}), lease_term=2 * MAX_CRASHES + 1)
    assert await crashes(admission) == {"t": 1}  # as the first death that there was


async def attempt_of(admission: Admission, task: str) -> int:
    attempt: int = (await admission.tenant().GetTask(pb.GetTaskRequest(name=task))).task.attempt
    return attempt


@pytest.mark.parametrize("expires", [False, True])
async def test_an_executor_that_was_asked_to_stop_is_no_crash(admission: Admission, expires: bool) -> None:
    """Also where scheduling was away, so that it could not end its lease."""
    (task,) = await create(admission, "t")
    for term in range(1, MAX_CRASHES + 2):
        await admission.run(task, lease_term=term)
        admission.clock.seconds += 31 if expires else 1
        await admission.ledger().GetSnapshot(ledger_pb2.GetSnapshotRequest())
        await register(admission, f"i{term + 1}", stopped=f"i{term}")
        assert await crashes(admission) == {"t": 0}
    await admission.run(task, lease_term=MAX_CRASHES + 2)
    await register(admission, "last", stopped="i1")  # an old record: the process before this one died
    assert await crashes(admission) == {"t": 1}


async def test_a_trainer_that_died_while_its_lease_was_lost_is_reported_and_counts_once(admission: Admission) -> None:
    poison, good = await create(admission, "poison", "good")
    await admission.run(poison, good)
    admission.clock.seconds += 31
    assert await crashes(admission) == {"poison": 1, "good": 1}
    (death,) = died({poison: 1})
    await register(admission, "i1", death)
    assert await crashes(admission) == {"poison": 1, "good": 0}
    await admission.run(good, lease_term=2)
    await admission.commit(step(good, 3, 1), lease_term=2)
    await register(admission, "i1", death)  # its answer was lost, so it registers again
    assert await crashes(admission) == {"poison": 1, "good": 0}
    await admission.run(poison, lease_term=3)
    await register(admission, "i1", *died({poison: 3}))  # before the ledger noticed that the lease was lost
    assert await crashes(admission) == {"poison": 2, "good": 0}


async def test_a_step_elsewhere_clears_a_task_of_a_lost_executor(admission: Admission) -> None:
    (task,) = await create(admission, "t")
    await admission.run(task)
    admission.clock.seconds += 31
    assert await crashes(admission) == {"t": 1}
    await admission.register("executors/two", "j1")
    await admission.run(task, executor="executors/two")
    await admission.commit(step(task, 3, 1), executor="executors/two")
    assert await crashes(admission) == {"t": 0}
    await register(admission, "i2")  # the first one died, but not of a task that has done a step since
    assert await crashes(admission) == {"t": 0}


async def test_a_task_with_which_every_executor_vanishes_fails(admission: Admission) -> None:
    """No executor ever comes back to tell that it died. The task runs alone from the first loss on."""
    (task,) = await create(admission, "t")
    for number in range(MAX_CRASHES + 1):
        name = f"executors/gone-{number}"
        await admission.register(name, f"incarnation-{number}")
        assert await admission.state(task) == "QUEUED"
        await admission.run(task, executor=name)
        admission.clock.seconds += 31
        snapshot = await admission.ledger().GetSnapshot(ledger_pb2.GetSnapshotRequest())
        assert [entry.num_crashes for entry in snapshot.tasks] == ([number + 1] if number < MAX_CRASHES else [])
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
