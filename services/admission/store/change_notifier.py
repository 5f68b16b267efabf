"""Wakes those who wait for a change of a task, or of anything. Lives on the event loop; holds no events itself."""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

ANYTHING = ""
T = TypeVar("T")


class ChangeNotifier:
    """Waiters re-read the store after waking: a wake-up is a hint, so none can be lost or pile up. `tell_others` takes
    the names on to other processes on the same database (services/admission/ledger/replicas.py)."""

    def __init__(self) -> None:
        self._waiters: dict[str, set[asyncio.Event]] = {}
        self._closed = False
        self._commits: set[asyncio.Task[object]] = set()
        self.tell_others: Callable[[Iterable[str]], None] | None = None

    async def after(self, commit: Callable[[], T], tell: Callable[[T], None]) -> T:
        """Runs the commit in a thread, then `tell` of what it answered, though the caller be cancelled meanwhile: what
        was committed for a caller who is gone has its watchers too."""

        async def both() -> T:
            done = await asyncio.to_thread(commit)
            tell(done)
            return done

        task = asyncio.create_task(both())
        self._commits.add(task)
        task.add_done_callback(self._commits.discard)
        return await asyncio.shield(task)

    def notify(self, names: Iterable[str] = ()) -> None:
        """The named tasks changed, and scheduling should look."""
        self.notify_tasks((*names, ANYTHING))

    def notify_tasks(self, names: Iterable[str]) -> None:
        """The named tasks have new events; nothing that a plan depends on changed."""
        names = list(names)
        self.wake(names)
        if self.tell_others is not None:
            self.tell_others(names)

    def wake(self, names: Iterable[str]) -> None:
        """Those who wait here."""
        for name in names:
            for event in self._waiters.get(name, ()):
                event.set()

    def wake_all(self) -> None:
        """Whatever they wait for."""
        self.wake(list(self._waiters))

    def close(self) -> None:
        """Wakes everyone for good: the service stops."""
        self._closed = True
        self.wake_all()

    @property
    def is_closed(self) -> bool:
        return self._closed

    @contextmanager
    def waiting(self, name: str) -> Iterator[asyncio.Event]:
        """An event that is set at each change; clear it before reading the store."""
        event = asyncio.Event()
        self._waiters.setdefault(name, set()).add(event)
        try:
            yield event
        finally:
            self._waiters[name].discard(event)
            if not self._waiters[name]:
                del self._waiters[name]
