"""Tenants take turns at computing: by the work that was done, whatever it consists of, and whoever still waits."""

import asyncio
import itertools
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import UnavailableError
from services.concurrency.fair_queue import FairQueue
from services.concurrency.threads import AbandonedError, TenantThreads
from tests.thoroughness import examples

SECONDS = 20.0


class Clock:
    """A monotonic clock moved by hand."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def until(condition: Callable[[], bool]) -> None:
    """Wait for what no event reports: that a thread waits for its turn."""
    ended = threading.Event()
    for _ in range(int(SECONDS * 1000)):
        if condition():
            return
        ended.wait(0.001)
    raise AssertionError("it did not come about")


@given(
    jobs=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 5)), min_size=1, max_size=8),
    num_slots=st.integers(1, 3),
)
@settings(max_examples=examples(50), deadline=None)
def test_few_jobs_run_at_once_and_one_of_each_tenant(jobs: list[tuple[str, int]], num_slots: int) -> None:
    queue, running, most = FairQueue(num_slots, slice_seconds=0), Counter[str](), [0]
    lock, done = threading.Lock(), list[str]()

    def work(tenant: str, num_slices: int) -> None:
        with queue.slot(tenant) as slot:
            for _ in range(num_slices):
                with lock:
                    running[tenant] += 1
                    most[0] = max(most[0], running.total())
                    assert running[tenant] == 1
                threading.Event().wait(0.0001)
                with lock:
                    running[tenant] -= 1
                slot.yield_to_waiting()
        done.append(tenant)

    with ThreadPoolExecutor(len(jobs)) as threads:
        for future in [threads.submit(work, *job) for job in jobs]:
            future.result()
    assert most[0] <= num_slots and len(done) == len(jobs)
    assert not queue.has_waiting and not queue._running


def test_a_tenant_with_many_jobs_gets_every_other_turn() -> None:
    queue, order, ready = FairQueue(num_slots=1, slice_seconds=0), list[str](), threading.Barrier(6)

    def work(tenant: str) -> None:
        ready.wait()
        with queue.slot(tenant) as slot:
            for _ in range(20):
                order.append(tenant)
                slot.yield_to_waiting()

    queue.acquire("first")  # until all of them wait
    with ThreadPoolExecutor(6) as threads:
        futures = [threads.submit(work, tenant) for tenant in (*["many"] * 4, "one", "other")]
        while sum(map(len, queue._waiting.values())) < 6:
            threading.Event().wait(0.001)
        queue.release("first")
        for future in futures:
            future.result()
    together = order[: max(i for i, tenant in enumerate(order) if tenant == "one")]
    gaps = [len(list(group)) for tenant, group in itertools.groupby(together, lambda t: t == "one") if not tenant]
    assert max(gaps) == 2, "between two of its queue each other tenant has one"
    assert Counter(order) == {"many": 80, "one": 20, "other": 20}


def test_a_slot_is_kept_while_no_job_waits_and_waiting_is_not_counted() -> None:
    clock = Clock()
    queue = FairQueue(num_slots=1, slice_seconds=15, overrun_seconds=1000, monotonic=clock)

    def run_b() -> None:
        with queue.slot("b"):
            clock.seconds += 100

    with queue.slot("a") as slot:
        for seconds in (10, 20, 30):
            clock.seconds = seconds
            assert slot.yield_to_waiting() == seconds
        other = threading.Thread(target=run_b)
        other.start()
        until(lambda: queue.has_waiting)
        clock.seconds += 10
        assert slot.yield_to_waiting() == 40, "handed on, and back 100 seconds later"
        other.join()
        clock.seconds += 10
        assert slot.yield_to_waiting() == 50


def test_a_piece_of_work_that_does_not_end_delays_no_other_tenant() -> None:
    """Both slots are held by jobs that never come to yield them."""
    queue, let_go, order = FairQueue(2, overrun_seconds=0.02), threading.Event(), list[str]()

    def endless(tenant: str) -> None:
        with queue.slot(tenant) as slot:
            assert let_go.wait(SECONDS)
            slot.yield_to_waiting()
            order.append(tenant)

    with ThreadPoolExecutor(4) as threads:
        hogs = [threads.submit(endless, tenant) for tenant in ("hog", "boar", "hog")]
        until(lambda: len(queue._running) == 2)
        for tenant in ("one", "two", "one"):
            with queue.slot(tenant) as slot:
                slot.yield_to_waiting()
                order.append(tenant)
        assert order == ["one", "two", "one"] and len(queue._running) == 2, "and a hog has one slot at most"
        let_go.set()
        for hog in hogs:
            hog.result()
    assert not queue.has_waiting and not queue._running


def test_jobs_that_overran_take_turns_again() -> None:
    """Three tenants' jobs overrun at once; afterwards one computes at a time, in turn."""
    queue, ready, order = FairQueue(1, slice_seconds=0, overrun_seconds=0.02), threading.Barrier(3), list[str]()
    num_running, most, is_recording = [0], [0], threading.Event()

    def work(tenant: str) -> None:
        with queue.slot(tenant) as slot:
            ready.wait(SECONDS)  # each has a slot by now
            while order.count(tenant) < 50:
                slot.yield_to_waiting()
                num_running[0] += 1
                if queue.has_waiting and len(queue._running) == 1:
                    is_recording.set()  # all have come to yield
                if is_recording.is_set():
                    most[0] = max(most[0], num_running[0])
                    order.append(tenant)
                threading.Event().wait(0.0001)
                num_running[0] -= 1

    with ThreadPoolExecutor(3) as threads:
        for job in [threads.submit(work, tenant) for tenant in "abc"]:
            job.result()
    assert most[0] == 1
    assert Counter(order[:60]) == {"a": 20, "b": 20, "c": 20}


