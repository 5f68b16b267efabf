"""Why a task runs where it runs: beside whom, and predicted against measured seconds, bytes and padding."""

import math
from collections.abc import Mapping, Sequence

from engine.planning.cost.task_demand import TaskDemand
from engine.planning.placement.eta import seconds_left
from engine.planning.placement.executor_state import ExecutorState
from engine.planning.types import Explanation, HTask


def explain_residents(host: ExecutorState, htasks: Sequence[HTask], reasons: Mapping[str, str]) -> list[Explanation]:
    """One explanation a resident."""
    fused = {name: htask for htask in htasks for name in htask.tasks}
    left = seconds_left(host, list(host.residents.values()))
    return [
        _explain(host, need, fused[name], reasons.get(name, ""), left[name]) for name, need in host.residents.items()
    ]


def _explain(host: ExecutorState, need: TaskDemand, htask: HTask, reason: str, left: float) -> Explanation:
    task, can_predict = need.task, host.executor.can_predict
    reached = task.num_effective_tokens + task.num_padding_tokens
    return Explanation(
        task=task.name,
        executor=host.name,
        neighbours=tuple(name for name in htask.tasks if name != task.name),
        reason=reason or "stays where it runs",
        predicted_bytes=need.footprint.adapter_bytes,
        alone_bytes=host.alone_bytes(need),
        predicted_seconds_left=left if can_predict else None,
        round_seconds=host.load_seconds() if can_predict else None,
        alone_round_seconds=host.round_seconds(host.crowd_of(need)) if can_predict else None,
        predicted_step_seconds=_share_of_round(host, need) if can_predict else None,
        measured_step_seconds=task.device_seconds / task.step if task.step and task.device_seconds else None,
        padding_fraction=task.num_padding_tokens / reached if reached else None,
        predicted_padding_fraction=_padding(host, need, htask),
        misses_deadline=can_predict and left > task.seconds_to_deadline,
    )


def _padding(host: ExecutorState, need: TaskDemand, htask: HTask) -> float:
    tokens = sum(host.residents[name].ragged.num_tokens for name in htask.tasks)
    padding = need.ragged.padding_tokens(max(1, math.ceil(tokens / htask.token_budget)), htask.chunk_tokens)
    return padding / (padding + need.ragged.num_tokens) if padding else 0.0


def _share_of_round(host: ExecutorState, need: TaskDemand) -> float:
    """By tokens, as the executor attributes what it measured."""
    whole = sum(other.step.num_tokens for other in host.residents.values())
    return host.load_seconds() * need.step.num_tokens / whole if whole else 0.0
