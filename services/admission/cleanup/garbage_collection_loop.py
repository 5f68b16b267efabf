"""Runs the garbage collector: on everything at the start and every hour, on a task when a result is recorded."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable

from engine.errors import MuxtuneError
from services.admission.cleanup.garbage_collector import GarbageCollector
from services.concurrency.threads import Threads

_INTERVAL_SECONDS, _RETRY_SECONDS = 3600.0, 5.0
_log = logging.getLogger(__name__)


class GarbageCollectionLoop:
    """`remove_datasets` removes the bytes that no dataset refers to. Failed deletions are tried again."""

    def __init__(
        self, collector: GarbageCollector, remove_datasets: Callable[[], Awaitable[None]], threads: Threads
    ) -> None:
        self._collector, self._remove_datasets, self._threads = collector, remove_datasets, threads
        self._names: set[str] = set()
        self._added = asyncio.Event()

    def add(self, names: Iterable[str]) -> None:
        """Collect these tasks soon."""
        self._names.update(names)
        if self._names:
            self._added.set()

    async def run(self) -> None:
        """Run until cancelled."""
        due = time.monotonic()
        while True:
            try:
                if time.monotonic() >= due:
                    await self._collect_all()
                    due = time.monotonic() + _INTERVAL_SECONDS
                await self._collect_added()
                await self._wait_until(due)
            except MuxtuneError as error:
                _log.warning("garbage collection failed and will be retried: %s", error)
                await asyncio.sleep(_RETRY_SECONDS)

    async def _collect_all(self) -> None:
        num_folders = await self._threads.run(self._collector.collect_all)
        await self._remove_datasets()
        _log.info("garbage collection deleted %d folders", num_folders)

    async def _collect_added(self) -> None:
        names = sorted(self._names)
        await self._threads.run(self._collector.collect, names)
        self._names.difference_update(names)

    async def _wait_until(self, due: float) -> None:
        self._added.clear()
        if not self._names:
            try:
                await asyncio.wait_for(self._added.wait(), due - time.monotonic())
            except TimeoutError:
                return
