"""Leases, plans, attempts and results are compared where they are committed and counted once, on both databases."""

import asyncio
import itertools
import random
from typing import Any

import grpc
import pytest

from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import errors_pb2, event_pb2, ledger_pb2, plan_pb2, task_pb2
from tests.services.admission.admission_mesh import (
    BOTH_DATABASES,
    Admission,
    checkpoint,
    evaluated,
    executor,
    finished,
    lease,
    refused,
    step,
)

pytestmark = pytest.mark.parametrize("database_url", BOTH_DATABASES, indirect=True)
SUPERSEDED, LEASE_LOST = (grpc.StatusCode.ABORTED, "SUPERSEDED"), (grpc.StatusCode.ABORTED, "LEASE_LOST")
ONE, TWO = "executors/one", "executors/two"


async def create(admission: Admission, count: int = 1) -> list[str]:
    dataset = (await admission.upload()).name
    return [(await admission.create(dataset, f"t{i}")).name for i in range(count)]


async def running(admission: Admission) -> str:
    (task,) = await create(admission)
    await admission.run(task)
    return task


async def snapshot(admission: Admission) -> ledger_pb2.GetSnapshotResponse:
    answer: ledger_pb2.GetSnapshotResponse = await admission.ledger().GetSnapshot(ledger_pb2.GetSnapshotRequest())
    return answer


def plan(version: int, *starts: tuple[str, int], name: str = ONE, lease_term: int = 1) -> ledger_pb2.CommitPlanRequest:
    started = [ledger_pb2.AttemptStart(task=task, expected_attempt=attempt) for task, attempt in starts]
    return ledger_pb2.CommitPlanRequest(executor=name, lease_term=lease_term, version=version, starts=started)


def failed(task: str, attempt: int) -> plan_pb2.TaskResult:
    failure = errors_pb2.TaskFailure(reason=errors_pb2.ERROR_REASON_NON_FINITE, message="NaN", metadata={"step": "3"})
    return plan_pb2.TaskResult(task=task, attempt=attempt, failed=failure)


def released(task: str, attempt: int) -> plan_pb2.TaskResult:
    return plan_pb2.TaskResult(task=task, attempt=attempt, released=plan_pb2.TaskReleased(reason="drain"))


async def states(admission: Admission, task: str) -> list[str]:
    """Return the states of a task that has ended, from its events."""
    changes = [event.state_changed for event in await admission.events(task) if event.HasField("state_changed")]
    return [task_pb2.TaskState.Name(change.state).removeprefix("TASK_STATE_") for change in changes]


async def test_the_snapshot_holds_all_that_a_cycle_needs(admission: Admission) -> None:
    first, second, third = await create(admission, 3)
    await admission.register(TWO, "j1")
    assert await admission.run(first) == [1]
    await admission.commit(step(first, 1, 1), checkpoint(first, 1, 1))
    await admission.tenant().CancelTask(pb.CancelTaskRequest(name=third))
    seen = await snapshot(admission)
    assert [(t.task.name, t.executor) for t in seen.tasks] == [(first, ONE), (second, "")]
    assert (seen.tasks[0].checkpoint.step, seen.tasks[0].task.progress.step) == (1, 1)
    assert not seen.tasks[1].HasField("checkpoint")
    assert [(e.name, e.lease_term, e.incarnation) for e in seen.executors] == [(ONE, 1, "i1"), (TWO, 1, "j1")]
    assert seen.executors[0].backbone == executor().backbone
    assert seen.plan_version == 1


async def test_only_one_of_two_schedulers_plans_is_committed(admission: Admission) -> None:
    """Both schedulers plan from the same snapshot, with the same version and attempts."""
    first, second = await create(admission, 2)
    await admission.register(TWO, "j1")
    plans = [plan(1, (first, 0), (second, 0)), plan(1, (second, 0), name=TWO), plan(1, (first, 0), name=TWO)]
    answers = await asyncio.gather(*map(admission.ledger().CommitPlan, plans), return_exceptions=True)
    won = [i for i, answer in enumerate(answers) if not isinstance(answer, BaseException)]
    assert len(won) == 1
    for answer in answers:
        if isinstance(answer, BaseException):
            with refused(*SUPERSEDED):
                raise answer
    seen = await snapshot(admission)
    assert {t.task.name: (t.executor, t.task.attempt) for t in seen.tasks if t.executor} == {
        start.task: (plans[won[0]].executor, 1) for start in plans[won[0]].starts
    }


