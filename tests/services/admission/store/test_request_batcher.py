"""Reads and changes of many callers share a transaction and do not affect each other, on both databases."""

import asyncio
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from engine.errors import NotFoundError, UnavailableError
from services.admission.store.database import Database
from services.admission.store.group_commit import GroupCommit
from services.admission.store.tables import plans
from tests.services.admission.admission_mesh import BOTH_DATABASES, TIMEOUT_SECONDS

ROOT = Path(__file__).parents[4]
both = pytest.mark.parametrize("database_url", BOTH_DATABASES, indirect=True)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    opened = Database(database_url)
    opened.migrate()
    yield opened
    await asyncio.to_thread(opened.close)


def versions(connection: sa.Connection) -> list[int]:
    return list(connection.execute(sa.select(plans.c.version).order_by(plans.c.version)).scalars())


def read_versions(database: Database) -> list[int]:
    with database.read() as connection:
        return versions(connection)


def put(connection: sa.Connection, version: int) -> int:
    connection.execute(sa.insert(plans).values(version=version, executor="executors/one", created=0))
    return version


def put_later(version: int) -> Callable[[sa.Connection], int]:
    return lambda connection: put(connection, version)


@contextmanager
def count_commits(database: Database) -> Iterator[list[int]]:
    commits: list[int] = []

    def note(_connection: Any) -> None:
        commits.append(1)

    sa.event.listen(database._engine, "commit", note)
    yield commits
    sa.event.remove(database._engine, "commit", note)


class HeldCall:
    """A change or a read that begins and waits to be released; calls made meanwhile form one batch."""

    def __init__(self) -> None:
        self._loop, self._begun, self._go = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def __call__(self, connection: sa.Connection) -> str:
        connection.execute(sa.select(1))
        return self.hold()

    def hold(self) -> str:
        self._loop.call_soon_threadsafe(self._begun.set)
        assert self._go.wait(TIMEOUT_SECONDS)
        return "held"

    async def begun(self) -> None:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await self._begun.wait()

    def release(self) -> None:
        self._go.set()


@contextmanager
def hold_next_commit(database: Database) -> Iterator[HeldCall]:
    """Hold the next transaction just before it commits."""
    held = HeldCall()
    sa.event.listen(database._engine, "commit", lambda _connection: held.hold(), once=True)
    yield held
    held.release()


async def commit_behind_another(database: Database, rest: list[Any]) -> list[Any]:
    """Return the outcomes of `rest`, which all wait while another call commits."""
    with hold_next_commit(database) as held:
        first = asyncio.ensure_future(database.commit(lambda connection: connection.execute(sa.select(1)).scalar()))
        await held.begun()
        waiting = [asyncio.ensure_future(one) for one in rest]
        await asyncio.sleep(0)  # each has handed its work in
    assert await first == 1
    return list(await asyncio.gather(*waiting, return_exceptions=True))


@both
@pytest.mark.parametrize("seed", range(3))
async def test_failed_changes_leave_nothing_and_later_changes_see_earlier_ones(database: Database, seed: int) -> None:
    """A list is the model: a change sees what earlier changes left."""
    draw, model, expected = random.Random(seed), list[int](), list[Any]()
    changes: list[Any] = []
    for version in range(1, 41):
        failure = draw.choice(
            [None, None, None, NotFoundError("mine"), ZeroDivisionError("mine"), sa.exc.IntegrityError]
        )

        def change(connection: sa.Connection, version: int = version, failure: Any = failure) -> list[int]:
            before = versions(connection)
            put(connection, version)
            if failure is sa.exc.IntegrityError:
                put(connection, version)
            elif failure is not None:
                raise failure
            return before

        changes.append(database.commit(change))
        expected.append(list(model) if failure is None else failure)
        if failure is None:
            model.append(version)
    with count_commits(database) as commits:
        outcomes = await commit_behind_another(database, changes)
    assert len(commits) == 2
    for outcome, right in zip(outcomes, expected, strict=True):
        assert isinstance(outcome, right) if isinstance(right, type) else outcome == right
    assert read_versions(database) == model


