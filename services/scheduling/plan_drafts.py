"""Turns a plan into what is sent to each executor, and tells whether an executor has it already. Pure."""

from collections.abc import Mapping

from engine.planning.types import Plan
from muxtune.v1 import ledger_pb2, plan_pb2, task_pb2
from services.conversion.plan import htask_to_proto
from services.resource_names import tenant_of
from services.scheduling.ledger_reader import LedgerSnapshot


class PlanDrafts:
    """Drafts of the executors' plans, without specs, with the attempts of the snapshot."""

    def __init__(self, plan: Plan, snapshot: LedgerSnapshot, weights: Mapping[str, float]) -> None:
        self._plan, self._snapshot, self._weights = plan, snapshot, weights
        self.entries = {entry.task.name: entry for entry in snapshot.tasks}
        # Tasks of a draining executor count as free: it releases them by itself, or is gone.
        self._holders = {executor.name for executor in snapshot.executors if not executor.draining}

    def draft(self, executor: str) -> plan_pb2.ExecutorPlan:
        """Return the executor's plan without tasks that another executor holds: they start here after that one has
        released them."""
        others, htasks = self._holders - {executor}, list[plan_pb2.HTask]()
        for htask in self._plan.htasks.get(executor, ()):
            held = {name for name in htask.tasks if self.entries[name].executor in others}
            htasks.append(htask_to_proto(htask.without(held)))
        names = [name for htask in htasks for name in htask.tasks]
        tenants = {tenant_of(name) for name in names}
        return plan_pb2.ExecutorPlan(
            executor=executor,
            tasks=[self._planned_task(self.entries[name]) for name in names],
            htasks=[htask for htask in htasks if htask.tasks],
            tenant_weights={tenant: weight for tenant, weight in self._weights.items() if tenant in tenants},
        )

    def _planned_task(self, entry: ledger_pb2.SnapshotTask) -> plan_pb2.PlannedTask:
        return plan_pb2.PlannedTask(
            task=entry.task.name,
            attempt=entry.task.attempt,
            num_steps=self._snapshot.specs[entry.task.name].num_steps,
            resume_from=entry.checkpoint if entry.HasField("checkpoint") else None,
            initial_adapter_key=entry.initial_adapter_key,
            trace_parent=entry.task.trace_parent,
            cancel=entry.task.state == task_pb2.TASK_STATE_CANCELLING,
        )


def is_same_plan(a: plan_pb2.ExecutorPlan, b: plan_pb2.ExecutorPlan) -> bool:
    """Return whether the plans are equal to an executor: in tasks, attempts, cancellations and hTasks."""
    return _signature(a) == _signature(b)


def _signature(plan: plan_pb2.ExecutorPlan) -> tuple[object, ...]:
    tasks = tuple((task.task, task.attempt, task.cancel) for task in plan.tasks)
    return tasks, tuple(htask.SerializeToString(deterministic=True) for htask in plan.htasks)
