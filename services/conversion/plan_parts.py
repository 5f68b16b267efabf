"""Cuts an executor's plan into messages of a few MiB, and puts it together again: specs of a thousand tasks are larger
than one message may be."""

from collections.abc import Iterator, Sequence

from muxtune.v1 import plan_pb2
from services.message_parts import cut


def split_plan(plan: plan_pb2.ExecutorPlan) -> Iterator[plan_pb2.ExecutorPlan]:
    """Yield the plan's parts, at least one. Each names executor and version and has some of the tasks; the last one has
    everything else."""
    parts = list(cut(plan.tasks))
    for tasks in parts[:-1]:
        yield plan_pb2.ExecutorPlan(version=plan.version, executor=plan.executor, tasks=tasks)
    last = plan_pb2.ExecutorPlan()
    last.CopyFrom(plan)
    if len(parts) > 1:
        last.ClearField("tasks")
        last.tasks.extend(parts[-1])
    yield last


class PlanParts:
    """Collects the parts of a plan. Parts of an older plan whose end did not come are dropped."""

    def __init__(self) -> None:
        self._parts: list[plan_pb2.ExecutorPlan] = []

    def add(self, part: plan_pb2.ExecutorPlan) -> None:
        """Add a part that is not the last."""
        self._parts = [*(p for p in self._parts if p.version == part.version), part]

    def finish(self, last: plan_pb2.ExecutorPlan) -> plan_pb2.ExecutorPlan:
        """Return the whole plan that ends with this part."""
        parts, self._parts = [p for p in self._parts if p.version == last.version], []
        if not parts:
            return last
        return merge_parts([*parts, last])


def merge_parts(parts: Sequence[plan_pb2.ExecutorPlan]) -> plan_pb2.ExecutorPlan:
    """Return the plan whose parts these are."""
    plan = plan_pb2.ExecutorPlan()
    plan.CopyFrom(parts[-1])
    plan.ClearField("tasks")
    for part in parts:
        plan.tasks.extend(part.tasks)
    return plan