async def test_a_plan_that_is_refused_stores_nothing(admission: Admission) -> None:
    first, second = await create(admission, 2)
    cancelled = await admission.create((await admission.upload()).name, "gone")
    await admission.tenant().CancelTask(pb.CancelTaskRequest(name=cancelled.name))
    await admission.run(second)
    before, rows = await snapshot(admission), admission.num_rows()
    for bad, reason in (
        (plan(2, (first, 0), (second, 0)), SUPERSEDED),  # its attempt is 1
        (plan(2, (first, 0), (first, 0)), SUPERSEDED),
        (plan(2, (first, 0), (cancelled.name, 0)), SUPERSEDED),
        (plan(1, (first, 0)), SUPERSEDED),
        (plan(0, (first, 0)), SUPERSEDED),
        (plan(2, (first, 0), lease_term=2), LEASE_LOST),
        (plan(2, (first, 0), lease_term=0), LEASE_LOST),
        (plan(2, (first, 0), name=TWO), LEASE_LOST),
    ):
        with refused(*reason):
            await admission.ledger().CommitPlan(bad)
        after = await snapshot(admission)
        assert (list(after.tasks), after.plan_version) == (list(before.tasks), before.plan_version)
    assert admission.num_rows() == rows


async def test_results_are_recorded_once_however_often_they_come(admission: Admission) -> None:
    task = await running(admission)
    batch = [evaluated(task, 1, 0), step(task, 1, 1, loss=3), step(task, 1, 2, loss=2), checkpoint(task, 1, 2),
             evaluated(task, 1, 2, loss=1.5)]  # fmt: skip
    verdicts = await asyncio.gather(*(admission.commit(*batch) for _ in range(8)))
    assert sorted(verdicts) == [["COMMITTED"] * 5] + [["DUPLICATE"] * 5] * 7
    assert await admission.commit(*batch, step(task, 1, 3), step(task, 1, 3)) == [
        *["DUPLICATE"] * 5, "COMMITTED", "DUPLICATE"
    ]  # fmt: skip
    await admission.restart()
    assert await admission.commit(step(task, 1, 3), step(task, 1, 1)) == ["DUPLICATE"] * 2
    ends = await asyncio.gather(*(admission.commit(finished(task, 1, "k")) for _ in range(4)))
    assert sorted(ends) == [["COMMITTED"]] + [["DUPLICATE"]] * 3
    assert admission.num_rows()["adapters"] == 1
    progress = (await admission.tenant().GetTask(pb.GetTaskRequest(name=task))).task.progress
    assert (progress.step, progress.effective_tokens, progress.padding_tokens) == (3, 30, 6)
    assert (progress.first_loss, progress.last_loss, progress.device_seconds) == (3, 1, 1.5)
    assert (progress.first_heldout_loss, progress.last_heldout_loss) == (2, 1.5)
    assert progress.checkpoint_step == 2 and not progress.HasField("seconds_left")
    kinds = [event.WhichOneof("event") for event in await admission.events(task)]
    assert kinds == [
        "state_changed", "state_changed", "evaluated", "step_done", "step_done", "checkpoint_committed", "evaluated",
        "step_done", "state_changed",
    ]  # fmt: skip


async def test_results_of_a_superseded_attempt_are_stale(admission: Admission) -> None:
    task = await running(admission)
    await admission.register(TWO, "j1")
    assert await admission.run(task, executor=TWO) == [2]
    kinds = (step, evaluated, checkpoint)
    old = [*(kind(task, 1, 1) for kind in kinds), finished(task, 1, "k"), failed(task, 1), released(task, 1)]
    rows = admission.num_rows()
    assert await admission.commit(*old) == ["STALE"] * 6
    assert await admission.commit(step(task, 2, 1)) == ["STALE"]  # the attempt is right, the executor is not
    assert await admission.commit(step(task, 3, 1), executor=TWO) == ["STALE"]
    assert await admission.commit(step("tenants/acme/tasks/none", 1, 1)) == ["STALE"]
    assert admission.num_rows() == rows and await admission.state(task) == "RUNNING"
    assert await admission.commit(step(task, 2, 1), executor=TWO) == ["COMMITTED"]


