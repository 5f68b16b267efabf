"""Memory of jobs is bounded whatever number of tenants brings them, and nobody's job waits for ever."""

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.concurrency.memory_queue import MemoryQueue
from tests.thoroughness import examples

SECONDS = 20.0


class Jobs:
    """Runs jobs that hold their memory until they are let go."""

    def __init__(self, queue: MemoryQueue) -> None:
        self._queue, self._threads = queue, ThreadPoolExecutor(30)
        self._changed, self.started, self.let_go = threading.Condition(), list[str](), set[str]()

    def start(self, name: str, num_bytes: int) -> "Future[None]":
        """Start a job; its tenant is the first letter of its name."""
        return self._threads.submit(self._run, name, num_bytes)

    def _run(self, name: str, num_bytes: int) -> None:
        with self._queue.hold(name[0], num_bytes, lambda: None), self._changed:
            self.started.append(name)
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: name in self.let_go, SECONDS)

    def has_started(self, *names: str) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: set(names) <= set(self.started), SECONDS)

    def end(self, *names: str) -> None:
        with self._changed:
            self.let_go.update(names)
            self._changed.notify_all()


def until(condition: Callable[[], bool]) -> None:
    for _ in range(int(SECONDS * 1000)):
        if condition():
            return
        threading.Event().wait(0.001)
    raise AssertionError("it did not come about")


def test_large_jobs_wait_in_turn_and_small_ones_do_not_wait_for_them() -> None:
    queue = MemoryQueue(1600)  # 1200 for large jobs; 400 for those up to 100
    jobs, waiting = Jobs(queue), queue._lanes[1]._waiting
    jobs.start("a1", 700)
    assert jobs.has_started("a1")
    for number, name in enumerate(("a2", "a3", "b1", "c1"), start=1):
        jobs.start(name, 5000 if name == "c1" else 700)
        until(lambda number=number: len(waiting) == number)  # type: ignore[misc]
    jobs.start("d1", 90)
    assert jobs.has_started("d1"), "a small one"
    assert jobs.started == ["a1", "d1"]
    jobs.end("a1")
    assert jobs.has_started("a2"), "no tenant holds anything now, and it has waited longest"
    jobs.end("a2", "d1")
    for name in ("a3", "b1", "c1"):
        jobs.end(name)
        assert jobs.has_started(name)
    assert sorted(jobs.started) == ["a1", "a2", "a3", "b1", "c1", "d1"]


def test_a_tenant_that_holds_memory_comes_after_one_that_does_not() -> None:
    queue = MemoryQueue(1600)
    jobs, waiting = Jobs(queue), queue._lanes[1]._waiting
    for name in ("a1", "b1"):
        jobs.start(name, 600)
    assert jobs.has_started("a1", "b1")
    for number, name in enumerate(("a2", "a3", "c1"), start=1):
        jobs.start(name, 600)
        until(lambda number=number: len(waiting) == number)  # type: ignore[misc]
    jobs.end("b1")
    assert jobs.has_started("c1") and jobs.started[-1] == "c1"
    jobs.end("a1", "a2", "a3", "c1")
    assert jobs.has_started("a2", "a3")


def test_a_job_that_is_not_wanted_any_more_leaves_the_queue() -> None:
    queue = MemoryQueue(1600)

    def leave() -> None:
        raise KeyError("left")

    with queue.hold("a", 1200, lambda: None):
        with pytest.raises(KeyError), queue.hold("b", 1200, leave):
            pass
        assert not queue._lanes[1]._waiting
    with queue.hold("c", 1200, leave):
        pass


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3000)), min_size=1, max_size=12))
@settings(max_examples=examples(30), deadline=None)
def test_memory_is_never_exceeded_and_all_jobs_run(wants: list[tuple[str, int]]) -> None:
    queue, held, most, lock = MemoryQueue(1600), Counter[bool](), Counter[bool](), threading.Lock()

    def run(tenant: str, num_bytes: int) -> None:
        is_small = num_bytes <= 100
        with queue.hold(tenant, num_bytes, lambda: None):
            with lock:
                held[is_small] += min(num_bytes, 1200)
                most[is_small] = max(most[is_small], held[is_small])
            threading.Event().wait(0.0005)
            with lock:
                held[is_small] -= min(num_bytes, 1200)

    with ThreadPoolExecutor(len(wants)) as threads:
        for job in [threads.submit(run, *want) for want in wants]:
            job.result(SECONDS)
    assert most[True] <= 400 and most[False] <= 1200
    assert not any(lane._held or lane._waiting for lane in queue._lanes)
