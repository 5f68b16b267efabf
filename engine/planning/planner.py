"""Which tasks are resident where, fused how. Pure: the same snapshot gives the same plan.

For now the simplest honest planner: oldest first, all that fit in memory, one hTask an executor.
"""

from collections.abc import Sequence

from engine.errors import InvalidInputError
from engine.planning.eta import seconds_left
from engine.planning.memory import adapter_bytes, microbatch_tokens, refuse_if_never_fits, total_bytes
from engine.planning.plan import ExecutorView, Explanation, HTask, Limits, Plan, Snapshot, TaskView


def plan(snapshot: Snapshot, limits: Limits) -> Plan:
    """Residents stay where they are; others go, oldest first, to the fitting executor with the fewest tasks."""
    usable = {e.name: e for e in snapshot.executors if not e.is_draining}
    residents: dict[str, list[TaskView]] = {name: [] for name in usable}
    waiting: list[Explanation] = []
    for task in sorted(snapshot.tasks, key=lambda t: (t.executor not in usable, t.age)):
        target = _place(task, usable, residents, limits)
        if isinstance(target, Explanation):
            waiting.append(target)
        else:
            residents[target.name].append(task)
    htasks = {name: _fuse(tasks, limits) for name, tasks in residents.items()}
    placed = [e for name, tasks in residents.items() for e in _explain(usable[name], tasks, limits)]
    return Plan(htasks, (*placed, *waiting))


def _place(
    task: TaskView, usable: dict[str, ExecutorView], residents: dict[str, list[TaskView]], limits: Limits
) -> ExecutorView | Explanation:
    hosts = [e for e in usable.values() if e.backbone.name == task.spec.backbone]
    if not hosts:
        return Explanation(task.name, "", (), f"no executor of backbone {task.spec.backbone} is ready")
    hosts.sort(key=lambda e: (e.name != task.executor, len(residents[e.name]), e.name))
    try:
        refuse_if_never_fits(task.spec, hosts, limits.token_budget, limits.chunk_tokens)
    except InvalidInputError as error:  # it fitted an executor that has left, or other operators
        return Explanation(task.name, "", (), str(error))
    for executor in hosts:
        if _bytes(executor, [*residents[executor.name], task], limits) <= executor.memory_bytes:
            return executor
    return Explanation(task.name, "", (), "waits for memory: every executor of its backbone is full")


def _bytes(executor: ExecutorView, tasks: Sequence[TaskView], limits: Limits) -> int:
    specs = [task.spec for task in tasks]
    num_tokens = microbatch_tokens(specs, limits.token_budget, limits.chunk_tokens)
    return total_bytes(specs, executor.backbone, num_tokens)


def _fuse(tasks: Sequence[TaskView], limits: Limits) -> tuple[HTask, ...]:
    if not tasks:
        return ()
    budget = microbatch_tokens([t.spec for t in tasks], limits.token_budget, limits.chunk_tokens)
    names = tuple(t.name for t in sorted(tasks, key=lambda t: t.age))
    return (HTask(names, budget, limits.chunk_tokens),)


def _explain(executor: ExecutorView, tasks: Sequence[TaskView], limits: Limits) -> list[Explanation]:
    return [
        Explanation(
            task=task.name,
            executor=executor.name,
            neighbours=tuple(t.name for t in tasks if t is not task),
            reason="stays where it runs" if task.executor == executor.name else "oldest that fits in memory",
            predicted_bytes=adapter_bytes(task.spec, executor.backbone),
            predicted_seconds_left=seconds_left(task, tasks, executor.effective_tokens_per_second),
        )
        for task in tasks
    ]
