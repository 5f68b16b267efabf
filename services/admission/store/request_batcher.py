"""Batches calls of many callers on one thread: the calls that wait while one batch runs are the next batch.

Callers on the event loop share one switch to a thread this way, and writers share one wait for the disk.
"""

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

import sqlalchemy as sa

from engine.errors import UnavailableError
from services.admission.store.prepared_statements import PreparedStatement

MAX_BATCH_CALLS = 64
_SAVEPOINT = PreparedStatement(sa.text("SAVEPOINT one_call"))
_ROLLBACK = PreparedStatement(sa.text("ROLLBACK TO SAVEPOINT one_call"))
_RELEASE = PreparedStatement(sa.text("RELEASE SAVEPOINT one_call"))


class BatchedCall:
    """A caller's function, its outcome, and the future that the caller awaits."""

    def __init__(
        self,
        function: Callable[..., Any],
        loop: asyncio.AbstractEventLoop,
        on_success: Callable[[Any], None] | None = None,
    ) -> None:
        self.loop, self._function, self._on_success = loop, function, on_success
        self.future: asyncio.Future[Any] = loop.create_future()
        self.error: BaseException | None = None
        self._result: Any = None
        self._has_result = False

    def run(self, *arguments: Any) -> None:
        """Run the function; keep its result or its exception."""
        try:
            self._result, self._has_result = self._function(*arguments), True
        except Exception as error:
            self.error = error

    def deliver(self) -> None:
        """Set the future on the caller's event loop. `on_success` runs even where the caller has left."""
        if self.error is None and self._has_result and self._on_success is not None:
            self._on_success(self._result)
        if self.future.done():
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self._result)


def run_in_savepoints(calls: Sequence[BatchedCall], connection: sa.Connection) -> None:
    """Run the calls in order in one transaction; a call that raises changes nothing."""
    for call in calls:
        _SAVEPOINT.execute(connection)
        call.run(connection)
        if call.error is not None:
            if connection.invalidated:
                raise call.error
            _ROLLBACK.execute(connection)
        _RELEASE.execute(connection)


class RequestBatcher:
    """`run_batch` runs the calls of a batch in order; where it raises, all calls fail that have not failed by
    themselves. Callers receive their results when the whole batch is done."""

    def __init__(self, name: str, run_batch: Callable[[Sequence[BatchedCall]], None]) -> None:
        self._name, self._run_batch = name, run_batch
        self._queue: SimpleQueue[BatchedCall | None] = SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    async def submit(self, function: Callable[..., Any], on_success: Callable[[Any], None] | None = None) -> Any:
        """Return or raise what the function does. The function is skipped if its caller leaves before its batch.
        `on_success` receives its result on the caller's event loop, whether or not the caller still waits."""
        if self._thread is None:
            self._start()
        if self._is_closed:
            raise UnavailableError("admission is stopping: send the call again")
        call = BatchedCall(function, asyncio.get_running_loop(), on_success)
        self._queue.put(call)
        return await call.future

    async def finish(self) -> None:
        """Run the calls that wait; refuse later ones."""
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Run the calls that wait; their callers receive the results when the event loop continues."""
        self._is_closed = True
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while calls := list(self._next_batch()):
            active = [call for call in calls if not call.future.cancelled()]
            try:
                if active:
                    self._run_batch(active)
            except BaseException as error:
                for call in active:
                    call.error = call.error or error
            _deliver(calls)

    def _next_batch(self) -> Iterator[BatchedCall]:
        """Wait for a first call and yield it with those behind it; yield nothing once closed."""
        call = self._queue.get()
        for num_left in reversed(range(MAX_BATCH_CALLS)):
            if call is None:
                self._queue.put(None)  # ends the next batch, too
                return
            yield call
            try:
                if num_left:
                    call = self._queue.get_nowait()
            except Empty:
                return


def _deliver(calls: Iterable[BatchedCall]) -> None:
    """Deliver the outcomes with one callback for each event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[BatchedCall]] = {}
    for call in calls:
        by_loop.setdefault(call.loop, []).append(call)
    for loop, calls_of_loop in by_loop.items():
        with suppress(RuntimeError):  # the loop has ended, and its callers with it
            loop.call_soon_threadsafe(_deliver_all, calls_of_loop)


def _deliver_all(calls: Sequence[BatchedCall]) -> None:
    for call in calls:
        call.deliver()
