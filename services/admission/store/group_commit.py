"""Changes of many callers in one transaction that runs on the event loop, with one wait for the disk in a thread.

For SQLite, where a statement takes microseconds: in a thread beside a busy event loop each would wait twice for the
interpreter's lock, which takes longer than the statement.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from typing import Any

import sqlalchemy as sa

from engine.errors import UnavailableError
from services.admission.store.request_batcher import MOST_JOBS, BatchedCall

Transaction = AbstractContextManager[sa.Connection]


class GroupCommit:
    """Of one event loop at a time. What comes while a transaction begins or is committed is the next one.

    `transaction(waits=...)` is committed when its block ends; it may raise at either end, and block: but where it may
    not wait, its beginning raises BlockingIOError instead. `do_all` runs jobs in it, in order; where it raises, all
    fail that did not by themselves.
    """

    def __init__(
        self, transaction: Callable[..., Transaction], do_all: Callable[[Sequence[BatchedCall], sa.Connection], None]
    ) -> None:
        self._transaction, self._do_all = transaction, do_all
        self._waiting: deque[BatchedCall] = deque()
        self._turns: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "changes")
        self._is_closed = False

    async def do(self, work: Callable[..., Any], tell: Callable[[Any], None] | None = None) -> Any:
        """As `Batches.do`."""
        if self._is_closed:
            raise UnavailableError("admission is stopping")
        loop = asyncio.get_running_loop()
        job = BatchedCall(work, loop, tell)
        self._waiting.append(job)
        if self._turns is None or self._turns.done():
            self._turns = loop.create_task(self._take_turns())
        return await job.answer

    async def finish(self) -> None:
        """Nothing more is taken, and what waits is done."""
        self._is_closed = True
        if self._turns is not None:
            await asyncio.wait([self._turns])

    def close(self) -> None:
        """After `finish`; without it, what waits is not begun."""
        self._is_closed = True
        self._waiting.clear()
        self._thread.shutdown()

    async def _take_turns(self) -> None:
        while self._waiting:
            await self._gather()
            try:
                transaction, connection = await self._begun()
            except Exception as error:
                _deliver(self._due(), error)
            else:
                jobs = self._due()
                _deliver(jobs, await self._ended(transaction, self._done(jobs, connection)))

    async def _gather(self) -> None:
        """Until the event loop has gone round and nobody came: two hops to a thread cost as much as several changes."""
        num_seen = 0
        while num_seen < len(self._waiting) < MOST_JOBS:
            num_seen = len(self._waiting)
            await asyncio.sleep(0)

    def _due(self) -> list[BatchedCall]:
        """Those whose callers are still there."""
        turn = [self._waiting.popleft() for _ in range(min(MOST_JOBS, len(self._waiting)))]
        return [job for job in turn if not job.answer.cancelled()]

    async def _begun(self) -> tuple[Transaction, sa.Connection]:
        """At once where nobody else writes; or else in the thread, which may wait."""
        transaction = self._transaction(waits=False)
        with suppress(BlockingIOError):
            return transaction, transaction.__enter__()
        transaction = self._transaction(waits=True)
        entering = self._thread.submit(transaction.__enter__)
        try:
            return transaction, await asyncio.wrap_future(entering)
        except asyncio.CancelledError:
            self._thread.submit(_leave, entering, transaction)
            raise

    def _done(self, jobs: Sequence[BatchedCall], connection: sa.Connection) -> Exception | None:
        """Or what went wrong with all of them."""
        try:
            self._do_all(jobs, connection)
        except Exception as error:
            return error
        return None

    async def _ended(self, transaction: Transaction, error: Exception | None) -> Exception | None:
        """Committed, or rolled back for that error."""
        leaving = self._thread.submit(transaction.__exit__, type(error) if error else None, error, None)
        try:
            await asyncio.wrap_future(leaving)
        except Exception as raised:
            return raised
        return error


def _leave(entering: "Future[Any]", transaction: Transaction) -> None:
    """What was begun for an event loop that has ended meanwhile."""
    if not entering.cancelled() and entering.exception() is None:
        with suppress(BaseException):
            transaction.__exit__(asyncio.CancelledError, asyncio.CancelledError(), None)


def _deliver(jobs: Iterable[BatchedCall], error: Exception | None) -> None:
    for job in jobs:
        job.error = job.error or error
        job.deliver()
