"""Runs the garbage collector: on a task when a result is recorded and after its end, on everything every hour.

Folders of tasks, bytes of datasets and old rows are collected apart from each other: none waits for another.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator

from services.admission.cleanup.garbage_collector import GarbageCollector
from services.admission.store.clock import now
from services.concurrency.threads import Threads

_INTERVAL_SECONDS, _LATE_SECONDS, _RETRY_SECONDS = 3600.0, 60.0, 30.0
_ROWS_SECONDS, _PAUSE_SECONDS = 600.0, 0.02  # between deletions of old rows, and between their transactions
_log = logging.getLogger(__name__)


class GarbageCollectionLoop:
    """`remove_datasets` removes the bytes that no dataset refers to. `delete_rows` deletes old rows, in a transaction
    for each number that it yields. Failed deletions are tried again."""

    def __init__(
        self,
        collector: GarbageCollector,
        remove_datasets: Callable[[], Awaitable[None]],
        threads: Threads,
        delete_rows: Callable[[], Iterator[int]],
    ) -> None:
        self._collector, self._remove_datasets, self._threads = collector, remove_datasets, threads
        self._delete_rows = delete_rows
        self._names: set[str] = set()
        self._added = asyncio.Event()
        self._late_until = now()

    def add(self, names: Iterable[str]) -> None:
        """Collect these tasks soon."""
        self._names.update(names)
        if self._names:
            self._added.set()

    async def run(self) -> None:
        """Run until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._collect_added())
            group.create_task(_repeat(self._collect_late, _LATE_SECONDS))
            group.create_task(_repeat(self._collect_all, _INTERVAL_SECONDS))
            group.create_task(_repeat(self._remove_datasets, _INTERVAL_SECONDS))
            group.create_task(_repeat(self._delete_old_rows, _ROWS_SECONDS))

    async def _collect_all(self) -> None:
        num_folders = await self._threads.run(self._collector.collect_all)
        _log.info("garbage collection deleted %d folders", num_folders)

    async def _delete_old_rows(self) -> None:
        num_rows, batches = 0, self._delete_rows()
        while (num_deleted := await self._threads.run(next, batches, None)) is not None:
            num_rows += num_deleted
            await asyncio.sleep(_PAUSE_SECONDS)
        if num_rows:
            _log.info("%d old rows are deleted", num_rows)

    async def _collect_late(self) -> None:
        """Add the tasks that ended a while ago: what was still being written at their end is there by now."""
        since, until = self._late_until, now() - int(_LATE_SECONDS * 1e6)
        if until > since:
            self.add(await self._threads.run(self._collector.list_ended, since, until))
            self._late_until = until

    async def _collect_added(self) -> None:
        while True:
            await self._added.wait()
            self._added.clear()
            names, self._names = sorted(self._names), set()
            failed = await self._threads.run(self._collector.collect, names)
            if failed:
                asyncio.get_running_loop().call_later(_RETRY_SECONDS, self.add, failed)


async def _repeat(work: Callable[[], Awaitable[None]], seconds: float) -> None:
    """Do the work at once and then at intervals, and sooner after a failure, which is logged."""
    while True:
        try:
            await work()
        except Exception as error:
            _log.warning("garbage collection failed and will be retried: %s: %s", type(error).__name__, error)
            await asyncio.sleep(min(seconds, _RETRY_SECONDS))
        else:
            await asyncio.sleep(seconds)
