"""Detects a trainer that hangs while it has work. Pure: the caller passes the time."""

_MAX_OVERSLEEP = 3.0  # in intervals; after a longer sleep this process was stopped too, and has unread messages


class Watchdog:
    """Records the messages from and to the trainer. Call `is_hung` every `interval_seconds`."""

    def __init__(self, limit_seconds: float) -> None:
        self.limit_seconds, self.interval_seconds = limit_seconds, min(5.0, limit_seconds / 4)
        self._last_message = self._last_check = 0.0
        self._is_idle = self._is_loading = True

    def record_start(self) -> None:
        """Records a new trainer. It loads its backbone until its first message, however long that takes."""
        self._is_idle = self._is_loading = True

    def record_message(self, now: float, *, is_idle: bool = False) -> None:
        """Records a message from the trainer. `is_idle`: it says that it waits for the next request."""
        self._last_message, self._is_idle, self._is_loading = now, is_idle, False

    def record_request(self, now: float) -> None:
        """Records a request to the trainer, which has work from now on."""
        if self._is_idle:
            self._last_message, self._is_idle = now, False

    def is_hung(self, now: float) -> bool:
        if now - self._last_check > _MAX_OVERSLEEP * self.interval_seconds:
            self._last_message = now
        self._last_check = now
        return not self._is_idle and not self._is_loading and now - self._last_message > self.limit_seconds
