"""A watch shows every event once, in order, from any sequence number, whatever happens meanwhile."""

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import grpc
import pytest

from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import event_pb2, ledger_pb2, plan_pb2, task_pb2
from services.admission.ledger.ledger import Ledger
from services.admission.store import tasks
from tests.services.admission.admission_mesh import (
    DATABASES,
    TIMEOUT_SECONDS,
    Admission,
    checkpoint,
    executor,
    finished,
    lease,
    refused,
    step,
)

both = pytest.mark.parametrize("database_url", DATABASES, indirect=True)
ONE = "executors/one"


async def running_task(admission: Admission) -> str:
    task = (await admission.create((await admission.upload()).name)).name
    assert await admission.run(task) == [1]
    return task


class Watcher:
    """Reads a task's events; watches again from the last sequence number whenever the stream breaks."""

    def __init__(self, admission: Admission, task: str, after: int = 0) -> None:
        self.events: list[event_pb2.TaskEvent] = []
        self.num_streams = 0
        self._admission, self._task, self._last = admission, task, after
        self._changed = asyncio.Condition()
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while True:
            self.num_streams += 1
            request = pb.WatchTaskRequest(name=self._task, after_sequence=self._last)
            try:
                async for answer in self._admission.tenant().WatchTask(request):
                    async with self._changed:
                        self.events.append(answer.event)
                        self._last = answer.event.sequence
                        self._changed.notify_all()
                return
            except grpc.RpcError as error:
                assert error.code() is grpc.StatusCode.UNAVAILABLE, error
                await self._admission.started.wait()

    async def has(self, sequence: int) -> None:
        async with asyncio.timeout(TIMEOUT_SECONDS), self._changed:
            await self._changed.wait_for(lambda: self._last >= sequence)

    async def has_state(self, state: str) -> None:
        number = task_pb2.TaskState.Value(f"TASK_STATE_{state}")
        async with asyncio.timeout(TIMEOUT_SECONDS), self._changed:
            await self._changed.wait_for(lambda: any(e.state_changed.state == number for e in self.events))

    async def ended(self) -> list[int]:
        """Wait for the end of the stream; return the sequence numbers seen."""
        await asyncio.wait_for(self._reading, TIMEOUT_SECONDS)
        return [event.sequence for event in self.events]

    async def close(self) -> None:
        self._reading.cancel()
        with suppress(asyncio.CancelledError):
            await self._reading


@both
async def test_watchers_from_any_sequence_see_each_event_once_while_they_are_committed(admission: Admission) -> None:
    task = await running_task(admission)  # events 1 and 2
    draw, num_steps = random.Random(3), 40
    watchers: list[tuple[int, Watcher]] = [(0, Watcher(admission, task)), (1, Watcher(admission, task, 1))]
    number = 0
    while number < num_steps:
        batch = [step(task, 1, number + 1 + i) for i in range(draw.randint(1, 6))]
        await admission.commit(*batch)
        number += len(batch)
        after = draw.randint(0, 2 + number + 5)  # past the end too
        watchers.append((after, Watcher(admission, task, after)))
    await admission.commit(finished(task, 1))
    last = 2 + number + 1
    for after, watcher in watchers:
        assert await watcher.ended() == list(range(after + 1, last + 1))
        assert watcher.num_streams == 1
    losses = [e.step_done.step for e in watchers[0][1].events if e.WhichOneof("event") == "step_done"]
    assert losses == list(range(1, number + 1))


async def test_the_history_is_more_than_one_page(admission: Admission) -> None:
    task = await running_task(admission)
    for start in range(0, 600, 200):
        await admission.commit(*(step(task, 1, start + i + 1) for i in range(200)))
    await admission.commit(finished(task, 1))
    assert [event.sequence for event in await admission.events(task)] == list(range(1, 604))
    assert [event.sequence for event in await admission.events(task, 258)] == list(range(259, 604))
    for after in (603, 604, 2**63 - 1):
        assert await admission.events(task, after) == []
    assert len(await admission.events(task, -5)) == 603


