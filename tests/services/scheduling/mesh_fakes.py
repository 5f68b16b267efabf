"""Fakes of the ledger and of executors, served over loopback around a real scheduler."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc

from engine.errors import LeaseLostError, MuxtuneError, SupersededError
from engine.planning.types import PlannerConfig
from muxtune.v1 import (
    event_pb2,
    execution_pb2,
    execution_pb2_grpc,
    ledger_pb2,
    ledger_pb2_grpc,
    operator_pb2,
    plan_pb2,
    scheduling_pb2_grpc,
    task_pb2,
)
from services.conversion.plan_parts import PlanParts
from services.message_parts import HeldPages
from services.rpc.authentication import mesh_authenticator
from services.rpc.client_channel import open_channel
from services.rpc.interceptor import RpcInterceptor
from services.scheduling.scheduler import Scheduler
from services.scheduling.servicer import SchedulingServicer

SECRET = "mesh_secret-of-the-tests"
BACKBONE = plan_pb2.Backbone(
    name="tiny", num_parameters=1000, num_layers=1, hidden_size=8, vocab_size=64, max_sequence_tokens=64,
    weight_bytes=4000, dtype="float32",
    adaptable_modules=[plan_pb2.AdaptableModule(name="q_proj", in_features=8, out_features=8)],
)  # fmt: skip
SPEC_OF_TASKS = task_pb2.TaskSpec(
    backbone="tiny", dataset="tenants/a/datasets/d", dataset_version="v",
    training=task_pb2.Training(learning_rate=0.1, num_steps=5, global_batch_size=2, max_sequence_tokens=16),
    lora=task_pb2.Lora(rank=2, target_modules=["q_proj"]),
)  # fmt: skip
QUEUED, RUNNING, CANCELLING = (
    task_pb2.TASK_STATE_QUEUED, task_pb2.TASK_STATE_RUNNING, task_pb2.TASK_STATE_CANCELLING,
)  # fmt: skip


class Changes:
    """Lets a test wait for a condition instead of sleeping."""

    def __init__(self) -> None:
        self._condition = asyncio.Condition()

    async def notify(self) -> None:
        async with self._condition:
            self._condition.notify_all()

    async def until(self, predicate: Callable[[], Any]) -> None:
        async with asyncio.timeout(15), self._condition:
            await self._condition.wait_for(predicate)


class FakeLedger(ledger_pb2_grpc.LedgerServiceServicer):
    """A ledger in memory. `refusals`: errors that the next calls of a method raise, one each. `message_tasks`: tasks in
    one page of a snapshot, and specs in one answer."""

    def __init__(self, changes: Changes) -> None:
        self.changes = changes
        self.tasks: dict[str, ledger_pb2.SnapshotTask] = {}
        self.executors: dict[str, plan_pb2.Executor] = {}
        self.plan_version, self.num_snapshots, self.message_tasks = 0, 0, 2
        self.plans: list[ledger_pb2.CommitPlanRequest] = []
        self.committed: list[plan_pb2.TaskResult] = []
        self.refusals: dict[str, list[MuxtuneError]] = {}
        self.audit: list[operator_pb2.AuditEvent] = []
        self._hints: set[asyncio.Event] = set()
        self._snapshots = HeldPages[ledger_pb2.GetSnapshotResponse]()

    async def put_task(self, number: int, tenant: str = "a", **fields: Any) -> str:
        name = f"tenants/{tenant}/tasks/t{number}"
        estimate = task_pb2.TaskEstimate(num_steps=5, num_train_tokens=100)
        task = task_pb2.Task(name=name, spec=SPEC_OF_TASKS, state=QUEUED, estimate=estimate)
        self.tasks[name] = ledger_pb2.SnapshotTask(task=task, **fields)
        await self.hint()
        return name

    async def hint(self) -> None:
        for event in self._hints:
            event.set()
        await self.changes.notify()

    async def hand_back(self, name: str) -> None:
        """Take the task from its executor as the state RELEASED does: its attempt stays."""
        self.tasks[name].executor = ""
        self.tasks[name].task.state = QUEUED
        await self.hint()

    async def WatchChanges(self, request: Any, context: Any) -> AsyncIterator[ledger_pb2.WatchChangesResponse]:
        event = asyncio.Event()
        self._hints.add(event)
        try:
            while True:
                event.clear()
                self._refuse("WatchChanges")
                yield ledger_pb2.WatchChangesResponse()
                await event.wait()
        finally:
            self._hints.discard(event)

    async def GetSnapshot(self, request: Any, context: Any) -> ledger_pb2.GetSnapshotResponse:
        self._refuse("GetSnapshot")
        if request.page_token:
            page, token = self._snapshots.page(request.page_token)
        else:
            self.num_snapshots += 1
            await self.changes.notify()
            page, token = self._snapshots.hold(self._snapshot_pages())
        page.next_page_token = token
        return page

    def _snapshot_pages(self) -> list[ledger_pb2.GetSnapshotResponse]:
        entries = list(self.tasks.values())
        pages = []
        for start in range(0, max(1, len(entries)), self.message_tasks):
            some = entries[start : start + self.message_tasks]
            page = ledger_pb2.GetSnapshotResponse(tasks=some, plan_version=self.plan_version)
            for entry in page.tasks:
                for field in ("spec", "estimate"):
                    entry.task.ClearField(field)
            pages.append(page)
        pages[0].executors.extend(self.executors.values())
        return pages

    async def BatchGetTaskSpecs(
        self, request: ledger_pb2.BatchGetTaskSpecsRequest, context: Any
    ) -> ledger_pb2.BatchGetTaskSpecsResponse:
        self._refuse("BatchGetTaskSpecs")
        read = request.tasks[: self.message_tasks]
        found = [self.tasks[name].task for name in read if name in self.tasks]
        specs = [ledger_pb2.StoredTaskSpec(task=t.name, spec=t.spec, estimate=t.estimate) for t in found]
        return ledger_pb2.BatchGetTaskSpecsResponse(specs=specs, num_read=len(read))

    async def CommitPlan(self, request: ledger_pb2.CommitPlanRequest, context: Any) -> ledger_pb2.CommitPlanResponse:
        self._refuse("CommitPlan")
        self._check_lease(request.executor, request.lease_term)
        if request.version <= self.plan_version:
            raise SupersededError(f"plan {request.version} after {self.plan_version}")
        for start in request.starts:
            if self.tasks[start.task].task.attempt != start.expected_attempt:
                raise SupersededError(f"{start.task} moved on")
        attempts = []
        for start in request.starts:
            entry = self.tasks[start.task]
            assert entry.executor != request.executor, "already there"
            entry.executor = request.executor
            entry.task.attempt += 1
            if entry.task.state == QUEUED:
                entry.task.state = RUNNING
            attempts.append(entry.task.attempt)
        self.plan_version = request.version
        self.plans.append(request)
        await self.changes.notify()
        return ledger_pb2.CommitPlanResponse(attempts=attempts)

    async def CommitResults(self, request: Any, context: Any) -> ledger_pb2.CommitResultsResponse:
        self._refuse("CommitResults")
        self._check_lease(request.executor, request.lease_term)
        verdicts = []
        for result in request.results:
            entry = self.tasks.get(result.task)
            if entry is None or entry.task.attempt != result.attempt:
                verdicts.append(ledger_pb2.RESULT_VERDICT_STALE)
            elif result in self.committed:
                verdicts.append(ledger_pb2.RESULT_VERDICT_DUPLICATE)
            else:
                verdicts.append(ledger_pb2.RESULT_VERDICT_COMMITTED)
                self.committed.append(result)
        await self.changes.notify()
        return ledger_pb2.CommitResultsResponse(verdicts=verdicts)

    async def PutLease(self, request: ledger_pb2.PutLeaseRequest, context: Any) -> ledger_pb2.PutLeaseResponse:
        executor, present = request.executor, self.executors.get(request.executor.name)
        if executor.lease_term:
            self._check_lease(executor.name, executor.lease_term)
            assert present is not None
            present.draining = executor.draining
        else:
            executor.lease_term = present.lease_term + 1 if present else 1
            self.executors[executor.name] = executor
        await self.hint()
        return ledger_pb2.PutLeaseResponse(lease_term=self.executors[executor.name].lease_term)

    async def EndLease(self, request: ledger_pb2.EndLeaseRequest, context: Any) -> ledger_pb2.EndLeaseResponse:
        self.executors.pop(request.executor, None)
        await self.hint()
        return ledger_pb2.EndLeaseResponse()

    async def RecordAuditEvent(self, request: Any, context: Any) -> ledger_pb2.RecordAuditEventResponse:
        self._refuse("RecordAuditEvent")
        self.audit.append(request.event)
        return ledger_pb2.RecordAuditEventResponse()

    def _refuse(self, method: str) -> None:
        if refusals := self.refusals.get(method):
            raise refusals.pop(0)

    def _check_lease(self, name: str, term: int) -> None:
        if name not in self.executors or self.executors[name].lease_term != term:
            raise LeaseLostError(f"{name} does not hold lease {term}")


class FakeExecutor(execution_pb2_grpc.ExecutionServiceServicer):
    """An executor that records its requests and, as a real one, sends unacknowledged results again."""

    def __init__(self, changes: Changes, name: str) -> None:
        self.changes, self.name = changes, name
        self.requests: list[execution_pb2.RunPlanRequest] = []
        self.num_streams, self.num_open, self.num_drains = 0, 0, 0
        self.refusals: list[MuxtuneError] = []
        self._unacknowledged: list[execution_pb2.RunPlanResponse] = []
        self._sequence = 0
        self._news = asyncio.Event()
        self._cut = asyncio.Event()

    @property
    def plans(self) -> list[plan_pb2.ExecutorPlan]:
        """Return the plans that have come, put together from their parts."""
        plans, parts = list[plan_pb2.ExecutorPlan](), PlanParts()
        for request in self.requests:
            if request.plan_continues:
                parts.add(request.plan)
            elif request.HasField("plan"):
                plans.append(parts.finish(request.plan))
        return plans

    @property
    def acknowledged(self) -> int:
        return max((request.acknowledged_sequence for request in self.requests), default=0)

    def attempts(self) -> dict[str, int]:
        """Return the attempts of the newest plan's tasks."""
        return {task.task: task.attempt for task in self.plans[-1].tasks} if self.plans else {}

    def send(self, *results: plan_pb2.TaskResult) -> int:
        self._sequence += 1
        self._unacknowledged.append(execution_pb2.RunPlanResponse(sequence=self._sequence, results=results))
        self._news.set()
        return self._sequence

    def cut(self) -> None:
        self._cut.set()

    async def RunPlan(self, request_iterator: Any, context: Any) -> AsyncIterator[execution_pb2.RunPlanResponse]:
        self.num_streams += 1
        if self.refusals:
            raise self.refusals.pop(0)
        self.num_open += 1
        self._cut.clear()
        reading = asyncio.create_task(self._read(request_iterator))
        sent = 0
        try:
            while True:
                self._news.clear()
                for response in [r for r in self._unacknowledged if r.sequence > sent]:
                    yield response
                    sent = response.sequence
                waits = [asyncio.create_task(event.wait()) for event in (self._news, self._cut)]
                await asyncio.wait([*waits, reading], return_when=asyncio.FIRST_COMPLETED)
                for wait in waits:
                    wait.cancel()
                if self._cut.is_set():
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
                if reading.done():
                    return
        finally:
            reading.cancel()
            self.num_open -= 1
            await self.changes.notify()

    async def Drain(self, request: Any, context: Any) -> execution_pb2.DrainResponse:
        if self.refusals:
            raise self.refusals.pop(0)
        self.num_drains += 1
        return execution_pb2.DrainResponse()

    async def _read(self, request_iterator: Any) -> None:
        async for request in request_iterator:
            self.requests.append(request)
            done = request.acknowledged_sequence
            self._unacknowledged = [r for r in self._unacknowledged if r.sequence > done]
            await self.changes.notify()


