"""The scheduling cycle: read a snapshot, plan with pure code, commit to the ledger, send to the executors.

Nothing here is durable: a scheduler that is killed starts its next cycle from the ledger again.
"""

import asyncio
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from opentelemetry import trace

from engine.errors import MuxtuneError, NotFoundError
from engine.planning.cost.task_demand import DemandEstimator
from engine.planning.crash_isolation import plan as make_plan
from engine.planning.types import Plan, PlannerConfig, Snapshot
from muxtune.v1 import (
    execution_pb2,
    execution_pb2_grpc,
    ledger_pb2,
    ledger_pb2_grpc,
    plan_pb2,
    scheduling_pb2,
    task_pb2,
)
from services.backoff import Backoff
from services.conversion.plan import (
    executor_to_view,
    explanation_to_proto,
    htask_to_domain,
    htask_to_proto,
    snapshot_task_to_view,
)
from services.failpoints import failpoint
from services.resource_names import tenant_of
from services.rpc.certificates import ClientTls
from services.rpc.server import start_critical_task
from services.scheduling.executor_streams import ExecutorStream, executor_channel
from services.telemetry import current_trace_parent, links_to, task_span, tracer

_FIRST_BACKOFF_SECONDS, _MAX_BACKOFF_SECONDS = 0.1, 5.0
_DRAIN_SECONDS = 120.0  # longer than an executor's own limit
_log = logging.getLogger(__name__)


