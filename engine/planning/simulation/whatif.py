"""What will be: when tasks will be done if nobody else comes, and an executor's hTasks over its stages as a picture."""

from collections.abc import Sequence

from engine.planning.cost.task_demand import DemandEstimator
from engine.planning.fusion.fusion import of_partition
from engine.planning.placement.executor_state import ExecutorState
from engine.planning.simulation.baselines import Multiplexed
from engine.planning.simulation.pipeline_simulator import Load, Pipeline, interleaved, one_by_one, simulate
from engine.planning.simulation.simulator import Arrival
from engine.planning.simulation.simulator import simulate as simulate_arrivals
from engine.planning.simulation.timeline import svg
from engine.planning.types import HTask, PlannerConfig, Snapshot

_NUM_PLANS = 64  # in the time that all work takes: changes that come closer together share one
_ROUNDS = 3  # in a picture


def forecast(snapshot: Snapshot, limits: PlannerConfig) -> dict[str, float]:
    """Seconds from now until each task is done, but for those that can run nowhere; none while costs are unknown."""
    executors = [executor for executor in snapshot.executors if not executor.is_draining]
    if not executors or not all(executor.can_predict for executor in executors):
        return {}
    policy = Multiplexed(limits, snapshot.tenant_weights, dict(snapshot.running))
    arrivals = [Arrival(0.0, task) for task in snapshot.tasks]
    run = simulate_arrivals(arrivals, executors, policy, replan_seconds=_whole_seconds(snapshot) / _NUM_PLANS)
    return {outcome.task.name: outcome.finished_seconds for outcome in run.outcomes}


def picture(snapshot: Snapshot, htasks: Sequence[HTask], executor: str, limits: PlannerConfig) -> str:
    """SVG: the executor's hTasks interleaved over its stages, a few rounds, and one by one for comparison."""
    view = next(e for e in snapshot.executors if e.name == executor)
    host, appraiser = ExecutorState(view, limits), DemandEstimator(limits)
    names = {name for htask in htasks for name in htask.tasks}
    for task in snapshot.tasks:
        if task.name in names:
            host.put(appraiser.need(task, view.backbone))
    jobs = host.jobs()
    groups = [of_partition([[jobs[name] for name in htask.tasks]], host.stage()).groups[0] for htask in htasks]
    loads = [
        Load(f"hTask {i}", group.num_microbatches, group.microbatch_seconds / 2, group.microbatch_seconds / 2)
        for i, group in enumerate(groups)
    ]
    pipeline = Pipeline(view.num_stages, view.hop_seconds, num_extra=int(view.num_stages > 1))
    timelines = [("interleaved", simulate(interleaved(loads, _ROUNDS), pipeline))]
    if len(loads) > 1:
        timelines.append(("one hTask after another", simulate(one_by_one(loads, _ROUNDS), pipeline)))
    return svg(timelines)


def _whole_seconds(snapshot: Snapshot) -> float:
    """About how long all that is left takes on the executors of each backbone: the longest of them."""
    seconds = [0.0]
    for backbone in {task.spec.backbone for task in snapshot.tasks}:
        hosts = [e for e in snapshot.executors if e.backbone.name == backbone and not e.is_draining]
        tokens = sum(t.num_steps_left * t.tokens_per_step for t in snapshot.tasks if t.spec.backbone == backbone)
        seconds += [tokens * host.profile.token_seconds / len(hosts) for host in hosts]
    return max(seconds)
