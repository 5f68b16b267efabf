"""Shares computation fairly: a few jobs run at once, and tenants take turns however many jobs each submits."""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from engine.errors import UnavailableError
from services.concurrency.threads import AbandonedError, is_abandoned


class FairQueue:
    """Runs at most `num_slots` jobs at once and one of each tenant. Thread-safe.

    A job that had its slot for `slice_seconds` yields it to waiting jobs and queues again. A job that does not come to
    yield it for `overrun_seconds` (a piece of its work may take long) goes on, but its slot is given to the next tenant
    as well: nobody waits for another's piece of work.
    """

    def __init__(
        self,
        num_slots: int = 2,
        slice_seconds: float = 0.1,
        overrun_seconds: float = 1.0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._num_slots, self.slice_seconds, self._overrun_seconds = num_slots, slice_seconds, overrun_seconds
        self.monotonic = monotonic
        self._lock = threading.Lock()
        self._running: dict[str, float] = {}  # the start of each tenant's slice
        self._waiting: OrderedDict[str, deque[threading.Event]] = OrderedDict()  # the tenant served longest ago first
        self._closing = threading.Event()

    def close(self) -> None:
        """End the jobs soon: where they next yield their slot, UnavailableError is raised."""
        self._closing.set()

    @contextmanager
    def slot(self, tenant: str) -> Iterator["ComputeSlot"]:
        """Wait for a slot, and release it at the end of the block.

        Raises AbandonedError if the caller of the job leaves meanwhile.
        """
        self.acquire(tenant)
        try:
            yield ComputeSlot(self, tenant)
        finally:
            self.release(tenant)

    @property
    def has_waiting(self) -> bool:
        return bool(self._waiting)

    def check_wanted(self) -> None:
        """Raise an error if the job is to end: AbandonedError or UnavailableError."""
        if is_abandoned():
            raise AbandonedError
        if self._closing.is_set():
            raise UnavailableError("The service is stopping. Send the call again.")

    def acquire(self, tenant: str, *, in_exchange: bool = False) -> None:
        """Wait for a slot.

        `in_exchange`: release the tenant's present slot in the same step, so that its place in the rotation is counted
        from this moment; if an error is raised, the tenant has its slot nevertheless.
        """
        granted = threading.Event()
        with self._lock:
            self._waiting.setdefault(tenant, deque()).append(granted)
            if in_exchange:
                del self._running[tenant]
            self._grant_slots()
        while not granted.wait(self._overrun_seconds):
            with self._lock:
                self._grant_slots()
                if granted.is_set() or in_exchange or not (is_abandoned() or self._closing.is_set()):
                    continue
                self._remove(tenant, granted)
            self.check_wanted()

    def renew(self, tenant: str) -> bool:
        """Begin the next slice of a job whose slice is over, if nobody waits for its slot. Return whether it may go on:
        not either if it had overrun and another tenant has its slot."""
        with self._lock:
            start = self._running.pop(tenant)
            may_go_on = not self._waiting and self._num_counted() < self._num_slots
            self._running[tenant] = self.monotonic() if may_go_on else start
            return may_go_on

    def release(self, tenant: str) -> None:
        with self._lock:
            del self._running[tenant]
            self._grant_slots()

    def _remove(self, tenant: str, granted: threading.Event) -> None:
        queue = self._waiting[tenant]
        with suppress(ValueError):
            queue.remove(granted)
        if not queue:
            del self._waiting[tenant]

    def _num_counted(self) -> int:
        """Return the number of running jobs that have not overrun."""
        now = self.monotonic()
        return sum(now - start < self._overrun_seconds for start in self._running.values())

    def _grant_slots(self) -> None:
        now, num_counted = self.monotonic(), self._num_counted()
        for tenant in list(self._waiting):
            if num_counted < self._num_slots and tenant not in self._running:
                queue = self._waiting.pop(tenant)
                self._running[tenant] = now
                num_counted += 1
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

        The job calls this between small pieces of its work. Raises AbandonedError or UnavailableError at the end of a
        slice if the job is to end.
        """
        now = self._queue.monotonic()
        seconds = self._seconds_before + now - self._slice_start
        if now - self._slice_start >= self._queue.slice_seconds:
            self._queue.check_wanted()
            if not self._queue.renew(self._tenant):
                self._queue.acquire(self._tenant, in_exchange=True)
                self._queue.check_wanted()
            self._seconds_before, self._slice_start = seconds, self._queue.monotonic()
        return seconds
