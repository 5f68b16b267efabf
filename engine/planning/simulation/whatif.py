"""Answers what-if questions: when tasks will be done if no task joins, and how an executor's hTasks fill its stages."""

from collections.abc import Sequence

from engine.planning.cost.task_demand import DemandEstimator
from engine.planning.fusion.fusion import fuse_as
from engine.planning.placement.executor_state import ExecutorState
from engine.planning.simulation.baselines import PlannerPolicy
from engine.planning.simulation.pipeline_simulator import (
    HTaskRound,
    Pipeline,
    ScheduledMicrobatch,
    Timeline,
    interleaved,
    one_by_one,
    simulate,
)
from engine.planning.simulation.simulator import Arrival
from engine.planning.simulation.simulator import simulate as simulate_arrivals
from engine.planning.simulation.timeline import svg
from engine.planning.types import HTask, PlannerConfig, Snapshot

_NUM_PLANS = 64  # plans in the time that all work takes: changes closer together than that share one
_NUM_ROUNDS = 3  # rounds shown in a picture
_MAX_OPERATIONS = 4_000  # forwards and backwards shown in a picture: about 1 MB of SVG


def forecast(snapshot: Snapshot, config: PlannerConfig) -> dict[str, float]:
    """Return the seconds until each task that can run is done; nothing while costs are unknown."""
    executors = [executor for executor in snapshot.executors if not executor.is_draining]
    if not executors or not all(executor.can_predict for executor in executors):
        return {}
    policy = PlannerPolicy(config, snapshot.tenant_weights, dict(snapshot.running))
    arrivals = [Arrival(0.0, task) for task in snapshot.tasks]
    run = simulate_arrivals(arrivals, executors, policy, replan_seconds=_total_seconds(snapshot) / _NUM_PLANS)
    return {outcome.task.name: outcome.finished_seconds for outcome in run.outcomes}


def picture(snapshot: Snapshot, htasks: Sequence[HTask], executor: str, config: PlannerConfig) -> str:
    """Return an SVG of the executor's hTasks interleaved over its stages, and one by one for comparison."""
    view = next(e for e in snapshot.executors if e.name == executor)
    state, estimator = ExecutorState(view, config), DemandEstimator(config)
    names = {name for htask in htasks for name in htask.tasks}
    for task in snapshot.tasks:
        if task.name in names:
            state.add(estimator.estimate(task, view.backbone))
    costs = state.step_costs()
    groups = [fuse_as([[costs[name] for name in htask.tasks]], state.stage()).groups[0] for htask in htasks]
    rounds = [
        HTaskRound(f"hTask {i}", group.num_microbatches, group.microbatch_seconds / 2, group.microbatch_seconds / 2)
        for i, group in enumerate(groups)
    ]
    pipeline = Pipeline(view.num_stages, view.hop_seconds, num_extra=int(view.num_stages > 1))
    timelines = [_draw_first("interleaved", interleaved(rounds, _NUM_ROUNDS), pipeline)]
    if len(rounds) > 1:
        timelines.append(_draw_first("one hTask after another", one_by_one(rounds, _NUM_ROUNDS), pipeline))
    return svg(timelines)


def _draw_first(title: str, order: list[ScheduledMicrobatch], pipeline: Pipeline) -> tuple[str, Timeline]:
    """Return the timeline with its title. A long one is cut, and its title says so."""
    most = max(1, _MAX_OPERATIONS // (2 * pipeline.num_stages))
    cut = f", the first {most} of {len(order)} microbatches" if len(order) > most else ""
    return title + cut, simulate(order[:most], pipeline)


def _total_seconds(snapshot: Snapshot) -> float:
    """Return about how long the work left takes on the executors of each backbone: the longest of these times."""
    seconds = [0.0]
    for backbone in {task.spec.backbone for task in snapshot.tasks}:
        executors = [e for e in snapshot.executors if e.backbone.name == backbone and not e.is_draining]
        tokens = sum(t.num_steps_left * t.tokens_per_step for t in snapshot.tasks if t.spec.backbone == backbone)
        seconds += [tokens * executor.profile.token_seconds / len(executors) for executor in executors]
    return max(seconds)
