"""Back-off: waits double up to the limit, and start over after a success."""

from services.backoff import Backoff


def test_waits_double_up_to_the_limit() -> None:
    backoff = Backoff(0.1, 1.0)
    assert [backoff.next_seconds() for _ in range(6)] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]


def test_a_success_starts_over() -> None:
    backoff = Backoff(1.0, 8.0)
    assert [backoff.next_seconds() for _ in range(3)] == [1.0, 2.0, 4.0]
    backoff.reset()
    assert backoff.next_seconds() == 1.0
