"""Errands to the artifact store, each on a thread of its own: no round waits for one, however long the store takes.

They compute nothing by torch. libgomp keeps a team of threads for every thread that computes, and where its threads are
more than the CPUs none spins any more: the trainer's steps would take 1.4 times as long (measured on two cores).
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
    """Under way, or done: then `then` is to be told, on the trainer's own thread."""

    future: "Future[T]"
    then: Callable[[T], None]

    @property
    def is_done(self) -> bool:
        return self.future.done()

    def settle(self) -> None:
        """Raises what the errand raised."""
        self.then(self.future.result())


class BackgroundIo:
    """`wake` is called, on any thread, when one is done. A task sends one at a time, so there are few."""

    def __init__(self, wake: Callable[[], Any]) -> None:
        self._wake = wake

    def send(self, work: Callable[[], T]) -> "Future[T]":
        """What it fails for, want of memory among it as UnavailableError, is the future's."""
        future: Future[T] = Future()
        future.add_done_callback(lambda _: self._wake())
        threading.Thread(target=_run, args=(work, future), name="store", daemon=True).start()
        return future


def _run(work: Callable[[], T], future: "Future[T]") -> None:
    try:
        result = within_memory(work)
    except OutOfMemoryError as error:  # the host's, for bytes on their way: that passes
        future.set_exception(UnavailableError(f"no memory for what goes to the store or comes from it: {error}"))
    except BaseException as error:  # told on the trainer's thread, where it belongs
        future.set_exception(error)
    else:
        future.set_result(result)
