"""The RPCs of tasks. What each promises stands in protos/muxtune/v1/admission.proto."""

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, TypeVar

import grpc
import sqlalchemy as sa

from engine.errors import UnavailableError
from engine.task import TaskState
from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import task_pb2
from services.admission.api import page_tokens
from services.admission.policy.admission_controller import Admissible, AdmissionController, Found
from services.admission.store import audit_log, idempotency, tasks
from services.admission.store.change_notifier import ChangeNotifier
from services.admission.store.database import Database
from services.conversion.task import state_to_domain
from services.failpoints import failpoint
from services.resource_names import new_name
from services.rpc.audit import current_call
from services.rpc.authentication import current_principal
from services.rpc.authorization import authorize, authorize_parent
from services.telemetry import current_trace_parent

_EVENTS_AT_ONCE = 256
T = TypeVar("T")


class TaskRpcs:
    """Part of AdmissionServicer."""

    _database: Database
    _notifier: ChangeNotifier
    _admitter: AdmissionController

    async def CreateTask(self, request: pb.CreateTaskRequest, context: Any) -> pb.CreateTaskResponse:
        principal, trace_parent = current_principal(), current_trace_parent()
        tenant = authorize_parent(principal, request.parent)
        body = idempotency.body_hash(request.task_id.encode(), request.spec.SerializeToString(deterministic=True))
        examined: Admissible | None = None

        def take(connection: sa.Connection) -> task_pb2.Task | Found:
            """In one transaction: what is stored is what was examined, or the task is examined again."""
            if made := idempotency.find(connection, tenant, request.request_id, "CreateTask", body):
                return tasks.read(connection, made)
            name = new_name(tenant, "tasks", request.task_id, "task_id")
            found = self._admitter.look(connection, principal, request.spec)
            is_examined = examined is not None and examined.found == found
            admissible = examined if is_examined else self._admitter.recall(principal, found)
            if admissible is None:
                return found
            idempotency.remember(connection, tenant, request.request_id, "CreateTask", body, name)
            key = found.initial_adapter_key
            return tasks.insert(connection, name, found.spec, admissible.estimate, key, trace_parent)

        while isinstance(done := await self._commit(take), Found):
            examined = await self._admitter.examine(principal, done)
        return pb.CreateTaskResponse(task=done)

    async def EstimateTask(self, request: pb.EstimateTaskRequest, context: Any) -> pb.EstimateTaskResponse:
        principal = current_principal()
        authorize_parent(principal, request.parent)
        found = await self._database.query(partial(self._admitter.look, principal=principal, spec=request.spec))
        return pb.EstimateTaskResponse(estimate=(await self._admitter.examine(principal, found)).estimate)

    async def GetTask(self, request: pb.GetTaskRequest, context: Any) -> pb.GetTaskResponse:
        name = authorize(current_principal(), request.name, "tasks")
        return pb.GetTaskResponse(task=await self._database.query(partial(tasks.read, name=name)))

    async def ListTasks(self, request: pb.ListTasksRequest, context: Any) -> pb.ListTasksResponse:
        tenant = authorize_parent(current_principal(), request.parent)
        states = [state_to_domain(state) for state in request.states]
        size, query = page_tokens.size(request.page_size), ["tasks", tenant, *sorted(state.name for state in states)]
        rows = await asyncio.to_thread(
            self._page, tenant, states, page_tokens.start(query, request.page_token), size + 1
        )
        shown = rows[:size]
        more = page_tokens.token(query, shown[-1].created, shown[-1].name) if len(rows) > size else ""
        return pb.ListTasksResponse(tasks=[tasks.to_proto(row) for row in shown], next_page_token=more)

    async def WatchTask(self, request: pb.WatchTaskRequest, context: Any) -> AsyncIterator[pb.WatchTaskResponse]:
        name = authorize(current_principal(), request.name, "tasks")
        sequence = request.after_sequence
        with self._notifier.waiting(name) as changed:
            while True:
                changed.clear()
                events, is_final = await self._database.query(partial(_events, name=name, after=sequence))
                for event in events:
                    yield pb.WatchTaskResponse(event=event)
                    sequence = event.sequence
                    failpoint("watch.event")
                if is_final and len(events) < _EVENTS_AT_ONCE:
                    return
                if self._notifier.is_closed:
                    raise UnavailableError("admission is stopping: watch again from your last sequence")
                if not events:
                    await changed.wait()

    async def CancelTask(self, request: pb.CancelTaskRequest, context: Any) -> pb.CancelTaskResponse:
        name = authorize(current_principal(), request.name, "tasks")
        task = await self._commit(partial(_cancel, name=name))
        return pb.CancelTaskResponse(task=task)

    async def _commit(self, change: Callable[[sa.Connection], T]) -> T:
        """The change of a task and its entry in the audit log, in one transaction; then those who watch hear of it.
        What returns something else than a task has changed none."""
        call = current_call()

        def told(connection: sa.Connection) -> T:
            done = change(connection)
            if isinstance(done, task_pb2.Task):
                audit_log.insert(connection, call.entry(done.name, grpc.StatusCode.OK.name))
            return done

        def tell(done: T) -> None:
            if isinstance(done, task_pb2.Task):
                self._notifier.notify([done.name])
                call.recorded_code = grpc.StatusCode.OK.name

        return await self._database.commit(told, tell)

    def _page(self, tenant: str, states: list[TaskState], before: tuple[int, str] | None, limit: int) -> Any:
        with self._database.read() as connection:
            return tasks.page(connection, tenant, states, before, limit)


def _events(connection: sa.Connection, name: str, after: int) -> tuple[list[task_pb2.TaskEvent], bool]:
    """The next ones, and whether the task has ended, which is read before its events."""
    is_final = TaskState[tasks.row_of(connection, name).state].is_final
    return tasks.events_after(connection, name, after, _EVENTS_AT_ONCE), is_final


def _cancel(connection: sa.Connection, name: str) -> task_pb2.Task:
    tasks.cancel(connection, name)
    return tasks.read(connection, name)
