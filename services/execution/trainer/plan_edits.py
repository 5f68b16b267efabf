"""Changes of a plan that an executor makes itself, after errors. Pure."""

from collections.abc import Collection, Iterable

from muxtune.v1 import plan_pb2


def split_off(plan: plan_pb2.ExecutorPlan, index: int, names: Iterable[str]) -> None:
    """Makes each of the tasks an hTask of its own, at the end of the plan."""
    htask = plan.htasks[index]
    for name in names:
        at = list(htask.tasks).index(name)
        alone = plan.htasks.add(tasks=[name], token_budget=htask.token_budget, chunk_tokens=htask.chunk_tokens)
        del htask.tasks[at]
        if htask.round_tokens:
            alone.round_tokens.append(htask.round_tokens.pop(at))


def keep_only(htask: plan_pb2.HTask, names: Collection[str]) -> None:
    """Removes all other tasks from the hTask."""
    for at in reversed(range(len(htask.tasks))):
        if htask.tasks[at] not in names:
            del htask.tasks[at]
            if htask.round_tokens:
                del htask.round_tokens[at]
