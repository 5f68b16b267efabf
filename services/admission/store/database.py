"""Transactions on the only database: SQLite by default, PostgreSQL by URL.

`read` and `write` are synchronous; their callers use threads. `ask` and `commit` are for the event loop: what many
calls ask PostgreSQL at once is answered in one go, and what they change is one transaction, with one wait for the disk.
"""

import hashlib
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from engine.errors import UnavailableError
from services.admission.store.group_commit import GroupCommit
from services.admission.store.prepared_statements import PreparedStatement
from services.admission.store.request_batcher import BatchedCall, RequestBatcher
from services.failpoints import failpoint

T = TypeVar("T")
_PATIENCE_MILLISECONDS = 10_000
_BEGIN, _SAVE, _UNDO, _RELEASE = (
    PreparedStatement(sa.text(text))
    for text in ("BEGIN IMMEDIATE", "SAVEPOINT alone", "ROLLBACK TO SAVEPOINT alone", "RELEASE SAVEPOINT alone")
)
_PATIENT, _IMPATIENT = (
    PreparedStatement(sa.text(f"PRAGMA busy_timeout={wait}")) for wait in (_PATIENCE_MILLISECONDS, 0)
)
_OF_DATABASES = (sa.exc.DBAPIError, sqlite3.OperationalError, sa.exc.TimeoutError)  # SQLite's own: of a Statement
_MIGRATIONS = Path(__file__).parents[1] / "migrations"
_SILENCE_SECONDS = 10
_switching = threading.Lock()  # SQLite says "locked", and waits for nobody, where two connections turn to WAL at once
_WRITERS_LOCK = 0x6D7578  # PostgreSQL's advisory lock: writers take turns, as they do on SQLite


class Database:
    """`write()` is serialisable: one writer at a time. What a write acknowledged is on the disk."""

    def __init__(self, url: str) -> None:
        self._is_sqlite = url.startswith("sqlite")
        # The last connection first: it has the most in its cache.
        self._engine = sa.create_engine(url, pool_pre_ping=not self._is_sqlite, pool_use_lifo=True)
        self._writing = threading.Lock()
        self._asking: sa.Connection | None = None
        self._writer: sa.Connection | None = None
        self._questions = RequestBatcher("questions", self._answer)
        self._changes: RequestBatcher | GroupCommit = RequestBatcher("changes", self._commit)
        if self._is_sqlite:
            self._changes = GroupCommit(self.write, _run_all)
        sa.event.listen(self._engine, "connect", _configure_sqlite if self._is_sqlite else _configure_postgresql)

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
    def write(self, *, waits: bool = True) -> Iterator[sa.Connection]:
        """Committed when the block ends, rolled back if it raises. BlockingIOError where it would have to wait for
        SQLite's other writer and may not."""
        with self._translated(), self._turn(waits), self._begun(waits) as connection:
            yield connection
            failpoint("commit.before")
        failpoint("commit.after")

    @contextmanager
    def _turn(self, waits: bool) -> Iterator[None]:
        if not self._writing.acquire(blocking=waits):
            raise BlockingIOError("another thread writes")
        try:
            yield
        finally:
            self._writing.release()

    @contextmanager
    def _begun(self, waits: bool) -> Iterator[sa.Connection]:
        if not self._is_sqlite:
            with self._engine.begin() as connection:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_WRITERS_LOCK)))
                yield connection
            return
        if self._writer is None:  # kept: to fetch it from the pool takes as long as a task's statements
            if not waits:
                raise BlockingIOError("the pool may have no connection")
            self._writer = self._engine.connect()
        try:
            with self._writer.begin():
                if waits:
                    _BEGIN.run(self._writer)
                else:
                    _begin_at_once(self._writer)
                yield self._writer
        except (sa.exc.DBAPIError, sqlite3.Error):
            self._close_writer()
            raise

    def _close_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    @contextmanager
    def alone_with(self, key: str) -> Iterator[sa.Connection]:
        """A transaction that reads, and in which no other process `holds` that key. Waits for those that do."""
        with self._translated(), self._engine.begin() as connection:
            if self.is_shared:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_lock_of(key))))
            yield connection

    def holds(self, connection: sa.Connection, key: str) -> bool:
        """Of PostgreSQL: until this transaction's end nobody will be alone with that key; false where somebody is."""
        lock = sa.select(sa.func.pg_try_advisory_xact_lock_shared(_lock_of(key)))
        return bool(connection.execute(lock).scalar())

    @property
    def is_shared(self) -> bool:
        """Whether other processes may be at work on it."""
        return not self._is_sqlite

    def connect_arguments(self) -> dict[str, Any]:
        """For a connection to PostgreSQL outside the pool, as psycopg takes them."""
        return dict(self._engine.dialect.create_connect_args(self._engine.url)[1])

    def notify(self, channel: str, payloads: Iterable[str]) -> None:
        """Tells whoever listens on that channel of PostgreSQL."""
        with self._translated(), self._engine.begin() as connection:
            connection.exec_driver_sql("SET LOCAL synchronous_commit = off")  # word need not be on the disk
            for payload in payloads:
                connection.execute(sa.select(sa.func.pg_notify(channel, payload)))

    async def ask(self, question: Callable[[sa.Connection], T]) -> T:
        """What the question finds. It changes nothing, and takes a millisecond at most: others wait for it."""
        if self._is_sqlite:  # whose readers wait for nobody: there and back to a thread takes seven times as long
            return self._told(question, self._reader())
        answer: T = await self._questions.do(partial(self._told, question))
        return answer

    async def commit(self, change: Callable[[sa.Connection], T], tell: Callable[[T], None] | None = None) -> T:
        """What the change returned, once it is on the disk. Changes of one transaction see each other in the order they
        came; one that raises leaves nothing, and the others stay. `tell` hears of it then, though the caller has left:
        what was committed for a caller who is gone has its watchers too."""
        answer: T = await self._changes.do(partial(self._told, change), tell)
        return answer

    def _told(self, work: Callable[[sa.Connection], T], connection: sa.Connection) -> T:
        try:
            return work(connection)
        except _OF_DATABASES as error:
            if (told := _told_of(error)) is None:
                raise
            raise told from error

    def _reader(self) -> sa.Connection:
        """Of the event loop."""
        if self._asking is None:
            with self._translated():
                self._asking = self._engine.connect()
        return self._asking

    def _answer(self, jobs: Sequence[BatchedCall]) -> None:
        with self.read() as connection:
            for job in jobs:
                job.run(connection)
                if job.error is not None:
                    connection.rollback()  # PostgreSQL answers nothing more before that

    def _commit(self, jobs: Sequence[BatchedCall]) -> None:
        with self.write() as connection:
            _run_all(jobs, connection)

    async def finish(self) -> None:
        """What `commit` was given is done, and it takes nothing more."""
        await self._changes.finish()

    def close(self) -> None:
        self._questions.close()
        self._changes.close()
        self._close_writer()
        if self._asking is not None:
            self._asking.close()
        self._engine.dispose()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except _OF_DATABASES as error:
            if (told := _told_of(error)) is None:
                raise
            raise told from error


