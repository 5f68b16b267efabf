"""The threads that alignment works in: what may take minutes (a dataset read) has others than what never does (a
microbatch packed), so that no stream waits for a dataset; and no tenant takes all of them."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar, TypeVarTuple
from weakref import WeakValueDictionary

_LONG_AT_ONCE, _LONG_OF_A_TENANT, _QUICK_AT_ONCE = 64, 4, 8  # most of the long ones wait for their turn (turns.py)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class ThreadPools:
    """For one event loop."""

    def __init__(self) -> None:
        self._long = ThreadPoolExecutor(_LONG_AT_ONCE, "long")
        self._quick = ThreadPoolExecutor(_QUICK_AT_ONCE, "quick")
        self._lines = WeakValueDictionary[str, asyncio.Semaphore]()

    async def quickly(self, work: Callable[[*Ts], T], *arguments: *Ts) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._quick, work, *arguments)

    async def in_line(self, tenant: str, work: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """Beside a few others of the tenant's; the rest wait, and keep no thread from other tenants."""
        loop = asyncio.get_running_loop()
        line = self._lines.setdefault(tenant, asyncio.Semaphore(_LONG_OF_A_TENANT))
        await line.acquire()

        def leave(_: object) -> None:  # when the work is done, though its caller may have left long before
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(line.release)

        future = self._long.submit(work, *arguments)
        future.add_done_callback(leave)
        return await asyncio.wrap_future(future)
