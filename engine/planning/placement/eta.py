"""Predicts when tasks end: together on one executor while no task joins, and alone on an executor."""

from collections.abc import Mapping

from engine.planning.cost.task_demand import DemandEstimator, TaskDemand
from engine.planning.placement.executor_state import ExecutorState
from engine.planning.types import ExecutorView, PlannerConfig, TaskView


def seconds_left(executor: ExecutorState, weights: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds until each resident has done its last step, if no task joins.

    Time is divided anew when tasks end: after each of them, or after each quarter of many.
    """
    steps = {name: float(demand.task.num_steps_left) for name, demand in executor.residents.items()}
    result, elapsed, left = dict[str, float](), 0.0, dict(executor.residents)
    while left:
        rates = executor.rates(executor.groups_of(left.values(), weights), left)
        seconds = {name: steps[name] * rates[name].seconds_per_step for name in left}
        ending = sorted(left, key=lambda name: seconds[name])[: max(1, len(left) // 4)]
        passed = seconds[ending[-1]]
        for name in ending:
            result[name] = elapsed + seconds[name]
            del left[name]
        for name in left:
            steps[name] -= passed / rates[name].seconds_per_step
        elapsed += passed
    return result


def seconds_alone(
    task: TaskView, executor: ExecutorView, config: PlannerConfig, estimator: DemandEstimator | None = None
) -> float:
    """Return the seconds of the task's remaining steps and evaluations, alone on an executor with measured costs."""
    state = ExecutorState(executor, config)
    demand = (estimator or DemandEstimator(config)).estimate(task, executor.backbone)
    return task.num_steps_left * (state.round_seconds(state.usage_of(demand)) + _seconds_between_steps(state, demand))


def _seconds_between_steps(executor: ExecutorState, demand: TaskDemand) -> float:
    """Return the mean seconds of evaluations and verified steps for one step of the task."""
    microbatch_tokens = executor.microbatch_tokens(executor.usage_of(demand))
    return demand.seconds_between_steps(executor.profile, microbatch_tokens) / executor.view.num_stages