class Scheduler:
    """Runs a cycle after each change in the ledger; keeps one stream to each executor."""

    def __init__(
        self,
        ledger: "ledger_pb2_grpc.LedgerServiceAsyncStub",
        secret: str,
        limits: PlannerConfig,
        tenant_weights: Mapping[str, float] | None = None,
        tls: ClientTls | None = None,
    ) -> None:
        self._ledger, self._secret, self._tls, self.limits = ledger, secret, tls, limits
        self.tenant_weights, self._estimator = tenant_weights or {}, DemandEstimator(limits)
        self.snapshot, self.plan = Snapshot((), ()), Plan({})  # the newest, for queries
        self.ledger_snapshot = ledger_pb2.GetSnapshotResponse()  # the message that `snapshot` was made from
        self._streams: dict[str, ExecutorStream] = {}
        self._running: dict[str, plan_pb2.ExecutorPlan] = {}
        self._changed = asyncio.Event()
        self._leader_term = 0
        self.is_running = False

    async def run(self, leader_term: int = 0) -> None:
        """Run cycles until cancelled. Changes coalesce: any number of them during a cycle start one more cycle."""
        self._leader_term, self.is_running = leader_term, True
        watching = start_critical_task(self._watch_changes(), "ledger changes")
        backoff = Backoff(_FIRST_BACKOFF_SECONDS, _MAX_BACKOFF_SECONDS)
        try:
            while True:
                await self._changed.wait()
                self._changed.clear()
                try:
                    await self.schedule()
                    backoff.reset()
                except MuxtuneError as error:
                    _log.warning("The cycle failed and is repeated: %s", error)
                    self._changed.set()
                    await backoff.wait()
        finally:
            watching.cancel()
            await asyncio.gather(*(stream.close() for stream in self._streams.values()))
            self._streams, self._running, self.is_running = {}, {}, False

    async def schedule(self) -> None:
        """Run one cycle. Raises SupersededError if another scheduler or a tenant changed the ledger meanwhile."""
        # 1. Read everything in one transaction.
        snapshot = await self._ledger.GetSnapshot(ledger_pb2.GetSnapshotRequest())
        await self._open_and_close_streams(snapshot.executors)
        # 2. Plan, with pure code: the same snapshot gives the same plan.
        view = self._planner_snapshot(snapshot)
        plan = self._plan(snapshot, view)
        # 3. For each executor, commit the plan if it differs from the one that runs: new attempts get their numbers.
        version = snapshot.plan_version
        entries = {entry.task.name: entry for entry in snapshot.tasks}
        for executor in snapshot.executors:
            draft = _draft_plan(plan, executor, entries, _tasks_held_by_others(executor, snapshot))
            tenants = {tenant_of(task.task) for task in draft.tasks}
            draft.tenant_weights.update({t: w for t, w in self.tenant_weights.items() if t in tenants})
            starting = [task for task in draft.tasks if entries[task.task].executor != executor.name]
            if starting or not self._is_running(draft):
                version += 1
                await self._commit_and_send(draft, starting, version, executor)
        # 4. Keep the snapshot and the plan for queries.
        self.ledger_snapshot, self.snapshot, self.plan = snapshot, view, plan

    async def refresh(self) -> None:
        """Read the ledger and plan for queries, because progress and corrected costs start no cycle. Commits nothing.

        A task that stays on its executor keeps the reason of the plan that placed it there.
        """
        snapshot = await self._ledger.GetSnapshot(ledger_pb2.GetSnapshotRequest())
        view = self._planner_snapshot(snapshot)
        plan, before = self._plan(snapshot, view), {entry.task: entry for entry in self.plan.explanations}
        explanations = [
            replace(entry, reason=before[entry.task].reason)
            if entry.task in before and before[entry.task].executor == entry.executor
            else entry
            for entry in plan.explanations
        ]
        self.ledger_snapshot, self.snapshot, self.plan = snapshot, view, Plan(plan.htasks, tuple(explanations))

    async def drain(self, name: str) -> None:
        """Return when the executor has released its tasks. Raises NotFoundError if it has no lease."""
        snapshot = await self._ledger.GetSnapshot(ledger_pb2.GetSnapshotRequest())
        executor = next((executor for executor in snapshot.executors if executor.name == name), None)
        if executor is None:
            raise NotFoundError(f'No executor "{name}" has a lease.')
        async with executor_channel(executor, self._secret, self._tls) as channel:
            stub: execution_pb2_grpc.ExecutionServiceAsyncStub = execution_pb2_grpc.ExecutionServiceStub(channel)
            await stub.Drain(execution_pb2.DrainRequest(), timeout=_DRAIN_SECONDS)

    def current_plans(self) -> scheduling_pb2.GetPlanResponse:
        """Return the plans as they were sent, with their explanations."""
        version = max((plan.version for plan in self._running.values()), default=0)
        explanations = [explanation_to_proto(explanation) for explanation in self.plan.explanations]
        return scheduling_pb2.GetPlanResponse(
            version=version, executors=list(self._running.values()), explanations=explanations
        )

    def _plan(self, snapshot: ledger_pb2.GetSnapshotResponse, view: Snapshot) -> Plan:
        suspects = [entry.task.name for entry in snapshot.tasks if entry.num_crashes]
        return make_plan(view, suspects, self.limits, self._estimator)

    def _planner_snapshot(self, snapshot: ledger_pb2.GetSnapshotResponse) -> Snapshot:
        """Return the planner's input, with the running hTasks, which it keeps where they are good enough."""
        now = time.time_ns() // 1000  # wall time, as deadlines are
        tasks = tuple(snapshot_task_to_view(entry, age, now) for age, entry in enumerate(snapshot.tasks))
        running = {name: tuple(map(htask_to_domain, plan.htasks)) for name, plan in self._running.items()}
        executors = tuple(executor_to_view(executor) for executor in snapshot.executors)
        return Snapshot(tasks, executors, running, self.tenant_weights)

    async def _commit_and_send(
        self,
        draft: plan_pb2.ExecutorPlan,
        starting: Sequence[plan_pb2.PlannedTask],
        version: int,
        executor: plan_pb2.Executor,
    ) -> None:
        links = links_to((task.task, task.trace_parent) for task in starting)
        attributes: dict[str, str | int] = {"muxtune.plan_version": version, "muxtune.executor": executor.name}
        with tracer().start_as_current_span(
            "schedule", links=links, attributes=attributes, record_exception=False
        ) as span:
            span.set_attribute("muxtune.num_tasks", len(draft.tasks))
            request = ledger_pb2.CommitPlanRequest(
                executor=executor.name,
                lease_term=executor.lease_term,
                version=version,
                leader_term=self._leader_term,
                starts=[ledger_pb2.AttemptStart(task=task.task, expected_attempt=task.attempt) for task in starting],
            )
            answer = await self._ledger.CommitPlan(request)
            failpoint("plan.committed")
            for task, attempt in zip(starting, answer.attempts, strict=True):
                task.attempt = attempt
                self._record_placement(task, version, executor.name, span)
            draft.version, draft.trace_parent = version, current_trace_parent()
        self._running[executor.name] = draft
        self._streams[executor.name].requests.put_plan(draft)

    def _record_placement(self, task: plan_pb2.PlannedTask, version: int, executor: str, cycle: trace.Span) -> None:
        attributes: dict[str, str | int] = {"muxtune.plan_version": version, "muxtune.executor": executor}
        with task_span("plan", task.task, task.trace_parent, **attributes) as span:
            span.add_link(cycle.get_span_context())

    def _is_running(self, draft: plan_pb2.ExecutorPlan) -> bool:
        """Return whether the executor was sent an equal plan; such a plan is not sent again.

        The caller first gives a new attempt to a task that was released and planned there again.
        """
        running = self._running.get(draft.executor)
        return running is not None and _signature(running) == _signature(draft)

    async def _open_and_close_streams(self, executors: Sequence[plan_pb2.Executor]) -> None:
        """Keep one stream to the incarnation of every executor with a lease, and close all others."""
        leases = {executor.name: executor.lease_term for executor in executors}
        for name, stream in list(self._streams.items()):
            if leases.get(name) != stream.executor.lease_term:
                del self._streams[name]
                self._running.pop(name, None)
                await stream.close()
        for executor in executors:
            if executor.name not in self._streams:
                self._streams[executor.name] = ExecutorStream(
                    executor, self._leader_term, self._secret, self._ledger, self._tls
                )

    async def _watch_changes(self) -> None:
        backoff = Backoff(_FIRST_BACKOFF_SECONDS, _MAX_BACKOFF_SECONDS)
        while True:
            try:
                async for _ in self._ledger.WatchChanges(ledger_pb2.WatchChangesRequest()):
                    self._changed.set()
                    backoff.reset()
            except MuxtuneError as error:
                _log.warning("The stream of ledger changes broke: %s", error)
            await backoff.wait()


