"""Rate limits: a token bucket a subject, and an error that says how long to wait."""

import pytest

from engine.errors import OverloadedError
from services.rpc.rate_limit import RateLimit


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.mark.parametrize(("per_second", "burst", "wait_seconds"), [(20.0, 40, 1), (1.0, 2, 1), (0.1, 1, 10)])
def test_the_error_says_how_long_to_wait(per_second: float, burst: int, wait_seconds: int) -> None:
    clock = Clock()
    limit = RateLimit(per_second, clock)
    for _ in range(burst):
        limit.acquire("a", "Too many calls.")
    with pytest.raises(OverloadedError, match=rf"Too many calls\. Retry after {wait_seconds} s\."):
        limit.acquire("a", "Too many calls.")
    assert limit.try_acquire("b")  # each subject has its own bucket
    clock.seconds += wait_seconds
    limit.acquire("a", "Too many calls.")


def test_a_refund_takes_back_a_call() -> None:
    limit = RateLimit(0.5, Clock())
    assert limit.try_acquire("a") and not limit.try_acquire("a")
    limit.refund("a")
    assert limit.try_acquire("a") and not limit.try_acquire("a")


def test_zero_means_no_limit() -> None:
    limit = RateLimit(0)
    assert all(limit.try_acquire("a") for _ in range(1000))
