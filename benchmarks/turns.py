"""Two meshes that take turns: each trains a task of its own while the other is suspended, so that what a step costs on
one is compared with its neighbour in time, hundreds of steps apart by seconds only.

A turn goes on until its watcher has been told of so many steps more; then all of the mesh's processes are stopped by
signal. What a stop cuts off is done in the next turn. Leases and keepalives have to outlast a turn.
"""

import ctypes
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from muxtune.cli.mesh import Mesh

_RESAMPLES = 10_000
_LIBC = ctypes.CDLL(None)


class Counted(Protocol):
    """A thread that follows a task's steps."""

    task: str
    times: list[float]

    def wait(self, count: int) -> None:
        """Until there are so many."""

    def join(self) -> None:
        """Until the task has ended."""


@dataclass(frozen=True)
class Turn:
    """Of one step: seconds that passed, and CPU seconds of all processes of the mesh."""

    wall_seconds: float
    cpu_seconds: float


@dataclass
class Side:
    """A mesh, and the task that it trains."""

    mesh: Mesh
    steps: Counted

    def __post_init__(self) -> None:
        self._processes = [p for service in self.mesh.processes.values() for p in with_descendants(service.pid)]

    def suspend(self) -> None:
        for process in self._processes:
            os.kill(process, signal.SIGSTOP)

    def resume(self) -> None:
        for process in self._processes:
            os.kill(process, signal.SIGCONT)

    def turn(self, num_steps: int) -> Turn:
        count, cpu_seconds, started = len(self.steps.times), self._cpu_seconds(), time.perf_counter()
        self.resume()
        self.steps.wait(count + num_steps)
        self.suspend()
        done, seconds = len(self.steps.times) - count, time.perf_counter() - started
        return Turn(seconds / done, (self._cpu_seconds() - cpu_seconds) / done)

    def _cpu_seconds(self) -> float:
        return sum(map(cpu_seconds_of, self._processes))


@contextmanager
def suspended(sides: Sequence[Side]) -> Iterator[None]:
    """Outside of a turn; they run again afterwards."""
    for side in sides:
        side.suspend()
    try:
        yield
    finally:
        for side in sides:
            side.resume()


def take_turns(sides: tuple[Side, Side], num_pairs: int, num_steps: int) -> list[tuple[Turn, Turn]]:
    """Of one side and the other, one pair before the first not counted; who begins changes from pair to pair."""
    pairs = []
    with suspended(sides):
        for number in range(num_pairs + 1):
            first, second = sides if number % 2 else sides[::-1]
            turns = {id(side): side.turn(num_steps) for side in (first, second)}
            pairs.append((turns[id(sides[0])], turns[id(sides[1])]))
    return pairs[1:]


def with_descendants(process: int) -> list[int]:
    found = [process]
    for task in Path(f"/proc/{process}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += with_descendants(int(child))
    return found


def cpu_seconds_of(process: int) -> float:
    """Of all its threads, by the kernel's clock."""
    clock = ctypes.c_int()
    if error := _LIBC.clock_getcpuclockid(process, ctypes.byref(clock)):
        raise OSError(error, os.strerror(error))
    return time.clock_gettime(clock.value)


@dataclass(frozen=True)
class Cost:
    """What one side costs more than the other, as a part of the other's; with the interval that holds it with 95 %."""

    middle: float
    low: float
    high: float

    def verdict(self, goal: float) -> str:
        """Held or failed where all of the interval says so."""
        if self.high < goal:
            return f"under {goal:.0%}: held"
        return f"under {goal:.0%}: {'FAILED' if self.low > goal else 'not told apart'}"


def cost_of(pairs: Sequence[tuple[float, float]]) -> Cost:
    """From pairs (one side, the other): of their sums, so that what comes rarely counts; interval by bootstrap of the
    pairs."""
    values = np.array(pairs)
    chosen = np.random.default_rng(0).integers(0, len(values), (_RESAMPLES, len(values)))
    sums = values[chosen].sum(axis=1)
    low, high = np.quantile(sums[:, 0] / sums[:, 1] - 1, (0.025, 0.975))
    one, other = values.sum(axis=0)
    return Cost(float(one / other - 1), float(low), float(high))
