"""Replicas of admission on one PostgreSQL: each notifies all others of changes, and one of them leads the ledger.

Each replica has a session, a connection of its own. On it the replica listens (LISTEN) and tries to get an advisory
lock; the replica that holds the lock leads the ledger. A process that is paused or cut off is silent; the server then
ends its session and frees the lock. Correctness does not depend on this: notices are hints, and the ledger is fenced
(services/admission/ledger/fencing.py).
"""

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg

from engine.errors import MuxtuneError
from services.admission.store.change_notifier import ChangeNotifier
from services.admission.store.database import Database
from services.concurrency.threads import Threads

SESSION = "muxtune replica"  # as pg_stat_activity names it
_CHANNEL, _ALL_NAMES = "muxtune_changes", "*"
_LEADER_LOCK = 0x6D7579
_HEARTBEAT_SECONDS = 0.5  # interval at which a replica tries to get the lock, or shows that it is alive
_RETRY_SECONDS = 1.0
_SESSION_TIMEOUT_SECONDS = 6  # the server ends a session that is silent for longer
_POLL_SECONDS = 10.0  # interval at which all waiters read the database, because a notice is lost if its sender dies
_MAX_PAYLOAD_BYTES = 7_900  # NOTIFY accepts less than 8000
_MAX_NAME_CHARACTERS, _MAX_PENDING = 300, 1_000  # executors may send any names
_log = logging.getLogger(__name__)
Lead = Callable[[], Coroutine[Any, Any, None]]


class Replicas:
    """Connects this process to the other replicas. `run` and `publish_changes` run until cancelled.

    `sees_other_leader`: whether another replica holds the lock, as far as this one knows. `failover_seconds`: in that
    time after the leader's end another one leads.
    """

    failover_seconds = 30.0

    def __init__(self, database: Database, notifier: ChangeNotifier, threads: Threads) -> None:
        self._database, self._notifier, self._threads = database, notifier, threads
        self._replica_id = uuid.uuid4().hex
        self.sees_other_leader = False
        self._pending: set[str] = set()
        self._has_pending = asyncio.Event()
        notifier.publish = self._add_pending

    async def run(self, lead: Lead) -> None:
        """Listen, and run `lead` while this process holds the lock; `lead` returns when its term is over."""
        while True:
            try:
                async with self._open_session() as session:
                    self._notifier.wake_all()  # notices were missed without a session
                    await self._run_session(session, lead)
            except (psycopg.Error, TimeoutError, MuxtuneError) as error:
                _log.warning("session at the database lost, connecting again: %s", error)
            await asyncio.sleep(_HEARTBEAT_SECONDS)

    async def publish_changes(self) -> None:
        """Send the notifier's names to the other replicas, all that are pending at once."""
        while True:
            await self._has_pending.wait()
            await self.publish_pending()

    async def publish_pending(self) -> None:
        """Send what is pending now; if that fails, have the others wake all their waiters later."""
        self._has_pending.clear()
        names, self._pending = self._pending, set()
        try:
            await self._threads.run(self._database.notify, _CHANNEL, list(_format_payloads(self._replica_id, names)))
        except MuxtuneError as error:
            _log.warning("other replicas not notified, will be retried: %s", error)
            await asyncio.sleep(_HEARTBEAT_SECONDS)
            self._add_pending([_ALL_NAMES])

    def _add_pending(self, names: Iterable[str]) -> None:
        self._pending.update(
            name for name in names if name.isascii() and name.isprintable() and len(name) < _MAX_NAME_CHARACTERS
        )
        if len(self._pending) > _MAX_PENDING:
            self._pending = {_ALL_NAMES}
        self._has_pending.set()

    @asynccontextmanager
    async def _open_session(self) -> "AsyncIterator[psycopg.AsyncConnection[Any]]":
        async with asyncio.timeout(_SESSION_TIMEOUT_SECONDS):
            session = await psycopg.AsyncConnection.connect(**self._database.connect_arguments(), autocommit=True)
        async with session:
            async with asyncio.timeout(_SESSION_TIMEOUT_SECONDS):
                await session.execute(f"SET application_name = '{SESSION}'")
                await session.execute(f"SET idle_session_timeout = '{_SESSION_TIMEOUT_SECONDS}s'")
                await session.execute(f"LISTEN {_CHANNEL}")
            yield session

    async def _run_session(self, session: "psycopg.AsyncConnection[Any]", lead: Lead) -> None:
        leading: asyncio.Task[None] | None = None
        loop = asyncio.get_running_loop()
        polled = loop.time()
        try:
            while leading is None or not leading.done():
                is_held = await _hold_lock(session, leading is not None)
                self.sees_other_leader = not is_held
                if is_held and leading is None:
                    leading = asyncio.create_task(lead(), name="ledger leader")
                async for notice in session.notifies(timeout=_HEARTBEAT_SECONDS):
                    self._receive(notice.payload)
                if loop.time() - polled > _POLL_SECONDS:
                    polled = loop.time()
                    self._notifier.wake_all()
            leading.result()
        finally:  # before the session closes and frees the lock
            self.sees_other_leader = False
            if leading is not None:
                leading.cancel()
                await asyncio.gather(leading, return_exceptions=True)

    def _receive(self, payload: str) -> None:
        sender, *names = payload.split("\n")
        if sender == self._replica_id:
            return
        if _ALL_NAMES in names:
            self._notifier.wake_all()
        else:
            self._notifier.wake(names)


class SingleReplica:
    """Replaces Replicas on SQLite, which has one process. It leads the ledger while it is the database's only user.

    Another admission may have acquired the ledger although this one holds the lock: an older version, or one that
    started after the lock was deleted. This one leads again when it can get the lock.
    """

    failover_seconds = 0.0
    sees_other_leader = False

    def __init__(self, database: Database, threads: Threads) -> None:
        self._database, self._threads = database, threads

    async def run(self, lead: Lead) -> None:
        cause = ""
        while True:
            try:
                await self._threads.run(self._database.claim)
                await lead()
                cause = ""
                _log.warning("another admission acquired the ledger; this one will acquire it again")
            except MuxtuneError as error:
                if str(error) != cause:  # else it is logged already
                    cause = str(error)
                    _log.warning("does not lead the ledger, will be retried: %s", error)
            await asyncio.sleep(_RETRY_SECONDS)

    async def publish_changes(self) -> None:
        """Do nothing: there is no other replica."""

    async def publish_pending(self) -> None:
        """Do nothing: there is no other replica."""


async def _hold_lock(session: "psycopg.AsyncConnection[Any]", is_held: bool) -> bool:
    """Try to get the lock; return whether this session holds it. Each call shows the server that we are connected."""
    async with asyncio.timeout(_SESSION_TIMEOUT_SECONDS / 2):
        if is_held:
            await session.execute("SELECT 1")
            return True
        result = await session.execute("SELECT pg_try_advisory_lock(%s)", (_LEADER_LOCK,))
        row = await result.fetchone()
        return bool(row and row[0])


def _format_payloads(sender: str, names: Iterable[str]) -> Iterator[str]:
    """Yield payloads of the sender and the names, a line each, in as many payloads as they need."""
    payload = sender
    for name in names:
        if len(payload) + 1 + len(name) > _MAX_PAYLOAD_BYTES:
            yield payload
            payload = sender
        payload += f"\n{name}"
    yield payload
