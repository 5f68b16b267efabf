"""Turns with a feature on and off: what a turn counts, and the verdict on the difference."""

import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from opentelemetry.sdk.trace import TracerProvider

from benchmarks import mesh_costs
from benchmarks.switched_spans import Switched
from benchmarks.turns import Cost, Turn, cost_of, cpu_seconds_of, take_turns, turn, with_descendants
from tests.thoroughness import seeds

PARENT = """
import subprocess, sys
with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
    print(child.pid, flush=True)
    input()
    child.kill()
"""


def test_a_mesh_is_its_processes_and_theirs() -> None:
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        child = int(process.stdout.readline())
        assert with_descendants(process.pid) == [process.pid, child]
        assert cpu_seconds_of(process.pid) > 0
        process.stdin.write("\n")


class Steps:
    """Counts one step for each call, or as many as the test sets."""

    def __init__(self, extra: int) -> None:
        self.times: list[float] = []
        self.waits: list[int] = []
        self._extra = extra

    def wait(self, count: int) -> None:
        self.waits.append(count)
        sum(range(300_000))
        self.times += [0.0] * (count - len(self.times) + self._extra)


@pytest.mark.parametrize("extra", [0, 3])
def test_a_turn_counts_all_steps_that_were_taken_in_it(extra: int) -> None:
    steps = Steps(extra)
    measurement = turn(steps, [threading_process()], 5, settle_seconds=0.0)
    assert steps.waits == [5] and len(steps.times) == 5 + extra
    assert 0 < measurement.cpu_seconds <= measurement.wall_seconds * 1.5
    settled = Steps(extra)
    turn(settled, [threading_process()], 5, settle_seconds=0.05)
    assert len(settled.waits) > 1 and settled.waits[-1] == settled.waits[-2] + extra + 5


def threading_process() -> int:
    return threading.main_thread().native_id or 0


def test_it_is_on_and_off_by_turns_and_pairs_keep_their_order() -> None:
    log: list[bool] = []
    pairs = take_turns(log.append, lambda: Turn(float(log[-1]), float(len(log))), 2)
    assert log == [False, True, True, False, False, True]
    assert pairs == [(Turn(1.0, 3.0), Turn(0.0, 4.0)), (Turn(1.0, 6.0), Turn(0.0, 5.0))]


def test_spans_are_recorded_while_the_switch_is_on(tmp_path: Path) -> None:
    path = tmp_path / "switch"
    path.write_bytes(b"\1")
    write = partial(mesh_costs.write, path)
    tracer = TracerProvider(sampler=Switched(str(path))).get_tracer("test")
    for is_on in (True, False, True):
        write(is_on)
        with tracer.start_as_current_span("span") as span:
            assert span.is_recording() is is_on


@pytest.mark.parametrize("seed", seeds(5, 2))
def test_the_interval_contains_the_true_cost(seed: int) -> None:
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
