"""Replicas of admission on one PostgreSQL: notices of changes reach all, one leads the ledger, a superseded leader
commits nothing. Polling is switched off, so that notices come by NOTIFY or by a new session."""

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import grpc
import pytest
import sqlalchemy as sa

from engine.errors import UnavailableError
from muxtune.v1 import admission_pb2 as pb
from services.admission.ledger import replicas as replicas_module
from services.admission.ledger.fencing import FencedDatabase
from services.admission.ledger.replicas import SESSION, Replicas
from services.admission.store import postgresql
from services.admission.store.change_notifier import ANY_CHANGE, ChangeNotifier
from services.admission.store.database import Database
from services.concurrency.threads import Threads
from tests.services.admission.admission_mesh import (
    TEN_ROWS,
    Admission,
    Alignment,
    dataset_parts,
    finished,
    step,
)
from tests.services.admission.postgres import Postgres

pytestmark = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
SECONDS = 20.0
TASK = "tenants/acme/tasks/t"


@pytest.fixture(autouse=True)
def no_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas_module, "_POLL_SECONDS", 1e9)
    monkeypatch.setattr(replicas_module, "_HEARTBEAT_SECONDS", 0.05)


class Replica:
    """Runs one replica without its servers; `terms` are those in which it led the ledger."""

    def __init__(self, url: str) -> None:
        self.database, self.notifier = Database(url), ChangeNotifier()
        self.replicas = Replicas(self.database, self.notifier, Threads("ledger", 1))
        self.terms: list[int] = []
        self.is_leading = asyncio.Event()
        self.fence: FencedDatabase | None = None
        self._may_go_on = asyncio.Event()

    async def lead(self) -> None:
        fence = await asyncio.to_thread(FencedDatabase, self.database)
        self.terms.append(fence.term)
        self.fence = fence
        self.is_leading.set()
        try:
            while await asyncio.to_thread(fence.is_current):  # noqa: ASYNC110  # nothing else reports it
                await asyncio.sleep(0.05)
        finally:
            self.is_leading.clear()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Replica"]:
        works = [
            asyncio.create_task(self.replicas.run(self.lead)),
            asyncio.create_task(self.replicas.publish_changes()),
        ]
        try:
            yield self
        finally:
            for work in works:
                work.cancel()
            await asyncio.gather(*works, return_exceptions=True)
            self.database.close()


@pytest.fixture
async def pair(database_url: str) -> AsyncIterator[list[Replica]]:
    """Run two replicas that listen; the first one leads the ledger."""
    database = Database(database_url)
    database.migrate()
    database.close()
    async with AsyncExitStack() as stack:
        replicas = []
        for _ in range(2):
            replicas.append(await stack.enter_async_context(Replica(database_url).running()))
            async with asyncio.timeout(SECONDS):
                await replicas[0].is_leading.wait()
        await _until(lambda: _num_listening(database_url) == 2)
        yield replicas


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not await asyncio.to_thread(holds):  # noqa: ASYNC110  # the server does not notify of it
            await asyncio.sleep(0.02)


def _sessions(url: str) -> list[int]:
    """Return the server's process ids of the sessions that listen."""
    database = Database(url)
    try:
        with database.read() as connection:
            query = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = :name"
            return list(connection.execute(sa.text(query), {"name": SESSION}).scalars())
    finally:
        database.close()


def _num_listening(url: str) -> int:
    return len(_sessions(url))


