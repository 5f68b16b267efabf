"""Threads of the alignment service: long work (reading a dataset) never delays short work (packing a microbatch).

Each kind of work has its own threads, and one tenant may use a few of the long ones only.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar, TypeVarTuple
from weakref import WeakValueDictionary

_NUM_LONG_THREADS, _NUM_SHORT_THREADS = 64, 8  # most long threads wait for a slot of fair_queue.FairQueue
_NUM_LONG_CALLS_PER_TENANT = 4

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class ThreadPools:
    """Runs blocking work for one event loop."""

    def __init__(self) -> None:
        self._long = ThreadPoolExecutor(_NUM_LONG_THREADS, "long")
        self._short = ThreadPoolExecutor(_NUM_SHORT_THREADS, "short")
        self._tenant_limits = WeakValueDictionary[str, asyncio.Semaphore]()

    async def run_short(self, work: Callable[[*Ts], T], *arguments: *Ts) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._short, work, *arguments)

    async def run_long(self, tenant: str, work: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """Run work of a tenant, a few calls at once. More calls wait without a thread."""
        loop = asyncio.get_running_loop()
        limit = self._tenant_limits.setdefault(tenant, asyncio.Semaphore(_NUM_LONG_CALLS_PER_TENANT))
        await limit.acquire()

        def release(_: object) -> None:  # when the work ends, even if its caller was cancelled long before
            with suppress(RuntimeError):  # the loop is closed, and no caller waits
                loop.call_soon_threadsafe(limit.release)

        future = self._long.submit(work, *arguments)
        future.add_done_callback(release)
        return await asyncio.wrap_future(future)
