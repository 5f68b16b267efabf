"""Explains why a task runs where it runs: its neighbours, and predicted against measured seconds, bytes and padding."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.planning.cost.task_demand import TaskDemand
from engine.planning.placement.eta import seconds_left
from engine.planning.placement.executor_state import ExecutorState
from engine.planning.types import MAX_NAMED_NEIGHBOURS, Explanation, HTask, TaskRate


def explain_residents(
    executor: ExecutorState,
    htasks: Sequence[HTask],
    reasons: Mapping[str, str],
    weights: Mapping[str, float],
    rates: Mapping[str, TaskRate],
) -> list[Explanation]:
    """Return one explanation for each resident."""
    residents = executor.residents
    left = seconds_left(executor, weights)
    token_seconds = _seconds_of_a_token(executor)
    explanations = {}
    for htask in htasks:
        tokens = sum(residents[name].sequences.num_tokens for name in htask.tasks)
        fused = _FusedRound(htask, max(1, math.ceil(tokens / htask.token_budget)), token_seconds)
        for name in htask.tasks:
            reason, rate = reasons.get(name, ""), rates[name]
            explanations[name] = _explain(executor, residents[name], fused, reason, left[name], rate)
    return [explanations[name] for name in residents]


@dataclass(frozen=True)
class _FusedRound:
    """An hTask's round; computed once for all its tasks. `token_seconds`: seconds of the executor's round by token."""

    htask: HTask
    num_microbatches: int
    token_seconds: float


def _explain(
    executor: ExecutorState, demand: TaskDemand, fused: _FusedRound, reason: str, left_seconds: float, rate: TaskRate
) -> Explanation:
    task, htask, can_predict = demand.task, fused.htask, executor.view.can_predict
    num_tokens = task.num_effective_tokens + task.num_padding_tokens
    return Explanation(
        task=task.name,
        executor=executor.name,
        neighbours=_first_others(htask, task.name),
        num_neighbours=len(htask.tasks) - 1,
        reason=reason or "stays where it runs",
        predicted_bytes=demand.footprint.adapter_bytes,
        alone_bytes=executor.alone_bytes(demand),
        predicted_seconds_left=left_seconds if can_predict else None,
        round_seconds=executor.load_seconds() if can_predict else None,
        alone_round_seconds=executor.round_seconds(executor.usage_of(demand)) if can_predict else None,
        predicted_step_seconds=_step_seconds(executor, demand, fused) if can_predict else None,
        measured_step_seconds=task.device_seconds / task.step if task.step and task.device_seconds else None,
        padding_fraction=task.num_padding_tokens / num_tokens if num_tokens else None,
        predicted_padding_fraction=_padding_fraction(demand, fused),
        device_share=rate.device_share,
        seconds_per_step=rate.seconds_per_step if can_predict else None,
        misses_deadline=can_predict and left_seconds > task.seconds_to_deadline,
    )


def _first_others(htask: HTask, name: str) -> tuple[str, ...]:
    first = htask.tasks[: MAX_NAMED_NEIGHBOURS + 1]
    return tuple(other for other in first if other != name)[:MAX_NAMED_NEIGHBOURS]


def _padding_fraction(demand: TaskDemand, fused: _FusedRound) -> float:
    padding = demand.sequences.padding_tokens(fused.num_microbatches, fused.htask.chunk_tokens)
    return padding / (padding + demand.sequences.num_tokens) if padding else 0.0


def _seconds_of_a_token(executor: ExecutorState) -> float:
    """Return the seconds of the executor's round by token: measured time is divided among tasks by tokens, too."""
    all_tokens = sum(demand.step.num_tokens for demand in executor.residents.values())
    return executor.load_seconds() / all_tokens if all_tokens else 0.0


def _step_seconds(executor: ExecutorState, demand: TaskDemand, fused: _FusedRound) -> float:
    """Return the task's device time of a step, with the evaluations and verified steps between two."""
    between = demand.seconds_between_steps(executor.profile, fused.htask.token_budget) / executor.view.num_stages
    return fused.token_seconds * demand.step.num_tokens + between
