"""The scheduling cycle: read a snapshot, plan with pure code, commit to the ledger, send to the executors.

Nothing here is durable: a scheduler that is killed starts its next cycle from the ledger again.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from opentelemetry import trace

from engine.errors import MuxtuneError, NotFoundError, SupersededError, UnavailableError
from engine.planning.types import Plan, PlannerConfig, Snapshot
from muxtune.v1 import execution_pb2, execution_pb2_grpc, ledger_pb2, ledger_pb2_grpc, plan_pb2
from services.backoff import Backoff
from services.conversion.plan import htask_to_domain
from services.failpoints import failpoint
from services.rpc.certificates import ClientTls
from services.rpc.server import start_critical_task
from services.scheduling.executor_streams import ExecutorStream, executor_channel
from services.scheduling.ledger_reader import LedgerReader, LedgerSnapshot
from services.scheduling.plan_drafts import PlanDrafts, is_same_plan
from services.scheduling.snapshot_planner import SnapshotPlanner
from services.telemetry import current_trace_parent, links_to, task_span, tracer

_FIRST_BACKOFF_SECONDS, _MAX_BACKOFF_SECONDS = 0.1, 5.0
_LONG_CYCLE_SECONDS, _MAX_REST_SECONDS = 0.1, 5.0
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
        self.tenant_weights = tenant_weights or {}
        self._reader, self._planner = LedgerReader(ledger), SnapshotPlanner(limits, self.tenant_weights)
        self.snapshot, self.plan = Snapshot((), ()), Plan({})  # the newest, for queries
        self.ledger_snapshot = LedgerSnapshot()  # that `snapshot` was made from
        self._streams: dict[str, ExecutorStream] = {}
        self._running: dict[str, plan_pb2.ExecutorPlan] = {}
        self._changed = asyncio.Event()
        self._leader_term, self._busy_seconds = 0, 0.0
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
                    await self._rest()
                    if self._planner.has_more:
                        self._changed.set()
                except Exception as error:
                    if isinstance(error, SupersededError):  # a tenant cancelled a task meanwhile, as often as it likes
                        _log.debug("The cycle is repeated: %s", error)
                    elif isinstance(error, MuxtuneError):
                        _log.warning("The cycle failed and is repeated: %s", error)
                    else:  # executors go on with the plans that they have
                        _log.exception("The cycle failed and is repeated")
                    self._changed.set()
                    await backoff.wait()
        finally:
            watching.cancel()
            await asyncio.gather(*(stream.close() for stream in self._streams.values()))
            self._streams, self._running, self.is_running = {}, {}, False

    async def schedule(self) -> None:
        """Run one cycle. Raises SupersededError if another scheduler or a tenant changed the ledger meanwhile."""
        # 1. Read everything in one transaction.
        started = time.monotonic()
        snapshot = await self._reader.read_snapshot()
        self._busy_seconds = time.monotonic() - started
        await self._open_and_close_streams(snapshot.executors)
        # 2. Plan, with pure code: the same snapshot gives the same plan.
        started = time.monotonic()
        view, plan = await self._plan(snapshot)
        self._busy_seconds += time.monotonic() - started
        # 3. For each executor, commit the plan if it differs from the one that runs: new attempts get their numbers.
        version, drafts = snapshot.plan_version, PlanDrafts(plan, snapshot, self.tenant_weights)
        for executor in snapshot.executors:
            draft = drafts.draft(executor.name)
            starting = [task for task in draft.tasks if drafts.entries[task.task].executor != executor.name]
            if starting or not self._is_running(draft):
                version += 1
                await self._add_specs(draft)
                await self._commit_and_send(draft, starting, version, executor)
        # 4. Keep the snapshot and the plan for queries.
        self.ledger_snapshot, self.snapshot, self.plan = snapshot, view, plan

    async def _rest(self) -> None:
        """With very many tasks a cycle takes long. Rest as long, so that the ledger serves others, too."""
        if self._busy_seconds > _LONG_CYCLE_SECONDS:
            await asyncio.sleep(min(self._busy_seconds, _MAX_REST_SECONDS))

    async def refresh(self) -> None:
        """Read the ledger and plan for queries, because progress and corrected costs start no cycle. Commits nothing.

        A task that stays on its executor keeps the reason of the plan that placed it there.
        """
        snapshot = await self._reader.read_snapshot()
        view, plan = await self._plan(snapshot)
        before = {entry.task: entry for entry in self.plan.explanations}
        explanations = [
            replace(entry, reason=before[entry.task].reason)
            if entry.task in before and before[entry.task].executor == entry.executor
            else entry
            for entry in plan.explanations
        ]
        self.ledger_snapshot, self.snapshot, self.plan = snapshot, view, Plan(plan.htasks, tuple(explanations))

    async def drain(self, name: str) -> None:
        """Return when the executor has released its tasks. Raises NotFoundError if it has no lease."""
        snapshot = await self._reader.read_snapshot()
        executor = next((executor for executor in snapshot.executors if executor.name == name), None)
        if executor is None:
            raise NotFoundError(f'No executor "{name}" has a lease.')
        async with executor_channel(executor, self._secret, self._tls) as channel:
            stub: execution_pb2_grpc.ExecutionServiceAsyncStub = execution_pb2_grpc.ExecutionServiceStub(channel)
            await stub.Drain(execution_pb2.DrainRequest(), timeout=_DRAIN_SECONDS)

    def current_plans(self) -> Sequence[plan_pb2.ExecutorPlan]:
        """Return the plans as they were sent."""
        return list(self._running.values())

    async def _plan(self, snapshot: LedgerSnapshot) -> tuple[Snapshot, Plan]:
        running = {name: tuple(map(htask_to_domain, plan.htasks)) for name, plan in self._running.items()}
        return await self._planner.plan(snapshot, running)

    async def _add_specs(self, draft: plan_pb2.ExecutorPlan) -> None:
        """Fill in the draft's specs: those of the plan that runs, and the others from the ledger."""
        running = self._running.get(draft.executor, plan_pb2.ExecutorPlan())
        specs = {task.task: task.spec for task in running.tasks}
        async for stored in self._reader.read_specs([task.task for task in draft.tasks if task.task not in specs]):
            if not stored.unreadable:
                specs[stored.task] = stored.spec
        for task in draft.tasks:
            if task.task not in specs:
                self._reader.forget(task.task)  # the next cycle finds that it cannot be read, and leaves it out
                raise UnavailableError(f"the spec of {task.task} can no longer be read")
            task.spec.CopyFrom(specs[task.task])

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
        return running is not None and is_same_plan(running, draft)

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
