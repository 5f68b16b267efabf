"""Measures how much more a step costs when a feature is switched on in a running mesh, in pairs of turns: on and off.

The two turns of a pair are seconds apart, in the same processes, because two equal meshes can differ by more than the
effect that is measured. After a switch some seconds pass before a turn is measured, so that delayed work (a process
sends its spans once a second) counts in its own turn.
"""

import ctypes
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

_SETTLE_SECONDS = 2.0
_RESAMPLES = 10_000
_LIBC = ctypes.CDLL(None)


class Counted(Protocol):
    """A thread that counts a task's steps."""

    times: list[float]

    def wait(self, count: int) -> None:
        """Wait until the task has done this many steps."""


@dataclass(frozen=True)
class Turn:
    """Figures of one step: seconds that passed, and CPU seconds of all processes."""

    wall_seconds: float
    cpu_seconds: float


def turn(steps: Counted, processes: Sequence[int], num_steps: int, settle_seconds: float = _SETTLE_SECONDS) -> Turn:
    """Return the first `num_steps` steps that begin after the warm-up."""
    begun, count = time.perf_counter(), len(steps.times)
    while time.perf_counter() - begun < settle_seconds:
        count += 1
        steps.wait(count)
    count, cpu_seconds, started = len(steps.times), sum(map(cpu_seconds_of, processes)), time.perf_counter()
    steps.wait(count + num_steps)
    done, seconds = len(steps.times) - count, time.perf_counter() - started
    return Turn(seconds / done, (sum(map(cpu_seconds_of, processes)) - cpu_seconds) / done)


def take_turns(switch: Callable[[bool], None], measured: Callable[[], Turn], num_pairs: int) -> list[tuple[Turn, Turn]]:
    """Return pairs (on, off), without the first. Pairs begin with on and with off in turn."""
    pairs = []
    for number in range(num_pairs + 1):
        turns = {}
        for is_on in (True, False) if number % 2 else (False, True):
            switch(is_on)
            turns[is_on] = measured()
        pairs.append((turns[True], turns[False]))
    return pairs[1:]


def with_descendants(process: int) -> list[int]:
    processes = [process]
    for task in Path(f"/proc/{process}/task").iterdir():
        for child in (task / "children").read_text().split():
            processes += with_descendants(int(child))
    return processes


def cpu_seconds_of(process: int) -> float:
    """Return the CPU seconds of all threads of a process, by the kernel's clock."""
    clock = ctypes.c_int()
    if error := _LIBC.clock_getcpuclockid(process, ctypes.byref(clock)):
        raise OSError(error, os.strerror(error))
    return time.clock_gettime(clock.value)


@dataclass(frozen=True)
class Cost:
    """Return the relative increase when it is on, with its 95 % confidence interval."""

    middle: float
    low: float
    high: float

    def verdict(self, goal: float) -> str:
        """Return held or failed if all of the interval agrees."""
        if self.high < goal:
            return f"under {goal:.0%}: held"
        return f"under {goal:.0%}: {'FAILED' if self.low > goal else 'not told apart'}"


def cost_of(pairs: Sequence[tuple[float, float]]) -> Cost:
    """Return the cost from pairs (on, off): the ratio of their sums, which counts rare costs; interval by bootstrap."""
    values = np.array(pairs)
    chosen = np.random.default_rng(0).integers(0, len(values), (_RESAMPLES, len(values)))
    sums = values[chosen].sum(axis=1)
    low, high = np.quantile(sums[:, 0] / sums[:, 1] - 1, (0.025, 0.975))
    on, off = values.sum(axis=0)
    return Cost(float(on / off - 1), float(low), float(high))