async def test_a_resumed_attempt_repeats_no_step(admission: Admission) -> None:
    task = await running(admission)
    await admission.commit(*(step(task, 1, i, loss=i) for i in (1, 2, 3)), checkpoint(task, 1, 2))
    await admission.commit(released(task, 1))
    assert await admission.state(task) == "QUEUED"
    assert await admission.run(task) == [2]
    again = [step(task, 2, 3, loss=99), checkpoint(task, 2, 2), step(task, 2, 4, loss=4)]
    assert await admission.commit(*again) == ["DUPLICATE", "DUPLICATE", "COMMITTED"]
    await admission.commit(finished(task, 2))
    done = [e.step_done for e in await admission.events(task) if e.HasField("step_done")]
    assert [(d.step, d.loss) for d in done] == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert (await snapshot(admission)).plan_version == 2


async def test_a_failure_is_reported_unchanged(admission: Admission) -> None:
    task = await running(admission)
    assert await admission.commit(failed(task, 1), failed(task, 1)) == ["COMMITTED", "DUPLICATE"]
    answer = (await admission.tenant().GetTask(pb.GetTaskRequest(name=task))).task
    assert answer.failure == failed(task, 1).failed and answer.state == task_pb2.TASK_STATE_FAILED
    assert (await admission.events(task))[-1].state_changed.failure == answer.failure
    assert not (await snapshot(admission)).tasks


async def test_a_batch_counts_whole_or_not_at_all(admission: Admission) -> None:
    first, second = await create(admission, 2)
    await admission.run(first, second)
    with refused(*LEASE_LOST):
        await admission.commit(step(first, 1, 1), step(second, 1, 1), lease_term=2)
    rows = admission.num_rows()
    # A RUNNING task cannot have been cancelled: whatever such a result is answered, its neighbours are not torn apart.
    try:
        verdicts = await admission.commit(step(first, 1, 1), finished(second, 1, cancelled=True), step(first, 1, 2))
    except grpc.RpcError:
        assert admission.num_rows() == rows
    else:
        assert verdicts[0] == verdicts[2] == "COMMITTED" and await admission.state(second) == "CANCELLED"


async def test_a_lease_belongs_to_one_incarnation(admission: Admission) -> None:
    task = await running(admission)
    renewed = await admission.ledger().PutLease(lease(executor(lease_term=1)))
    assert renewed.lease_term == 1 and await admission.state(task) == "RUNNING"
    assert await admission.register(incarnation="i2") == 2  # takes the name over, and its attempts back
    assert await admission.state(task) == "QUEUED"
    for late in (
        executor(lease_term=1),
        executor(),
        executor(lease_term=2),
        executor(incarnation="i2", lease_term=1),
    ):
        with refused(*LEASE_LOST):
            await admission.ledger().PutLease(lease(late))
    with refused(*LEASE_LOST):
        await admission.commit(step(task, 1, 1), lease_term=1)
    assert await admission.commit(step(task, 1, 1), lease_term=2) == ["STALE"]
    await admission.ledger().EndLease(ledger_pb2.EndLeaseRequest(executor=ONE, incarnation="i1"))  # ended long ago
    assert [e.lease_term for e in (await snapshot(admission)).executors] == [2]
    assert await admission.run(task, lease_term=2) == [3]


async def test_a_lease_that_ran_out_is_lost_and_its_tasks_go_back(admission: Admission) -> None:
    task = await running(admission)
    admission.clock.seconds += 29
    await admission.ledger().PutLease(lease(executor(lease_term=1)))
    admission.clock.seconds += 29
    assert await admission.commit(step(task, 1, 1)) == ["COMMITTED"]
    admission.clock.seconds += 2
    for call in (
        admission.commit(step(task, 1, 2)),
        admission.ledger().CommitPlan(plan(2)),
        admission.ledger().PutLease(lease(executor(lease_term=1))),
    ):
        with refused(*LEASE_LOST):
            await call
    seen = await snapshot(admission)
    assert not seen.executors
    assert [(t.executor, t.task.state) for t in seen.tasks] == [("", task_pb2.TASK_STATE_QUEUED)]
    assert await admission.register() == 2  # the same incarnation may come back
    assert await admission.run(task, lease_term=2) == [3]


async def test_a_restart_keeps_everything_and_gives_leases_their_time_again(admission: Admission) -> None:
    first, second = await create(admission, 2)
    await admission.run(first)
    await admission.commit(step(first, 1, 1), checkpoint(first, 1, 1))
    admission.clock.seconds += 20
    before = await snapshot(admission)
    await admission.restart()
    after = await snapshot(admission)
    for seen in (before, after):
        for entry in seen.executors:
            entry.ClearField("lease_expire_time")
    assert after == before
    admission.clock.seconds += 20
    assert await admission.commit(step(first, 1, 2)) == ["COMMITTED"]
    with refused(*SUPERSEDED):
        await admission.ledger().CommitPlan(plan(1, (second, 0)))
    admission.clock.seconds += 20
    assert not (await snapshot(admission)).executors


