"""Pools of threads, one for each kind of blocking work: no kind of work can fill the threads of another.

A pool may share its threads among tenants: one tenant gets a few of them, and threads that become free go to tenants
in turn.
"""

import asyncio
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar, copy_context
from typing import TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
_abandoned: ContextVar[threading.Event | None] = ContextVar("abandoned", default=None)


class AbandonedError(Exception):
    """Nobody waits for this work any more, so it ends."""


def is_abandoned() -> bool:
    """Return whether the caller has left for whom this thread works. Long work asks now and then, and ends."""
    abandoned = _abandoned.get()
    return abandoned is not None and abandoned.is_set()


class Threads:
    """Runs blocking work on a few threads, first come, first served: for callers that are not tenants."""

    def __init__(self, name: str, num_threads: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, name)

    async def run(self, work: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """Return what `work` returns, or raise what it raises. It sees the caller's context variables."""
        return await _run(self._threads, lambda _: None, work, *arguments)


class TenantThreads:
    """Runs blocking work of tenants for one event loop: at most `num_threads` calls at once, `max_per_tenant` of one.

    Other calls wait without a thread. A thread that becomes free goes to the tenant with the fewest running calls; of
    several to the one that was served longest ago.
    """

    def __init__(self, name: str, num_threads: int, max_per_tenant: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, name)
        self._num_threads, self._max_per_tenant = num_threads, max_per_tenant
        self._running = Counter[str]()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()  # served longest ago first

    async def run(self, tenant: str, work: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """Return what `work` returns, or raise what it raises. It sees the caller's context variables."""
        await self._acquire(tenant)
        loop = asyncio.get_running_loop()

        def release(_: object) -> None:  # when the work ends, even if its caller was cancelled long before
            with suppress(RuntimeError):  # the loop is closed, and no caller waits
                loop.call_soon_threadsafe(self._release, tenant)

        return await _run(self._threads, release, work, *arguments)

    async def _acquire(self, tenant: str) -> None:
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(granted)
        self._grant()
        try:
            await granted
        except asyncio.CancelledError:
            if granted.cancelled():
                self._remove(tenant, granted)
            else:  # granted in the same turn of the event loop
                self._release(tenant)
            raise

    def _remove(self, tenant: str, granted: "asyncio.Future[None]") -> None:
        queue = self._waiting.get(tenant, deque())
        with suppress(ValueError):
            queue.remove(granted)
        if not queue:
            self._waiting.pop(tenant, None)

    def _release(self, tenant: str) -> None:
        self._running[tenant] -= 1
        if not self._running[tenant]:
            del self._running[tenant]
        self._grant()

    def _grant(self) -> None:
        while self._running.total() < self._num_threads:
            eligible = [tenant for tenant in self._waiting if self._running[tenant] < self._max_per_tenant]
            if not eligible:
                return
            tenant = min(eligible, key=self._running.__getitem__)
            queue = self._waiting.pop(tenant)
            granted = queue.popleft()
            if queue:
                self._waiting[tenant] = queue  # behind all other tenants
            if not granted.done():
                self._running[tenant] += 1
                granted.set_result(None)


async def _run(
    threads: ThreadPoolExecutor,
    on_done: Callable[["Future[T]"], None],
    work: Callable[[*Ts], T],
    *arguments: *Ts,
) -> T:
    """Run work that sees the caller's context variables, as `asyncio.to_thread` does, and whether the caller left."""
    abandoned, context = threading.Event(), copy_context()
    context.run(_abandoned.set, abandoned)
    future = threads.submit(lambda: context.run(work, *arguments))
    future.add_done_callback(on_done)
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
        abandoned.set()
        raise
