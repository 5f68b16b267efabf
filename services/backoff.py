"""Exponential back-off between attempts of something that failed."""

import asyncio


class Backoff:
    """Doubles the wait after each failure, from `first_seconds` up to `max_seconds`; `reset` starts over."""

    def __init__(self, first_seconds: float, max_seconds: float) -> None:
        self._first_seconds, self._max_seconds = first_seconds, max_seconds
        self._seconds = first_seconds

    def reset(self) -> None:
        """Start over after a success."""
        self._seconds = self._first_seconds

    def next_seconds(self) -> float:
        """Return the wait before the next attempt, and double the one after it."""
        seconds = self._seconds
        self._seconds = min(2 * seconds, self._max_seconds)
        return seconds

    async def wait(self) -> None:
        """Sleep before the next attempt."""
        await asyncio.sleep(self.next_seconds())
