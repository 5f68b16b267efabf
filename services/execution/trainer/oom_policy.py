"""What is done where a microbatch finds no memory: it halves; a task that finds none for one sequence leaves its hTask;
alone it fails. Pure.
"""

from engine.alignment.microbatch import Microbatch
from muxtune.v1 import plan_pb2


class OutOfMemoryPolicy:
    """Remembers, by task, how large its microbatches may be: a new plan does not know."""

    def __init__(self) -> None:
        self._most_tokens: dict[str, int] = {}

    def token_budget(self, htask: plan_pb2.HTask) -> int:
        """The hTask's own, or less where a member has found no memory before."""
        return min([htask.token_budget, *(self._most_tokens.get(name, htask.token_budget) for name in htask.tasks)])

    def relieve(self, plan: plan_pb2.ExecutorPlan, index: int, microbatch: Microbatch) -> str | None:
        """Makes do with less in the plan's hTask of that index, or moves a task out of it, to the plan's end. The task
        that cannot be helped, if it is that."""
        htask, ranges = plan.htasks[index], microbatch.ranges
        if sum(len(r.segments) for r in ranges) > 1:
            chunks = max(1, microbatch.num_tokens // htask.chunk_tokens // 2)
            for range_ in ranges:
                self._most_tokens[range_.task] = chunks * htask.chunk_tokens
            return None
        (name,) = (r.task for r in ranges)
        if name not in htask.tasks:  # it has left: a stream opened anew does not have it
            return None
        if len(htask.tasks) == 1:
            return name
        htask.tasks.remove(name)
        plan.htasks.add(tasks=[name], token_budget=htask.token_budget, chunk_tokens=htask.chunk_tokens)
        return None

    def forget_all_but(self, names: list[str]) -> None:
        self._most_tokens = {name: most for name, most in self._most_tokens.items() if name in names}
