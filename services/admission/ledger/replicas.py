"""Several admissions on one PostgreSQL: word of changes goes from each to all, and one of them keeps the ledger.

Each holds one connection of its own, its session. It listens there (LISTEN), and asks there for an advisory lock, which
the server frees when the session ends: who has it keeps the ledger. A process that is paused or cut off says nothing in
its session, which the server then ends. Nothing depends on it for truth: word is a hint, and who keeps the ledger is
fenced (services/admission/ledger/fencing.py).
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

SESSION = "muxtune replica"  # as pg_stat_activity names it
_CHANNEL, _EVERYTHING = "muxtune_changes", "*"
_KEEPER_LOCK = 0x6D7579
_TURN_SECONDS = 0.5  # how often a replica asks for the lock, or says that it still lives
_SILENCE_SECONDS = 6  # after which the server ends a session
_POLL_SECONDS = 10.0  # word is lost when its sender dies: everyone reads that often anyway
_MAX_PAYLOAD_BYTES = 7_900  # NOTIFY takes less than 8000
_MAX_NAME, _MAX_UNTOLD = 300, 1_000  # what executors say may name anything
_log = logging.getLogger(__name__)
Keep = Callable[[], Coroutine[Any, Any, None]]


class Replicas:
    """This process among the others. `run` and `tell` run until cancelled."""

    def __init__(self, database: Database, notifier: ChangeNotifier) -> None:
        self._database, self._notifier, self._own = database, notifier, uuid.uuid4().hex
        self._untold: set[str] = set()
        self._has_untold = asyncio.Event()
        notifier.tell_others = self._note

    async def run(self, keep: Keep) -> None:
        """Listens, and runs `keep` as long as the lock is this process's; it ends by itself where its term is over."""
        while True:
            try:
                async with self._open_session() as session:
                    self._notifier.wake_all()  # what was said meanwhile was not heard
                    await self._attend(session, keep)
            except (psycopg.Error, TimeoutError, MuxtuneError) as error:
                _log.warning("session at the database broke, a new one follows: %s", error)
            await asyncio.sleep(_TURN_SECONDS)

    async def tell(self) -> None:
        """Sends on what the notifier says, as it comes, however much there is in one go."""
        while True:
            await self._has_untold.wait()
            await self.tell_now()

    async def tell_now(self) -> None:
        self._has_untold.clear()
        names, self._untold = self._untold, set()
        try:
            await asyncio.to_thread(self._database.notify, _CHANNEL, list(_payloads(self._own, names)))
        except MuxtuneError as error:
            _log.warning("others were not told, they will be: %s", error)
            await asyncio.sleep(_TURN_SECONDS)
            self._note([_EVERYTHING])

    def _note(self, names: Iterable[str]) -> None:
        self._untold.update(name for name in names if name.isascii() and name.isprintable() and len(name) < _MAX_NAME)
        if len(self._untold) > _MAX_UNTOLD:
            self._untold = {_EVERYTHING}
        self._has_untold.set()

    @asynccontextmanager
    async def _open_session(self) -> "AsyncIterator[psycopg.AsyncConnection[Any]]":
        async with asyncio.timeout(_SILENCE_SECONDS):
            session = await psycopg.AsyncConnection.connect(**self._database.connect_arguments(), autocommit=True)
        async with session:
            async with asyncio.timeout(_SILENCE_SECONDS):
                await session.execute(f"SET application_name = '{SESSION}'")
                await session.execute(f"SET idle_session_timeout = '{_SILENCE_SECONDS}s'")
                await session.execute(f"LISTEN {_CHANNEL}")
            yield session

    async def _attend(self, session: "psycopg.AsyncConnection[Any]", keep: Keep) -> None:
        keeping: asyncio.Task[None] | None = None
        loop = asyncio.get_running_loop()
        polled = loop.time()
        try:
            while keeping is None or not keeping.done():
                if await _is_locked(session, keeping is not None) and keeping is None:
                    keeping = asyncio.create_task(keep(), name="keeper of the ledger")
                async for word in session.notifies(timeout=_TURN_SECONDS):
                    self._hear(word.payload)
                if loop.time() - polled > _POLL_SECONDS:
                    polled = loop.time()
                    self._notifier.wake_all()
            keeping.result()
        finally:  # before the session is closed, and the lock free
            if keeping is not None:
                keeping.cancel()
                await asyncio.gather(keeping, return_exceptions=True)

    def _hear(self, payload: str) -> None:
        sender, *names = payload.split("\n")
        if sender == self._own:
            return
        if _EVERYTHING in names:
            self._notifier.wake_all()
        else:
            self._notifier.wake(names)


class SingleReplica:
    """The only process on its database: SQLite. It keeps the ledger from its start to its end, or until another is
    started on that file by mistake."""

    async def run(self, keep: Keep) -> None:
        await keep()

    async def tell(self) -> None:
        """Nobody is there."""

    async def tell_now(self) -> None:
        """Nor here."""


async def _is_locked(session: "psycopg.AsyncConnection[Any]", is_ours: bool) -> bool:
    """Asks for the lock where it is not ours yet; either way the server hears from us."""
    async with asyncio.timeout(_SILENCE_SECONDS / 2):
        if is_ours:
            await session.execute("SELECT 1")
            return True
        asked = await session.execute("SELECT pg_try_advisory_lock(%s)", (_KEEPER_LOCK,))
        row = await asked.fetchone()
        return bool(row and row[0])


def _payloads(sender: str, names: Iterable[str]) -> Iterator[str]:
    """The sender and the names, a line each, in as many payloads as they need."""
    payload = sender
    for name in names:
        if len(payload) + 1 + len(name) > _MAX_PAYLOAD_BYTES:
            yield payload
            payload = sender
        payload += f"\n{name}"
    yield payload
