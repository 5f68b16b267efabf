"""Group commit on the event loop: one transaction runs the changes of many callers; a thread waits for the disk.

Meant for SQLite, where a statement takes microseconds: in a thread beside a busy event loop each statement would wait
twice for the interpreter's lock, which takes longer than the statement.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from typing import Any

import sqlalchemy as sa

from engine.errors import UnavailableError
from services.admission.store.request_batcher import MAX_BATCH_CALLS, BatchedCall, run_in_savepoints

Transaction = AbstractContextManager[sa.Connection]


class GroupCommit:
    """Serves one event loop at a time. Calls that come while a transaction begins or commits go into the next one.

    `begin(blocking=...)` returns a transaction that commits when its block ends. Both ends may raise and may block;
    with `blocking=False` the transaction raises BlockingIOError on entry instead of waiting.
    """

    def __init__(self, begin: Callable[..., Transaction]) -> None:
        self._begin_transaction = begin
        self._queue: deque[BatchedCall] = deque()
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "changes")
        self._late_rollback: Future[None] | None = None
        self._is_closed = False

    async def submit(self, function: Callable[..., Any], on_success: Callable[[Any], None] | None = None) -> Any:
        """Behave as `RequestBatcher.submit`."""
        if self._is_closed:
            raise UnavailableError("admission is stopping: send the call again")
        loop = asyncio.get_running_loop()
        call = BatchedCall(function, loop, on_success)
        self._queue.append(call)
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._run_batches())
        return await call.future

    async def finish(self) -> None:
        """Run the calls that wait; refuse later ones."""
        self._is_closed = True
        if self._worker is not None:
            await asyncio.wait([self._worker])

    def close(self) -> None:
        """Stop at once. Without `finish` before it, calls that wait never run."""
        self._is_closed = True
        self._queue.clear()
        self._thread.shutdown()

    async def _run_batches(self) -> None:
        while self._queue:
            await self._collect()
            try:
                transaction, connection = await self._begin()
            except Exception as error:
                _deliver(self._next_batch(), error)
            else:
                calls = self._next_batch()
                batch_error = _run_all(calls, connection)
                _deliver(calls, await self._end(transaction, batch_error))

    async def _collect(self) -> None:
        """Let the event loop run until no further call comes: two thread switches cost as much as several changes."""
        num_seen = 0
        while num_seen < len(self._queue) < MAX_BATCH_CALLS:
            num_seen = len(self._queue)
            await asyncio.sleep(0)

    def _next_batch(self) -> list[BatchedCall]:
        """Take the calls of one batch from the queue, without those whose callers have left."""
        batch = [self._queue.popleft() for _ in range(min(MAX_BATCH_CALLS, len(self._queue)))]
        return [call for call in batch if not call.future.cancelled()]

    async def _begin(self) -> tuple[Transaction, sa.Connection]:
        """Begin at once where no other writer is active; wait for it in the thread otherwise."""
        if self._late_rollback is None or self._late_rollback.done():  # the thread could not end what begins here
            transaction = self._begin_transaction(blocking=False)
            with suppress(BlockingIOError):
                return transaction, transaction.__enter__()
        transaction = self._begin_transaction(blocking=True)
        entering = self._thread.submit(transaction.__enter__)
        try:
            return transaction, await asyncio.wrap_future(entering)
        except asyncio.CancelledError:
            self._late_rollback = self._thread.submit(_roll_back_late, entering, transaction)
            raise

    async def _end(self, transaction: Transaction, error: Exception | None) -> Exception | None:
        """Commit, or roll back because of the error. Return the error that all calls of the batch fail with."""
        leaving = self._thread.submit(transaction.__exit__, type(error) if error else None, error, None)
        try:
            await asyncio.wrap_future(leaving)
        except Exception as raised:
            return raised
        return error


def _run_all(calls: Sequence[BatchedCall], connection: sa.Connection) -> Exception | None:
    """Run the calls. Return the error that spoils the transaction of all of them, if any."""
    try:
        run_in_savepoints(calls, connection)
    except Exception as error:
        return error
    return None


def _roll_back_late(entering: "Future[Any]", transaction: Transaction) -> None:
    """Roll back a transaction that began for an event loop that has ended meanwhile."""
    if not entering.cancelled() and entering.exception() is None:
        with suppress(BaseException):
            transaction.__exit__(asyncio.CancelledError, asyncio.CancelledError(), None)


def _deliver(calls: Iterable[BatchedCall], error: Exception | None) -> None:
    for call in calls:
        call.error = call.error or error
        call.deliver()
