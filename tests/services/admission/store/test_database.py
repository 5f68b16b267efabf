"""Migrations, transactions and broken connections, on both databases."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import op
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from engine.errors import UnavailableError
from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import task_pb2
from services.admission.store.database import _MIGRATIONS, Database
from services.admission.store.tables import metadata, plans, tasks
from tests.services.admission.admission_mesh import BOTH_DATABASES, Admission, step

both = pytest.mark.parametrize("database_url", BOTH_DATABASES, indirect=True)


@pytest.fixture
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return an empty database: these tests migrate it."""
    if request.param == "postgresql":
        url: str = request.getfixturevalue("postgres").new_database()
        return url
    return f"sqlite:///{tmp_path / 'muxtune.db'}"


def plan_versions(database: Database) -> list[int]:
    with database.read() as connection:
        return list(connection.execute(sa.select(plans.c.version).order_by(plans.c.version)).scalars())


def put_plan(connection: sa.Connection, version: int) -> None:
    connection.execute(sa.insert(plans).values(version=version, executor="executors/one", created=0))


@both
def test_migrations_make_the_tables_that_the_code_reads(database_url: str) -> None:
    database = Database(database_url)
    database.migrate()
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
        assert context.get_current_revision() == ScriptDirectory(str(_MIGRATIONS)).get_current_head()
    database.close()


@both
def test_tasks_older_than_the_special_tokens_option_keep_their_behaviour(database_url: str) -> None:
    old = task_pb2.TaskSpec(backbone="tiny", training=task_pb2.Training(learning_rate=1e-3, num_steps=7, seed=3))
    database = Database(database_url)
    database.migrate("0003_leadership")
    with database.write() as connection:
        values = {"name": "tenants/a/tasks/t", "tenant": "tenants/a", "created": 0, "state": "RUNNING", "dataset": "d"}
        connection.execute(sa.insert(tasks).values(**values, spec=old.SerializeToString(), estimate=b"", progress=b""))
    database.migrate()
    with database.read() as connection:
        stored = task_pb2.TaskSpec.FromString(connection.execute(sa.select(tasks.c.spec)).scalar_one())
    database.close()
    old.training.parse_special_tokens = True
    assert stored == old


@both
def test_migrating_again_keeps_what_is_there(database_url: str) -> None:
    for version in range(1, 4):
        database = Database(database_url)
        database.migrate()
        with database.write() as connection:
            put_plan(connection, version)
        database.close()
    assert plan_versions(Database(database_url)) == [1, 2, 3]


@both
def test_a_migration_cut_short_leaves_nothing_and_is_done_at_the_next_start(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_table, table_names = op.create_table, []

    def fails_midway(name: str, *columns: object, **options: object) -> object:
        if len(table_names) == 4:
            raise RuntimeError("the power went")
        table_names.append(name)
        return create_table(name, *columns, **options)  # type: ignore[arg-type]

    database = Database(database_url)
    with monkeypatch.context() as patched:
        patched.setattr(op, "create_table", fails_midway)
        with pytest.raises(RuntimeError):
            database.migrate()
    with database.read() as connection:
        assert not set(sa.inspect(connection).get_table_names()) & set(metadata.tables)
    database.migrate()
    assert plan_versions(database) == []


@both
def test_several_services_may_migrate_at_once(database_url: str) -> None:
    databases = [Database(database_url) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(Database.migrate, databases))
    assert plan_versions(databases[0]) == []


@both
def test_a_write_that_raises_leaves_nothing(database_url: str) -> None:
    database = Database(database_url)
    database.migrate()
    with pytest.raises(ZeroDivisionError), database.write() as connection:
        put_plan(connection, 1)
        assert connection.execute(sa.select(plans)).all()
        raise ZeroDivisionError
    assert plan_versions(database) == []


@both
def test_writers_take_turns_over_processes_connections(database_url: str) -> None:
    """Each writer reads the highest version and writes the next; two `Database`s stand for two processes."""
    databases = [Database(database_url) for _ in range(2)]
    databases[0].migrate()
    barrier = threading.Barrier(4)

    def count(database: Database) -> None:
        barrier.wait()
        for _ in range(10):
            with database.write() as connection:
                newest = connection.execute(sa.select(sa.func.max(plans.c.version))).scalar() or 0
                put_plan(connection, newest + 1)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(count, databases * 2))
    assert plan_versions(databases[0]) == list(range(1, 41))


@both
def test_readers_see_what_is_committed_and_wait_for_no_writer(database_url: str) -> None:
    database = Database(database_url)
    database.migrate()
    with database.write() as connection:
        put_plan(connection, 1)
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(plan_versions, database).result(timeout=5) == []
    assert plan_versions(database) == [1]


def test_sqlite_keeps_what_it_acknowledged(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'a.db'}")
    with database.read() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")
        }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2}  # FULL


def test_a_database_that_cannot_be_reached_is_unavailable(tmp_path: Path) -> None:
    for url in (f"sqlite:///{tmp_path / 'none' / 'a.db'}", f"postgresql+psycopg://u@/d?host={tmp_path}"):
        with pytest.raises(UnavailableError):
            Database(url).migrate()


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_broken_connections_are_replaced(admission: Admission, request: pytest.FixtureRequest) -> None:
    postgres = request.getfixturevalue("postgres")
    task = await admission.create((await admission.upload()).name)
    await admission.run(task.name)
    for number in (1, 2, 3):
        assert postgres.break_connections(admission.database_url) > 0
        assert await admission.commit(step(task.name, 1, number)) == ["COMMITTED"]
        read = await admission.tenant().GetTask(pb.GetTaskRequest(name=task.name))
        assert read.task.progress.step == number