def _cut(url: str, pids: list[int]) -> None:
    database = Database(url)
    with database.read() as connection:
        for pid in pids:
            connection.execute(sa.text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
    database.close()


async def test_a_change_reaches_only_the_subscribers_of_its_task_on_the_other_replica(pair: list[Replica]) -> None:
    sender, receiver = pair
    with (
        receiver.notifier.subscribe(TASK) as changed,
        receiver.notifier.subscribe(TASK + "2") as other,
        receiver.notifier.subscribe(ANY_CHANGE) as anything,
    ):
        for _ in range(5):  # a replica wakes all when it connects and from time to time, but not five times in a row
            for event in (changed, other, anything):
                event.clear()
            sender.notifier.notify_tasks([TASK])
            await asyncio.wait_for(changed.wait(), SECONDS)
            if not (was_more_woken := other.is_set() or anything.is_set()):
                break
        assert not was_more_woken
        sender.notifier.notify([TASK + "2"])
        await asyncio.wait_for(anything.wait(), SECONDS)
        await asyncio.wait_for(other.wait(), SECONDS)


@pytest.mark.parametrize("num_names", [900, 5000])
async def test_many_changes_at_once_reach_all_subscribers(pair: list[Replica], num_names: int) -> None:
    sender, receiver = pair
    names = [f"tenants/{'a' * 60}/tasks/t-{i}" for i in range(num_names)]
    with (
        receiver.notifier.subscribe(names[0]) as first,
        receiver.notifier.subscribe(names[num_names // 2]) as middle,
        receiver.notifier.subscribe(names[-1]) as last,
    ):
        sender.notifier.notify_tasks(names)
        for changed in (first, middle, last):
            await asyncio.wait_for(changed.wait(), SECONDS)


async def test_invalid_names_do_not_stop_notifications(pair: list[Replica]) -> None:
    sender, receiver = pair
    for hostile in ("\0", "a\nb", "t" * 100_000, "\ud800", "é" * 200, "'; DROP TABLE tasks; --"):
        sender.notifier.notify_tasks([hostile])
    with receiver.notifier.subscribe(TASK) as changed:
        sender.notifier.notify_tasks([TASK])
        await asyncio.wait_for(changed.wait(), SECONDS)


async def test_a_replica_that_lost_its_session_wakes_all_subscribers(pair: list[Replica], database_url: str) -> None:
    first, second = pair
    with first.notifier.subscribe(TASK) as one, second.notifier.subscribe(ANY_CHANGE) as another:
        _cut(database_url, _sessions(database_url))
        for changed in (one, another):
            await asyncio.wait_for(changed.wait(), SECONDS)


async def test_one_keeps_the_ledger_and_another_takes_it_when_its_session_is_cut(
    pair: list[Replica], database_url: str
) -> None:
    """Twenty times: soon one replica leads again and its writes succeed; no two led in one term."""
    draw = random.Random(5)
    for _ in range(20):
        _cut(database_url, draw.sample(sessions := _sessions(database_url), k=min(len(sessions), draw.randint(1, 2))))
        await _until(lambda: any(replica.is_leading.is_set() and _is_current(replica) for replica in pair))
    async with asyncio.timeout(SECONDS):  # each knows of the leader, for its overall health
        while [replica.replicas.sees_other_leader for replica in pair].count(True) != 1:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    terms = [term for replica in pair for term in replica.terms]
    assert len(set(terms)) == len(terms) > 5 and all(replica.terms == sorted(replica.terms) for replica in pair)


def _is_current(replica: Replica) -> bool:
    with suppress(UnavailableError):
        return replica.fence is not None and replica.fence.is_current()
    return False


async def test_a_leader_whose_term_was_taken_by_one_that_was_slow_begins_again(
    pair: list[Replica], database_url: str
) -> None:
    late = await asyncio.to_thread(FencedDatabase, Database(database_url))
    await _until(lambda: any(replica.terms and replica.terms[-1] > late.term for replica in pair))
    assert not late.is_current()


async def test_a_leader_that_stops_hands_the_ledger_to_another_replica(database_url: str, pair: list[Replica]) -> None:
    async with Replica(database_url).running() as third:
        assert not third.is_leading.is_set()
    assert pair[0].is_leading.is_set() and not pair[1].terms


async def test_a_task_created_at_one_is_watched_to_its_end_at_another(
    admission: Admission, alignment: Alignment, postgres: Postgres, tmp_path: Path
) -> None:
    """Sessions are cut all the time: missed notices are made good when the session is back."""
    other = Admission(admission.database_url, tmp_path / "artifacts", alignment.address)
    async with AsyncExitStack() as stack:
        await other.start()
        stack.push_async_callback(other.close)
        for one in (admission, other):
            replicas, idle = Replicas(one.database, one.notifier, Threads("ledger", 1)), asyncio.Event()
            for work in (replicas.run(lambda idle=idle: idle.wait()), replicas.publish_changes()):  # type: ignore[misc]
                stack.callback(asyncio.create_task(work).cancel)
        task = (await admission.create((await admission.upload()).name)).name
        watch, events = other.with_token(admission._keys["acme"]), []

        async def read() -> None:
            async for answer in watch.WatchTask(pb.WatchTaskRequest(name=task)):
                events.append(answer.event.sequence)

        reading = asyncio.create_task(read())
        await _until(lambda: len(events) == 1)
        for _ in range(5):
            await asyncio.to_thread(_cut, admission.database_url, _sessions(admission.database_url))
        await other.run(task)  # the other made its ledger last
        for number in range(1, 20):
            await other.commit(step(task, 1, number))
            if number % 4 == 0:
                await asyncio.to_thread(_cut, admission.database_url, _sessions(admission.database_url))
        await other.commit(finished(task, 1))
        await asyncio.wait_for(reading, SECONDS)
        assert events == list(range(1, 23))


async def test_bytes_that_another_process_is_removing_are_not_taken_for_a_datasets(
    admission: Admission, alignment: Alignment, tmp_path: Path
) -> None:
    """One replica deletes a dataset while the other receives it, many times: acknowledged datasets have their bytes."""
    other = Admission(admission.database_url, tmp_path / "artifacts", alignment.address)
    await other.start()
    try:
        admission.tenant()
        calls = [one.with_token(admission._keys["acme"]) for one in (admission, other)]
        num_refused = 0
        for turn in range(40):
            deleter, receiver = random.Random(turn).sample(calls, 2)
            first = (await deleter.UploadDataset(dataset_parts(TEN_ROWS, f"a-{turn}"))).dataset
            uploading = asyncio.ensure_future(receiver.UploadDataset(dataset_parts(TEN_ROWS, f"b-{turn}")))
            deleting = asyncio.ensure_future(deleter.DeleteDataset(pb.DeleteDatasetRequest(name=first.name)))
            done, _ = await asyncio.gather(uploading, deleting, return_exceptions=True)
            if isinstance(done, grpc.RpcError):
                assert done.code() is grpc.StatusCode.UNAVAILABLE, done
                num_refused += 1
                continue
            assert admission.artifacts.exists(f"tenants/acme/datasets/{first.sha256}.jsonl")
            await deleter.DeleteDataset(pb.DeleteDatasetRequest(name=done.dataset.name))
        print(f"{num_refused} of 40 were to be sent again")
    finally:
        await other.close()


def test_a_process_that_stops_within_a_transaction_does_not_block_others(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgresql, "_IDLE_TRANSACTION_SECONDS", 1)
    paused, other = Database(database_url), Database(database_url)
    paused.migrate()
    may_go_on, began, ended = threading.Event(), threading.Event(), []

    def write() -> None:
        try:
            with paused.write() as connection:
                connection.execute(sa.text("UPDATE leaderships SET term = 7"))
                began.set()
                may_go_on.wait(SECONDS)
        except UnavailableError as error:
            ended.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    assert began.wait(SECONDS)
    assert FencedDatabase(other).term == 1  # waits until the server has ended the other's session
    may_go_on.set()
    thread.join(SECONDS)
    assert len(ended) == 1
    for database in (paused, other):
        with database.read() as connection:
            assert connection.execute(sa.text("SELECT max(term) FROM leaderships")).scalar_one() == 1
        database.close()
