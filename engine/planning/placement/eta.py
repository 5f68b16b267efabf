"""Predicts when tasks end: together on one executor while no task joins, and alone on an executor."""

from collections.abc import Sequence

from engine.planning.cost.task_demand import DemandEstimator, TaskDemand
from engine.planning.placement.executor_state import ExecutorState, ResourceUsage
from engine.planning.types import ExecutorView, PlannerConfig, TaskView


def seconds_left(executor: ExecutorState, demands: Sequence[TaskDemand]) -> dict[str, float]:
    """Return the seconds until each task has done its last step, if no task joins.

    Every round is one step of each task that has steps left, so rounds get shorter as neighbours finish.
    """
    result, elapsed, rounds_done = dict[str, float](), 0.0, 0
    by_steps = sorted(demands, key=lambda demand: demand.task.num_steps_left, reverse=True)
    usages = [ResourceUsage()]
    for demand in by_steps:  # most steps first: the tasks that are left form a prefix
        usages.append(usages[-1] + executor.usage_of(demand))
    for count in range(len(by_steps), 0, -1):
        task = by_steps[count - 1].task
        rounds = task.num_steps_left - rounds_done
        elapsed += rounds * executor.round_seconds(usages[count])
        rounds_done += rounds
        result[task.name] = elapsed
    return result


def seconds_alone(
    task: TaskView, executor: ExecutorView, config: PlannerConfig, estimator: DemandEstimator | None = None
) -> float:
    """Return the seconds of the task's remaining steps, alone on an executor with measured costs."""
    state = ExecutorState(executor, config)
    demand = (estimator or DemandEstimator(config)).estimate(task, executor.backbone)
    return task.num_steps_left * state.round_seconds(state.usage_of(demand))
