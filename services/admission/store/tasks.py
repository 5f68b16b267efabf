"""Tasks and their events in the database. `change_state` makes every change of state, with its event, in one
transaction. Synchronous, no gRPC."""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from google.protobuf.message import DecodeError

from engine.errors import AlreadyExistsError
from engine.task import TaskState, check_transition
from muxtune.v1 import errors_pb2, event_pb2, task_pb2
from services.admission.store.clock import now, to_timestamp
from services.admission.store.pages import Page, read_page
from services.admission.store.prepared_statements import PreparedStatement
from services.admission.store.tables import adapters, task_events, tasks
from services.conversion.task import state_to_proto
from services.resource_names import adapter_of_task, tenant_of
from services.rpc.authorization import denied

UNFINISHED = [state.name for state in TaskState if not state.is_final]
_ROW = PreparedStatement(sa.select(tasks).where(tasks.c.name == sa.bindparam("name")))
_NAME_CONFLICTS = PreparedStatement(
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
    .limit(sa.bindparam("limit"))
)


def insert(
    connection: sa.Connection,
    name: str,
    spec: task_pb2.TaskSpec,
    estimate: task_pb2.TaskEstimate,
    initial_adapter_key: str,
    trace_parent: str,
) -> task_pb2.Task:
    """Store a new task in QUEUED with its first event. Raises AlreadyExistsError if its id is in use."""
    if _NAME_CONFLICTS.fetch_first(connection, name=name, adapter=adapter_of_task(name)):
        raise AlreadyExistsError(f"{name}, or an adapter of that id, exists already: choose another id")
    created, progress = now(), task_pb2.TaskProgress(num_steps=estimate.num_steps)
    time = to_timestamp(created)
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
    changed = event_pb2.StateChanged(state=state, message="acknowledged")
    event = event_pb2.TaskEvent(sequence=1, time=time, state_changed=changed)
    _INSERT_EVENT.execute(connection, task=name, sequence=1, event=event.SerializeToString())
    return task_pb2.Task(
        name=name, spec=spec, state=state, progress=progress, estimate=estimate, create_time=time,
        trace_parent=trace_parent,
    )  # fmt: skip


def get_row(connection: sa.Connection, name: str) -> Any:
    """Return the task's row. Raises PermissionDeniedError if the task does not exist (AIP-211)."""
    row = _ROW.fetch_first(connection, name=name)
    if row is None:
        raise denied(name)
    return row


def get_task(connection: sa.Connection, name: str) -> task_pb2.Task:
    """Return the task. Raises PermissionDeniedError if it does not exist (AIP-211)."""
    return to_proto(get_row(connection, name))


def append_event(connection: sa.Connection, name: str, event: event_pb2.TaskEvent) -> None:
    """Store the event with the task's next sequence number and the current time."""
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
    """Set the task's state and append the event of it. Raises IllegalTransitionError if `state` may not follow."""
    check_transition(row.name, TaskState[row.state], state)
    values: dict[str, Any] = {"state": state.name, **columns}
    if state.is_final:
        values |= {"ended": now(), "executor": ""}
    if failure is not None:
        values["failure"] = failure.SerializeToString()
    connection.execute(sa.update(tasks).where(tasks.c.name == row.name).values(values))
    changed = event_pb2.StateChanged(
        state=state_to_proto(state),
        message=message,
        failure=failure,
        adapter=columns.get("adapter", ""),
        attempt=columns.get("attempt", row.attempt),
    )
    append_event(connection, row.name, event_pb2.TaskEvent(state_changed=changed))


def append_message(connection: sa.Connection, row: Any, message: str) -> None:
    """Append an event that shows the tenant a message and leaves the task's state as it is."""
    state = state_to_proto(TaskState[row.state])
    unchanged = event_pb2.StateChanged(state=state, message=message, attempt=row.attempt)
    append_event(connection, row.name, event_pb2.TaskEvent(state_changed=unchanged))


def cancel(connection: sa.Connection, name: str) -> None:
    """Cancel the task: at once where nothing was trained; CANCELLING comes first where an adapter is to be exported."""
    row = get_row(connection, name)
    if row.state in (TaskState.CANCELLING.name, TaskState.CANCELLED.name):
        return
    is_idle = row.state == TaskState.QUEUED.name and row.checkpoint is None
    following = TaskState.CANCELLED if is_idle else TaskState.CANCELLING
    change_state(connection, row, following, "cancelled by the tenant")


def list_events(connection: sa.Connection, name: str, sequence: int, limit: int) -> list[event_pb2.TaskEvent]:
    """Return the task's events after that sequence number."""
    rows = _EVENTS_AFTER.fetch_all(connection, name=name, after=sequence, limit=limit)
    return [event_pb2.TaskEvent.FromString(row.event) for row in rows]


def read_spec(row: Any) -> task_pb2.TaskSpec:
    """Return the task's spec; an empty one if its bytes are damaged, so that lists and results of others go on."""
    try:
        return task_pb2.TaskSpec.FromString(row.spec)
    except DecodeError:
        return task_pb2.TaskSpec()


def list_page(
    connection: sa.Connection, tenant: str, states: Sequence[TaskState], before: tuple[int, str] | None, size: int
) -> Page:
    """Return the tenant's tasks in these states (empty: in any), newest first. `before`: (created, name) of the last
    task of the page before."""
    query = sa.select(tasks).where(tasks.c.tenant == tenant).order_by(tasks.c.created.desc(), tasks.c.name.desc())
    if states:
        query = query.where(tasks.c.state.in_([state.name for state in states]))
    if before:
        query = query.where(sa.tuple_(tasks.c.created, tasks.c.name) < sa.tuple_(*map(sa.literal, before)))
    return read_page(connection, query, size)


def to_proto(row: Any) -> task_pb2.Task:
    """Convert a row of `tasks` to the API's Task."""
    return task_pb2.Task(
        name=row.name,
        spec=read_spec(row),
        state=state_to_proto(TaskState[row.state]),
        failure=errors_pb2.TaskFailure.FromString(row.failure) if row.failure else None,
        progress=task_pb2.TaskProgress.FromString(row.progress),
        adapter=row.adapter,
        estimate=task_pb2.TaskEstimate.FromString(row.estimate),
        create_time=to_timestamp(row.created),
        start_time=to_timestamp(row.started),
        end_time=to_timestamp(row.ended),
        trace_parent=row.trace_parent,
        attempt=row.attempt,
    )
