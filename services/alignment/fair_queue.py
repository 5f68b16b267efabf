"""Shares computation fairly: a few jobs run at once, and tenants take turns however many jobs each submits."""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class FairQueue:
    """Runs at most `num_slots` jobs at once and one of each tenant. Thread-safe.

    A job that had its slot for `slice_seconds` yields it to waiting jobs and queues again.
    """

    def __init__(
        self, num_slots: int = 2, slice_seconds: float = 0.1, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._num_slots, self.slice_seconds, self.monotonic = num_slots, slice_seconds, monotonic
        self._lock = threading.Lock()
        self._running: set[str] = set()  # tenants
        self._waiting: OrderedDict[str, deque[threading.Event]] = OrderedDict()  # the tenant served longest ago first

    @contextmanager
    def slot(self, tenant: str) -> Iterator["ComputeSlot"]:
        """Wait for a slot, and release it at the end of the block."""
        self.acquire(tenant)
        try:
            yield ComputeSlot(self, tenant)
        finally:
            self.release(tenant)

    @property
    def has_waiting(self) -> bool:
        return bool(self._waiting)

    def acquire(self, tenant: str, *, in_exchange: bool = False) -> None:
        """Wait for a slot.

        `in_exchange`: release the tenant's present slot in the same step, so that its place in the rotation is counted
        from this moment.
        """
        granted = threading.Event()
        with self._lock:
            self._waiting.setdefault(tenant, deque()).append(granted)
            if in_exchange:
                self._running.remove(tenant)
            self._grant_slots()
        granted.wait()

    def release(self, tenant: str) -> None:
        with self._lock:
            self._running.remove(tenant)
            self._grant_slots()

    def _grant_slots(self) -> None:
        for tenant in list(self._waiting):
            if len(self._running) < self._num_slots and tenant not in self._running:
                queue = self._waiting.pop(tenant)
                self._running.add(tenant)
                queue.popleft().set()
                if queue:
                    self._waiting[tenant] = queue  # behind all other tenants


class ComputeSlot:
    """The slot of one job, used by that job's thread only."""

    def __init__(self, queue: FairQueue, tenant: str) -> None:
        self._queue, self._tenant = queue, tenant
        self._slice_start, self._seconds_before = queue.monotonic(), 0.0

    def yield_to_waiting(self) -> float:
        """Yield the slot to waiting jobs if the slice is over. Return the job's seconds so far, without waiting.

        The job calls this between small pieces of its work.
        """
        now = self._queue.monotonic()
        seconds = self._seconds_before + now - self._slice_start
        if now - self._slice_start >= self._queue.slice_seconds and self._queue.has_waiting:
            self._queue.acquire(self._tenant, in_exchange=True)
            self._seconds_before, self._slice_start = seconds, self._queue.monotonic()
        return seconds
