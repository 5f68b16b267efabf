"""One tenant's blocking work never takes the threads that others wait for."""

import asyncio
import threading
from collections import Counter
from contextvars import ContextVar
from typing import Any

import pytest

from services.concurrency.threads import TenantThreads, Threads

SECONDS = 20.0


async def started(events: "asyncio.Queue[str]", count: int) -> list[str]:
    async with asyncio.timeout(SECONDS):
        return [await events.get() for _ in range(count)]


class Work:
    """Blocking work that reports its start and ends when its tenant is let go."""

    def __init__(self) -> None:
        self.events, self._loop = asyncio.Queue[str](), asyncio.get_running_loop()
        self.running, self.most = Counter[str](), Counter[str]()
        self._lock, self._let_go = threading.Lock(), dict[str, threading.Semaphore]()

    def __call__(self, tenant: str) -> str:
        with self._lock:
            self.running[tenant] += 1
            self.most[tenant] = max(self.most[tenant], self.running[tenant])
            self.most["all"] = max(self.most["all"], self.running.total())
            semaphore = self._let_go.setdefault(tenant, threading.Semaphore(0))
        self._loop.call_soon_threadsafe(self.events.put_nowait, tenant)
        assert semaphore.acquire(timeout=SECONDS)
        with self._lock:
            self.running[tenant] -= 1
        return tenant

    def let_go(self, tenant: str, count: int = 1) -> None:
        with self._lock:
            self._let_go.setdefault(tenant, threading.Semaphore(0)).release(count)


async def test_a_tenant_holds_a_few_threads_and_the_next_free_one_goes_to_another() -> None:
    threads, work = TenantThreads("t", 4, 3), Work()
    hog = [asyncio.create_task(threads.run("hog", work, "hog")) for _ in range(10)]
    assert await started(work.events, 3) == ["hog"] * 3
    good = [asyncio.create_task(threads.run("good", work, "good")) for _ in range(3)]
    assert await started(work.events, 1) == ["good"], "a thread that the hog may not have"
    work.let_go("hog")
    assert await started(work.events, 1) == ["good"], "it has fewer running calls than the hog"
    work.let_go("good")
    assert await started(work.events, 1) == ["good"]
    work.let_go("hog", 10)
    work.let_go("good", 3)
    assert await asyncio.gather(*hog, *good) == ["hog"] * 10 + ["good"] * 3
    assert (work.most["hog"], work.most["all"]) == (3, 4)
    assert not threads._running and not threads._waiting


async def test_cancelled_callers_leave_the_queue_and_their_work_keeps_its_thread() -> None:
    threads, work = TenantThreads("t", 2, 1), Work()
    running = asyncio.create_task(threads.run("hog", work, "hog"))
    await started(work.events, 1)
    waiting = [asyncio.create_task(threads.run("hog", work, "hog")) for _ in range(5)]
    last = asyncio.create_task(threads.run("hog", work, "hog"))
    await asyncio.sleep(0)
    for call in (running, *waiting):
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    other = asyncio.create_task(threads.run("good", work, "good"))
    assert await started(work.events, 1) == ["good"], "the work of the cancelled call still has its thread"
    work.let_go("hog")
    assert await started(work.events, 1) == ["hog"]
    work.let_go("hog")
    work.let_go("good")
    assert [await last, await other] == ["hog", "good"] and work.most["hog"] == 1


@pytest.mark.parametrize("kind", ["of tenants", "of one kind"])
async def test_work_sees_its_callers_context_and_its_error_comes_back(kind: str) -> None:
    caller, threads = ContextVar[str]("caller", default=""), TenantThreads("t", 1, 1)
    run: Any = Threads("t", 1).run if kind == "of one kind" else lambda *work: threads.run("a", *work)
    caller.set("me")
    assert await run(caller.get) == "me"
    with pytest.raises(ZeroDivisionError):
        await run(lambda: 1 // 0)
    assert await run(lambda: 1) == 1
