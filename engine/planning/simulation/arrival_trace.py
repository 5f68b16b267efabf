"""Reads arrival traces, or generates them with the shape of public cluster traces: bursts of arrivals, a few tenants
with most tasks, durations with a heavy tail.

Sources of the shapes: Hu et al. 2021 (Helios) and Weng et al. 2022 (MLaaS in the wild) report log-normal-like durations
over several orders of magnitude, few users with most jobs, and daily bursts.
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

_MAX_SEQUENCE_TOKENS = (64, 128, 256)
_RANKS = (4, 8, 16, 32)


@dataclass(frozen=True)
class TraceParameters:
    """Parameters of a generated trace. `rate`: mean arrivals a second. `burst`: mean arrivals at once; 1 is Poisson."""

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


def arrivals(trace: TraceParameters) -> list[Arrival]:
    """Generate a trace: the same for the same parameters. Names and ages count up in order of arrival."""
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
        Arrival(float(times[i]), _draw(i, trace, f"{int(tenants[i]):02}", int(steps[i]), random))
        for i in range(trace.num_tasks)
    ]


def read(lines: Iterable[str], backbone: str, target_modules: tuple[str, ...]) -> list[Arrival]:
    """Read a trace as JSON Lines, one arrival a line:

        {"seconds": 1, "tenant": "a", "steps": 9, "batch": 8, "max_sequence_tokens": 64, "mean_tokens": 30, "rank": 8}

    `mean_tokens` of a sequence: half of `max_sequence_tokens` if left out. Raises InvalidInputError naming the line.
    """
    trace = list[Arrival]()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            seconds, steps, batch = float(row["seconds"]), int(row["steps"]), int(row["batch"])
            max_tokens, rank = int(row["max_sequence_tokens"]), int(row["rank"])
            tokens = float(row.get("mean_tokens", max_tokens / 2))
            tenant = str(row["tenant"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidInputError(f"line {number} of the trace: {_format(error)}") from error
        if min(steps, batch, max_tokens, rank) < 1 or not 0 <= seconds < float("inf") or not 0 < tokens <= max_tokens:
            raise InvalidInputError(
                f"line {number} of the trace: steps, batch, max_sequence_tokens and rank must be at least 1, seconds "
                "not negative, mean_tokens above 0 and at most max_sequence_tokens"
            )
        task = _task(len(trace), backbone, tenant, steps, batch, max_tokens, rank, tokens, target_modules)
        trace.append(Arrival(seconds, task))
    return trace


def _format(error: Exception) -> str:
    return f"lacks {error}" if isinstance(error, KeyError) else f"is not an arrival ({error})"


def _draw(number: int, trace: TraceParameters, tenant: str, steps: int, random: np.random.Generator) -> TaskView:
    max_tokens, rank, batch = (int(random.choice(values)) for values in (_MAX_SEQUENCE_TOKENS, _RANKS, (8, 16, 32)))
    tokens = max_tokens * random.uniform(0.3, 0.7)
    return _task(number, trace.backbone, tenant, steps, batch, max_tokens, rank, tokens, trace.target_modules)


def _task(
    number: int, backbone: str, tenant: str, steps: int, batch: int, max_tokens: int, rank: int, mean_tokens: float,
    target_modules: tuple[str, ...],
) -> TaskView:  # fmt: skip
    training = Training(
        1e-4, num_steps=steps, micro_batch_size=8, global_batch_size=batch, max_sequence_tokens=max_tokens
    )
    spec = TaskSpec(backbone, Lora(rank, 2.0 * rank, target_modules), "", training)
    tokens = int(steps * batch * mean_tokens)
    return TaskView(f"{tenant}-{number:05}", tenant, spec, number, steps, num_train_tokens=tokens)