@both
async def test_each_caller_gets_its_own_answer_and_a_failed_read_affects_no_other(database: Database) -> None:
    await database.commit(put_later(1))

    def wrong(connection: sa.Connection) -> None:
        connection.execute(sa.text("SELECT nothing FROM nowhere"))

    queries = [
        database.query(wrong if n % 3 == 0 else lambda connection, n=n: (n, versions(connection))) for n in range(30)
    ]
    held = HeldCall()
    first = asyncio.ensure_future(database.query(held)) if database.is_shared else None
    if first is not None:
        await held.begun()
    waiting = [asyncio.ensure_future(one) for one in queries]
    await asyncio.sleep(0)  # each has asked
    held.release()
    assert first is None or await first == "held"
    outcomes = list(await asyncio.gather(*waiting, return_exceptions=True))
    for n, outcome in enumerate(outcomes):
        assert isinstance(outcome, UnavailableError | sa.exc.DBAPIError) if n % 3 == 0 else outcome == (n, [1])


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_a_read_that_hangs_blocks_no_change_and_no_event_loop(database: Database) -> None:
    await database.commit(put_later(1))
    held = HeldCall()
    hung = asyncio.ensure_future(database.query(held))
    await held.begun()
    with database.read() as connection:  # nor does an open cursor
        cursor = connection.execute(sa.select(plans.c.version))
        assert [await database.commit(put_later(version)) for version in (2, 3)] == [2, 3]
        assert cursor.scalars().all() == [1]
    assert not hung.done() and read_versions(database) == [1, 2, 3]
    held.release()
    assert await hung == "held"


@both
async def test_writers_in_threads_get_their_turn_among_many_changes(database: Database) -> None:
    done = False

    async def flood(start: int) -> int:
        number = start
        while not done:
            await database.commit(put_later(number))
            number += 100
        return (number - start) // 100

    def write(version: int) -> None:
        with database.write() as connection:
            put(connection, version)

    floods = [asyncio.ensure_future(flood(start)) for start in range(1, 9)]
    for version in (10**6, 10**6 + 1, 10**6 + 2):
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await asyncio.to_thread(write, version)
    done = True
    num_flooded = sum(await asyncio.gather(*floods))
    assert len(read_versions(database)) == num_flooded + 3


@both
async def test_a_caller_cancelled_before_its_turn_changes_nothing_and_later_is_notified(database: Database) -> None:
    notified = list[Any]()

    def fails(connection: sa.Connection) -> None:
        put(connection, 2)
        raise NotFoundError("mine")

    with hold_next_commit(database) as held:
        begun = asyncio.ensure_future(database.commit(put_later(3), notified.append))
        await held.begun()
        gone = asyncio.ensure_future(database.commit(put_later(1), notified.append))
        failed = asyncio.ensure_future(database.commit(fails, notified.append))
        await asyncio.sleep(0)
        for call in (begun, gone):
            call.cancel()
        await asyncio.gather(begun, gone, return_exceptions=True)
    with pytest.raises(NotFoundError):
        await failed
    assert await database.commit(versions) == [3] == notified


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_a_connection_that_breaks_fails_all_of_its_transaction(
    database: Database, database_url: str, request: pytest.FixtureRequest
) -> None:
    postgres = request.getfixturevalue("postgres")

    def breaks(connection: sa.Connection) -> None:
        put(connection, 2)
        postgres.break_connections(database_url)
        versions(connection)

    changes = [database.commit(change) for change in (put_later(1), breaks, put_later(3))]
    outcomes = await commit_behind_another(database, changes)
    assert [type(outcome) for outcome in outcomes] == [UnavailableError] * 3
    assert read_versions(database) == []
    assert await database.commit(put_later(4)) == 4


async def test_a_disk_that_is_full_fails_all_and_takes_more_once_there_is_room(database: Database) -> None:
    def fills(connection: sa.Connection) -> None:
        connection.execute(sa.text("PRAGMA max_page_count = 1"))
        for version in range(100, 10_000):
            put(connection, version)

    outcomes = await commit_behind_another(database, [database.commit(c) for c in (put_later(1), fills, put_later(2))])
    assert isinstance(outcomes[1], UnavailableError)
    committed = [number for number, outcome in ((1, outcomes[0]), (2, outcomes[2])) if outcome == number]
    assert read_versions(database) == committed  # those whose callers were notified of success
    database._engine.dispose()
    assert await database.commit(put_later(3)) == 3