class SchedulingMesh:
    """A fake ledger, fake executors by name, and a real scheduler that can be stopped and started."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self.changes = Changes()
        self.ledger = FakeLedger(self.changes)
        self.executors: dict[str, FakeExecutor] = {}

    async def serve(self, add: Callable[[Any, grpc.aio.Server], None], servicer: Any) -> str:
        server = grpc.aio.server(interceptors=[RpcInterceptor(mesh_authenticator(SECRET))])
        add(servicer, server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        self._stack.push_async_callback(server.stop, None)
        return address

    async def add_executor(
        self,
        name: str = "executors/x",
        memory_bytes: int = 1 << 30,
        cost: plan_pb2.CostProfile | None = None,
        num_stages: int = 0,
    ) -> FakeExecutor:
        executor = FakeExecutor(self.changes, name)
        add = execution_pb2_grpc.add_ExecutionServiceServicer_to_server
        self.executors[name] = executor
        self.ledger.executors[name] = plan_pb2.Executor(
            name=name, address=await self.serve(add, executor), incarnation="i1", lease_term=1, backbone=BACKBONE,
            device=plan_pb2.Device(memory_bytes=memory_bytes, cost=cost), num_stages=num_stages,
        )  # fmt: skip
        await self.ledger.hint()
        return executor

    @asynccontextmanager
    async def scheduler(self) -> AsyncIterator[tuple[Scheduler, Any]]:
        """Run a scheduler; yield it and a stub of its SchedulingService."""
        if not hasattr(self, "ledger_address"):
            add = ledger_pb2_grpc.add_LedgerServiceServicer_to_server
            self.ledger_address = await self.serve(add, self.ledger)
        async with open_channel(self.ledger_address, SECRET) as channel:
            ledger: Any = ledger_pb2_grpc.LedgerServiceStub(channel)
            scheduler = Scheduler(ledger, SECRET, PlannerConfig(256, 16))
            running = asyncio.create_task(scheduler.run())
            add_service = scheduling_pb2_grpc.add_SchedulingServiceServicer_to_server
            self.address = await self.serve(add_service, SchedulingServicer(scheduler, ledger, 15.0))
            try:
                async with open_channel(self.address, SECRET) as client:
                    yield scheduler, scheduling_pb2_grpc.SchedulingServiceStub(client)
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)


def step_done(task: str, attempt: int, step: int) -> plan_pb2.TaskResult:
    return plan_pb2.TaskResult(task=task, attempt=attempt, step_done=event_pb2.StepDone(step=step, loss=1.0))
