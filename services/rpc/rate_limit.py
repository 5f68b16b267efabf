"""Rate limits: one token bucket a subject, in a table of bounded size."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable

from engine.errors import OverloadedError

_MAX_BUCKETS = 10_000


class RateLimit:
    """Allows each subject `per_second` calls, and in one burst the calls of two seconds. 0 means no limit."""

    def __init__(self, per_second: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.per_second, self._monotonic = per_second, monotonic
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # (calls left, at which time)

    def acquire(self, subject: str, message: str) -> None:
        """Count one call of the subject. Raises OverloadedError with the message and the time to wait."""
        if not self.try_acquire(subject):
            seconds = math.ceil((1 - self._calls_left(subject)) / self.per_second)
            raise OverloadedError(f"{message} Retry after {max(1, seconds)} s.", subject=subject)

    def try_acquire(self, subject: str) -> bool:
        """Count one call of the subject; return False, and count nothing, if its bucket is empty."""
        if not self.per_second:
            return True
        left = self._calls_left(subject)
        self._store(subject, left - 1 if left >= 1 else left)
        return left >= 1

    def reserve(self, subject: str, num_calls: int) -> float:
        """Count calls that will be made, and return the seconds to wait before them. Later ones queue behind these."""
        if not self.per_second:
            return 0.0
        left = self._calls_left(subject) - num_calls
        self._store(subject, left)
        return max(0.0, -left / self.per_second)

    def refund(self, subject: str) -> None:
        """Return one counted call to the subject's bucket."""
        if self.per_second:
            self._store(subject, self._calls_left(subject) + 1)

    def _calls_left(self, subject: str) -> float:
        left, since = self._buckets.get(subject, (max(1.0, 2 * self.per_second), self._monotonic()))
        return left + (self._monotonic() - since) * self.per_second

    def _store(self, subject: str, left: float) -> None:
        self._buckets[subject] = (min(left, max(1.0, 2 * self.per_second)), self._monotonic())
        self._buckets.move_to_end(subject)
        while len(self._buckets) > _MAX_BUCKETS:
            self._buckets.popitem(last=False)
