"""Transactions on admission's database: SQLite by default, PostgreSQL by URL.

`read` and `write` are synchronous; their callers use threads. `query` and `commit` are for the event loop: many reads
share one connection, many changes share one transaction and one wait for the disk. All that differs between the two
databases is in services/admission/store/sqlite.py and services/admission/store/postgresql.py.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from engine.errors import UnavailableError
from services.admission.store.group_commit import GroupCommit
from services.admission.store.postgresql import PostgresqlDialect
from services.admission.store.request_batcher import RequestBatcher
from services.admission.store.sqlite import EventLoopReader, SqliteDialect
from services.failpoints import failpoint

T = TypeVar("T")
_MIGRATIONS = Path(__file__).parents[1] / "migrations"


class Dialect(Protocol):
    """Everything that differs between databases. `is_shared`: other processes may use the same database.
    `driver_errors`: errors that prepared statements raise past SQLAlchemy."""

    is_shared: bool
    driver_errors: tuple[type[Exception], ...]
    engine: sa.Engine

    def claim(self) -> None:
        """Make this process the only user of a database that is not shared. Raises UnavailableError."""

    def begin(self, *, blocking: bool) -> AbstractContextManager[sa.Connection]:
        """Open a transaction of the only writer, over all processes. With `blocking` false, raises BlockingIOError
        instead of waiting."""

    def begin_snapshot(self) -> AbstractContextManager[sa.Connection]:
        """Open a transaction in which all statements read the same state. It waits for no writer, and delays none."""

    def lock_exclusively(self, connection: sa.Connection, key: str) -> None:
        """Wait until no other process has locked the key; lock it until the transaction ends."""

    def try_lock_shared(self, connection: sa.Connection, key: str) -> bool:
        """Lock the key against exclusive locks until the transaction ends; return False if one exists."""

    def notify(self, channel: str, payloads: Iterable[str]) -> None:
        """Send the payloads to all processes that listen on the channel."""

    def queue_reads(self) -> RequestBatcher | EventLoopReader:
        """Create the queue of an event loop's reads; each receives a connection."""

    def queue_writes(self, write: Callable[..., AbstractContextManager[sa.Connection]]) -> RequestBatcher | GroupCommit:
        """Create the queue of an event loop's changes; each receives a connection in a transaction of `write`."""

    def close(self) -> None: ...


class Database:
    """`write()` is serialisable: one writer at a time. What a write acknowledged is on the disk."""

    def __init__(self, url: str) -> None:
        self._dialect: Dialect = SqliteDialect(url) if url.startswith("sqlite") else PostgresqlDialect(url)
        self._engine = self._dialect.engine
        self._errors: tuple[type[Exception], ...] = (
            sa.exc.DBAPIError,
            sa.exc.TimeoutError,
            *self._dialect.driver_errors,
        )
        self._writing = threading.Lock()
        self._reads = self._dialect.queue_reads()
        self._writes = self._dialect.queue_writes(self.write)

    def claim(self) -> None:
        """Make this process the only user of a database that is not shared, until `close` or its end.

        Raises UnavailableError if another process is. May be called again: the lock may have been removed since.
        """
        with self._translate_errors():
            self._dialect.claim()

    def migrate(self, revision: str = "head") -> None:
        """Migrate the schema to `revision`, also from an empty database. The migration is one transaction, and only one
        process migrates at a time."""
        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS))
        with self.write() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, revision)

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        with self._translate_errors(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def read_consistently(self) -> Iterator[sa.Connection]:
        """Open a transaction in which all statements read the same state of the database."""
        with self._translate_errors(), self._dialect.begin_snapshot() as connection:
            yield connection

    @contextmanager
    def write(self, *, blocking: bool = True) -> Iterator[sa.Connection]:
        """Commit when the block ends, roll back if it raises. With `blocking` false, raises BlockingIOError instead of
        waiting for another writer."""
        with (
            self._translate_errors(),
            self._hold_write_lock(blocking),
            self._dialect.begin(blocking=blocking) as connection,
        ):
            yield connection
            failpoint("commit.before")
        failpoint("commit.after")

    @contextmanager
    def lock_exclusively(self, key: str) -> Iterator[sa.Connection]:
        """Wait until no process holds a lock of the key, then open a reading transaction that locks it exclusively."""
        with self._translate_errors(), self._engine.begin() as connection:
            self._dialect.lock_exclusively(connection, key)
            yield connection

    def try_lock_shared(self, connection: sa.Connection, key: str) -> bool:
        """Lock the key against exclusive locks until the transaction ends; return False if one exists."""
        return self._dialect.try_lock_shared(connection, key)

    @property
    def is_shared(self) -> bool:
        """Return whether other processes may use the same database."""
        return self._dialect.is_shared

    def connect_arguments(self) -> dict[str, Any]:
        """Return the driver's arguments for a connection outside the pool."""
        return dict(self._engine.dialect.create_connect_args(self._engine.url)[1])

    def notify(self, channel: str, payloads: Iterable[str]) -> None:
        """Send the payloads to all processes that listen on the channel."""
        with self._translate_errors():
            self._dialect.notify(channel, payloads)

    async def query(self, function: Callable[[sa.Connection], T]) -> T:
        """Return the function's result. It must change nothing and take a millisecond at most: others wait for it."""
        with self._translate_errors():
            result: T = await self._reads.submit(function)
            return result

    async def commit(self, change: Callable[[sa.Connection], T], on_committed: Callable[[T], None] | None = None) -> T:
        """Return the change's result once it is on the disk. Changes of one transaction see each other in the order
        in which they came; one that raises changes nothing, and the others remain.

        `on_committed` then receives the result even if the caller has left: watchers must hear of every change.
        """
        with self._translate_errors():
            result: T = await self._writes.submit(change, on_committed)
            return result

    async def finish(self) -> None:
        """Run the changes that `commit` has accepted; refuse later ones."""
        await self._writes.finish()

    def close(self) -> None:
        self._reads.close()
        self._writes.close()
        self._dialect.close()

    @contextmanager
    def _hold_write_lock(self, blocking: bool) -> Iterator[None]:
        if not self._writing.acquire(blocking=blocking):
            raise BlockingIOError("another thread writes")
        try:
            yield
        finally:
            self._writing.release()

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            if (unavailable := _to_unavailable(error)) is None:
                raise
            raise unavailable from error


def _to_unavailable(error: Exception) -> UnavailableError | None:
    """Return the error that callers receive; None if the database itself works."""
    if isinstance(error, sa.exc.TimeoutError):
        return UnavailableError("the database is busy: no connection became free in time; try again")
    cause: BaseException | None = error
    if isinstance(error, sa.exc.DBAPIError):
        if not isinstance(error, sa.exc.OperationalError) and not error.connection_invalidated:
            return None
        cause = error.orig
    return UnavailableError(f"the database is unavailable ({type(cause).__name__}): try again")
