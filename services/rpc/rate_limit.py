"""How often someone may: a token bucket for each, in a table that does not grow without end."""

import time
from collections import OrderedDict
from collections.abc import Callable

from engine.errors import OverloadedError

_MAX_BUCKETS = 10_000


class RateLimit:
    """`per_second` calls by each subject, and as many in one burst as two seconds have. 0: no limit."""

    def __init__(self, per_second: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.per_second, self._monotonic = per_second, monotonic
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # (calls left, when)

    def take(self, subject: str, message: str) -> None:
        """Raises OverloadedError where the bucket is empty; a second later it is not, at a rate of one or more."""
        if not self.per_second:
            return
        left = self._left(subject)
        self._put(subject, left - 1 if left >= 1 else left)
        if left < 1:
            raise OverloadedError(message, subject=subject)

    def give_back(self, subject: str) -> None:
        """What was taken was not used."""
        if self.per_second:
            self._put(subject, self._left(subject) + 1)

    def _left(self, subject: str) -> float:
        left, since = self._buckets.get(subject, (max(1.0, 2 * self.per_second), self._monotonic()))
        return left + (self._monotonic() - since) * self.per_second

    def _put(self, subject: str, left: float) -> None:
        self._buckets[subject] = (min(left, max(1.0, 2 * self.per_second)), self._monotonic())
        self._buckets.move_to_end(subject)
        while len(self._buckets) > _MAX_BUCKETS:
            self._buckets.popitem(last=False)