def _tasks_held_by_others(executor: plan_pb2.Executor, snapshot: ledger_pb2.GetSnapshotResponse) -> set[str]:
    """Return the tasks that other executors still hold.

    They start here after they were released at the end of a round. Tasks of a draining executor are not included: it
    releases them by itself, or is gone.
    """
    others = {e.name for e in snapshot.executors if e.name != executor.name and not e.draining}
    return {entry.task.name for entry in snapshot.tasks if entry.executor in others}


def _draft_plan(
    plan: Plan,
    executor: plan_pb2.Executor,
    entries: Mapping[str, ledger_pb2.SnapshotTask],
    held_elsewhere: Collection[str],
) -> plan_pb2.ExecutorPlan:
    """Return the plan for the executor without the tasks `held_elsewhere`, with the attempts of the snapshot."""
    htasks = [htask_to_proto(htask.without(held_elsewhere)) for htask in plan.htasks.get(executor.name, ())]
    return plan_pb2.ExecutorPlan(
        executor=executor.name,
        tasks=[_planned_task(entries[name]) for htask in htasks for name in htask.tasks],
        htasks=[htask for htask in htasks if htask.tasks],
    )


def _planned_task(entry: ledger_pb2.SnapshotTask) -> plan_pb2.PlannedTask:
    return plan_pb2.PlannedTask(
        task=entry.task.name,
        spec=entry.task.spec,
        attempt=entry.task.attempt,
        num_steps=entry.task.estimate.num_steps,
        resume_from=entry.checkpoint if entry.HasField("checkpoint") else None,
        initial_adapter_key=entry.initial_adapter_key,
        trace_parent=entry.task.trace_parent,
        cancel=entry.task.state == task_pb2.TASK_STATE_CANCELLING,
    )


def _signature(plan: plan_pb2.ExecutorPlan) -> tuple[object, ...]:
    """Return what an executor sees of a plan: tasks, attempts, cancellations and hTasks."""
    tasks = tuple((task.task, task.attempt, task.cancel) for task in plan.tasks)
    return tasks, tuple(htask.SerializeToString(deterministic=True) for htask in plan.htasks)
