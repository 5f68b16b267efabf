"""The scheduling cycle: a snapshot, a plan made by pure code, a commit, and word to the executors.

Nothing here is durable: killed at any time, the next cycle starts from the ledger again.
"""

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
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
from services.rpc.certificates import ClientTls
from services.rpc.server import start_critical_task
from services.scheduling.executor_streams import ExecutorStream, executor_channel
from services.telemetry import current_trace_parent, links_to, task_span, tracer

_FIRST_BACKOFF_SECONDS, _MAX_BACKOFF_SECONDS = 0.1, 5.0
_DRAIN_SECONDS = 120.0  # it gives up by itself long before
_log = logging.getLogger(__name__)


class Scheduler:
    """Runs a cycle at each hint of the ledger; keeps one stream to each executor."""

    def __init__(
        self,
        ledger: "ledger_pb2_grpc.LedgerServiceAsyncStub",
        secret: str,
        limits: PlannerConfig,
        tenant_weights: Mapping[str, float] | None = None,
        trust: ClientTls | None = None,
    ) -> None:
        self._ledger, self._secret, self._trust, self.limits = ledger, secret, trust, limits
        self.tenant_weights, self._estimator = tenant_weights or {}, DemandEstimator(limits)
        self.snapshot, self.plan = Snapshot((), ()), Plan({})  # the newest, for those who ask
        self.read = ledger_pb2.GetSnapshotResponse()  # what the snapshot was made of
        self._streams: dict[str, ExecutorStream] = {}
        self._running: dict[str, plan_pb2.ExecutorPlan] = {}
        self._hinted = asyncio.Event()
        self._leader_term = 0
        self.is_running = False

    async def run(self, leader_term: int = 0) -> None:
        """Cycles until cancelled. Hints coalesce: any number of changes during a cycle make one more."""
        self._leader_term, self.is_running = leader_term, True
        watching = start_critical_task(self._watch_changes(), "hints of the ledger")
        backoff = Backoff(_FIRST_BACKOFF_SECONDS, _MAX_BACKOFF_SECONDS)
        try:
            while True:
                await self._hinted.wait()
                self._hinted.clear()
                try:
                    await self.schedule()
                    backoff.reset()
                except MuxtuneError as error:
                    _log.warning("cycle given up, a new one follows: %s", error)
                    self._hinted.set()
                    await backoff.wait()
        finally:
            watching.cancel()
            await asyncio.gather(*(stream.close() for stream in self._streams.values()))
            self._streams, self._running, self.is_running = {}, {}, False

    async def schedule(self) -> None:
        """One cycle. Raises SupersededError when another scheduler, or a tenant, was faster: begin again."""
        # 1. Read everything in one transaction.
        snapshot = await self._ledger.GetSnapshot(ledger_pb2.GetSnapshotRequest())
        await self._follow(snapshot.executors)
        # 2. Decide, with pure code: same snapshot, same plan.
        view = self._view(snapshot)
        plan = self._decide(snapshot, view)
        # 3. Commit, executor by executor, what differs from what it runs: new attempts get their numbers.
        version = snapshot.plan_version
        entries = {entry.task.name: entry for entry in snapshot.tasks}
        for executor in snapshot.executors:
            draft = _draft(plan, executor, entries, _held_elsewhere(executor, snapshot))
            starting = [task for task in draft.tasks if entries[task.task].executor != executor.name]
            if starting or not self._is_running(draft):
                version += 1
                await self._commit_and_send(draft, starting, version, executor)
        # 4. Remember why, for those who ask.
        self.read, self.snapshot, self.plan = snapshot, view, plan

    async def look(self) -> None:
        """Reads anew, and plans what a cycle would plan now, for those who ask: progress and corrected costs start no
        cycle. Nothing is committed. Why a task is where it is stays what it was."""
        read = await self._ledger.GetSnapshot(ledger_pb2.GetSnapshotRequest())
        view = self._view(read)
        plan, before = self._decide(read, view), {told.task: told for told in self.plan.explanations}
        told = [
            replace(now, reason=before[now.task].reason)
            if now.task in before and before[now.task].executor == now.executor
            else now
            for now in plan.explanations
        ]
        self.read, self.snapshot, self.plan = read, view, Plan(plan.htasks, tuple(told))

    async def drain(self, name: str) -> None:
        """Answers when the executor has handed back its tasks. Raises NotFoundError."""
        read = await self._ledger.GetSnapshot(ledger_pb2.GetSnapshotRequest())
        executor = next((executor for executor in read.executors if executor.name == name), None)
        if executor is None:
            raise NotFoundError(f'no executor "{name}" has a lease')
        async with executor_channel(executor, self._secret, self._trust) as channel:
            stub: execution_pb2_grpc.ExecutionServiceAsyncStub = execution_pb2_grpc.ExecutionServiceStub(channel)
            await stub.Drain(execution_pb2.DrainRequest(), timeout=_DRAIN_SECONDS)

    def current(self) -> scheduling_pb2.GetPlanResponse:
        """The plans as they were sent, and why."""
        version = max((plan.version for plan in self._running.values()), default=0)
        explanations = [explanation_to_proto(explanation) for explanation in self.plan.explanations]
        return scheduling_pb2.GetPlanResponse(
            version=version, executors=list(self._running.values()), explanations=explanations
        )

    def _decide(self, snapshot: ledger_pb2.GetSnapshotResponse, view: Snapshot) -> Plan:
        suspects = [entry.task.name for entry in snapshot.tasks if entry.num_crashes]
        return make_plan(view, suspects, self.limits, self._estimator)

    def _view(self, snapshot: ledger_pb2.GetSnapshotResponse) -> Snapshot:
        """What the planner reads: with the hTasks that run, which it keeps where they are good enough."""
        now = time.time_ns() // 1000  # of deadlines, which are wall time
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
                self._note_placement(task, version, executor.name, span)
            draft.version, draft.trace_parent = version, current_trace_parent()
        self._running[executor.name] = draft
        self._streams[executor.name].mailbox.put_plan(draft)

    def _note_placement(self, task: plan_pb2.PlannedTask, version: int, executor: str, cycle: trace.Span) -> None:
        attributes: dict[str, str | int] = {"muxtune.plan_version": version, "muxtune.executor": executor}
        with task_span("plan", task.task, task.trace_parent, **attributes) as span:
            span.add_link(cycle.get_span_context())

    def _is_running(self, draft: plan_pb2.ExecutorPlan) -> bool:
        """Whether the executor was sent just that (hysteresis: an equal plan is not sent again).

        A task handed back and planned there again looks the same, attempt and all: it needs a new attempt first.
        """
        running = self._running.get(draft.executor)
        return running is not None and _signature(running) == _signature(draft)

    async def _follow(self, executors: Sequence[plan_pb2.Executor]) -> None:
        """A stream to every live executor's incarnation; none to others."""
        leases = {executor.name: executor.lease_term for executor in executors}
        for name, stream in list(self._streams.items()):
            if leases.get(name) != stream.executor.lease_term:
                del self._streams[name]
                self._running.pop(name, None)
                await stream.close()
        for executor in executors:
            if executor.name not in self._streams:
                self._streams[executor.name] = ExecutorStream(
                    executor, self._leader_term, self._secret, self._ledger, self._trust
                )

    async def _watch_changes(self) -> None:
        backoff = Backoff(_FIRST_BACKOFF_SECONDS, _MAX_BACKOFF_SECONDS)
        while True:
            try:
                async for _ in self._ledger.WatchChanges(ledger_pb2.WatchChangesRequest()):
                    self._hinted.set()
                    backoff.reset()
            except MuxtuneError as error:
                _log.warning("the ledger's hints broke off: %s", error)
            await backoff.wait()


