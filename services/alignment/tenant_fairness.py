"""Whose rows are computed with now: a few jobs at a time, tenants in rotation, however many jobs or rows one brings."""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class FairQueue:
    """Thread-safe. At most `num_at_once` jobs have the turn, no two of one tenant: what takes long for one leaves room
    for another. A job that has had it for `slice_seconds` hands it on if any waits, and waits in its tenant's line."""

    def __init__(
        self, num_at_once: int = 2, slice_seconds: float = 0.1, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._num_at_once, self.slice_seconds, self.monotonic = num_at_once, slice_seconds, monotonic
        self._lock = threading.Lock()
        self._having: set[str] = set()
        self._waiting: OrderedDict[str, deque[threading.Event]] = OrderedDict()  # the tenant served longest ago first

    @contextmanager
    def of(self, tenant: str) -> Iterator["ComputeSlot"]:
        """Waits for the tenant's turn; it ends with the block."""
        self.take(tenant)
        try:
            yield ComputeSlot(self, tenant)
        finally:
            self.give(tenant)

    @property
    def is_awaited(self) -> bool:
        return bool(self._waiting)

    def take(self, tenant: str, *, instead: bool = False) -> None:
        """`instead`: of the one that it has, in one step, so that its place in the rotation is that of this moment."""
        mine = threading.Event()
        with self._lock:
            self._waiting.setdefault(tenant, deque()).append(mine)
            if instead:
                self._having.remove(tenant)
            self._serve()
        mine.wait()

    def give(self, tenant: str) -> None:
        with self._lock:
            self._having.remove(tenant)
            self._serve()

    def _serve(self) -> None:
        for tenant in list(self._waiting):
            if len(self._having) < self._num_at_once and tenant not in self._having:
                line = self._waiting.pop(tenant)
                self._having.add(tenant)
                line.popleft().set()
                if line:
                    self._waiting[tenant] = line  # behind all others


class ComputeSlot:
    """What one job has of its turns. Not thread-safe: the job's own."""

    def __init__(self, turns: FairQueue, tenant: str) -> None:
        self._turns, self._tenant = turns, tenant
        self._since, self._seconds_before = turns.monotonic(), 0.0

    def offer(self) -> float:
        """To be called every now and then: hands the turn on where others wait. Seconds it has had in all, waiting not
        counted."""
        now = self._turns.monotonic()
        seconds = self._seconds_before + now - self._since
        if now - self._since >= self._turns.slice_seconds and self._turns.is_awaited:
            self._turns.take(self._tenant, instead=True)
            self._seconds_before, self._since = seconds, self._turns.monotonic()
        return seconds
