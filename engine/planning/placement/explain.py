"""Explains why a task runs where it runs: its neighbours, and predicted against measured seconds, bytes and padding."""

import math
from collections.abc import Mapping, Sequence

from engine.planning.cost.task_demand import TaskDemand
from engine.planning.placement.eta import seconds_left
from engine.planning.placement.executor_state import ExecutorState
from engine.planning.types import Explanation, HTask


def explain_residents(
    executor: ExecutorState, htasks: Sequence[HTask], reasons: Mapping[str, str]
) -> list[Explanation]:
    """Return one explanation for each resident."""
    fused = {name: htask for htask in htasks for name in htask.tasks}
    left = seconds_left(executor, list(executor.residents.values()))
    return [
        _explain(executor, demand, fused[name], reasons.get(name, ""), left[name])
        for name, demand in executor.residents.items()
    ]


def _explain(
    executor: ExecutorState, demand: TaskDemand, htask: HTask, reason: str, left_seconds: float
) -> Explanation:
    task, can_predict = demand.task, executor.view.can_predict
    num_tokens = task.num_effective_tokens + task.num_padding_tokens
    return Explanation(
        task=task.name,
        executor=executor.name,
        neighbours=tuple(name for name in htask.tasks if name != task.name),
        reason=reason or "stays where it runs",
        predicted_bytes=demand.footprint.adapter_bytes,
        alone_bytes=executor.alone_bytes(demand),
        predicted_seconds_left=left_seconds if can_predict else None,
        round_seconds=executor.load_seconds() if can_predict else None,
        alone_round_seconds=executor.round_seconds(executor.usage_of(demand)) if can_predict else None,
        predicted_step_seconds=_share_of_round(executor, demand) if can_predict else None,
        measured_step_seconds=task.device_seconds / task.step if task.step and task.device_seconds else None,
        padding_fraction=task.num_padding_tokens / num_tokens if num_tokens else None,
        predicted_padding_fraction=_padding_fraction(executor, demand, htask),
        misses_deadline=can_predict and left_seconds > task.seconds_to_deadline,
    )


def _padding_fraction(executor: ExecutorState, demand: TaskDemand, htask: HTask) -> float:
    tokens = sum(executor.residents[name].sequences.num_tokens for name in htask.tasks)
    num_microbatches = max(1, math.ceil(tokens / htask.token_budget))
    padding = demand.sequences.padding_tokens(num_microbatches, htask.chunk_tokens)
    return padding / (padding + demand.sequences.num_tokens) if padding else 0.0


def _share_of_round(executor: ExecutorState, demand: TaskDemand) -> float:
    """Return the task's seconds of a round, divided by tokens as the executor divides measured time."""
    all_tokens = sum(other.step.num_tokens for other in executor.residents.values())
    return executor.load_seconds() * demand.step.num_tokens / all_tokens if all_tokens else 0.0
