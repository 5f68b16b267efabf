"""Prepared statements store and return what SQLAlchemy does, on both databases."""

import random
import sqlite3
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from engine.errors import UnavailableError
from services.admission.store.database import Database
from services.admission.store.prepared_statements import PreparedStatement
from services.admission.store.tables import audit_events, requests, task_events, usage
from tests.services.admission.admission_mesh import BOTH_DATABASES

both = pytest.mark.parametrize("database_url", BOTH_DATABASES, indirect=True)
TEXTS = [
    "",
    "plain",
    "O'Brien; DROP TABLE requests; --",
    ":tenant",
    "?",
    "%(tenant)s",
    "%s",
    "ключ",
    "🙂" * 50,
    "\n\t\\",
]


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = Database(database_url)
    opened.migrate()
    yield opened
    opened.close()


@both
def test_stored_values_equal_those_of_sqlalchemy_in_both_directions(database: Database) -> None:
    insert = PreparedStatement(sa.insert(task_events))
    select = PreparedStatement(
        sa.select(task_events).where(task_events.c.task == sa.bindparam("task")).order_by(task_events.c.sequence)
    )
    draw, rows = random.Random(0), []
    with database.write() as connection:
        for number, text in enumerate(TEXTS):
            values = {"task": text, "sequence": (1 << 62) + number, "event": draw.randbytes(draw.choice([0, 1, 5000]))}
            if number % 2:
                insert.execute(connection, **values)
            else:
                connection.execute(sa.insert(task_events).values(values))
            rows.append(values)
    with database.read() as connection:
        for values in rows:
            (row,) = select.fetch_all(connection, task=values["task"])
            query = sa.select(task_events).where(task_events.c.task == values["task"])
            assert row._asdict() == values == connection.execute(query).one()._asdict()
        assert select.fetch_first(connection, task="nobody's") is None


@both
def test_numbers_of_accounts_come_back_as_they_went(database: Database) -> None:
    insert, select = PreparedStatement(sa.insert(usage)), PreparedStatement(sa.select(usage))
    values = {"tenant": "tenants/a", "day": 1, "effective_tokens": 1 << 60, "padding_tokens": 0, "num_steps": 3}
    with database.write() as connection:
        insert.execute(connection, **values, device_seconds=2.0)
        row = select.fetch_first(connection)
    assert row is not None and row._asdict() == {**values, "device_seconds": 2.0}
    assert type(row.device_seconds) is float and type(row.effective_tokens) is int


@both
def test_an_automatic_column_is_numbered(database: Database) -> None:
    insert = PreparedStatement(sa.insert(audit_events))
    values = {"time": 1, "subject": "s", "tenant": "t", "method": "m", "resource": "r", "status_code": "OK"}
    with database.write() as connection:
        for _ in range(3):
            insert.execute(connection, **values)
        assert connection.execute(sa.select(audit_events.c.sequence)).scalars().all() == [1, 2, 3]


@both
def test_a_transaction_that_raises_stores_nothing(database: Database) -> None:
    insert, select = PreparedStatement(sa.insert(requests)), PreparedStatement(sa.select(requests))
    row = {"tenant": "t", "request_id": "r", "method": "m", "body_sha256": "b", "resource": "x", "created": 1}
    with pytest.raises((sqlite3.IntegrityError, sa.exc.IntegrityError)), database.write() as connection:
        insert.execute(connection, **row)
        insert.execute(connection, **row)
    with database.read() as connection:
        assert select.fetch_all(connection) == []


def test_a_database_that_is_away_is_unavailable(database: Database) -> None:
    with pytest.raises(UnavailableError), database.write() as connection:
        connection.execute(sa.text("DROP TABLE requests"))
        PreparedStatement(sa.select(requests)).fetch_all(connection)