async def test_attempts_are_revoked_by_name_or_all(admission: Admission) -> None:
    tasks = await create(admission, 3)
    await admission.run(*tasks)

    async def revoke(*names: str, name: str = ONE) -> int:
        request = ledger_pb2.RevokeAttemptsRequest(executor=name, tasks=names, reason="its stream broke")
        count: int = (await admission.ledger().RevokeAttempts(request)).num_revoked
        return count

    assert await revoke(tasks[0], name=TWO) == 0
    assert await revoke(tasks[0], "tenants/acme/tasks/none") == 1
    assert await admission.commit(*(step(task, 1, 1) for task in tasks)) == ["STALE", "COMMITTED", "COMMITTED"]
    assert await revoke() == 2
    assert await revoke() == 0
    assert [await admission.state(task) for task in tasks] == ["QUEUED"] * 3
    assert [t.task.attempt for t in (await snapshot(admission)).tasks] == [2, 2, 2]


async def test_a_cancelled_task_that_loses_its_executor_is_exported_by_another(admission: Admission) -> None:
    task = await running(admission)
    await admission.commit(step(task, 1, 1), checkpoint(task, 1, 1))
    await admission.tenant().CancelTask(pb.CancelTaskRequest(name=task))
    await admission.ledger().EndLease(ledger_pb2.EndLeaseRequest(executor=ONE, incarnation="i1"))
    assert await admission.state(task) == "CANCELLING"
    await admission.register(TWO, "j1")
    assert await admission.run(task, executor=TWO) == [3]
    assert await admission.state(task) == "CANCELLING"
    assert await admission.commit(finished(task, 3, "k", cancelled=True), executor=TWO) == ["COMMITTED"]
    assert await states(admission, task) == ["QUEUED", "RUNNING", "CANCELLING", "CANCELLED"]


async def test_a_cancel_that_races_the_end_leaves_one_end(admission: Admission) -> None:
    draw, tasks = random.Random(5), await create(admission, 10)
    await admission.run(*tasks)

    async def race(task: str, end: Any) -> list[Any]:
        calls = [admission.tenant().CancelTask(pb.CancelTaskRequest(name=task)), admission.commit(end),
                 admission.commit(end)]  # fmt: skip
        draw.shuffle(calls)
        return await asyncio.gather(*calls, return_exceptions=True)

    ends = itertools.cycle((finished, failed))
    answers = await asyncio.gather(*(race(task, end(task, 1)) for task, end in zip(tasks, ends, strict=False)))
    for task, outcome in zip(tasks, answers, strict=True):
        verdicts = sorted(verdict for answer in outcome if isinstance(answer, list) for verdict in answer)
        assert verdicts == ["COMMITTED", "DUPLICATE"]
        seen = await states(admission, task)
        assert seen[:2] == ["QUEUED", "RUNNING"] and seen[-1] in ("SUCCEEDED", "FAILED")
        assert seen[2:-1] in ([], ["CANCELLING"])
        for answer in outcome:
            if isinstance(answer, grpc.RpcError):
                assert answer.code() is grpc.StatusCode.FAILED_PRECONDITION and "CANCELLING" not in seen


async def test_a_fall_back_to_an_earlier_checkpoint_is_reported_to_the_tenant(
    admission: Admission,
) -> None:
    task = await running(admission)
    await admission.commit(*(checkpoint(task, 1, number) for number in (2, 4)))
    fell_back = event_pb2.CheckpointCommitted(step=2, manifest_key=f"{task}/checkpoints/00000002-1")
    resumed = plan_pb2.TaskResumed(checkpoint=fell_back, message="the checkpoint of step 4 cannot be read")
    result = plan_pb2.TaskResult(task=task, attempt=1, resumed=resumed)
    assert await admission.commit(result, result) == ["COMMITTED", "DUPLICATE"]
    (seen,) = (await snapshot(admission)).tasks
    assert seen.checkpoint == fell_back and seen.task.progress.checkpoint_step == 2
    assert await admission.commit(checkpoint(task, 1, 3)) == ["COMMITTED"]  # counts again: it is after that one
    await admission.commit(finished(task, 1))
    changes = [event.state_changed for event in await admission.events(task) if event.HasField("state_changed")]
    assert [(change.message, change.state) for change in changes][2] == (resumed.message, task_pb2.TASK_STATE_RUNNING)
