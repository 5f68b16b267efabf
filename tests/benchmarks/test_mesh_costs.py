"""mesh_costs.py computes pauses and verdicts of goals from its measurements."""

import random
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.mesh_costs import Rounds, section


@pytest.mark.parametrize("seed", range(20))
def test_a_pause_is_what_was_idle_beside_the_usual(seed: int) -> None:
    """Two tasks with rounds of different lengths; a third joins after a pause of known length."""
    chance = random.Random(seed)
    pause, usual = chance.uniform(0.05, 3.0), chance.uniform(0.001, 0.02)
    one, two, third = (SimpleNamespace(times=[], device_seconds=[]) for _ in range(3))
    now, arrival = 100.0, 0.0
    for number in range(60):
        members = [one, two, third] if number >= 30 else [one, two]
        seconds = [chance.uniform(0.2, 0.4) for _ in members]
        if number == 30:
            arrival = now + chance.uniform(0.0, pause)
        now += sum(seconds) + usual + (pause if number == 30 else 0.0)
        for member, took in zip(members, seconds, strict=True):
            member.times.append(now + chance.uniform(0.0, 1e-4))  # committed one after the other
            member.device_seconds.append(took)
    measured_pause, round_seconds = Rounds(one.times, [one, two, third]).pause(arrival, third.times[0])
    assert measured_pause == pytest.approx(pause, abs=0.01)
    assert 0.4 < round_seconds < 0.85


def raw(**changes: Any) -> dict[str, Any]:
    samples = {
        "up": [9.0, 8.0], "first_step": [0.3, 0.4, 0.5], "pauses": [[0.1, 0.5], [0.2, 0.5], [0.3, 0.5]],
        "waits": [0.001, 0.002, 0.003], "tracing": {"pairs": turns(1.004, 1.002), "spans": 7},
    }  # fmt: skip
    origin = {
        "command": "c", "commit": "x", "when": "w", "machine": "m", "load_average": [0.0], "versions": {"torch": "2"},
    }  # fmt: skip
    return origin | {"repeats": 3, "pairs": 20, "steps": 9, "threads": 1, "backbone": "b", "found": samples | changes}


def turns(wall: float, cpu: float) -> list[Any]:
    """Return pairs with these ratios, to a thousandth."""
    noise = [1.001 if i % 2 else 0.999 for i in range(20)]
    plain = {"wall_seconds": 2.0, "cpu_seconds": 1.0}
    return [[{"wall_seconds": 2.0 * wall * by, "cpu_seconds": cpu * by}, plain] for by in noise]


def test_goals_are_reported_as_held_or_failed() -> None:
    held = section(raw())
    assert held.count(": held") == 4 and "FAILED" not in held
    assert section(raw(pauses=[[0.6, 0.5]] * 3)).count("FAILED") == 1
    assert section(raw(waits=[0.02] * 3)).count("FAILED") == 1
    slow = section(raw(tracing={"pairs": turns(1.1, 1.01), "spans": 7}))
    assert slow.count("FAILED") == 1 and "+10.00%" in slow and slow.count("not told apart") == 1
