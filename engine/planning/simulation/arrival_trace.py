"""Arrival traces: read, or made with the shape of public cluster traces: bursts of arrivals, a few tenants with most
tasks, durations with a heavy tail. Sources of the shapes: Hu et al. 2021 (Helios) and Weng et al. 2022 (MLaaS in the
wild) report log-normal-like durations over several orders of magnitude, few users with most jobs, and daily bursts.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from engine.errors import InvalidInputError
from engine.methods import Lora
from engine.planning.simulation.simulator import Arrival
from engine.planning.types import TaskView
from engine.task import TaskSpec, Training

_CAPS = (64, 128, 256)
_RANKS = (4, 8, 16, 32)


@dataclass(frozen=True)
class Trace:
    """`rate`: arrivals a second, on average. `burst`: 1 is Poisson; more comes in bursts of so many on average."""

    num_tasks: int
    rate: float
    backbone: str
    burst: float = 1.0
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    num_tenants: int = 20
    median_steps: float = 200.0
    spread: float = 1.5  # of the logarithm of the number of steps
    max_steps: int = 100_000
    seed: int = 0


def arrivals(trace: Trace) -> list[Arrival]:
    """The same trace for the same numbers. Names count up, ages as they arrive."""
    random = np.random.default_rng(trace.seed)
    sizes = random.geometric(1 / trace.burst, trace.num_tasks)
    gaps = np.zeros(trace.num_tasks)
    starts = np.cumsum([0, *sizes])
    starts = starts[starts < trace.num_tasks]
    gaps[starts] = random.exponential(trace.burst / trace.rate, len(starts))
    times = np.cumsum(gaps)
    weights = 1 / np.arange(1, trace.num_tenants + 1)  # Zipf
    tenants = random.choice(trace.num_tenants, trace.num_tasks, p=weights / weights.sum())
    steps = np.clip(
        np.exp(random.normal(np.log(trace.median_steps), trace.spread, trace.num_tasks)), 1, trace.max_steps
    )
    return [
        Arrival(float(times[i]), _drawn(i, trace, f"tenants/{int(tenants[i]):02}", int(steps[i]), random))
        for i in range(trace.num_tasks)
    ]


def read(lines: Iterable[str], backbone: str, target_modules: tuple[str, ...]) -> list[Arrival]:
    """A trace as JSON Lines, an arrival a line:

        {"seconds": 1, "tenant": "a", "steps": 9, "batch": 8, "max_sequence_tokens": 64, "mean_tokens": 30, "rank": 8}

    `mean_tokens`: of a sequence; half of its most if left out. Raises InvalidInputError naming the line.
    """
    found = list[Arrival]()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            seconds, steps, batch = float(row["seconds"]), int(row["steps"]), int(row["batch"])
            most, rank = int(row["max_sequence_tokens"]), int(row["rank"])
            tokens = float(row.get("mean_tokens", most / 2))
            tenant = str(row["tenant"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidInputError(f"line {number} of the trace: {_told(error)}") from error
        if min(steps, batch, most, rank) < 1 or not 0 <= seconds < float("inf") or not 0 < tokens <= most:
            raise InvalidInputError(f"line {number} of the trace: a number is out of range")
        task = _task(len(found), backbone, f"tenants/{tenant}", steps, batch, most, rank, tokens, target_modules)
        found.append(Arrival(seconds, task))
    return found


def _told(error: Exception) -> str:
    return f"lacks {error}" if isinstance(error, KeyError) else f"is not an arrival ({error})"


def _drawn(number: int, trace: Trace, tenant: str, steps: int, random: np.random.Generator) -> TaskView:
    most, rank, batch = (int(random.choice(values)) for values in (_CAPS, _RANKS, (8, 16, 32)))
    tokens = most * random.uniform(0.3, 0.7)
    return _task(number, trace.backbone, tenant, steps, batch, most, rank, tokens, trace.target_modules)


def _task(
    number: int, backbone: str, tenant: str, steps: int, batch: int, most: int, rank: int, mean_tokens: float,
    target_modules: tuple[str, ...],
) -> TaskView:  # fmt: skip
    training = Training(1e-4, num_steps=steps, micro_batch_size=8, global_batch_size=batch, max_sequence_tokens=most)
    spec = TaskSpec(backbone, Lora(rank, 2.0 * rank, target_modules), "", training)
    tokens = int(steps * batch * mean_tokens)
    return TaskView(f"{tenant}/tasks/{number:05}", tenant, spec, number, steps, num_train_tokens=tokens)
