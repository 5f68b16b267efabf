"""Tasks that were on an executor when it died: one of them may be why, so each runs alone until it has done a step.

Pure: the planner's plans of parts of the snapshot, put together.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace

from engine.planning.cost.task_demand import DemandEstimator
from engine.planning.planner import plan as make_plan
from engine.planning.types import ExecutorView, Explanation, Plan, PlannerConfig, Snapshot, TaskView

_ALONE = "alone, after an executor died while it ran there: to see whether it is why"
_WAITS = "waits to run alone, after an executor died while it ran there"
_DISPLACED = "waits: each executor of its backbone runs a task alone, after one died"


def plan(snapshot: Snapshot, suspects: Collection[str], limits: PlannerConfig, appraiser: DemandEstimator) -> Plan:
    """The planner's plan, but no suspect shares an executor with anyone."""
    if not suspects:
        return make_plan(snapshot, limits, appraiser)
    alone = dict(_placed(snapshot, suspects, limits))
    others = tuple(task for task in snapshot.tasks if task.name not in suspects)
    rest = make_plan(_part(snapshot, others, [e for e in snapshot.executors if e.name not in alone]), limits, appraiser)
    placed = {task for plan in alone.values() for executor in plan.htasks for task in plan.tasks_of(executor)}
    waiting = [Explanation(name, "", (), _WAITS) for name in suspects if name not in placed]
    explained = [replace(e, reason=_ALONE) for plan in alone.values() for e in plan.explanations]
    explained += _displaced(rest.explanations, snapshot, alone) if alone else rest.explanations
    htasks = dict(rest.htasks)
    for part in alone.values():
        htasks |= part.htasks
    return Plan(htasks, (*explained, *waiting))


def _placed(snapshot: Snapshot, suspects: Collection[str], limits: PlannerConfig) -> Iterator[tuple[str, Plan]]:
    """(executor, plan of one suspect alone there): whom it runs already, or the oldest that waits. Of several executors
    of a backbone the last one is left to those who are no suspects."""
    waiting = [task for task in snapshot.tasks if task.name in suspects]
    waiting.sort(key=lambda task: (task.age, task.name))
    ready = [executor for executor in snapshot.executors if not executor.is_draining]
    for executor in sorted(ready, key=lambda e: not any(task.executor == e.name for task in waiting)):
        if _is_last_of_several(executor, ready, snapshot, suspects):
            continue
        for task in sorted(waiting, key=lambda task: task.executor != executor.name):
            found = make_plan(_part(snapshot, (task,), [executor]), limits)
            if found.tasks_of(executor.name):
                yield executor.name, found
                waiting.remove(task)
                ready.remove(executor)
                break


def _is_last_of_several(
    executor: ExecutorView, ready: list[ExecutorView], snapshot: Snapshot, suspects: Collection[str]
) -> bool:
    """Of its backbone, of those not taken yet, while tasks that are no suspects want one."""
    backbone = executor.backbone.name
    num_all = sum(e.backbone.name == backbone and not e.is_draining for e in snapshot.executors)
    num_left = sum(e.backbone.name == backbone for e in ready)
    wanted = any(task.spec.backbone == backbone and task.name not in suspects for task in snapshot.tasks)
    return wanted and num_all > 1 and num_left == 1


def _part(snapshot: Snapshot, tasks: tuple[TaskView, ...], executors: list[ExecutorView]) -> Snapshot:
    names = {executor.name for executor in executors}
    running = {name: htasks for name, htasks in snapshot.running.items() if name in names}
    return replace(snapshot, tasks=tasks, executors=tuple(executors), running=running)


def _displaced(
    explanations: tuple[Explanation, ...], snapshot: Snapshot, alone: Collection[str]
) -> Iterator[Explanation]:
    """The planner does not know of the executors that it was not shown."""
    backbones = {executor.backbone.name for executor in snapshot.executors if executor.name in alone}
    wanted = {task.name: task.spec.backbone for task in snapshot.tasks}
    left = {executor.backbone.name for executor in snapshot.executors if executor.name not in alone}
    for explanation in explanations:
        is_displaced = not explanation.executor and wanted[explanation.task] in backbones - left
        yield replace(explanation, reason=_DISPLACED) if is_displaced else explanation
