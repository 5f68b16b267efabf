"""When files that nobody reads any more are deleted: everything at the start and every hour, a task's when something of
it was recorded."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable

from engine.errors import MuxtuneError
from services.admission.cleanup.garbage_collector import GarbageCollector

_EVERY_SECONDS, _RETRY_SECONDS = 3600.0, 5.0
_log = logging.getLogger(__name__)


class GarbageCollectionLoop:
    """`sweep_datasets` removes bytes that no dataset holds. What cannot be deleted now is tried again."""

    def __init__(self, sweeper: GarbageCollector, sweep_datasets: Callable[[], Awaitable[None]]) -> None:
        self._sweeper, self._sweep_datasets = sweeper, sweep_datasets
        self._names: set[str] = set()
        self._added = asyncio.Event()

    def add(self, names: Iterable[str]) -> None:
        """Tasks of which something was recorded."""
        self._names.update(names)
        if self._names:
            self._added.set()

    async def run(self) -> None:
        """Until cancelled."""
        due = time.monotonic()
        while True:
            try:
                if time.monotonic() >= due:
                    await self._sweep_all()
                    due = time.monotonic() + _EVERY_SECONDS
                await self._sweep_added()
                await self._wait_until(due)
            except MuxtuneError as error:
                _log.warning("sweep put off: %s", error)
                await asyncio.sleep(_RETRY_SECONDS)

    async def _sweep_all(self) -> None:
        num_folders = await asyncio.to_thread(self._sweeper.sweep_all)
        await self._sweep_datasets()
        _log.info("swept everything: %d folders went", num_folders)

    async def _sweep_added(self) -> None:
        names = sorted(self._names)
        await asyncio.to_thread(self._sweeper.sweep, names)
        self._names.difference_update(names)

    async def _wait_until(self, due: float) -> None:
        self._added.clear()
        if not self._names:
            try:
                await asyncio.wait_for(self._added.wait(), due - time.monotonic())
            except TimeoutError:
                return