async def test_another_process_that_writes_holds_up_no_event_loop(database: Database, database_url: str) -> None:
    with closing(sqlite3.connect(database_url.removeprefix("sqlite:///"), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        waiting = asyncio.ensure_future(database.commit(put_later(1)))
        for _ in range(100):
            assert await database.query(versions) == []
            await asyncio.sleep(0)
        other.execute("COMMIT")
    assert await waiting == 1


def test_an_event_loop_that_ends_amid_a_change_leaves_the_database_to_others(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/test.db")
    database.migrate()

    async def leave_as_it_begins() -> None:
        asyncio.ensure_future(database.commit(put_later(1)))  # noqa: RUF006
        for _ in range(20):  # by then it waits in its thread
            await asyncio.sleep(0)

    async def leave_as_it_is_committed() -> None:
        with hold_next_commit(database) as held:
            asyncio.ensure_future(database.commit(put_later(2)))  # noqa: RUF006
            await held.begun()

    with database.write():
        asyncio.run(leave_as_it_begins())
    asyncio.run(leave_as_it_is_committed())
    assert asyncio.run(database.commit(put_later(3))) == 3
    assert read_versions(database) == [2, 3]
    database.close()


def test_a_second_event_loop_waits_until_the_first_ones_transaction_is_rolled_back() -> None:
    """It once began at once, and the only thread could not end its transaction: it still waited to begin another."""
    may_begin, blocking_modes = threading.Event(), list[bool]()
    connection = sa.create_engine("sqlite://", connect_args={"check_same_thread": False}).connect()

    @contextmanager
    def begin(*, blocking: bool) -> Iterator[sa.Connection]:
        blocking_modes.append(blocking)
        if not blocking:
            raise BlockingIOError
        assert may_begin.wait(TIMEOUT_SECONDS)
        yield connection

    commits = GroupCommit(begin)

    async def leave() -> None:
        asyncio.ensure_future(commits.submit(lambda _: 1))  # noqa: RUF006
        for _ in range(20):  # by then it waits in the thread
            await asyncio.sleep(0)

    async def follow() -> Any:
        following = asyncio.ensure_future(commits.submit(lambda _: 2))
        for _ in range(20):
            await asyncio.sleep(0)
        assert blocking_modes.count(False) == 1
        may_begin.set()
        return await following

    asyncio.run(leave())
    assert asyncio.run(follow()) == 2
    commits.close()


async def test_no_change_is_accepted_after_the_end(database: Database) -> None:
    waiting = [asyncio.ensure_future(database.commit(put_later(version))) for version in range(1, 6)]
    await asyncio.sleep(0)
    await database.finish()
    database.close()
    assert await asyncio.gather(*waiting) == [1, 2, 3, 4, 5]
    with pytest.raises(UnavailableError):
        await database.commit(put_later(6))


KILLED = """
import asyncio, sys
import sqlalchemy as sa
from services.admission.store.database import Database
from services.admission.store.tables import plans

async def main():
    database = Database(sys.argv[1])
    def put(version):
        return lambda c: c.execute(sa.insert(plans).values(version=version, executor="e", created=0)) and version
    async def one(version):
        print(await database.commit(put(version)), flush=True)
    await one(1)
    open(sys.argv[2], "w").close()  # the failpoint is armed
    await asyncio.gather(*(one(version) for version in range(2, 12)))

asyncio.run(main())
"""


@both
@pytest.mark.parametrize("failpoint", ["commit.before", "commit.after"])
async def test_a_killed_transaction_is_unacknowledged_and_committed_wholly_or_not_at_all(
    database: Database, database_url: str, failpoint: str, tmp_path: Path
) -> None:
    armed = tmp_path / "armed"
    armed.mkdir()
    process = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", KILLED, database_url, str(armed / failpoint)],
        cwd=ROOT,
        env={**os.environ, "MUXTUNE_FAILPOINTS": str(armed)},
        stdout=subprocess.PIPE,
    )
    assert process.returncode == -signal.SIGKILL
    assert process.stdout.split() == [b"1"]
    # Those that came before the thread first looked are one transaction, and it was the first to die.
    left = read_versions(database)
    assert left[0] == 1 and left == list(range(1, 1 + len(left)))
    assert len(left) > 1 if failpoint == "commit.after" else len(left) == 1
