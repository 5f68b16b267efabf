"""How long tasks on one executor still take, if nobody comes: rounds get shorter as neighbours finish; and how long one
takes alone."""

from collections.abc import Sequence

from engine.planning.cost.task_demand import DemandEstimator, TaskDemand
from engine.planning.placement.executor_state import ExecutorState, ResourceUsage
from engine.planning.types import ExecutorView, PlannerConfig, TaskView


def seconds_left(host: ExecutorState, needs: Sequence[TaskDemand]) -> dict[str, float]:
    """Until each has done its last step. Every round is one step of each that has one left."""
    result, elapsed, rounds_done = dict[str, float](), 0.0, 0
    waiting = sorted(needs, key=lambda need: need.task.num_steps_left, reverse=True)
    crowds = [ResourceUsage()]
    for need in waiting:  # those with most steps first: a prefix of them is who is left
        crowds.append(crowds[-1] + host.crowd_of(need))
    for count in range(len(waiting), 0, -1):
        task = waiting[count - 1].task
        rounds = task.num_steps_left - rounds_done
        elapsed += rounds * host.round_seconds(crowds[count])
        rounds_done += rounds
        result[task.name] = elapsed
    return result


def seconds_alone(
    task: TaskView, executor: ExecutorView, limits: PlannerConfig, appraiser: DemandEstimator | None = None
) -> float:
    """Of all its steps, had it to itself an executor whose costs are known."""
    host = ExecutorState(executor, limits)
    need = (appraiser or DemandEstimator(limits)).need(task, executor.backbone)
    return task.num_steps_left * host.round_seconds(host.crowd_of(need))
