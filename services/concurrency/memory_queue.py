"""Jobs start while their memory together fits; others wait, so that memory does not grow with the number of tenants."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_WAIT_SECONDS = 1.0


@dataclass(frozen=True, eq=False)
class _Waiting:
    tenant: str
    num_bytes: int


class MemoryQueue:
    """Thread-safe. A job that needs more than `max_bytes` starts when no other one runs.

    The job of the tenant that holds the least starts next; of several the one that has waited longest. No job passes a
    job before it, so that a large one is not starved by small ones. Small ones have a quarter of the bytes to
    themselves: they do not wait for large ones.
    """

    def __init__(self, max_bytes: int) -> None:
        small = max_bytes // 4
        self._max_small_job = small // 4
        self._lanes = _Lane(small), _Lane(max_bytes - small)

    @contextmanager
    def hold(self, tenant: str, num_bytes: int, check_wanted: Callable[[], None]) -> Iterator[None]:
        """Wait for the memory; hold it until the end of the block. `check_wanted` raises an error if the job is to end
        before it starts."""
        lane = self._lanes[0 if num_bytes <= self._max_small_job else 1]
        job = _Waiting(tenant, min(num_bytes, lane.max_bytes))
        lane.acquire(job, check_wanted)
        try:
            yield
        finally:
            lane.release(job)


class _Lane:
    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._held, self._waiting, self._changed = Counter[str](), list[_Waiting](), threading.Condition()

    def acquire(self, job: _Waiting, check_wanted: Callable[[], None]) -> None:
        with self._changed:
            self._waiting.append(job)
            try:
                while not self._may_start(job):
                    self._changed.wait(_WAIT_SECONDS)
                    check_wanted()
            except BaseException:
                self._waiting.remove(job)
                raise
            else:
                self._waiting.remove(job)
                self._held[job.tenant] += job.num_bytes
            finally:
                self._changed.notify_all()

    def release(self, job: _Waiting) -> None:
        with self._changed:
            self._held[job.tenant] -= job.num_bytes
            if not self._held[job.tenant]:
                del self._held[job.tenant]
            self._changed.notify_all()

    def _may_start(self, job: _Waiting) -> bool:
        first = min(self._waiting, key=lambda waiting: self._held[waiting.tenant])  # the first of equal ones
        return first is job and self._held.total() + job.num_bytes <= self.max_bytes
