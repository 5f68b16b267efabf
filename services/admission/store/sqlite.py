"""SQLite: a file of one process. Reads and changes run on the event loop; a thread waits for the disk."""

import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from engine.errors import UnavailableError
from services.admission.store.file_lock import FileLock
from services.admission.store.group_commit import GroupCommit
from services.admission.store.prepared_statements import PreparedStatement

_BUSY_MILLISECONDS = 10_000
_MAX_PATH_BYTES = 504  # SQLite itself has 512, with the names of its journals
_BEGIN = PreparedStatement(sa.text("BEGIN IMMEDIATE"))
_WAIT_IF_BUSY, _FAIL_IF_BUSY = (
    PreparedStatement(sa.text(f"PRAGMA busy_timeout={wait}")) for wait in (_BUSY_MILLISECONDS, 0)
)
_PRAGMAS = ("synchronous=FULL", f"busy_timeout={_BUSY_MILLISECONDS}", "foreign_keys=ON", "temp_store=MEMORY")
_switching_to_wal = threading.Lock()  # two connections that switch at once get "locked" without waiting


class SqliteDialect:
    """Keeps one connection for all writes: to fetch it from the pool takes as long as a task's statements."""

    is_shared = False
    driver_errors: tuple[type[Exception], ...] = (sqlite3.OperationalError,)

    def __init__(self, url: str) -> None:
        self.engine = sa.create_engine(url, pool_use_lifo=True)  # the connection used last has the most in its cache
        self._writer: sa.Connection | None = None
        self._lock: FileLock | None = None
        sa.event.listen(self.engine, "connect", _configure)

    def claim(self) -> None:
        """Make this process the only user of the file. Raises UnavailableError if that is another process, or if SQLite
        cannot open the file."""
        if self._lock is None:
            path = self._find_file()
            if (num_names := path.stat().st_nlink) > 1:
                raise UnavailableError(
                    f"{path} has {num_names} names (hard links). SQLite loses data if two are used: remove the others"
                )
            self._lock = FileLock(path)
        self._lock.acquire()

    def _find_file(self) -> Path:
        """Return the database's file, with all links resolved."""
        arguments, options = self.engine.dialect.create_connect_args(self.engine.url)
        try:
            with closing(self.engine.dialect.connect(*arguments, **options)) as connection:
                databases = connection.cursor().execute("PRAGMA database_list").fetchall()
                name = next(row[2] for row in databases if row[1] == "main")
        except sqlite3.OperationalError as error:
            path = self.engine.url.database or ""
            remedy = (
                f"its path has {len(os.fsencode(path))} bytes, SQLite takes {_MAX_PATH_BYTES}: choose a shorter one"
                if len(os.fsencode(path)) > _MAX_PATH_BYTES
                else "its folder must exist, and this process must be able to write there"
            )
            raise UnavailableError(f"{path} cannot be opened ({error}): {remedy}") from error
        return Path(os.path.realpath(name))

    @contextmanager
    def begin(self, *, blocking: bool) -> Iterator[sa.Connection]:
        if self._writer is None:
            if not blocking:
                raise BlockingIOError("the pool may have no free connection")
            self._writer = self.engine.connect()
        try:
            with self._writer.begin():
                if blocking:
                    _BEGIN.execute(self._writer)
                else:
                    _begin_without_waiting(self._writer)
                yield self._writer
        except (sa.exc.DBAPIError, sqlite3.Error):
            self._close_writer()
            raise

    @contextmanager
    def begin_snapshot(self) -> Iterator[sa.Connection]:
        with self.engine.begin() as connection:
            connection.exec_driver_sql("BEGIN")
            yield connection

    def lock_exclusively(self, connection: sa.Connection, key: str) -> None:
        """Do nothing: there is no other process."""

    def try_lock_shared(self, connection: sa.Connection, key: str) -> bool:
        return True

    def notify(self, channel: str, payloads: Iterable[str]) -> None:
        """Do nothing: there is no other process."""

    def queue_reads(self) -> "EventLoopReader":
        return EventLoopReader(self.engine)

    def queue_writes(self, write: Callable[..., AbstractContextManager[sa.Connection]]) -> GroupCommit:
        return GroupCommit(write)

    def _close_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def close(self) -> None:
        self._close_writer()
        self.engine.dispose()
        if self._lock is not None:
            self._lock.release()


class EventLoopReader:
    """Runs reads on the event loop itself: SQLite's readers never wait, and a switch to a thread and back takes seven
    times as long as a read."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._connection: sa.Connection | None = None

    async def submit(self, function: Callable[[sa.Connection], Any]) -> Any:
        if self._connection is None:
            self._connection = self._engine.connect()
        return function(self._connection)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()


def _begin_without_waiting(connection: sa.Connection) -> None:
    """Begin a write transaction. Raises BlockingIOError where another process writes."""
    _FAIL_IF_BUSY.execute(connection)
    try:
        _BEGIN.execute(connection)
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
            raise
        raise BlockingIOError("another process writes") from error
    finally:
        _WAIT_IF_BUSY.execute(connection)


def _configure(connection: Any, record: object) -> None:
    connection.isolation_level = None  # `begin` starts transactions, not the driver
    cursor = connection.cursor()
    with _switching_to_wal:
        cursor.execute("PRAGMA journal_mode=WAL")
    for pragma in _PRAGMAS:
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
