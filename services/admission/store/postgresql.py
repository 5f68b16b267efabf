"""PostgreSQL: a server that several admission processes share. Advisory locks order them; threads wait for it."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import sqlalchemy as sa

from services.admission.store.request_batcher import BatchedCall, RequestBatcher, run_in_savepoints

_WRITERS_LOCK = 0x6D7578  # advisory lock of the only writer, as SQLite has one
_IDLE_TRANSACTION_SECONDS = 10


class PostgresqlDialect:
    """Batches reads and changes each on a thread, so that many calls share one thread switch and one connection."""

    is_shared = True
    driver_errors: tuple[type[Exception], ...] = ()

    def __init__(self, url: str) -> None:
        self.engine = sa.create_engine(url, pool_pre_ping=True, pool_use_lifo=True)
        sa.event.listen(self.engine, "connect", _configure)

    @contextmanager
    def begin(self, *, blocking: bool) -> Iterator[sa.Connection]:
        with self.engine.begin() as connection:
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_WRITERS_LOCK)))
            yield connection

    @contextmanager
    def begin_snapshot(self) -> Iterator[sa.Connection]:
        with self.engine.connect() as connection:
            repeatable = connection.execution_options(isolation_level="REPEATABLE READ")
            with repeatable.begin():
                yield repeatable

    def claim(self) -> None:
        """Do nothing: other processes may use the database."""

    def lock_exclusively(self, connection: sa.Connection, key: str) -> None:
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_lock_id(key))))

    def try_lock_shared(self, connection: sa.Connection, key: str) -> bool:
        lock = sa.select(sa.func.pg_try_advisory_xact_lock_shared(_lock_id(key)))
        return bool(connection.execute(lock).scalar())

    def notify(self, channel: str, payloads: Iterable[str]) -> None:
        with self.engine.begin() as connection:
            connection.exec_driver_sql("SET LOCAL synchronous_commit = off")  # notices need not reach the disk
            for payload in payloads:
                connection.execute(sa.select(sa.func.pg_notify(channel, payload)))

    def queue_reads(self) -> RequestBatcher:
        def run_batch(calls: Sequence[BatchedCall]) -> None:
            with self.engine.connect() as connection:
                for call in calls:
                    call.run(connection)
                    if call.error is not None:
                        connection.rollback()  # PostgreSQL refuses further statements before that

        return RequestBatcher("reads", run_batch)

    def queue_writes(self, write: Callable[..., AbstractContextManager[sa.Connection]]) -> RequestBatcher:
        def run_batch(calls: Sequence[BatchedCall]) -> None:
            with write() as connection:
                run_in_savepoints(calls, connection)

        return RequestBatcher("changes", run_batch)

    def close(self) -> None:
        self.engine.dispose()


def _lock_id(key: str) -> int:
    """Return a signed 64-bit integer, which PostgreSQL identifies advisory locks by."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], signed=True)


def _configure(connection: Any, record: object) -> None:
    """Limit idle transactions: a process that is paused or cut off in one must not block all other writers."""
    connection.execute(f"SET idle_in_transaction_session_timeout = '{_IDLE_TRANSACTION_SECONDS}s'")
    connection.commit()
