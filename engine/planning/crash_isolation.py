"""Isolates the tasks that ran on an executor when it died: one of them may be the cause, so each runs alone until it
has done a step.

Pure: it combines the planner's plans of parts of the snapshot.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace

from engine.planning.cost.task_demand import DemandEstimator
from engine.planning.planner import plan as make_plan
from engine.planning.types import ExecutorView, Explanation, Plan, PlannerConfig, Snapshot, TaskView

_ALONE = "runs alone: it was on an executor when that died, and may be the cause"
_WAITS = "waits to run alone: it was on an executor when that died, and may be the cause"
_DISPLACED = "waits: each executor of its backbone runs a task alone, after one died"


def plan(snapshot: Snapshot, suspects: Collection[str], config: PlannerConfig, estimator: DemandEstimator) -> Plan:
    """Return the planner's plan with the restriction that a suspect shares its executor with no other task."""
    if not suspects:
        return make_plan(snapshot, config, estimator)
    alone = dict(_place_alone(snapshot, suspects, config))
    others = tuple(task for task in snapshot.tasks if task.name not in suspects)
    rest = make_plan(_part(snapshot, others, [e for e in snapshot.executors if e.name not in alone]), config, estimator)
    placed = {task for plan in alone.values() for executor in plan.htasks for task in plan.tasks_of(executor)}
    waiting = [Explanation(name, "", (), _WAITS) for name in suspects if name not in placed]
    explanations = [replace(e, reason=_ALONE) for plan in alone.values() for e in plan.explanations]
    explanations += _explain_displaced(rest.explanations, snapshot, alone) if alone else rest.explanations
    htasks = dict(rest.htasks)
    for part in alone.values():
        htasks |= part.htasks
    return Plan(htasks, (*explanations, *waiting))


def _place_alone(snapshot: Snapshot, suspects: Collection[str], config: PlannerConfig) -> Iterator[tuple[str, Plan]]:
    """Yield an executor and the plan of one suspect alone there: a suspect that runs there, else the oldest waiting.

    If a backbone has several executors, one of them is left to the tasks that are not suspects.
    """
    waiting = [task for task in snapshot.tasks if task.name in suspects]
    waiting.sort(key=lambda task: (task.age, task.name))
    ready = [executor for executor in snapshot.executors if not executor.is_draining]
    for executor in sorted(ready, key=lambda e: not any(task.executor == e.name for task in waiting)):
        if _is_last_of_several(executor, ready, snapshot, suspects):
            continue
        for task in sorted(waiting, key=lambda task: task.executor != executor.name):
            plan_alone = make_plan(_part(snapshot, (task,), [executor]), config)
            if plan_alone.tasks_of(executor.name):
                yield executor.name, plan_alone
                waiting.remove(task)
                ready.remove(executor)
                break


def _is_last_of_several(
    executor: ExecutorView, ready: list[ExecutorView], snapshot: Snapshot, suspects: Collection[str]
) -> bool:
    """Return whether it is the only one of its backbone's executors left for tasks that are not suspects."""
    backbone = executor.backbone.name
    num_all = sum(e.backbone.name == backbone and not e.is_draining for e in snapshot.executors)
    num_left = sum(e.backbone.name == backbone for e in ready)
    is_wanted = any(task.spec.backbone == backbone and task.name not in suspects for task in snapshot.tasks)
    return is_wanted and num_all > 1 and num_left == 1


def _part(snapshot: Snapshot, tasks: tuple[TaskView, ...], executors: list[ExecutorView]) -> Snapshot:
    names = {executor.name for executor in executors}
    running = {name: htasks for name, htasks in snapshot.running.items() if name in names}
    return replace(snapshot, tasks=tasks, executors=tuple(executors), running=running)


def _explain_displaced(
    explanations: tuple[Explanation, ...], snapshot: Snapshot, alone: Collection[str]
) -> Iterator[Explanation]:
    """Replace the reason of tasks that wait because their executors were hidden from the planner."""
    backbones = {executor.backbone.name for executor in snapshot.executors if executor.name in alone}
    backbone_of = {task.name: task.spec.backbone for task in snapshot.tasks}
    left = {executor.backbone.name for executor in snapshot.executors if executor.name not in alone}
    for explanation in explanations:
        is_displaced = not explanation.executor and backbone_of[explanation.task] in backbones - left
        yield replace(explanation, reason=_DISPLACED) if is_displaced else explanation
