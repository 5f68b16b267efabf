"""Wakes waiters when a task changes, or when anything does. Lives on the event loop and stores no events."""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

ANY_CHANGE = ""


class ChangeNotifier:
    """A wake-up is a hint: waiters read the store again, so that no wake-up can be lost or pile up. `publish` sends
    the names to other processes on the same database (services/admission/ledger/replicas.py)."""

    def __init__(self) -> None:
        self._waiters: dict[str, set[asyncio.Event]] = {}
        self._closed = False
        self.publish: Callable[[Iterable[str]], None] | None = None

    def notify(self, names: Iterable[str] = ()) -> None:
        """Wake waiters of these tasks, and scheduling: its plan may have to change."""
        self.notify_tasks((*names, ANY_CHANGE))

    def notify_tasks(self, names: Iterable[str]) -> None:
        """Wake waiters of these tasks only: they have new events that no plan depends on."""
        names = list(names)
        self.wake(names)
        if self.publish is not None:
            self.publish(names)

    def wake(self, names: Iterable[str]) -> None:
        """Wake waiters of this process."""
        for name in names:
            for event in self._waiters.get(name, ()):
                event.set()

    def wake_all(self) -> None:
        """Wake all waiters of this process."""
        self.wake(list(self._waiters))

    def close(self) -> None:
        """Wake all waiters for the last time: the service stops."""
        self._closed = True
        self.wake_all()

    @property
    def is_closed(self) -> bool:
        return self._closed

    @contextmanager
    def subscribe(self, name: str) -> Iterator[asyncio.Event]:
        """Yield an event that is set at each change of the task. Clear it before reading the store."""
        event = asyncio.Event()
        self._waiters.setdefault(name, set()).add(event)
        try:
            yield event
        finally:
            self._waiters[name].discard(event)
            if not self._waiters[name]:
                del self._waiters[name]
