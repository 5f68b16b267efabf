"""Runs artifact-store I/O on background threads, so that a slow store never delays a step.

These threads compute nothing with torch: libgomp keeps a team of threads for every thread that computes, and none of
them spins once they outnumber the CPUs. The trainer's steps would take 1.4 times as long (measured on two cores).
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from engine.errors import UnavailableError
from engine.runtime.out_of_memory import OutOfMemoryError, within_memory

T = TypeVar("T")


@dataclass(frozen=True)
class BackgroundCall(Generic[T]):
    """A call on a background thread. `on_done` handles its result on the trainer's own thread."""

    future: "Future[T]"
    on_done: Callable[[T], None]

    @property
    def is_done(self) -> bool:
        return self.future.done()

    def complete(self) -> None:
        """Passes the result to `on_done`. Raises the error that the call raised."""
        self.on_done(self.future.result())


class BackgroundIo:
    """Starts a thread for each call, and calls `wake`, on any thread, when one is done. A task has at most one call."""

    def __init__(self, wake: Callable[[], Any]) -> None:
        self._wake = wake

    def submit(self, work: Callable[[], T]) -> "Future[T]":
        """Runs `work`. Its error becomes the future's; a lack of memory becomes UnavailableError."""
        future: Future[T] = Future()
        future.add_done_callback(lambda _: self._wake())
        threading.Thread(target=_run, args=(work, future), name="store", daemon=True).start()
        return future


def _run(work: Callable[[], T], future: "Future[T]") -> None:
    try:
        result = within_memory(work)
    except OutOfMemoryError as error:  # the host has no room for the bytes in transfer, which does not last
        future.set_exception(UnavailableError(f"the host has no memory for this transfer: {error}"))
    except BaseException as error:  # raised again on the trainer's thread
        future.set_exception(error)
    else:
        future.set_result(result)
