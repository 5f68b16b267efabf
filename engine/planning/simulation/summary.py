"""Summarises a simulated run: throughput, completion times, and fairness among tenants."""

import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engine.planning.simulation.simulator import SimulationResult
from engine.planning.types import TaskView


@dataclass(frozen=True)
class SimulationSummary:
    """Figures of a simulated run. `seconds`: from the first arrival to the last end.

    A task's slowdown is its completion time over its time alone. `fairness`: Jain's index of tenants' mean slowdowns, 1
    if all are equal (Jain, Chiu, Hawe 1984).
    """

    num_tasks: int
    num_never_placed: int
    num_plans: int
    num_evictions: int
    seconds: float
    effective_tokens_per_second: float
    mean_completion_seconds: float
    median_completion_seconds: float
    p95_completion_seconds: float
    mean_slowdown: float
    fairness: float


def summarise(run: SimulationResult, alone_seconds: Callable[[TaskView], float]) -> SimulationSummary:
    """Return the summary of a run. Raises ValueError if no task finished."""
    if not run.outcomes:
        raise ValueError("no task ran: each needs more memory than any executor has")
    completions = [outcome.completion_seconds for outcome in run.outcomes]
    slowdowns = defaultdict[str, list[float]](list)
    for outcome in run.outcomes:
        slowdowns[outcome.task.tenant].append(outcome.completion_seconds / max(1e-9, alone_seconds(outcome.task)))
    first = min(outcome.arrived_seconds for outcome in run.outcomes)
    seconds = max(outcome.finished_seconds for outcome in run.outcomes) - first
    tokens = sum(outcome.task.num_train_tokens for outcome in run.outcomes)
    return SimulationSummary(
        num_tasks=len(run.outcomes),
        num_never_placed=len(run.never_placed),
        num_plans=run.num_plans,
        num_evictions=sum(outcome.num_evictions for outcome in run.outcomes),
        seconds=seconds,
        effective_tokens_per_second=tokens / seconds if seconds else 0.0,
        mean_completion_seconds=statistics.fmean(completions),
        median_completion_seconds=statistics.median(completions),
        p95_completion_seconds=float(np.quantile(completions, 0.95)),
        mean_slowdown=statistics.fmean(value for values in slowdowns.values() for value in values),
        fairness=jain_index([statistics.fmean(values) for values in slowdowns.values()]),
    )


def jain_index(values: list[float]) -> float:
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))
