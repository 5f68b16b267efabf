"""Arrival traces with the shape of public cluster traces: bursts of arrivals, a few tenants with most tasks, durations
with a heavy tail. Sources of the shapes: Hu et al. 2021 (Helios) and Weng et al. 2022 (MLaaS in the wild) report
log-normal-like durations over several orders of magnitude, few users with most jobs, and daily bursts.
"""

from dataclasses import dataclass

import numpy as np

from engine.methods import Lora
from engine.planning.plan import TaskView
from engine.planning.simulator import Arrival
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
        Arrival(float(times[i]), _task(i, trace.backbone, int(tenants[i]), int(steps[i]), random))
        for i in range(trace.num_tasks)
    ]


def _task(number: int, backbone: str, tenant: int, steps: int, random: np.random.Generator) -> TaskView:
    cap, rank, batch = (int(random.choice(values)) for values in (_CAPS, _RANKS, (8, 16, 32)))
    training = Training(
        1e-4, num_steps=steps, micro_batch_size=8, global_batch_size=batch, max_sequence_tokens=cap
    )  # fmt: skip
    spec = TaskSpec(backbone, Lora(rank, 2.0 * rank, ("q_proj", "v_proj")), "", training)
    tokens = int(steps * batch * cap * random.uniform(0.3, 0.7))
    owner = f"tenants/{tenant:02}"
    return TaskView(f"{owner}/tasks/{number:05}", owner, spec, number, steps, num_train_tokens=tokens)