@pytest.mark.parametrize("state", ["computes", "waits for a slot", "waits for a thread"])
async def test_work_that_nobody_waits_for_any_more_ends(state: str) -> None:
    queue = FairQueue(num_slots=1, slice_seconds=0, overrun_seconds=0.01)
    threads, started, ended = TenantThreads("t", 2, 1), asyncio.Event(), asyncio.Event()
    loop, seen = asyncio.get_running_loop(), list[str]()

    def work() -> None:
        loop.call_soon_threadsafe(started.set)
        try:
            with queue.slot("bad") as slot:
                seen.append("slot")
                while True:
                    slot.yield_to_waiting()
        except AbandonedError:
            seen.append("abandoned")
        finally:
            loop.call_soon_threadsafe(ended.set)

    if state == "waits for a slot":
        queue.acquire("good")
        queue._running["good"] = float("inf")  # it does not overrun
    call = asyncio.create_task(threads.run("bad", work))
    async with asyncio.timeout(SECONDS):
        await started.wait()
        if state == "waits for a thread":
            second = asyncio.create_task(threads.run("bad", work))
            await asyncio.sleep(0)
            second.cancel()
            await asyncio.gather(second, return_exceptions=True)
        call.cancel()
        await ended.wait()
        assert seen == (["abandoned"] if state == "waits for a slot" else ["slot", "abandoned"])
        assert await threads.run("bad", lambda: "the thread is free") == "the thread is free"
    assert not queue.has_waiting and "bad" not in queue._running


def test_jobs_end_when_the_service_stops() -> None:
    queue, ready = FairQueue(1, slice_seconds=0, overrun_seconds=0.01), threading.Barrier(3)

    def work(tenant: str) -> None:
        ready.wait()
        with queue.slot(tenant) as slot:
            while True:
                slot.yield_to_waiting()

    with ThreadPoolExecutor(2) as threads:
        jobs = [threads.submit(work, tenant) for tenant in "ab"]
        ready.wait()
        queue.close()
        for job in jobs:
            with pytest.raises(UnavailableError, match="stopping"):
                job.result(SECONDS)
