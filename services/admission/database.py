"""Transactions on the only database: SQLite by default, PostgreSQL by URL. Synchronous; callers use threads."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from engine.errors import UnavailableError
from services.failpoints import failpoint

_MIGRATIONS = Path(__file__).parent / "migrations"
_WRITERS_LOCK = 0x6D7578  # PostgreSQL's advisory lock: writers take turns, as they do on SQLite


class Database:
    """`write()` is serialisable: one writer at a time. What a write acknowledged is on the disk."""

    def __init__(self, url: str) -> None:
        self._is_sqlite = url.startswith("sqlite")
        self._engine = sa.create_engine(url, pool_pre_ping=not self._is_sqlite)
        self._writing = threading.Lock()
        if self._is_sqlite:
            sa.event.listen(self._engine, "connect", _configure_sqlite)

    def migrate(self, revision: str = "head") -> None:
        """Brings the schema up to this code's (or to an older revision), from nothing if need be: whole or not at all,
        one service at a time."""
        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS))
        with self.write() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, revision)

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        with self._translated(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Committed when the block ends, rolled back if it raises."""
        with self._translated(), self._writing, self._engine.begin() as connection:
            if self._is_sqlite:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            else:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_WRITERS_LOCK)))
            yield connection
            failpoint("commit.before")
        failpoint("commit.after")

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sa.exc.OperationalError as error:
            raise UnavailableError(f"the database is away: {type(error.orig).__name__}") from error


def _configure_sqlite(connection: object, record: object) -> None:
    connection.isolation_level = None  # type: ignore[attr-defined]  # we begin transactions ourselves
    cursor = connection.cursor()  # type: ignore[attr-defined]
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=10000", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