async def test_a_sequence_beyond_the_end_waits_for_it(admission: Admission) -> None:
    task = await running_task(admission)
    watcher = Watcher(admission, task, after=4)
    await admission.commit(step(task, 1, 1), step(task, 1, 2))
    await admission.commit(step(task, 1, 3))
    await watcher.has(5)
    assert [event.step_done.step for event in watcher.events] == [3]
    await watcher.close()


@both
async def test_watchers_go_on_over_a_restart(admission: Admission) -> None:
    task = await running_task(admission)
    watchers = [Watcher(admission, task) for _ in range(3)]
    for restart in range(3):
        await admission.commit(step(task, 1, 2 * restart + 1))
        await watchers[0].has(3 + 2 * restart)
        await admission.restart()
        await admission.commit(step(task, 1, 2 * restart + 2))
    await admission.commit(finished(task, 1))
    for watcher in watchers:
        assert await watcher.ended() == list(range(1, 10))
        assert watcher.num_streams >= 2


async def test_a_commit_whose_caller_is_gone_meanwhile_reaches_the_watchers(
    admission: Admission, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Watchers once waited forever when the scheduler was killed while admission stored its last results."""
    task = await running_task(admission)
    watcher = Watcher(admission, task)
    await watcher.has(2)
    began, may_go_on = threading.Event(), threading.Event()
    commit = Ledger.commit_results

    def slowly(*arguments: Any) -> Any:
        began.set()
        assert may_go_on.wait(TIMEOUT_SECONDS)
        return commit(*arguments)

    monkeypatch.setattr(Ledger, "commit_results", slowly)
    request = ledger_pb2.CommitResultsRequest(executor=ONE, lease_term=1, results=[finished(task, 1)])
    call = admission.ledger().CommitResults(request)
    committing = asyncio.ensure_future(call)
    assert await asyncio.to_thread(began.wait, TIMEOUT_SECONDS)
    call.cancel()
    with suppress(asyncio.CancelledError):
        await committing
    await admission.state(task)  # a call later than the cancellation on the same connection: the server has heard of it
    may_go_on.set()
    assert await watcher.ended() == [1, 2, 3]


async def test_a_watcher_that_does_not_read_holds_no_memory_and_misses_nothing(
    admission: Admission, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watcher reads one of 24 MB of events; the service reads a few more from its database, then none."""
    num_events, task = 3000, await running_task(admission)
    with admission.database.write() as connection:
        for _ in range(num_events - 2):
            tasks.append_message(connection, tasks.get_row(connection, task), "x" * 8000)
    num_read, right = 0, tasks.list_events

    def counted(*arguments: Any) -> list[event_pb2.TaskEvent]:
        nonlocal num_read
        events = right(*arguments)
        num_read += len(events)
        return events

    monkeypatch.setattr(tasks, "list_events", counted)
    slow = admission.tenant().WatchTask(pb.WatchTaskRequest(name=task), timeout=240)
    seen = [(await anext(aiter(slow))).event.sequence]
    before = -1
    while before != num_read:  # until it stands still
        before = num_read
        await asyncio.sleep(0.5)
    assert 1 <= num_read < num_events // 2
    others = Watcher(admission, task)
    await others.has(num_events)
    assert num_read < num_events * 3 // 2  # the slow one's share did not grow by that
    await admission.commit(finished(task, 1))
    assert await others.ended() == list(range(1, num_events + 2))
    seen += [answer.event.sequence async for answer in slow]
    assert seen == list(range(1, num_events + 2))


async def test_a_stopping_service_sends_watchers_away_with_unavailable(admission: Admission) -> None:
    task = await running_task(admission)
    watch = admission.tenant().WatchTask(pb.WatchTaskRequest(name=task, after_sequence=1))
    assert (await watch.read()).event.sequence == 2
    changes = admission.ledger().WatchChanges(ledger_pb2.WatchChangesRequest())
    await changes.read()
    admission.notifier.close()
    for stream in (watch, changes):
        with refused(grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE"):
            await stream.read()


async def end_lease(admission: Admission) -> None:
    await admission.ledger().EndLease(ledger_pb2.EndLeaseRequest(executor=ONE, incarnation="i1"))


async def let_lease_expire(admission: Admission) -> None:
    admission.clock.seconds += 31
    await admission.ledger().GetSnapshot(ledger_pb2.GetSnapshotRequest())


async def let_lease_expire_and_renew_another(admission: Admission) -> None:
    await admission.register("executors/two")
    admission.clock.seconds += 20
    await admission.ledger().PutLease(lease(executor("executors/two", lease_term=1)))
    admission.clock.seconds += 20
    await admission.ledger().PutLease(lease(executor("executors/two", lease_term=1)))
    await admission.ledger().GetSnapshot(ledger_pb2.GetSnapshotRequest())


async def restart_executor(admission: Admission) -> None:
    await admission.ledger().PutLease(lease(executor(incarnation="i2")))


async def revoke_all(admission: Admission) -> None:
    request = ledger_pb2.RevokeAttemptsRequest(executor=ONE, reason="lost")
    assert (await admission.ledger().RevokeAttempts(request)).num_revoked == 1


LOSSES = [end_lease, let_lease_expire, let_lease_expire_and_renew_another, restart_executor, revoke_all]


@pytest.mark.parametrize("lose", LOSSES, ids=lambda lose: lose.__name__)
async def test_watchers_hear_when_a_task_loses_its_executor(
    admission: Admission, lose: Callable[[Admission], Awaitable[None]]
) -> None:
    """The task is QUEUED again; a task that was being cancelled with nothing trained ends, and its watches do, too."""
    task = await running_task(admission)
    watcher = Watcher(admission, task)
    await watcher.has(2)
    await admission.tenant().CancelTask(pb.CancelTaskRequest(name=task))
    await watcher.has_state("CANCELLING")
    await lose(admission)
    assert await watcher.ended() == [1, 2, 3, 4]
    assert await admission.state(task) == "CANCELLED"


@pytest.mark.parametrize("lose", LOSSES, ids=lambda lose: lose.__name__)
async def test_a_lost_executor_is_worth_a_scheduling_cycle(
    admission: Admission, lose: Callable[[Admission], Awaitable[None]]
) -> None:
    task = await running_task(admission)
    changes = admission.ledger().WatchChanges(ledger_pb2.WatchChangesRequest())
    assert (await changes.read()).revision == 1
    await lose(admission)
    async with asyncio.timeout(TIMEOUT_SECONDS):
        assert (await changes.read()).revision == 2
    changes.cancel()
    assert await admission.state(task) == "QUEUED"


async def test_scheduling_is_notified_of_arrivals_and_ends_but_not_of_steps(admission: Admission) -> None:
    dataset = (await admission.upload()).name
    changes = admission.ledger().WatchChanges(ledger_pb2.WatchChangesRequest())

    async def is_notified() -> None:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await changes.read()

    await is_notified()
    task = (await admission.create(dataset)).name
    await is_notified()
    await admission.run(task)
    await admission.commit(step(task, 1, 1), checkpoint(task, 1, 1))
    unheard = asyncio.ensure_future(changes.read())
    await admission.commit(step(task, 1, 2))
    assert not unheard.done()
    released = plan_pb2.TaskResult(task=task, attempt=1, released=plan_pb2.TaskReleased(reason="drain"))
    await admission.commit(released)
    await asyncio.wait_for(unheard, TIMEOUT_SECONDS)
    await admission.tenant().CancelTask(pb.CancelTaskRequest(name=task))
    await is_notified()
    changes.cancel()


async def test_a_watcher_that_leaves_is_forgotten(admission: Admission) -> None:
    task = await running_task(admission)
    watch = admission.tenant().WatchTask(pb.WatchTaskRequest(name=task))
    assert (await watch.read()).event.sequence == 1
    assert task in admission.notifier._waiters
    watch.cancel()
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while task in admission.notifier._waiters:
            await admission.state(task)
