"""Whether the trainer still lives while it has work. Pure: time comes from outside."""

_OVERSLEPT = 3.0  # times the interval: this process was stopped itself, and has not read what the trainer said


class Watchdog:
    """`heard` and `told` are noted with the time; `is_hung` is asked at intervals of `interval_seconds`."""

    def __init__(self, limit_seconds: float) -> None:
        self.limit_seconds, self.interval_seconds = limit_seconds, min(5.0, limit_seconds / 4)
        self._last_sign = self._last_asked = 0.0
        self._is_idle = self._is_loading = True

    def started(self) -> None:
        """A new trainer: until its first word it loads its backbone, however long that takes."""
        self._is_idle = self._is_loading = True

    def heard(self, now: float, *, is_idle: bool = False) -> None:
        """The trainer said something: that it waits for us, or anything else."""
        self._last_sign, self._is_idle, self._is_loading = now, is_idle, False

    def told(self, now: float) -> None:
        """The trainer has something to do from now on."""
        if self._is_idle:
            self._last_sign, self._is_idle = now, False

    def is_hung(self, now: float) -> bool:
        if now - self._last_asked > _OVERSLEPT * self.interval_seconds:
            self._last_sign = now
        self._last_asked = now
        return not self._is_idle and not self._is_loading and now - self._last_sign > self.limit_seconds
