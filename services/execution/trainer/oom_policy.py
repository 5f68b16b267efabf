"""Out-of-memory policy: halves the microbatch, then moves the task out of its hTask, then fails it. Pure."""

from engine.alignment.microbatch import Microbatch
from muxtune.v1 import plan_pb2
from services.execution.trainer.plan_edits import split_off


class OutOfMemoryPolicy:
    """Keeps a limit on the size of each task's microbatches, which a new plan does not know."""

    def __init__(self) -> None:
        self._max_tokens: dict[str, int] = {}

    def token_budget(self, htask: plan_pb2.HTask) -> int:
        """Returns the hTask's token budget, or less if a member has run out of memory before."""
        return min([htask.token_budget, *(self._max_tokens.get(name, htask.token_budget) for name in htask.tasks)])

    def reduce_memory(self, plan: plan_pb2.ExecutorPlan, index: int, microbatch: Microbatch) -> str | None:
        """Halves the microbatches of the hTask at `index`, or moves a task out of it to the end of the plan.

        Returns the task that must fail, if there is one: it ran out of memory with one sequence and no other task.
        """
        htask, ranges = plan.htasks[index], microbatch.ranges
        if sum(len(r.segments) for r in ranges) > 1:
            chunks = max(1, microbatch.num_tokens // htask.chunk_tokens // 2)
            for range_ in ranges:
                self._max_tokens[range_.task] = chunks * htask.chunk_tokens
            return None
        (name,) = (r.task for r in ranges)
        if name not in htask.tasks:  # the task has left: a new stream will not contain it
            return None
        if len(htask.tasks) == 1:
            return name
        split_off(plan, index, [name])
        return None

    def forget_all_but(self, names: list[str]) -> None:
        self._max_tokens = {name: limit for name, limit in self._max_tokens.items() if name in names}