def _told_of(error: Exception) -> UnavailableError | None:
    """What callers hear; None where the database is not to blame."""
    if isinstance(error, sa.exc.TimeoutError):
        return UnavailableError("the database is busy: no connection was free in time")
    if isinstance(error, sa.exc.DBAPIError):
        is_away = isinstance(error, sa.exc.OperationalError) or error.connection_invalidated
        return UnavailableError(f"the database is away: {type(error.orig).__name__}") if is_away else None
    return UnavailableError(f"the database is away: {type(error).__name__}")


def _run_all(jobs: Sequence[BatchedCall], connection: sa.Connection) -> None:
    """One after another, each as if it were alone."""
    for job in jobs:
        _SAVE.run(connection)
        job.run(connection)
        if job.error is not None:
            if connection.invalidated:
                raise job.error
            _UNDO.run(connection)
        _RELEASE.run(connection)


def _begin_at_once(connection: sa.Connection) -> None:
    """BlockingIOError where another process writes."""
    _IMPATIENT.run(connection)
    try:
        _BEGIN.run(connection)
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
            raise
        raise BlockingIOError("another process writes") from error
    finally:
        _PATIENT.run(connection)


def _lock_of(key: str) -> int:
    """As PostgreSQL numbers its advisory locks: 64 bits with a sign."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], signed=True)


def _configure_sqlite(connection: object, record: object) -> None:
    connection.isolation_level = None  # type: ignore[attr-defined]  # we begin transactions ourselves
    cursor = connection.cursor()  # type: ignore[attr-defined]
    with _switching:
        cursor.execute("PRAGMA journal_mode=WAL")
    for pragma in (
        "synchronous=FULL",
        f"busy_timeout={_PATIENCE_MILLISECONDS}",
        "foreign_keys=ON",
        "temp_store=MEMORY",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _configure_postgresql(connection: Any, record: object) -> None:
    """A process that is paused or cut off amid a transaction must not keep all other writers waiting for good."""
    connection.execute(f"SET idle_in_transaction_session_timeout = '{_SILENCE_SECONDS}s'")
    connection.commit()
