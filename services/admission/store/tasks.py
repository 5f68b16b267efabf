"""Tasks and their events in the store. Every change of state goes through `change_state`, with its event, in one
transaction. Synchronous, no gRPC."""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from engine.errors import AlreadyExistsError
from engine.task import TaskState, check_transition
from muxtune.v1 import errors_pb2, task_pb2
from services.admission.store.clock import now, timestamp
from services.admission.store.prepared_statements import PreparedStatement
from services.admission.store.tables import adapters, task_events, tasks
from services.conversion.task import state_to_proto
from services.resource_names import adapter_of_task, tenant_of
from services.rpc.authorization import denied

UNFINISHED = [state.name for state in TaskState if not state.is_final]
_ROW = PreparedStatement(sa.select(tasks).where(tasks.c.name == sa.bindparam("name")))
_TAKEN = PreparedStatement(
    sa.select(tasks.c.name)
    .where(tasks.c.name == sa.bindparam("name"))
    .union_all(sa.select(adapters.c.name).where(adapters.c.name == sa.bindparam("adapter")))
)
_INSERT, _INSERT_EVENT = PreparedStatement(sa.insert(tasks)), PreparedStatement(sa.insert(task_events))
_NEXT_SEQUENCE = (
    sa.update(tasks)
    .where(tasks.c.name == sa.bindparam("task"))
    .values(last_sequence=tasks.c.last_sequence + 1)
    .returning(tasks.c.last_sequence)
)
_EVENTS_AFTER = PreparedStatement(
    sa.select(task_events.c.event)
    .where(task_events.c.task == sa.bindparam("name"), task_events.c.sequence > sa.bindparam("after"))
    .order_by(task_events.c.sequence)
    .limit(sa.bindparam("most"))
)


def insert(
    connection: sa.Connection,
    name: str,
    spec: task_pb2.TaskSpec,
    estimate: task_pb2.TaskEstimate,
    initial_adapter_key: str,
    trace_parent: str,
) -> task_pb2.Task:
    """A new task in QUEUED with its first event. Raises AlreadyExistsError if the id is taken."""
    if _TAKEN.fetch_first(connection, name=name, adapter=adapter_of_task(name)):
        raise AlreadyExistsError(f"{name} (or the adapter it would leave) exists already: choose another id")
    created, progress = now(), task_pb2.TaskProgress(num_steps=estimate.num_steps)
    time = timestamp(created)
    values = {
        "name": name,
        "tenant": tenant_of(name),
        "created": created,
        "state": TaskState.QUEUED.name,
        "dataset": spec.dataset,
        "spec": spec.SerializeToString(deterministic=True),
        "estimate": estimate.SerializeToString(),
        "progress": progress.SerializeToString(),
        "initial_adapter_key": initial_adapter_key,
        "last_sequence": 1,
        "trace_parent": trace_parent,
    }
    _INSERT.execute(connection, **values)
    state = task_pb2.TASK_STATE_QUEUED
    changed = task_pb2.StateChanged(state=state, message="acknowledged")
    event = task_pb2.TaskEvent(sequence=1, time=time, state_changed=changed)
    _INSERT_EVENT.execute(connection, task=name, sequence=1, event=event.SerializeToString())
    return task_pb2.Task(
        name=name, spec=spec, state=state, progress=progress, estimate=estimate, create_time=time,
        trace_parent=trace_parent,
    )  # fmt: skip


def row_of(connection: sa.Connection, name: str) -> Any:
    """Raises PermissionDeniedError where there is none (AIP-211)."""
    row = _ROW.fetch_first(connection, name=name)
    if row is None:
        raise denied(name)
    return row


def read(connection: sa.Connection, name: str) -> task_pb2.Task:
    """Raises PermissionDeniedError where there is none (AIP-211)."""
    return to_proto(row_of(connection, name))


def append_event(connection: sa.Connection, name: str, event: task_pb2.TaskEvent) -> None:
    """Gives the event its sequence and time."""
    sequence = connection.execute(_NEXT_SEQUENCE, {"task": name}).scalar_one()
    event.sequence = sequence
    event.time.FromMicroseconds(now())
    _INSERT_EVENT.execute(connection, task=name, sequence=sequence, event=event.SerializeToString())


def change_state(
    connection: sa.Connection,
    row: Any,
    state: TaskState,
    message: str,
    *,
    failure: errors_pb2.TaskFailure | None = None,
    **columns: Any,
) -> None:
    """Raises IllegalTransitionError where `state` may not follow."""
    check_transition(row.name, TaskState[row.state], state)
    values: dict[str, Any] = {"state": state.name, **columns}
    if state.is_final:
        values |= {"ended": now(), "executor": ""}
    if failure is not None:
        values["failure"] = failure.SerializeToString()
    connection.execute(sa.update(tasks).where(tasks.c.name == row.name).values(values))
    changed = task_pb2.StateChanged(
        state=state_to_proto(state),
        message=message,
        failure=failure,
        adapter=columns.get("adapter", ""),
        attempt=columns.get("attempt", row.attempt),
    )
    append_event(connection, row.name, task_pb2.TaskEvent(state_changed=changed))


def tell(connection: sa.Connection, row: Any, message: str) -> None:
    """An event that changes nothing: what the tenant should know."""
    state = state_to_proto(TaskState[row.state])
    told = task_pb2.StateChanged(state=state, message=message, attempt=row.attempt)
    append_event(connection, row.name, task_pb2.TaskEvent(state_changed=told))


def cancel(connection: sa.Connection, name: str) -> None:
    """See CancelTask: at once where nothing was trained, CANCELLING where an adapter is to be exported."""
    row = row_of(connection, name)
    if row.state in (TaskState.CANCELLING.name, TaskState.CANCELLED.name):
        return
    is_idle = row.state == TaskState.QUEUED.name and row.checkpoint is None
    following = TaskState.CANCELLED if is_idle else TaskState.CANCELLING
    change_state(connection, row, following, "cancelled by the tenant")


def events_after(connection: sa.Connection, name: str, sequence: int, limit: int) -> list[task_pb2.TaskEvent]:
    rows = _EVENTS_AFTER.fetch_all(connection, name=name, after=sequence, most=limit)
    return [task_pb2.TaskEvent.FromString(row.event) for row in rows]


def page(
    connection: sa.Connection, tenant: str, states: Sequence[TaskState], before: tuple[int, str] | None, limit: int
) -> Sequence[Any]:
    """Newest first, after the (created, name) of the page before."""
    query = sa.select(tasks).where(tasks.c.tenant == tenant).order_by(tasks.c.created.desc(), tasks.c.name.desc())
    if states:
        query = query.where(tasks.c.state.in_([state.name for state in states]))
    if before:
        query = query.where(sa.tuple_(tasks.c.created, tasks.c.name) < sa.tuple_(*map(sa.literal, before)))
    return connection.execute(query.limit(limit)).all()


def to_proto(row: Any) -> task_pb2.Task:
    """A row as the contract shows it."""
    return task_pb2.Task(
        name=row.name,
        spec=task_pb2.TaskSpec.FromString(row.spec),
        state=state_to_proto(TaskState[row.state]),
        failure=errors_pb2.TaskFailure.FromString(row.failure) if row.failure else None,
        progress=task_pb2.TaskProgress.FromString(row.progress),
        adapter=row.adapter,
        estimate=task_pb2.TaskEstimate.FromString(row.estimate),
        create_time=timestamp(row.created),
        start_time=timestamp(row.started),
        end_time=timestamp(row.ended),
        trace_parent=row.trace_parent,
        attempt=row.attempt,
    )
