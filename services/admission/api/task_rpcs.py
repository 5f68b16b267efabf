"""RPCs of tasks. protos/muxtune/v1/admission.proto specifies each RPC."""

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, TypeVar

import grpc
import sqlalchemy as sa

from engine.errors import UnavailableError
from engine.task import TaskState
from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import event_pb2, task_pb2
from services.admission.api import page_tokens
from services.admission.policy.admission_controller import AdmissionController, AdmittedTask, ResolvedTask
from services.admission.store import audit_log, idempotency, tasks
from services.admission.store.change_notifier import ChangeNotifier
from services.admission.store.database import Database
from services.admission.threads import AdmissionThreads
from services.conversion.task import state_to_domain
from services.failpoints import failpoint
from services.resource_names import new_name, tenant_of
from services.rpc.audit import current_call
from services.rpc.authentication import current_principal
from services.rpc.authorization import authorize, authorize_parent
from services.rpc.rate_limit import RateLimit
from services.telemetry import current_trace_parent

_MAX_EVENTS = 256
_PACED_EVENTS = 16  # events that a watch sends at once, when its tenant's turn comes
T = TypeVar("T")


class TaskRpcs:
    """Methods of AdmissionServicer on tasks."""

    _database: Database
    _notifier: ChangeNotifier
    _controller: AdmissionController
    _watch_rate: RateLimit
    _threads: AdmissionThreads

    async def CreateTask(self, request: pb.CreateTaskRequest, context: Any) -> pb.CreateTaskResponse:
        principal, trace_parent = current_principal(), current_trace_parent()
        tenant = authorize_parent(principal, request.parent)
        body = idempotency.hash_parts(request.task_id.encode(), request.spec.SerializeToString(deterministic=True))
        evaluated: AdmittedTask | None = None

        def create(connection: sa.Connection) -> task_pb2.Task | ResolvedTask:
            """Store the task if nothing changed since its evaluation; otherwise return the task to evaluate again."""
            if existing := idempotency.find_resource(connection, tenant, request.request_id, "CreateTask", body):
                return tasks.get_task(connection, existing)
            name = new_name(tenant, "tasks", request.task_id, "task_id")
            resolved = self._controller.resolve(connection, principal, request.spec)
            is_current = evaluated is not None and evaluated.resolved == resolved
            admitted = evaluated if is_current else self._controller.evaluate_from_cache(principal, resolved)
            if admitted is None:
                return resolved
            idempotency.record_request(connection, tenant, request.request_id, "CreateTask", body, name)
            key = resolved.initial_adapter_key
            return tasks.insert(connection, name, resolved.spec, admitted.estimate, key, trace_parent)

        while isinstance(result := await self._commit(create), ResolvedTask):
            evaluated = await self._controller.evaluate(principal, result)
        return pb.CreateTaskResponse(task=result)

    async def EstimateTask(self, request: pb.EstimateTaskRequest, context: Any) -> pb.EstimateTaskResponse:
        principal = current_principal()
        authorize_parent(principal, request.parent)
        resolved = await self._database.query(partial(self._controller.resolve, principal=principal, spec=request.spec))
        return pb.EstimateTaskResponse(estimate=(await self._controller.evaluate(principal, resolved)).estimate)

    async def GetTask(self, request: pb.GetTaskRequest, context: Any) -> pb.GetTaskResponse:
        name = authorize(current_principal(), request.name, "tasks")
        return pb.GetTaskResponse(task=await self._database.query(partial(tasks.get_task, name=name)))

    async def ListTasks(self, request: pb.ListTasksRequest, context: Any) -> pb.ListTasksResponse:
        tenant = authorize_parent(current_principal(), request.parent)
        states = [state_to_domain(state) for state in request.states]
        query = ["tasks", tenant, *sorted(state.name for state in states)]
        read = partial(self._threads.clients.run, tenant, partial(self._page, tenant, states))
        rows, token = await page_tokens.read_page(request, query, read)
        return pb.ListTasksResponse(tasks=[tasks.to_proto(row) for row in rows], next_page_token=token)

    async def WatchTask(self, request: pb.WatchTaskRequest, context: Any) -> AsyncIterator[pb.WatchTaskResponse]:
        name = authorize(current_principal(), request.name, "tasks")
        sequence = request.after_sequence
        with self._notifier.subscribe(name) as changed:
            while True:
                changed.clear()
                events, is_final = await self._database.query(partial(_events, name=name, after=sequence))
                for start in range(0, len(events), _PACED_EVENTS):
                    paced = events[start : start + _PACED_EVENTS]
                    if seconds := self._watch_rate.reserve(tenant_of(name), len(paced)):
                        await asyncio.sleep(seconds)
                    for event in paced:
                        yield pb.WatchTaskResponse(event=event)
                        sequence = event.sequence
                        failpoint("watch.event")
                if is_final and len(events) < _MAX_EVENTS:
                    return
                if self._notifier.is_closed:
                    raise UnavailableError("admission is stopping: watch again after your last sequence number")
                if not events:
                    await changed.wait()

    async def CancelTask(self, request: pb.CancelTaskRequest, context: Any) -> pb.CancelTaskResponse:
        name = authorize(current_principal(), request.name, "tasks")
        task = await self._commit(partial(_cancel, name=name))
        return pb.CancelTaskResponse(task=task)

    async def _commit(self, change: Callable[[sa.Connection], T]) -> T:
        """Commit the change of a task and its audit event in one transaction, then wake its watchers. A change that
        does not return a task has changed no task."""
        call = current_call()

        def change_and_audit(connection: sa.Connection) -> T:
            result = change(connection)
            if isinstance(result, task_pb2.Task):
                audit_log.insert(connection, call.entry(result.name, grpc.StatusCode.OK.name))
            return result

        def notify(result: T) -> None:
            if isinstance(result, task_pb2.Task):
                self._notifier.notify([result.name])
                call.recorded_code = grpc.StatusCode.OK.name

        return await self._database.commit(change_and_audit, notify)

    def _page(self, tenant: str, states: list[TaskState], before: tuple[int, str] | None, limit: int) -> Any:
        with self._database.read() as connection:
            return tasks.list_page(connection, tenant, states, before, limit)


def _events(connection: sa.Connection, name: str, after: int) -> tuple[list[event_pb2.TaskEvent], bool]:
    """Return the next events and whether the task has ended. The state is read first: no event follows a final one."""
    is_final = TaskState[tasks.get_row(connection, name).state].is_final
    return tasks.list_events(connection, name, after, _MAX_EVENTS), is_final


def _cancel(connection: sa.Connection, name: str) -> task_pb2.Task:
    tasks.cancel(connection, name)
    return tasks.get_task(connection, name)