def _held_elsewhere(executor: plan_pb2.Executor, snapshot: ledger_pb2.GetSnapshotResponse) -> set[str]:
    """Tasks that another executor still has: it hands them back at its round's end, with what they have learnt by then,
    and only then they start here. One that drains does so by itself, or is gone."""
    others = {e.name for e in snapshot.executors if e.name != executor.name and not e.draining}
    return {entry.task.name for entry in snapshot.tasks if entry.executor in others}


def _draft(
    plan: Plan,
    executor: plan_pb2.Executor,
    entries: Mapping[str, ledger_pb2.SnapshotTask],
    missing: Iterable[str],
) -> plan_pb2.ExecutorPlan:
    """The plan as the executor will read it, but for those `missing` yet; attempts as in the snapshot until
    committed."""
    htasks = [htask_to_proto(htask) for htask in plan.htasks.get(executor.name, ())]
    for htask in htasks:
        htask.tasks[:] = [name for name in htask.tasks if name not in missing]
    return plan_pb2.ExecutorPlan(
        executor=executor.name,
        tasks=[_planned(entries[name]) for htask in htasks for name in htask.tasks],
        htasks=[htask for htask in htasks if htask.tasks],
    )


def _planned(entry: ledger_pb2.SnapshotTask) -> plan_pb2.PlannedTask:
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
    """What makes two plans the same to an executor: who, in which attempt, fused how."""
    tasks = tuple((task.task, task.attempt, task.cancel) for task in plan.tasks)
    return tasks, tuple(htask.SerializeToString(deterministic=True) for htask in plan.htasks)
