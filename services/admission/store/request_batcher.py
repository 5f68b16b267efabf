"""Work of many callers done by one thread in one go: what waits while one batch is done is the next batch.

So that callers on the event loop share a hop to a thread, and writers one wait for the disk.
"""

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from engine.errors import UnavailableError

MOST_JOBS = 64  # in one batch


class BatchedCall:
    """One caller's work, and what came of it."""

    def __init__(
        self, work: Callable[..., Any], loop: asyncio.AbstractEventLoop, tell: Callable[[Any], None] | None = None
    ) -> None:
        self.work, self.loop, self._tell = work, loop, tell
        self.answer: asyncio.Future[Any] = loop.create_future()
        self._result: Any = None
        self.error: BaseException | None = None
        self._is_done = False

    def run(self, *given: Any) -> None:
        """Keeps what the work returns, or raises."""
        try:
            self._result, self._is_done = self.work(*given), True
        except Exception as error:
            self.error = error

    def deliver(self) -> None:
        """On its event loop. A caller who has left gets nothing, and others are told all the same."""
        if self.error is None and self._is_done and self._tell is not None:
            self._tell(self._result)
        if self.answer.done():
            return
        if self.error is not None:
            self.answer.set_exception(self.error)
        else:
            self.answer.set_result(self._result)


class RequestBatcher:
    """`do_all` runs the jobs it is given, in order; where it raises, all fail that did not by themselves. The callers
    get their answers when it is done with all of them."""

    def __init__(self, name: str, do_all: Callable[[Sequence[BatchedCall]], None]) -> None:
        self._name, self._do_all = name, do_all
        self._waiting: SimpleQueue[BatchedCall | None] = SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    async def do(self, work: Callable[..., Any], tell: Callable[[Any], None] | None = None) -> Any:
        """What the work returns or raises. Work whose caller leaves before its turn is not begun; `tell` hears of what
        is done, on the caller's event loop, whether or not the caller is there."""
        if self._thread is None:
            self._start()
        if self._is_closed:
            raise UnavailableError("admission is stopping")
        job = BatchedCall(work, asyncio.get_running_loop(), tell)
        self._waiting.put(job)
        return await job.answer

    async def finish(self) -> None:
        """Does what waits, and then nothing more."""
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """The same; its callers hear of it when the event loop goes on."""
        self._is_closed = True
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while jobs := list(self._batch()):
            due = [job for job in jobs if not job.answer.cancelled()]
            try:
                if due:
                    self._do_all(due)
            except BaseException as error:
                for job in due:
                    job.error = job.error or error
            _deliver(jobs)

    def _batch(self) -> Iterator[BatchedCall]:
        """Waits for a first one; none when it is closed."""
        job = self._waiting.get()
        for left in reversed(range(MOST_JOBS)):
            if job is None:
                self._waiting.put(None)  # for the next turn
                return
            yield job
            try:
                if left:
                    job = self._waiting.get_nowait()
            except Empty:
                return


def _deliver(jobs: Iterable[BatchedCall]) -> None:
    """With one call into each event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[BatchedCall]] = {}
    for job in jobs:
        by_loop.setdefault(job.loop, []).append(job)
    for loop, own in by_loop.items():
        with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
            loop.call_soon_threadsafe(_deliver_here, own)


def _deliver_here(jobs: Sequence[BatchedCall]) -> None:
    for job in jobs:
        job.deliver()
