"""Turns of two meshes: only one runs at a time; what is said of the difference is what the figures bear."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from benchmarks.turns import Cost, Side, cost_of, cpu_seconds_of, take_turns, with_descendants

BUSY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if sys.argv[1:] else None
print(child.pid if child else 0, flush=True)
while True: pass
"""


@pytest.fixture
def busy() -> Any:
    """A process with a child, both of which never rest."""
    with subprocess.Popen([sys.executable, "-c", BUSY, "parent"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        yield process, child
        os.kill(child, signal.SIGKILL)
        process.kill()


class Steps:
    """A step whenever the process has used a hundredth of a CPU second."""

    task = "task"

    def __init__(self, process: int) -> None:
        self._process = process
        self._started = cpu_seconds_of(process)

    @property
    def times(self) -> list[float]:
        return [0.0] * int((cpu_seconds_of(self._process) - self._started) * 100)

    def wait(self, count: int) -> None:
        while len(self.times) < count:
            time.sleep(0.001)

    def join(self) -> None: ...


def test_a_side_runs_in_its_turn_only(busy: Any) -> None:
    process, child = busy
    assert with_descendants(process.pid) == [process.pid, child]
    side = Side(cast(Any, SimpleNamespace(processes={"execution": process})), Steps(process.pid))
    other = Side(cast(Any, SimpleNamespace(processes={})), Steps(os.getpid()))
    other.steps.wait = lambda count: None  # type: ignore[method-assign]
    side.suspend()
    while any(state(p) != "T" for p in (process.pid, child)):
        time.sleep(0.001)
    before = [cpu_seconds_of(p) for p in (process.pid, child)]
    turn = side.turn(5)
    used = [cpu_seconds_of(p) - b for p, b in zip((process.pid, child), before, strict=True)]
    assert used[0] >= 0.05 and used[1] > 0
    assert 0 < turn.cpu_seconds <= sum(used) / 5 + 1e-3 and turn.wall_seconds > 0
    side.resume()


def state(process: int) -> str:
    with open(f"/proc/{process}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0]


class Recorded:
    """A side that notes its turns."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def suspend(self) -> None:
        self.log.append(f"{self.name} suspended")

    def resume(self) -> None:
        self.log.append(f"{self.name} resumed")

    def turn(self, num_steps: int) -> str:
        self.log.append(self.name)
        return f"{self.name}{num_steps}"


def test_sides_begin_by_turns_and_pairs_keep_their_order() -> None:
    log: list[str] = []
    pairs = take_turns(cast(Any, (Recorded("a", log), Recorded("b", log))), 2, 7)
    assert pairs == [("a7", "b7")] * 2
    assert log == ["a suspended", "b suspended", *"baabba", "a resumed", "b resumed"]


@pytest.mark.parametrize("seed", range(5))
def test_the_interval_holds_what_is_there(seed: int) -> None:
    random = np.random.default_rng(seed)
    shared = random.lognormal(0, 0.3, 400)  # what slows both of a pair
    pairs = [(1.03 * s * random.normal(1, 0.02), s * random.normal(1, 0.02)) for s in shared]
    cost = cost_of(pairs)
    assert cost.low <= cost.middle <= cost.high and cost.low - 0.001 < 0.03 < cost.high + 0.001
    assert cost.high - cost.low < 0.01
    assert cost_of(pairs) == cost


def test_a_verdict_needs_all_of_the_interval() -> None:
    assert Cost(0.005, 0.001, 0.009).verdict(0.01) == "under 1%: held"
    assert Cost(0.02, 0.011, 0.03).verdict(0.01) == "under 1%: FAILED"
    assert Cost(0.005, -0.01, 0.02).verdict(0.01) == "under 1%: not told apart"
